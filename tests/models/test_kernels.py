"""Kernels of every kind of convolution, checked against what the convolution computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torchlens_viz import maximize
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.models.kernels import kernels_of

# Quantised tensors are deprecated in torch; until they are gone, their kernels can be drawn.
quantised = pytest.mark.filterwarnings(
    "ignore:.*quantize:UserWarning", "ignore:.*deprecated:DeprecationWarning"
)


class Scaled(nn.Module):
    """A parametrisation that is easy to compute by hand."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_change_of_state_can_be_seen():
    model = nn.Conv2d(1, 1, 1)
    before = state_of(model)
    assert is_unchanged(model, before)
    nn.init.constant_(model.weight, 9.0)
    assert not is_unchanged(model, before)


# Tensors.


def test_weight_tensor_is_its_own_kernels():
    weight = torch.randn(4, 2, 3, 5, requires_grad=True)
    kernels = kernels_of(weight)
    assert torch.equal(kernels.weight, weight)
    assert kernels.name == ""
    assert not kernels.weight.requires_grad


def test_weight_of_a_1d_convolution_is_one_pixel_high():
    weight = torch.randn(4, 2, 7)
    assert torch.equal(kernels_of(weight).weight, weight.reshape(4, 2, 1, 7))


@quantised
def test_quantised_weight_tensor_is_the_numbers_it_stands_for():
    quantum = torch.quantize_per_tensor(torch.tensor([-0.5, 0.26, 1.0]), 0.25, 0, torch.qint8)
    assert kernels_of(quantum.reshape(1, 1, 1, 3)).weight.flatten().tolist() == [-0.5, 0.25, 1.0]


# Layers: an image that is zero but for one pixel gives the kernels back.


def response_to_a_point(layer: nn.Module, channel: int, size: int) -> torch.Tensor:
    """What a layer puts out for one point in the middle of an input channel: (O, H, W)."""
    point = torch.zeros(1, layer.in_channels, size, size)
    point[0, channel, size // 2, size // 2] = 1
    with torch.no_grad():
        return layer(point)[0]


@pytest.mark.parametrize("groups", [1, 2, 6], ids=["plain", "grouped", "depthwise"])
def test_filters_are_what_a_convolution_makes_of_a_point(groups):
    layer = nn.Conv2d(6, 12, 3, padding=2, groups=groups, bias=False)
    kernels = kernels_of(layer).weight
    assert kernels.shape == (12, 6 // groups, 3, 3)
    per_group, outputs = 6 // groups, 12 // groups
    for channel in range(6):
        seen = response_to_a_point(layer, channel, 5)[:, 2:5, 2:5].flip(1, 2)  # cross-correlation mirrors
        group, inside = divmod(channel, per_group)
        mine = slice(group * outputs, (group + 1) * outputs)
        torch.testing.assert_close(kernels[mine, inside], seen[mine])


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(3, 5, 1), (4, 6, 2), (6, 6, 6), (6, 3, 3)])
def test_filters_are_what_a_transposed_convolution_makes_of_a_point(inputs, outputs, groups):
    layer = nn.ConvTranspose2d(inputs, outputs, (3, 4), groups=groups, bias=False)
    kernels = kernels_of(layer).weight
    assert kernels.shape == (outputs, inputs // groups, 3, 4)
    per_group, each = inputs // groups, outputs // groups
    for channel in range(inputs):
        stamped = response_to_a_point(layer, channel, 1)  # one point puts the kernel itself on the image
        group, inside = divmod(channel, per_group)
        mine = slice(group * each, (group + 1) * each)
        assert torch.equal(kernels[mine, inside], stamped[mine])
        assert stamped.count_nonzero() == stamped[mine].count_nonzero()


@pytest.mark.parametrize("groups", [1, 2])
def test_1d_kernels_are_rows_also_where_transposed(groups):
    layer = nn.Conv1d(4, 6, 5, groups=groups)
    assert torch.equal(kernels_of(layer).weight, layer.weight.reshape(6, 4 // groups, 1, 5))
    layer = nn.ConvTranspose1d(4, 6, 5, groups=groups, bias=False)
    point = torch.zeros(1, 4, 1)
    point[0, 3] = 1
    stamped = layer(point)[0, -6 // groups :]
    kernels = kernels_of(layer).weight
    assert kernels.shape == (6, 4 // groups, 1, 5)
    assert torch.equal(kernels[-6 // groups :, -1, 0], stamped)


@quantised
def test_quantised_convolutions_are_drawn_in_the_numbers_they_stand_for():
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    weight = torch.linspace(-1, 1, 54).reshape(2, 3, 3, 3)
    layer = quantized.Conv2d(3, 2, 3)
    layer.set_weight_bias(torch.quantize_per_tensor(weight, 1 / 64, 0, torch.qint8), None)
    expected = (weight.double() * 64).round() / 64
    kernels = kernels_of(nn.Sequential(nn.ReLU(), layer))
    assert kernels.name == "1"
    torch.testing.assert_close(kernels.weight.double(), expected, rtol=0, atol=0)


@quantised
@pytest.mark.skipif("qnnpack" not in torch.backends.quantized.supported_engines, reason="needs qnnpack")
def test_quantised_transposed_convolutions_have_one_filter_per_output_too(monkeypatch):
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    weight = torch.arange(-9.0, 9.0).reshape(3, 2, 1, 3)
    layer = quantized.ConvTranspose2d(3, 2, (1, 3))
    layer.set_weight_bias(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None)
    assert torch.equal(kernels_of(layer).weight, weight.transpose(0, 1))


def test_parametrised_weights_are_those_the_layer_computes_with():
    layer = nn.Conv2d(1, 2, 3)
    plain = layer.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    assert torch.equal(kernels_of(nn.Sequential(layer)).weight, plain * 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_style_weight_norm_is_that_of_the_parameters_as_they_are():
    layer = torch.nn.utils.weight_norm(nn.Conv2d(2, 3, 3))
    stale = layer.weight
    layer.weight_g.data *= 3
    assert torch.allclose(kernels_of(layer).weight, 3 * stale)
    assert layer.weight is stale


def test_weight_norm_is_applied():
    layer = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(2.0)
    norms = kernels_of(layer).weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), 2.0))


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_spectral_norm_does_not_move_it(training):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))).train(training)
    before = state_of(model)
    first, again = kernels_of(model).weight, kernels_of(model, "0").weight
    assert torch.equal(first, again)
    assert is_unchanged(model, before)
    assert all(module.training is training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(first, model.eval()[0].weight)


def test_parametrised_weight_in_training_mode_does_move():
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    before = state_of(layer)
    assert layer.weight is not None
    assert not is_unchanged(layer, before)  # what the test above would see


def test_pruned_weights_are_zero_where_they_were_pruned():
    from torch.nn.utils import prune

    layer = nn.Conv2d(1, 4, 3)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert (kernels_of(layer).weight == 0).sum() == 18


def test_kernels_are_not_copied_and_never_changed():
    layer = nn.Conv2d(3, 4, 3)
    assert kernels_of(layer).weight.data_ptr() == layer.weight.data_ptr()


# Which layer.


def test_first_convolution_is_taken_where_none_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 3)), nn.Conv2d(1, 8, 3))
    assert kernels_of(model).name == "1.1"


