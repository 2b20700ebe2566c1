"""`project` on networks of every kind: right, or refused with the reason; and the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.attribution.test_project import RULES, modules_only, picture
from tests.nets import Gives, Noisy, Repeats, assert_as_before, small_net, snapshot
from torchlens_viz import errors, maximize, project

# --- networks of every kind


def zoo(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    more = {"googlenet": {"init_weights": True, "aux_logits": False}}.get(name, {})
    return models.get_model(name, weights=None, **more)


def first_output(net, layer):
    """Keep what a layer of a copy puts out first, before anything works on it in place."""
    kept = {}

    def keep(module, args, output):
        kept.setdefault("it", output.clone())

    net.get_submodule(layer).register_forward_hook(keep)
    return kept


def by_hand(net, layer, image, channel, place, rule):
    """The projection by replacing every ReLU module and function, with no part of the library."""

    class Ruled(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(context, gradient):
            passed = gradient.relu() if rule != "gradient" else gradient
            return passed * (context.saved_tensors[0] > 0) if rule != "deconvnet" else passed

    twin = copy.deepcopy(net).eval()
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.forward = lambda x: Ruled.apply(x)
    kept = first_output(twin, layer)
    leaf = image[None].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: Ruled.apply(x))
        twin(leaf)
    return torch.autograd.grad(kept["it"][0, channel][place], leaf)[0][0]


NETWORKS = {  # a layer of each, and one from which the path bends otherwise than by ReLUs
    "resnet18": ("layer2", None),
    "vgg16": ("features.10", None),
    "densenet121": ("features.denseblock2", None),
    "googlenet": ("inception4a", None),
    "mobilenet_v3_small": ("features.0.1", ("features.4", r"`features.0.2` \(Hardswish\) applies hardswish")),
    "swin_t": (
        "features.0",
        ("features.1", r"`features.1.0.attn` \(ShiftedWindowAttention\) applies softmax"),
    ),
    "vit_b_16": (
        "conv_proj",
        ("encoder.layers.encoder_layer_0", r"\(MultiheadAttention\) applies multi_head_attention_forward"),
    ),
    "convnext_tiny": ("features.0", ("features.1", r"`features.1.0.block.4` \(GELU\) applies gelu")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_projected_right_or_refused_and_stay_as_they_were(name):
    net, (layer, refusal) = zoo(name), NETWORKS[name]
    image = picture(3, 224, 224)
    before, numbers = snapshot(net), torch.get_rng_state()
    for rule in RULES:
        found = project(net, layer, image, [1, 2], rule=rule)
        if layer in ("features.0", "conv_proj"):  # no ReLU so far: all rules are the gradient
            assert torch.equal(found.images, project(net, layer, image, [1, 2], rule="gradient").images)
        else:
            for at, channel in enumerate([1, 2]):
                place = tuple(found.positions[at].tolist())
                expected = by_hand(net, layer, image, channel, place, rule)
                scale = float(expected.abs().amax())
                assert scale > 0 or rule != "deconvnet"
                torch.testing.assert_close(found.images[at], expected, rtol=1e-3, atol=1e-4 * scale)
        if refusal is not None and rule != "gradient":
            deeper, reason = refusal
            with pytest.raises(errors.InvalidArgumentError, match=f'{reason}; pass `rule="gradient"`'):
                project(net, deeper, image, [1], rule=rule)
    if refusal is not None:
        found = project(net, refusal[0], image, [1], rule="gradient")
        twin = copy.deepcopy(net).eval()
        kept = first_output(twin, refusal[0])
        leaf = image[None].clone().requires_grad_()
        twin(leaf)
        row, column = found.positions[0].tolist()
        output = kept["it"]
        unit = {
            "mobilenet_v3_small": lambda: output[0, 1, row, column],
            "vit_b_16": lambda: output[0, column, 1],
            "swin_t": lambda: output[0, row, column, 1],
            "convnext_tiny": lambda: output[0, 1, row, column],
        }[name]()
        (expected,) = torch.autograd.grad(unit, leaf)
        scale = float(expected.abs().amax())
        torch.testing.assert_close(found.images, expected, rtol=1e-3, atol=1e-4 * scale)
    assert_as_before(net, before)
    assert torch.equal(torch.get_rng_state(), numbers)


# --- nothing about the caller's model or modes changes


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(modules_only(), nn.Dropout(0.5)).train()
    net[0][0].weight.requires_grad_(False)
    net[0][4].weight.grad = torch.ones_like(net[0][4].weight)
    before, numbers, image = snapshot(net), torch.get_rng_state(), picture(3, 60, 60)
    kept, version = image.clone(), image._version
    for rule in RULES:
        project(net, "0.7", image, rule=rule)
        project(net, "0.8", image, [2], rule=rule, position="all")
    assert (net[0][4].weight.grad == 1).all()
    net[0][4].weight.grad = None
    assert_as_before(net, before)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(image, kept)
    assert image._version == version
    assert image.grad is None
    assert not image.requires_grad


def test_hooks_of_the_caller_do_not_run_and_stay():
    net, calls = small_net(), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="forward hooks that are not its own"):
        project(net, "2", picture(3, 12, 12))
    assert calls == []
    assert len(net[0]._forward_hooks) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_without_gradients_and_on_frozen_parameters(mode):
    net, image = small_net(), picture(3, 20, 20)
    expected = project(net, "2", image)
    net.requires_grad_(False)
    with mode():
        found = project(net, "2", image.clone())
    assert torch.equal(found.images, expected.images)
    found.images.add_(1)
    assert not found.images.requires_grad


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        net, image = small_net(), picture(3, 20, 20)
    assert torch.equal(project(net, "2", image).images, project(small_net(), "2", picture(3, 20, 20)).images)


@pytest.mark.usefixtures("process_as_it_was")
def test_a_compiled_model_runs_eagerly():
    expected = project(small_net(), "2", picture(3, 20, 20)).images
    wrapped = torch.compile(small_net(), backend="eager")
    assert torch.equal(project(wrapped, "2", picture(3, 20, 20)).images, expected)
    in_place = small_net()
    in_place.compile(backend="eager")
    assert torch.equal(project(in_place, "2", picture(3, 20, 20)).images, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_is_gone_through_in_float32(dtype):
    net = modules_only().to(dtype)
    found = project(net, "7", picture(3, 40, 40), range(6))
    assert torch.equal(
        found.images, project(copy.deepcopy(net).float(), "7", picture(3, 40, 40), range(6)).images
    )
    assert next(net.parameters()).dtype == dtype


def test_autocast_and_tf32_do_not_count():
    image = picture(3, 40, 40)
    expected = project(small_net(), "2", image).images
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project(small_net(), "2", image).images, expected)


def test_random_numbers_go_on_as_if_nothing_had_run():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Noisy(), nn.Conv2d(4, 2, 3))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    project(net, "2", picture(3, 20, 20))
    assert torch.equal(torch.rand(3), expected)


class Checkpointed(nn.Module):
    def __init__(self, act, *, use_reentrant):
        super().__init__()
        self.part, self.end = nn.Sequential(nn.Conv2d(3, 4, 3), act), nn.Conv2d(4, 3, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.end(checkpoint(self.part, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", ["max", "all"])
def test_relus_are_found_when_checkpointing_runs_them_again(rule, place):
    net = Checkpointed(nn.ReLU(inplace=True), use_reentrant=False)
    plain = nn.Sequential(net.part[0], nn.ReLU(), net.end)
    image = picture(3, 40, 40)
    found = project(net, "end", image, rule=rule, position=place)
    torch.testing.assert_close(found.images, project(plain, "2", image, rule=rule, position=place).images)


def test_checkpointing_does_not_hide_what_a_rule_is_not_defined_for():
    net = Checkpointed(nn.SiLU(), use_reentrant=False)
    with pytest.raises(errors.InvalidArgumentError, match=r"`part.1` \(SiLU\) applies silu"):
        project(net, "end", picture(3, 12, 12))
    project(net, "end", picture(3, 12, 12), rule="gradient")


@pytest.mark.parametrize("rule", RULES)
def test_reentrant_checkpointing_is_refused(rule):
    net = Checkpointed(nn.ReLU(), use_reentrant=True)
    with pytest.raises(errors.InvalidArgumentError, match="switch checkpointing off in the model"):
        project(net, "end", picture(3, 12, 12), rule=rule)


# --- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "net"}, errors.InvalidTypeError, "`model` must be an nn.Module, got str"),
        ({"layer": "9"}, errors.LayerNotFoundError, "no layer is named `9`"),
        ({"layer": nn.Conv2d}, errors.InvalidArgumentError, "`layer` must find one layer, got 2: `0`, `2`"),
        ({"channels": [7]}, errors.InvalidArgumentError, "`channels` must be indices from 0 to 6, got 7"),
        (
            {"channels": []},
            errors.InvalidArgumentError,
            "`channels` must choose at least one, got an empty list",
        ),
        (
            {"rule": "lrp"},
            errors.InvalidArgumentError,
            '`rule` must be "deconvnet", "guided" or "gradient", got',
        ),
        ({"position": "min"}, errors.InvalidArgumentError, '`position` must be "max" or "all", got \'min\''),
        (
            {"position": 3},
            errors.InvalidTypeError,
            r'`position` must be "max", "all" or \(row, column\), got 3',
        ),
        ({"position": (0, 1.5)}, errors.InvalidTypeError, "`position` must be an int, got 1.5"),
        (
            {"position": (0, 8)},
            errors.InvalidArgumentError,
            r"must lie in the map of `2`, 8 x 8, got \(0, 8\); rows",
        ),
        ({"position": (-1, 0)}, errors.InvalidArgumentError, "`position` must be at least 0, got -1"),
        ({"batch_size": 0}, errors.InvalidArgumentError, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": "all"}, errors.InvalidTypeError, "`batch_size` must be an int, got 'all'"),
        ({"image": "a.png"}, errors.InvalidTypeError, "`image` must be a tensor or a picture, got str"),
        (
            {"image": torch.rand(2, 3, 12, 12)},
            errors.InvalidArgumentError,
            r"one image .* got shape \(2, 3, 12, 12\)",
        ),
        (
            {"image": torch.rand(4, 12, 12)},
            errors.InvalidArgumentError,
            r"cannot take an image of shape \(4, 12, 12\)",
        ),
        (
            {"channel_dim": 0},
            errors.InvalidArgumentError,
            "`channel_dim` must be a dimension after the first of",
        ),
        (
            {"channel_dim": 5},
            errors.InvalidArgumentError,
            "`channel_dim` must be a dimension of what `2` puts out",
        ),
    ],
)
def test_bad_input_is_refused_with_what_to_do(change, error, message):
    given = {"model": small_net(), "layer": "2", "image": picture(3, 12, 12), "channels": None, **change}
    with pytest.raises(error, match=message):
        project(given.pop("model"), given.pop("layer"), given.pop("image"), given.pop("channels"), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, x), "must put out one tensor"),
        (lambda x: x.detach(), "nothing leads back from `1` to the image"),
        (lambda x: x[:, :, None], "`layer` must put out one tensor .* got float32 of shape"),
        (lambda x: x.repeat(2, 1, 1, 1), "a row per image, got float32 of shape"),
        (lambda x: x[:, :, :0], "`layer` must put out maps with values, but `1` puts out empty ones"),
        (lambda x: torch.ones(1, 2, 3, 3), "nothing leads back from `1` to the image"),
    ],
)
def test_a_layer_without_maps_or_without_a_way_back_is_refused(make, message):
    net = nn.Sequential(nn.Conv2d(3, 2, 3), Gives(make))
    with pytest.raises(errors.InvalidArgumentError, match=message):
        project(net, "1", picture(3, 8, 8), channel_dim=1)


def test_a_layer_that_does_not_run_and_torchscript_are_refused():
    with pytest.raises(errors.CaptureError, match="`unused` does not run on this image; choose a layer that"):
        project(Repeats(), "unused", picture(2, 6, 6))
    exported = torch.export.export(small_net(), (torch.rand(1, 3, 8, 8),)).module()
    with pytest.raises(errors.CaptureError, match=r"the model was made by torch\.export"):
        project(exported, "0", picture(3, 8, 8))


def test_what_maximize_finds_can_be_projected():
    result = maximize(small_net(), "3", [2], size=16, steps=3)
    found = project(small_net(), "3", result.images[0], [2])
    assert found.scores[0] > 0
    assert found.images.abs().sum() > 0
