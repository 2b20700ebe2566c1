"""`ablate` is a plain loop over hooks, only faster."""

from __future__ import annotations

import copy
import doctest
import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from tests.nets import Repeats, assert_as_before, snapshot
from torchlens_viz import ablate
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError, NoDataError


def batches(sizes=(4, 2, 4), shape=(3, 32, 32), classes=10):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, *shape, generator=generator), torch.randint(classes, (n,), generator=generator))
        for n in sizes
    ]


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model


def by_a_plain_loop(model, data, layer, channels, *, by="zero", dim=1):
    """Loss and hits of every input, (1 + channels, inputs), the network as it is first, hook by hook."""
    module = model.get_submodule(layer)
    seen = []
    handle = module.register_forward_hook(
        lambda m, a, out: seen.append(out.detach().movedim(dim, -1).flatten(0, -2))
    )
    losses, hits = [], []
    with torch.no_grad():
        for images, _ in data:
            model(images)
        handle.remove()
        mean = torch.cat(seen).double().mean(0)
        for channel in [None, *channels]:

            def replaced(m, a, out, channel=channel):
                out = out.clone()
                place = out.movedim(dim, 0)
                if channel is not None and by == "zero":
                    place[channel] = 0
                elif channel is not None and by == "mean":
                    place[channel] = mean[channel].to(out)
                elif channel is not None:
                    place[channel] = place[channel].flip(0)  # of two inputs, the other
                return out

            handle = module.register_forward_hook(replaced)
            outputs = [(model(images), labels) for images, labels in data]
            handle.remove()
            losses.append(
                torch.cat([F.cross_entropy(out.double(), y, reduction="none") for out, y in outputs])
            )
            hits.append(torch.cat([out.argmax(1) == y for out, y in outputs]).double())
    return torch.stack(losses), torch.stack(hits)


def assert_as_the_loop(found, losses, hits, *, within=1e-6):
    changes = losses[1:] - losses[0]
    assert found.loss == pytest.approx(losses[0].mean().item(), abs=within)
    assert found.accuracy == pytest.approx(hits[0].mean().item())
    np.testing.assert_allclose(found.loss_change, changes.mean(1), atol=within, rtol=0)
    np.testing.assert_allclose(
        found.loss_error, changes.std(1) / changes.shape[1] ** 0.5, atol=within, rtol=1e-4
    )
    np.testing.assert_allclose(found.accuracy_change, hits[1:].mean(1) - hits[0].mean(), atol=1e-12)


@pytest.mark.parametrize(
    "layer", ["conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.1", "layer4.1.relu"]
)
@pytest.mark.parametrize("by", ["zero", "mean"])
def test_it_is_the_plain_loop_within_rounding(layer, by):
    model, data, channels = resnet18().double(), batches(), [5, 0, 31]
    data = [(images.double(), labels) for images, labels in data]
    found = ablate(model, data, layer, channels, loss="cross_entropy", by=by, rows=8)
    assert found.channels.tolist() == channels
    assert found.samples_seen == 10
    assert_as_the_loop(found, *by_a_plain_loop(model, data, layer, channels, by=by), within=1e-10)


def test_it_is_the_plain_loop_in_float32_for_every_channel():
    model, data = resnet18(), batches((2,))
    found = ablate(model, data, "layer1.1.bn1", loss="cross_entropy")
    assert len(found.channels) == 64
    assert found.loss_change.abs().max() > 1e-3
    assert_as_the_loop(found, *by_a_plain_loop(model, data, "layer1.1.bn1", range(64)))


def test_resampling_takes_the_channel_of_another_input():
    model, data = resnet18(), batches((2, 2))
    for rows in (1, 64):
        found = ablate(model, data, "layer2.1", [3, 9], loss="cross_entropy", by="resample", rows=rows)
        assert_as_the_loop(found, *by_a_plain_loop(model, data, "layer2.1", [3, 9], by="resample"))
    with pytest.raises(InvalidArgumentError, match=r"`by=\"resample\"` needs batches of two inputs at least"):
        ablate(model, batches((1,)), "layer2.1", loss="cross_entropy", by="resample")


class InPlace(nn.Module):
    """Adds in place to what its layer has no part in, so that it cannot be batched around it."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(3, 4, 1)
        self.layer = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, images):
        maps = self.branch(images)
        maps += self.layer(images)
        return self.head(maps.relu_().mean((2, 3)))


class Decides(nn.Module):
    """Takes a way that a value decides."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, images):
        maps = self.layer(images).mean((2, 3))
        if float(maps.abs().sum()) < 0:
            return self.head(-maps)
        return self.head(maps)


