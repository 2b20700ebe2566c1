"""`compare` finds the layer where two networks part, and leaves both as they were."""

from __future__ import annotations

import copy
import doctest
import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.comparison.nets import altered, coarser, fresh_resnet50, outputs_by_hooks, small
from tests.nets import Noisy, Repeats, assert_as_before, hook_count, snapshot
from torchlens_viz import Comparison, compare
from torchlens_viz.errors import (
    CaptureError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotCapturedError,
    LayerNotFoundError,
    ModelFailedError,
    NoDataError,
)

IMAGES = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
LAYERS = ["0", "1", "2", "3", "4", "5", "6", "(output)"]


def order_of(found: Comparison) -> list[str]:
    return [row.layer for row in found.layers]


# What is measured


@pytest.mark.parametrize("name", ["0", "1", "3", "6"])
def test_errors_are_those_of_a_plain_loop_over_hooks(name):
    a = small()
    b = altered(a, name, lambda layer: layer.weight.mul_(1.01).add_(0.02))
    found = compare(a, b, IMAGES, rtol=0.01, atol=0.001)
    ours, theirs = outputs_by_hooks(a, IMAGES), outputs_by_hooks(b, IMAGES)
    assert order_of(found) == LAYERS
    for row in found.layers:
        x, y = (side[row.layer if row.layer != "(output)" else ""][0] for side in (ours, theirs))
        gap = np.abs(x - y)
        allowed = 0.001 + 0.01 * np.maximum(np.abs(x), np.sqrt((x**2).mean()))
        assert row.max_abs == pytest.approx(gap.max(), rel=1e-12)
        assert row.excess == pytest.approx((gap / allowed).max(), rel=1e-12)
        assert row.relative == pytest.approx(np.sqrt((gap**2).sum() / (x**2).sum()), rel=1e-9)
        cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
        assert row.cosine == pytest.approx(cosine, abs=1e-12)
        assert row.is_beyond == bool((gap > allowed).any())
        worst = np.unravel_index((gap / allowed).argmax(), gap.shape)
        assert (row.sample, row.channel) == worst[:2]
        assert row.by_channel is not None
        per_channel = gap.max(axis=tuple(axis for axis in range(gap.ndim) if axis != 1))
        np.testing.assert_allclose(row.by_channel.numpy(), per_channel, rtol=1e-12)


def test_batches_add_up_to_what_one_batch_gives():
    a = small()
    b = altered(a, "3", lambda layer: layer.weight.mul_(1.01))
    whole = compare(a, b, IMAGES, rtol=0, atol=1)
    parts = compare(a, b, IMAGES.split([1, 3]), rtol=0, atol=1)
    assert parts.samples_seen == whole.samples_seen == 4
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert (one.layer, one.channel, one.sample) == (other.layer, other.channel, other.sample)
        for name in ("max_abs", "relative", "cosine", "excess"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5, abs=1e-6)


def test_a_value_that_is_nan_in_one_network_alone_is_beyond_any_tolerance():
    a = small()
    b = altered(a, "3", lambda layer: layer.bias[2].fill_(torch.nan))
    found = compare(a, b, IMAGES, rtol=100, atol=100)
    assert (found.first, found["3"].channel, found["3"].max_abs) == ("3", 2, float("inf"))
    assert compare(b, copy.deepcopy(b), IMAGES).first is None  # the same NaN in both


def test_a_dead_layer_in_both_is_the_same():
    a = altered(small(), "3", lambda layer: layer.bias.fill_(-1e6))
    found = compare(a, copy.deepcopy(a), IMAGES)
    assert found.first is None
    assert (found["4"].cosine, found["4"].relative) == (1.0, 0.0)


def test_another_shape_is_beyond_and_cannot_be_drawn():
    a = small()
    b = copy.deepcopy(a)
    b[3].stride = (1, 2)
    b[6] = nn.Linear(8 * 6 * 3, 5)
    found = compare(a, b, IMAGES)
    assert found.first == "3"
    assert found["3"].shapes == ((4, 8, 6, 6), (4, 8, 6, 3))
    assert found["3"].excess == found["3"].relative == float("inf")
    with pytest.raises(InvalidArgumentError, match=r"`layer` must put out one shape .* got `3` with \(4, 8"):
        found.grid()