def test_subclass_of_a_convolution_with_another_name_is_one_too():
    class Standardised(nn.Conv2d):
        pass

    model = nn.Sequential(nn.ReLU(), Standardised(1, 2, 3))
    assert kernels_of(model).name == "1"


@pytest.mark.parametrize("selector", ["2", 2, nn.Conv1d, lambda name, module: name == "2"])
def test_layer_is_found_by_any_selector(selector):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv1d(1, 2, 3))
    kernels = kernels_of(model, selector)
    assert kernels.name == "2"
    assert torch.equal(kernels.weight[:, :, 0], model[2].weight)


def test_layer_reached_under_two_names_is_one_layer():
    conv = nn.Conv2d(1, 2, 3)
    model = nn.ModuleDict({"a": conv, "b": conv})
    assert kernels_of(model, nn.Conv2d).name == "a"


def test_layer_without_a_name_convolutional_in_shape_only_is_drawn_when_named():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Module())
    model[1].weight = nn.Parameter(torch.randn(2, 3, 4, 4))
    assert torch.equal(kernels_of(model, "1").weight, model[1].weight)


# What is refused.


def sparse_convolution() -> nn.ConvTranspose2d:
    layer = nn.ConvTranspose2d(3, 2, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)
    return layer


NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("source", "layer", "message"),
    [
        (NET, nn.Conv2d, r"`layer` must find one layer, got 2: `0`, `2`"),
        (NET, "4", r"`4` \(Linear\) has no kernels; choose a convolution"),
        (NET, "1", r"`1` \(BatchNorm2d\) has no kernels"),
        (nn.Sequential(nn.LazyConv2d(3, 3)), None, r"`0` has no values yet; run the model once"),
        (nn.LazyConv2d(3, 3).weight, None, r"the weight has no values yet"),
        (torch.zeros(4, 3, 3, 3), "0", r"`layer` has no effect on a weight tensor"),
        (torch.zeros(4, 3), None, r"\(O, I, kH, kW\) with at least one pixel, got shape \(4, 3\)"),
        (torch.zeros(0, 3, 3, 3), None, r"got shape \(0, 3, 3, 3\)"),
        (torch.zeros(2, 3, 0, 3), None, r"got shape \(2, 3, 0, 3\)"),
        (torch.zeros(2, 0, 3), None, r"got shape \(2, 0, 1, 3\)"),
    ],
)
def test_what_cannot_be_drawn_raises_with_the_next_step(source, layer, message):
    with pytest.raises(InvalidArgumentError, match=message):
        kernels_of(source, layer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1, 2], "a model or a weight tensor, got list"),
        (
            torch.zeros(1, 1, 2, 2, dtype=torch.complex64),
            r"got torch.complex64 on cpu; take its `\.real` part",
        ),
        (
            nn.Conv2d(1, 1, 3, device="meta"),
            "the weight must hold real numbers to draw, got .* on meta; load its",
        ),
        (torch.ones(2, 3, 4, 4).to_sparse(), r"the weight must be a dense tensor, got .*\.to_dense\(\)`"),
        (nn.Sequential(sparse_convolution()), r"`0` must be a dense tensor, got layout torch\.sparse_coo"),
    ],
)
def test_what_holds_no_real_numbers_raises_type_error(source, message):
    with pytest.raises(InvalidTypeError, match=message):
        kernels_of(source)