class Tokens(nn.Module):
    """Attention over positions; channels are last."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.attention(self.layer(images.flatten(2).transpose(1, 2))).mean(1))


@pytest.mark.parametrize(("kind", "dim"), [(InPlace, 1), (Decides, 1), (Tokens, -1)])
def test_networks_of_every_kind_give_what_the_loop_gives(kind, dim):
    torch.manual_seed(0)
    model, data = kind().eval().double(), [(x.double(), y) for x, y in batches(shape=(3, 4, 4))]
    found = ablate(model, data, "layer", loss="cross_entropy", rows=6)
    channels = found.channels.tolist()
    assert_as_the_loop(found, *by_a_plain_loop(model, data, "layer", channels, dim=dim), within=1e-10)


def test_a_layer_that_runs_twice_is_replaced_in_every_call():
    torch.manual_seed(0)
    model = nn.Sequential(Repeats(), nn.Flatten(), nn.Linear(2 * 2 * 4, 10)).double()
    data = [(x.double(), y) for x, y in batches(shape=(2, 4, 4))]
    found = ablate(model, data, "0.conv", loss="cross_entropy")
    assert_as_the_loop(found, *by_a_plain_loop(model, data, "0.conv", [0, 1]), within=1e-10)


def test_a_channel_that_is_read_with_weight_zero_is_worth_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[0].bias[2] = 100  # fires strongest
        model[3].weight.view(10, 4, 16)[:, 2] = 0
    found = ablate(model, batches(shape=(3, 4, 4)), "0", loss="cross_entropy")
    assert found.loss_change[2] == 0
    assert (found.loss_change[[0, 1, 3]].abs() > 1e-4).all()
    assert found.order.tolist()[0] == int(found.loss_change.argmax())


def test_a_loss_of_the_callers_own_sees_the_batch():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 1, bias=False)
    data = [{"image": x, "weight": torch.arange(len(x)) + 1.0} for x, _ in batches((3, 2), (3, 4, 4))]
    found = ablate(model, data, "", loss=lambda out, batch: out.square().mean((1, 2, 3)) * batch["weight"])
    with torch.no_grad():
        squares = [model(part["image"]).double().square().mean((2, 3)) for part in data]
    expected = torch.cat(
        [-own * part["weight"][:, None] / 2 for own, part in zip(squares, data, strict=True)]
    )
    np.testing.assert_allclose(found.loss_change, expected.mean(0), rtol=1e-5)
    assert (found.accuracy, found.accuracy_change) == (None, None)


def test_networks_inputs_and_random_numbers_are_as_before():
    model = resnet18().train()
    model.fc.eval()
    data = batches((2,))
    before, images = snapshot(model), data[0][0].clone()
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate()
    for by in ("zero", "mean", "resample"):
        ablate(model, data, "layer3", [0], loss="cross_entropy", by=by)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert_as_before(model, before)
    assert torch.equal(images, data[0][0])


def test_a_table_shows_what_costs_most():
    found = ablate(resnet18(), batches((2,)), "layer3.1.relu", range(12), loss="cross_entropy")
    lines = repr(found).splitlines()
    assert lines[0].startswith("Ablation of 12 channels of `layer3.1.relu` by zero over 2 inputs: loss ")
    assert lines[1].startswith(f"  channel {int(found.channels[found.order[0]])}: loss ")
    assert lines[-1] == "  and 2 more"
    assert [row["channel"] for row in found.rows()] == list(range(12))


def once(data):
    yield from data


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "layer9"}, LayerNotFoundError, r"no layer is named `layer9`"),
        ({"channels": 64}, InvalidArgumentError, r"`channels` must be indices from 0 to 63, got 64"),
        ({"by": "noise"}, InvalidArgumentError, r'`by` must be "zero", "mean" or "resample", got \'noise\''),
        ({"rows": 0}, InvalidArgumentError, r"`rows` must be at least 1, got 0"),
        ({"loader": []}, NoDataError, r"`loader` must yield at least one batch"),
        (
            {"loader": once([]), "by": "mean"},
            InvalidTypeError,
            r"gone through twice for `by=\"mean\"`, got generator",
        ),
        (
            {"loss": "hinge"},
            InvalidArgumentError,
            r"`loss` must be a function .* or \"cross_entropy\", got 'hinge'",
        ),
        (
            {"loss": lambda out, batch: out.mean()},
            InvalidArgumentError,
            r"one number per input, \(2,\), got shape \(\)",
        ),
        (
            {"loss": lambda out, batch: 1.0},
            InvalidTypeError,
            r"a tensor of floating numbers, \(N,\), got float",
        ),
        (
            {"loader": [torch.randn(2, 3, 32, 32)]},
            InvalidArgumentError,
            r"needs the class of each input, got batches",
        ),
        (
            {"label_of": 0},
            InvalidTypeError,
            r"`label_of` must find one integer per input, \(N,\), got \(2, 3, 32",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, error, message):
    given = {"layer": "layer1", "channels": [0], "loss": "cross_entropy", "loader": batches((2,)), **options}
    with pytest.raises(error, match=message):
        ablate(resnet18(), given.pop("loader"), given.pop("layer"), given.pop("channels"), **given)


def test_a_layer_that_does_not_run_is_refused():
    model = Repeats()
    with pytest.raises(InvalidArgumentError, match=r"`layer` must run in eval mode, but `unused` does not"):
        ablate(model, batches(shape=(2, 4, 4)), "unused", loss="cross_entropy")


def test_examples_run():
    assert doctest.testmod(importlib.import_module("torchlens_viz.ablation.ablate")).failed == 0


def test_a_copy_gives_the_same_bits():
    model, data = resnet18(), batches((2,))
    one, other = (
        ablate(each, data, "layer4.0", [1, 2], loss="cross_entropy") for each in (model, copy.deepcopy(model))
    )
    assert torch.equal(one.loss_change, other.loss_change)


def test_the_page_runs():
    page = Path(__file__).parents[2] / "docs" / "effects.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0