def test_a_layer_that_runs_twice_has_a_row_per_call():
    a = Repeats()
    b = altered(a, "conv", lambda layer: layer.bias.add_(1))
    found = compare(a, b, torch.ones(1, 2, 4, 4))
    assert [(row.layer, row.call) for row in found.layers] == [("conv", 0), ("conv", 1), ("(output)", 0)]
    assert found.layers[1].label == "conv [call 1]"
    assert found["conv"].call == 0
    with pytest.raises(InvalidArgumentError, match=r"`call` must be a call of `conv` .* 0 to 1, got 2"):
        found.grid("conv", call=2)


# Planted faults


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return fresh_resnet50()


def planted(resnet: nn.Module, kind: type, number: int = 10) -> list[str]:
    names = [name for name, module in resnet.named_modules() if isinstance(module, kind)]
    return random.Random(0).sample(names, number)


PHOTO = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_one_channels_bias_in_resnet50_is_found_at_its_layer_and_channel(resnet):
    for place, name in enumerate(planted(resnet, nn.BatchNorm2d)):
        other = altered(resnet, name, lambda layer, channel=place: layer.bias[channel].add_(0.01))
        found = compare(resnet, other, PHOTO)
        assert (found.first, found[name].channel) == (name, place)


@pytest.mark.slow
def test_the_eps_of_one_batch_normalisation_in_resnet50_is_found(resnet):
    for name in planted(resnet, nn.BatchNorm2d):
        other = altered(resnet, name, lambda layer: setattr(layer, "eps", 1e-3))
        assert compare(resnet, other, PHOTO).first == name


@pytest.mark.slow
def test_a_layer_quantised_too_coarsely_among_8_bit_layers_is_found(resnet):
    fine = copy.deepcopy(resnet)
    with torch.no_grad():
        for layer in fine.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.copy_(coarser(layer.weight, 8))
    assert compare(resnet, fine, PHOTO, rtol=0.5, isolate=True).first is None
    for name in planted(resnet, nn.Conv2d):
        exact = resnet.get_submodule(name).weight
        other = altered(fine, name, lambda layer, exact=exact: layer.weight.copy_(coarser(exact, 3)))
        found = compare(resnet, other, PHOTO, rtol=0.5, isolate=True)
        assert [row.layer for row in found.beyond] == [name]


@pytest.mark.parametrize(
    "convert",
    [
        copy.deepcopy,
        lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
        lambda model: copy.deepcopy(model).double(),
        lambda model: copy.deepcopy(model).half(),
        lambda model: copy.deepcopy(model).bfloat16(),
        lambda model: torch.compile(copy.deepcopy(model)),
    ],
    ids=["copy", "channels_last", "double", "half", "bfloat16", "compiled"],
)
def test_what_differs_by_rounding_alone_has_no_first_layer(resnet, convert):
    found = compare(resnet, convert(resnet), PHOTO)
    assert found.first is None
    assert found.beyond == ()
    assert len(found.layers) == len({(row.layer, row.call) for row in found.layers}) == 175
    assert (found.only_in_a, found.only_in_b) == ((), ())


def test_a_network_that_magnifies_rounding_gets_the_tolerance_that_it_needs():
    torch.manual_seed(0)
    a = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(12))).eval()
    with torch.no_grad():
        for module in a.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(12)  # each layer makes of a small distance a large one
    batch = torch.randn(16, 32)
    found = compare(a, copy.deepcopy(a).double(), batch)
    assert found.first is None
    assert found["11.0"].rtol > 100 * found["0.0"].rtol
    assert found["11.0"].max_abs > 1e-4  # far beyond what one layer's rounding is


# Each layer alone


def test_isolated_layers_are_judged_by_what_they_do_themselves():
    a = small()
    b = altered(a, "0", lambda layer: layer.bias.add_(0.5))
    assert [row.layer for row in compare(a, b, IMAGES).beyond] == LAYERS
    assert [row.layer for row in compare(a, b, IMAGES, isolate=True).beyond] == ["0"]


# Which layers belong together


def test_layers_are_matched_by_their_order():
    a = small()
    named = nn.Sequential()
    for number, module in enumerate(copy.deepcopy(a)):
        named.add_module(f"part_{number}", nn.Sequential(module, nn.Identity()))
    with pytest.raises(
        InvalidArgumentError, match=r"`a` and `b` must have layers of the same names, got none"
    ):
        compare(a, named, IMAGES)
    with torch.no_grad():
        named.part_3[0].bias.add_(1)
    found = compare(a, named, IMAGES, match="order")
    assert order_of(found) == LAYERS
    assert (found.first, found["3"].other) == ("3", "part_3.0")