def test_model_without_convolutions_says_so():
    with pytest.raises(LayerNotFoundError, match=r"the model \(Linear\) has no convolution; pass the weight"):
        kernels_of(nn.Linear(2, 2))


def test_unknown_layer_names_the_nearest():
    model = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(1, 1, 1))})
    with pytest.raises(
        LayerNotFoundError, match=r"no layer is named `feature\.0`; did you mean `features\.0`"
    ):
        kernels_of(model, "feature.0")


def test_slice_of_a_3d_kernel_is_drawn():
    weight = nn.Conv3d(2, 3, (5, 3, 4)).weight
    assert torch.equal(kernels_of(weight[:, :, 1]).weight, weight[:, :, 1])


def test_a_weight_that_a_class_computes_is_what_it_computes():
    class Scaled(nn.Conv2d):
        @property
        def weight(self):
            return 7 * self._parameters["weight"]

        @weight.setter
        def weight(self, value):
            self._parameters["weight"] = value

    plain = nn.Conv2d(3, 4, 3)
    scaled = Scaled.__new__(Scaled)
    scaled.__dict__.update(plain.__dict__)
    assert torch.equal(kernels_of(scaled).weight, 7 * plain.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_kernels_are_taken_from_a_scripted_part():
    conv = nn.Conv2d(3, 4, 3)
    assert torch.equal(kernels_of(nn.Sequential(torch.jit.script(conv)), "0").weight, conv.weight)


class EqualRate:
    """A hook of somebody's own that computes the weight before each pass, as equalised learning rates do."""

    def __call__(self, module, args):
        module.weight = module.weight_orig * 0.5

    @classmethod
    def apply(cls, module):
        weight = module._parameters.pop("weight")
        module.register_parameter("weight_orig", weight)
        module.weight = weight.detach() * 0.5
        module.register_forward_pre_hook(cls())
        return module


COMPUTED = {
    "pruned": (lambda conv: prune.l1_unstructured(conv, "weight", 0.3), "weight_orig"),
    "pruned by structure": (lambda conv: prune.ln_structured(conv, "weight", 0.5, 2, 0), "weight_orig"),
    "pruned twice": (
        lambda conv: prune.random_unstructured(prune.l1_unstructured(conv, "weight", 0.3), "weight", 0.3),
        "weight_orig",
    ),
    "old weight norm": (nn.utils.weight_norm, "weight_v"),
    "old spectral norm": (nn.utils.spectral_norm, "weight_orig"),
    "weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "equal rates": (EqualRate.apply, "weight_orig"),
}


@pytest.mark.parametrize("change", ["load", "step"])
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_kernels_are_those_of_now(kind, change):
    """Not those of the last forward pass: they are what the layer then computes with."""
    make, name = COMPUTED[kind]
    torch.manual_seed(0)
    net = nn.Sequential(make(nn.Conv2d(1, 4, 3, bias=False))).eval()
    net(torch.rand(1, 1, 8, 8))
    if change == "load":
        torch.manual_seed(1)
        net.load_state_dict(nn.Sequential(make(nn.Conv2d(1, 4, 3, bias=False))).state_dict())
    else:
        with torch.no_grad():
            net[0].get_parameter(name).add_(torch.randn(4, 1, 3, 3))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    kernels = kernels_of(net).weight
    assert all(map(torch.equal, before.values(), net.state_dict().values()))
    impulses = torch.eye(9).view(9, 1, 3, 3)
    expected = net(impulses)[..., 0, 0].T.reshape(4, 1, 3, 3).detach()
    torch.testing.assert_close(kernels, expected)
    result = maximize(net, "0", size=6, steps=2, precision="float32")
    told = net(result.images).mean((2, 3)).diagonal().detach()
    torch.testing.assert_close(result.scores, told)
