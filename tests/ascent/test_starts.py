"""Units that do not respond: the dead are found, all of them and no other, and the others are woken."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.ascent.test_traps import run, same
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.method import Normalized
from torchlens_viz.models.demo_net import load_demo_net, normalize


class Functional(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.last, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), act
        self.out = nn.Identity()

    def forward(self, x):
        return self.out(self.act(self.last(self.act(self.first(x)))))


ACTS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp by position": lambda x: torch.clamp(x, 0),
    "clamp_": lambda x: x.clamp_(0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, min=0),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
}


def planted(act) -> tuple[nn.Module, list[bool]]:
    """A network in which channels 1 and 4 are dead, 2 and 6 only woken by redirection, and the rest alive."""
    torch.manual_seed(0)
    model = Functional(act)
    with torch.no_grad():
        model.first.weight.abs_()
        model.last.weight.abs_().mul_(0.3)
        model.first.bias.fill_(0.1)
        model.last.bias.fill_(0.1)
        model.last.bias[1] = -1e3
        model.last.weight[4] = 0
        model.last.bias[4] = 0
        noise = model.first(torch.full((1, 3, 12, 12), 0.5)).relu()
        white = model.first(torch.ones(1, 3, 12, 12)).relu()
        for place in (2, 6):  # off at gray, on at white
            at_gray, at_white = (
                F.conv2d(maps, model.last.weight[place : place + 1]).mean() for maps in (noise, white)
            )
            model.last.bias[place] = -(0.2 * at_gray + 0.8 * at_white)
    return model, [place in (1, 4) for place in range(8)]


@pytest.mark.parametrize("kind", ACTS)
def test_the_dead_are_found_and_only_they(kind):
    model, dead = planted(ACTS[kind])
    start = model.eval()(torch.full((1, 3, 12, 12), 0.5))[0].mean((1, 2))
    assert start[[1, 2, 4, 6]].tolist() == [0, 0, 0, 0]
    result = run(model, "out", steps=30, method=Normalized(restarts=1))
    assert [status == "dead" for status in result.status] == dead
    assert (result.scores[[2, 6]] > 0).all()
    assert result.scores[[1, 4]].tolist() == [0, 0]
    assert result.evidence[1] == "no gradient from 2 starts, with and after redirected ReLUs"
    torch.testing.assert_close(result.means, model(result.images).mean((2, 3)).detach())


@pytest.mark.parametrize("kind", ["nn.ReLU", "nn.ReLU6 in place", "clamp"])
def test_waking_some_leaves_the_others_of_the_batch_alone(kind):
    model, _ = planted(ACTS[kind])
    together = run(model, "out", steps=12)
    for place in (0, 2, 4):
        alone = run(model, "out", place, steps=12)
        torch.testing.assert_close(alone.images[0], together.images[place], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.history[0], together.history[place], equal_nan=True)
    same(run(model, "out", steps=12, batch_size=3), together)


def test_a_threshold_passed_while_woken_counts():
    model, _ = planted(F.relu)
    result = run(model, "out", 2, steps=64, threshold=0.01)
    assert result.status == ("threshold",)
    assert (~result.history[0].isnan()).sum() < 18


def test_the_dead_are_tried_on_the_reference_that_drives_them_hardest():
    # Alive on one picture only, whose pattern no redirection of a constant objective finds.
    class Picky(nn.Module):
        def __init__(self, picture):
            super().__init__()
            self.picture = picture
            self.out = nn.Identity()

        def forward(self, x):
            distance = (x - self.picture).square().mean((1, 2, 3))
            near = torch.where(distance < 1e-3, x.mean((1, 2, 3)), 0 * x.sum((1, 2, 3)))
            return self.out(near[:, None])

    torch.manual_seed(0)
    picture = torch.rand(3, 8, 8)
    references = torch.stack([torch.rand(3, 8, 8), picture, torch.rand(3, 8, 8)])
    without = run(Picky(picture), "out", size=8, lr=1e-4)
    assert without.status == ("dead",)
    found = run(Picky(picture), "out", size=8, lr=1e-4, method=Normalized(references=references))
    assert found.status != ("dead",)
    torch.testing.assert_close(found.images[0], picture, rtol=0, atol=2e-3)
    hopeless = run(Picky(picture - 5), "out", size=8, method=Normalized(restarts=0, references=references))
    assert hopeless.evidence == (
        "no gradient from 2 starts, one of them the reference image that drives it hardest, "
        "with and after redirected ReLUs",
    )


def test_a_unit_whose_windows_undo_each_others_pull_is_woken_alone():
    # The pull of all windows on a pixel is +1 - 1; to be on, a pixel must be 0.9 brighter than its neighbour.
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2), padding="same", padding_mode="circular"), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([-1.0, 1.0])
        model[0].bias[:] = -0.9
    assert run(model, "1", steps=30, size=(8, 8), method=Normalized(restarts=0)).status == ("dead",)
    found = run(model, "1", steps=30, size=(8, 8), method=Normalized(restarts=1))
    assert found.status != ("dead",)
    assert found.scores[0] > 0


def test_what_transforms_extinguish_is_climbed_without_them():
    # Channel 0 sees red against its neighbours, which resampling blurs; 1 sees brightness; 2 nothing.
    model = nn.Sequential(nn.Conv2d(3, 3, 2, stride=2), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[0] = 0  # so that green and blue stay what they were at the start
        model[0].weight[0, 0] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        model[0].weight[1] = 1 / 12
        model[0].weight[2] = 0
        model[0].bias[:] = torch.tensor([-1.6, 0, -1])
    found = run(model, "1", steps=30, size=16, transforms="robust")
    assert found.status[0] != "dead"
    assert found.evidence[0].endswith(
        "; without the transforms, since under them no gradient lasted from 5 starts"
    )
    assert "transforms" not in found.evidence[1]
    assert found.status[2] == "dead"
    assert found.evidence[2] == (
        "no gradient from 5 starts, under the transforms and without them, with and after redirected ReLUs"
    )
    assert found.scores[0] > 0
    same(run(model, "1", 0, steps=30, size=16, transforms="robust"), run(model, "1", 0, steps=30, size=16))
    others = {"steps": 30, "size": 16, "transforms": "robust", "batch_size": 2}
    same(run(model, "1", **others), found)
    beside = run(model, "1", [0] + [1] * 40, **others)  # for as long as channel 0 takes
    apart = run(model, "1", [1] * 40, **others)
    torch.testing.assert_close(beside.history[1:], apart.history, rtol=1e-5, atol=1e-5)
    alone = run(model, "1", 0, steps=30, size=16, transforms="robust", method=Normalized(restarts=0))
    assert alone.evidence[0].endswith("since under them no gradient lasted")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_do_not_make_a_living_unit_dead(steps):
    model, dead = planted(F.relu)
    result = run(model, "out", steps=steps)
    assert [status == "dead" for status in result.status] == dead
    assert result.history.shape == (8, steps)
    assert result.history[[2, 6]].isfinite().all()


def test_what_falls_asleep_on_the_way_is_woken():
    # Channels that a step too far switches off, all of which photographs and other climbs drive.
    demo, channels = load_demo_net(), [4, 11, 23, 29, 36]
    result = maximize(
        demo, "features.4", channels, size=48, steps=32, preprocess=normalize, parametrization="fourier"
    )
    assert (result.scores > 1).all()
    assert set(result.status) <= {"steps", "stalled"}
    assert result.history.isfinite().all()


def test_a_channel_with_nan_among_its_weights_is_stopped_and_the_others_climb():
    model, _ = planted(F.relu)
    clean = run(model, "out", steps=8)
    with torch.no_grad():
        model.last.weight[3, 0, 0, 0] = torch.nan
        model.last.bias[5] = torch.inf
    for layer in ("last", "out"):
        result = run(model, layer, steps=8)
        assert [status == "nonfinite" for status in result.status] == [n in (3, 5) for n in range(8)]
        assert not result.scores[[3, 5]].isfinite().any()
    others = [0, 1, 2, 4, 6, 7]
    torch.testing.assert_close(result.images[others], clean.images[others], rtol=0, atol=1e-5)
    assert model.last.weight[3].isnan().any()


def test_a_convolution_without_weights_is_dead_before_its_relu_too():
    model, _ = planted(F.relu)
    result = run(model, "last", steps=8)
    assert [status == "dead" for status in result.status] == [n == 4 for n in range(8)]


def test_without_restarts_the_evidence_says_so():
    model, _ = planted(F.relu)
    assert run(model, "out", 1, method=Normalized(restarts=0)).evidence == (
        "no gradient at the start, with and after redirected ReLUs",
    )
    assert run(model, "out", 1, method="classic", seed=1).evidence == ("no gradient at the start",)