def test_networks_of_a_single_layer_are_compared_by_what_they_put_out():
    found = compare(nn.Softmax(1), nn.Softmax(0), torch.eye(3)[:2])
    assert (order_of(found), found.first) == (["(output)"], "(output)")


def test_orders_of_unlike_length_are_refused():
    a = small()
    with pytest.raises(InvalidArgumentError, match=r'`match="order"` .* got 7 in `a` and 6 in `b`'):
        compare(a, nn.Sequential(*copy.deepcopy(a)[:-1]), IMAGES, match="order")


def test_layers_are_matched_by_a_mapping():
    a = small()
    b = nn.ModuleDict({"body": copy.deepcopy(a)[:5], "head": nn.Sequential(*copy.deepcopy(a)[5:])})
    b.forward = lambda batch: b["head"](b["body"](batch))
    with torch.no_grad():
        b["head"][1].bias.add_(1)
    found = compare(a, b, IMAGES, match={"3": "body.3", "6": "head.1"})
    assert [(row.layer, row.other) for row in found.layers] == [("3", "body.3"), ("6", "head.1")]
    assert found.first == "6"
    with pytest.raises(LayerNotFoundError, match=r"no layer is named `body.33`; did you mean `body.3`"):
        compare(a, b, IMAGES, match={"3": "body.33"})
    with pytest.raises(InvalidArgumentError, match=r"`layers` has no effect with a mapping in `match`"):
        compare(a, b, IMAGES, "3", match={"3": "body.3"})
    with pytest.raises(InvalidArgumentError, match=r"`match` must name at least one layer"):
        compare(a, b, IMAGES, match={})


def test_only_chosen_layers_are_compared():
    a = small()
    b = altered(a, "0", lambda layer: layer.bias.add_(1))
    assert order_of(compare(a, b, IMAGES, nn.Conv2d)) == ["0", "3"]
    assert order_of(compare(a, b, IMAGES, ["6", 0], match="order")) == ["0", "6"]


def test_layers_that_one_network_alone_has_are_named():
    a = small()
    b = copy.deepcopy(a)
    b.insert(7, nn.Softmax(1))
    b[4] = nn.Sequential(nn.ReLU(), nn.ReLU())
    found = compare(a, b, IMAGES)
    assert (found.first, found.only_in_a, found.only_in_b) == ("(output)", ("4",), ("7",))
    assert "only in a: 4" in repr(found)


# Networks that were made of others


def test_an_exported_network_is_taken_apart_into_its_layers():
    a = small()
    program = torch.export.export(a, (IMAGES,))
    found = compare(a, program, IMAGES)
    assert (order_of(found), found.first, found.only_in_b) == (LAYERS, None, ())
    b = altered(a, "3", lambda layer: layer.bias[1].add_(1))
    found = compare(a, torch.export.export(b, (IMAGES,)), IMAGES)
    assert (found.first, found["3"].channel) == ("3", 1)
    assert compare(program, b, IMAGES).first == "3"


def test_an_exported_layer_that_runs_twice_is_known_by_its_calls():
    a = Repeats()
    batch = torch.ones(1, 2, 4, 4)
    found = compare(a, torch.export.export(a, (batch,)), batch)
    assert [row.label for row in found.layers] == ["conv", "conv [call 1]", "(output)"]
    assert found.first is None


def test_what_cannot_be_hooked_is_refused_by_name():
    a = small()
    graph = torch.export.export(a, (IMAGES,)).module()
    with pytest.raises(CaptureError, match=r"`b` cannot be compared .* pass the ExportedProgram itself"):
        compare(a, graph, IMAGES)
    with pytest.raises(
        InvalidTypeError, match=r"`a` must be a torch.nn.Module or an ExportedProgram, got str"
    ):
        compare("resnet50", a, IMAGES)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name():
    a = small()
    with pytest.raises(
        CaptureError, match=r"`b` cannot be compared layer by layer: the model is TorchScript"
    ):
        compare(a, torch.jit.trace(a, IMAGES), IMAGES)


