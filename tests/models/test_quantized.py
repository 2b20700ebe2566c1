"""Networks that are really quantised: what can be seen of them is right, the rest is refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from torchlens_viz import (
    capture,
    compare,
    explain,
    feature_grid,
    kernel_grid,
    layers,
    maximize,
    overlay_grid,
    project,
    receptive_field,
    survey,
)
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.state import quantizes

pytestmark = [
    pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no engine here"),
    pytest.mark.filterwarnings("ignore"),  # of torch.ao, that it will move
]
NAMES = {"resnet18": ("conv1", "layer4.1.conv2"), "mobilenet_v2": ("features.0.0", "features.18.0")}


@pytest.fixture(scope="module", params=NAMES)
def net(request):
    """A quantised network, the float one with the same weights, an image, and two layers of both."""
    before = torch.backends.quantized.engine
    made = []
    for quantize in (True, False):
        torch.manual_seed(0)
        builder = getattr(torchvision.models.quantization, request.param)
        made.append(builder(weights=None, quantize=quantize).eval())
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    yield *made, image, NAMES[request.param]
    torch.backends.quantized.engine = before


def by_hand(model: nn.Module, name: str, image: torch.Tensor, call: int = 0) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2].clone()))
    with torch.no_grad():
        model(image)
    hook.remove()
    return seen[call]


def test_captured_values_are_what_the_layers_put_out(net):
    model, _, image, names = net
    with torch.no_grad(), capture(model, names) as acts:
        model(image)
    for name in names:
        expected = by_hand(model, name, image)
        assert acts[name].is_quantized
        assert torch.equal(acts[name].int_repr(), expected.int_repr())
        assert (acts[name].q_scale(), acts[name].q_zero_point()) == (
            expected.q_scale(), expected.q_zero_point(),
        )  # fmt: skip


def test_maps_and_kernels_are_those_of_the_numbers_that_are_meant(net):
    model, _, image, (first, _) = net
    values = by_hand(model, first, image)
    assert feature_grid(values).tobytes() == feature_grid(values.dequantize()).tobytes()
    weight = model.get_submodule(first).weight()
    assert kernel_grid(model, first).tobytes() == kernel_grid(weight.dequantize()).tobytes()
    assert kernel_grid(model).tobytes() == kernel_grid(model, first).tobytes()


@pytest.mark.parametrize("is_shown", [True, False])
def test_layers_are_listed_as_they_run(net, is_shown):
    model, _, image, names = net
    table = layers(model, image) if is_shown else layers(model, input_shape=image.shape)
    for name in names:
        assert table[name].output_shape == tuple(by_hand(model, name, image).shape)
        assert table[name].parameters == sum(
            each.numel() for each in (model.get_submodule(name).weight(), model.get_submodule(name).bias())
        )
    assert table.marked("first convolution").names == (names[0],)


def test_a_survey_counts_what_is_meant(net):
    model, _, image, (first, _) = net
    found = survey(model, [image], first, progress=False)
    values = by_hand(model, first, image).dequantize().double()
    torch.testing.assert_close(found.stats[first].mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(found.stats[first].max, values.amax((0, 2, 3)))


def test_compare_tells_how_far_the_float_network_is(net):
    model, exact, image, _ = net
    found = compare(exact, model, image)
    rows = [row for row in found.layers if row.layer != "(output)"]
    assert len(rows) > 20
    for row in rows[::10]:
        ours = by_hand(exact, row.layer, image, row.call)
        theirs = by_hand(model, row.other, image, row.call).dequantize()
        assert row.max_abs == pytest.approx(float((ours - theirs).abs().max()), rel=1e-5)
        distance = (ours - theirs).double().square().mean().sqrt() / ours.double().square().mean().sqrt()
        assert row.relative == pytest.approx(float(distance), rel=1e-5)
    assert rows[0].relative < 0.1  # the same network; later on, what was not trained vanishes in the rounding


def test_what_needs_gradients_is_refused_with_the_reason(net):
    model, exact, image, (first, _) = net
    assert quantizes(model)
    assert not quantizes(exact)
    asks = [
        lambda: maximize(model, first, 0, size=64, steps=1, progress=False),
        lambda: explain(model, image),
        lambda: explain(model, image, layer=first),
        lambda: explain(model, image, method="gradient"),
        lambda: project(model, first, image),
        lambda: receptive_field(model, first, image.shape),
        lambda: overlay_grid(model, first, image),
    ]
    for ask in asks:
        with pytest.raises(InvalidArgumentError, match=r"the model is quantised .*take the float network"):
            ask()


def test_dynamic_quantisation_leaves_gradients_to_the_float_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not quantizes(model)
    assert maximize(model, "0", 1, size=8, steps=2, progress=False).status == ("steps",)
