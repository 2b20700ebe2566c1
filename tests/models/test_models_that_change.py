"""Models that write to their own weights or attributes when they run in eval mode: nothing of it is left."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlens_viz import (
    ablate,
    compare,
    explain,
    layers,
    maximize,
    overlay_grid,
    pair_grid,
    project,
    receptive_field,
    survey,
)
from torchlens_viz.models.state import set_eval

IMAGE = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))
BATCH = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))
LOADER = [(BATCH[:2], torch.tensor([0, 1])), (BATCH[2:], torch.tensor([2, 0]))]


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)
        self.update = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.is_merged = False
        self.merged = []
        self.mean = torch.zeros(4)

    def forward(self, x):
        y = self.conv(x)
        return self.head(F.relu(y).mean((2, 3)))


class Merging(Changing):
    """Folds an update into its weight in its first pass in eval mode."""

    def forward(self, x):
        if not self.training and not self.is_merged:
            self.conv.weight.data += self.update
            self.is_merged = True
            self.merged.append("update")
        return super().forward(x)


class Replacing(Changing):
    def forward(self, x):
        if not self.training and not self.is_merged:
            self.conv.weight.data = self.conv.weight.data + self.update
            self.is_merged = True
        return super().forward(x)


class ReplacingParameter(Changing):
    def forward(self, x):
        if not self.training and not self.is_merged:
            self.conv.weight = nn.Parameter(self.conv.weight.detach() + self.update)
            self.is_merged = True
        return super().forward(x)


class Clamped(Changing):
    def forward(self, x):
        with torch.no_grad():
            self.conv.weight.clamp_(min=0)
        return super().forward(x)


class ThroughViews(Changing):
    def forward(self, x):
        every_other = self.conv.weight.detach().view(-1)
        every_other[::2] *= 0.5
        torch._foreach_mul_([self.head.weight.data, self.head.bias.data], 0.5)
        torch.mul(self.update.data, 0.5, out=self.update.data)
        return super().forward(x)


class MaxNorm(Changing):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, max_norm=0.1)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((2, 3)) + self.embedding(torch.tensor([1])))


class Averaging(Changing):
    """Subtracts a moving average, which is a plain attribute, and counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 2, 3))
        return self.head(F.relu(y - self.mean.view(1, -1, 1, 1)).mean((2, 3)))


class FlagIsProperty(Changing):
    @property
    def training(self):
        return self.__dict__.get("is_training", True)

    @training.setter
    def training(self, value):
        if not value and self.training and "conv" in self.__dict__.get("_modules", ()):
            self.conv.weight.data += self.update
        self.__dict__["is_training"] = value


class SetsAttributes(Changing):
    def __setattr__(self, name, value):
        if name == "training" and not value and "conv" in self.__dict__.get("_modules", ()):
            self.conv.weight.data += self.update
        super().__setattr__(name, value)


KINDS = [
    *(Merging, Replacing, ReplacingParameter, Clamped, ThroughViews, MaxNorm, Averaging),
    *(FlagIsProperty, SetsAttributes),
]
CALLS = {
    "maximize": lambda model: maximize(model, "conv", channels=[0], steps=3, size=12),
    "explain": lambda model: explain(model, IMAGE, 1).trust,
    "ablationcam": lambda model: explain(model, IMAGE, 1, method="ablationcam", layer="conv"),
    "smoothgrad": lambda model: explain(model, IMAGE, 1, method="smoothgrad"),
    "guided": lambda model: explain(model, IMAGE, 1, method="guided"),
    "project": lambda model: project(model, "conv", IMAGE),
    "survey": lambda model: survey(model, LOADER, ["conv"]),
    "survey by relevance": lambda model: survey(model, LOADER, ["conv"], target=lambda out, _: out[:, 0]),
    "ablate": lambda model: ablate(model, LOADER, "conv", loss="cross_entropy"),
    "overlay_grid": lambda model: overlay_grid(model, "conv", IMAGE),
    "pair_grid": lambda model: pair_grid(model, "conv", IMAGE),
    "receptive_field": lambda model: receptive_field(model, "conv", (1, 3, 12, 12)),
    "layers": lambda model: layers(model, IMAGE[None]),
    "compare": lambda model: compare(model, copy.deepcopy(model), BATCH),
}


def everything(model):
    return (
        {name: each.detach().clone() for name, each in model.named_parameters()},
        [id(each) for each in model.parameters()],
        [{**vars(module), "merged": [*vars(module).get("merged", ())]} for module in model.modules()],
    )


def is_same(before, after):
    weights = all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    ours, theirs = before[2], after[2]
    attributes = all(
        one.keys() == other.keys()
        and all(other[name] is value for name, value in one.items() if name != "merged")
        and one["merged"] == other["merged"]
        for one, other in zip(ours, theirs, strict=True)
    )
    return weights and before[1] == after[1] and attributes


def changed(kind, *, training):
    torch.manual_seed(0)
    model = kind()
    if not training:
        set_eval(model)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_it(kind, training):
    model = changed(kind, training=training)
    for name, call in CALLS.items():
        before = everything(model)
        call(model)
        assert is_same(before, everything(model)), name


@pytest.mark.parametrize("kind", [*KINDS[:-2], Changing])
def test_it_is_looked_at_as_it_answers_in_eval_mode(kind):
    model = changed(kind, training=True)
    plain = changed(kind, training=False)
    with torch.no_grad():
        expected = plain(IMAGE[None])[0, 1]
        weight = plain.conv.weight.clone()  # now, as it is after a pass
    found = explain(model, IMAGE, 1, method="gradcam", layer="conv")
    torch.testing.assert_close(found.scores[0], expected)
    if kind is ThroughViews:  # it is another network in every pass
        return
    with torch.no_grad():
        best = F.conv2d(BATCH, weight, model.conv.bias).amax((0, 2, 3))
    seen = survey(model, LOADER, ["conv"])
    torch.testing.assert_close(seen.top["conv"].values[:, 0], best)


def test_the_guard_can_fail():
    model = changed(Merging, training=True)
    before = everything(model)
    model.eval()(BATCH)
    assert not is_same(before, everything(model))


def test_what_is_in_training_can_go_on():
    model = changed(Merging, training=True)
    loss = model(BATCH).sum()  # whose graph needs the weights as they were
    maximize(model, "conv", channels=[0], steps=2, size=12)
    explain(model, IMAGE, 1)
    loss.backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    expected(BATCH).sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, expected.conv.weight.grad)