def quantised(a: nn.Sequential) -> nn.Module:
    """Quantise a network to 8 bits, its convolutions fused with what follows them."""
    from torch.ao import quantization

    torch.backends.quantized.engine = next(
        engine for engine in torch.backends.quantized.supported_engines if engine not in ("none", "onednn")
    )
    b = nn.Sequential(quantization.QuantStub(), *copy.deepcopy(a), quantization.DeQuantStub())
    for layer in b:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    quantization.fuse_modules(b, [["1", "2", "3"], ["4", "5"]], inplace=True)
    b.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(b, inplace=True)
    b(IMAGES)
    return quantization.convert(b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_network_is_compared_where_its_layers_were_folded():
    a = nn.Sequential(nn.Identity(), *small(), nn.Identity()).eval()
    engine = torch.backends.quantized.engine
    try:
        b = quantised(a[1:-1])
        found = compare(a, b, IMAGES)
        assert found.first is None
        assert found.folded == {"1": "3", "2": "3", "4": "5"}
        assert order_of(found) == ["0", "3", "5", "6", "7", "8", "(output)"]
        assert 1e-3 < found["7"].relative < 0.1
        with torch.no_grad():
            a[4].bias[3] += 4  # what was quantised is another network
        found = compare(a, b, IMAGES)
        assert (found.first, found["5"].channel) == ("5", 3)
    finally:
        torch.backends.quantized.engine = engine


# Nothing is changed


class Observing(nn.Module):
    """Learns from what it sees, in eval mode too, as observers of quantisation do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.abs().max()
        return x.add_(1)


def test_networks_inputs_and_random_numbers_are_as_before():
    a = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Dropout(0.5),
        Observing(),
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        Noisy(),
    )
    a[0].eval()
    b = copy.deepcopy(a).train()
    before, images = (snapshot(a), snapshot(b)), IMAGES.clone()
    torch.manual_seed(7)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for options in ({}, {"isolate": True}, {"correlations": True}):
        assert compare(a, b, IMAGES, **options).first is None
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert_as_before(a, before[0])
    assert_as_before(b, before[1])
    assert torch.equal(IMAGES, images)


def test_a_network_that_fails_leaves_no_hooks():
    a = small()
    with pytest.raises(
        ModelFailedError, match=r"`inputs` must be what the model takes: .* 3 channels, but got 2"
    ):
        compare(a, copy.deepcopy(a), torch.randn(1, 2, 10, 10))
    assert hook_count(a) == 0


# Inputs and arguments


def test_batches_may_hold_labels_and_networks_may_take_keywords():
    a = small()
    pairs = [(IMAGES, torch.zeros(4)), (IMAGES[:1], torch.zeros(1))]
    assert compare(a, copy.deepcopy(a), pairs).samples_seen == 5
    named = [{"pixels": IMAGES}]
    assert compare(a, copy.deepcopy(a), named, input_of="pixels").samples_seen == 4
    assert compare(a, copy.deepcopy(a), {"input": IMAGES}).samples_seen == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": -1}, InvalidArgumentError, r"`rtol` must be at least 0, got -1"),
        ({"atol": torch.inf}, InvalidArgumentError, r"`atol` must be finite, got inf"),
        ({"maps": 0}, InvalidArgumentError, r"`maps` must be at least 1, got 0"),
        ({"match": "place"}, InvalidArgumentError, r'`match` must be "name" or "order", got \'place\''),
        ({"layers": "9"}, LayerNotFoundError, r"no layer is named `9`"),
        ({"inputs": []}, NoDataError, r"`inputs` must hold at least one input, got none"),
        ({"inputs": 3}, InvalidTypeError, r"`inputs` must be a tensor .* got int"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, error, message):
    a = small()
    with pytest.raises(error, match=message):
        compare(a, copy.deepcopy(a), **{"inputs": IMAGES, **options})


@pytest.mark.parametrize("module", ["compare"])
def test_examples_run(module):
    assert doctest.testmod(importlib.import_module(f"torchlens_viz.comparison.{module}")).failed == 0


def test_the_page_runs():
    page = Path(__file__).parents[2] / "docs" / "compare.md"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 5
    assert found.failed == 0


def test_a_layer_that_was_not_compared_is_named():
    a = small()
    with pytest.raises(LayerNotCapturedError, match=r"`33` was not compared; did you mean `3`\?"):
        compare(a, copy.deepcopy(a), IMAGES)["33"]
