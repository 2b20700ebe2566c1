"""What is the caller's stays as it is: what models note, keep, freeze, write to and are given."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from tests.models.test_models_that_change import BATCH, CALLS, IMAGE, LOADER
from torchlens_viz import (
    FolderWriter,
    Monitor,
    compare,
    explain,
    layers,
    maximize,
    overlay_grid,
    pair_grid,
    survey,
)
from torchlens_viz.models.state import inference


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Table:
    """A class of the model's own, which keeps what it was asked for."""

    def __init__(self):
        self.rows = {}

    def row(self, x):
        if x.shape[-1] not in self.rows:
            self.rows[x.shape[-1]] = x[:1, :1] * 0 + 1
        return self.rows[x.shape[-1]]


class Noting(Plain):
    """Counts, lists and keeps, in every kind of place."""

    def __init__(self):
        super().__init__()
        self.calls, self.last, self.scaled = 0, None, None
        self.recent, self.nested = deque([0], maxlen=2), {"shapes": [[]]}
        self.counts, self.note, self.table = np.zeros(2), SimpleNamespace(calls=0), Table()
        self.averages = {"conv": torch.zeros(4)}
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.note.calls += 1
        self.counts += 1
        self.steps += 1
        self.recent.append(self.calls)
        self.nested["shapes"][0].append(x.shape)
        self.last = y = self.conv(x * self.table.row(x))
        self.averages["conv"].mul_(0.9).add_(1)
        self.register_buffer("extra", torch.ones(1), persistent=False)
        if self.scaled is None:  # kept without a graph, it could not be trained
            self.scaled = self.head.weight * 2
        return F.linear(F.relu(y).mean((2, 3)), self.scaled)


class Freezing(Plain):
    def forward(self, x):
        self.conv.weight.requires_grad_(False)
        self.head.weight.grad = None
        return super().forward(x)


def pruned():
    model = Plain()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    return model


def told(value, seen):
    """Return all that can be told of a value, so that two of them can be compared."""
    if isinstance(value, torch.Tensor):
        held = type(value), id(value), value.detach().tolist(), value.requires_grad, value._version
        return (*held, None if not value.is_leaf or value.grad is None else value.grad.tolist())
    if id(value) in seen:
        return id(value)
    seen[id(value)] = value
    if isinstance(value, np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return id(value), [(str(key), told(each, seen)) for key, each in value.items()]
    if isinstance(value, list | tuple | deque | set):
        return type(value), [told(each, seen) for each in value]
    if isinstance(value, nn.Module | SimpleNamespace | Table):
        return id(value), told(vars(value), seen)
    return value if isinstance(value, int | float | str | None) else str(value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Noting, Freezing, pruned])
def test_what_a_model_notes_keeps_and_freezes_is_as_it_was(kind, training):
    torch.manual_seed(0)
    model = kind()
    model(BATCH).sum().backward()
    if kind is Noting:
        model.scaled = None
    for module in model.modules():
        module.training = training
    # It cannot be copied, as its graph cannot.
    others = {"compare": lambda model: compare(model, Plain(), BATCH)}
    for name, call in {**CALLS, **others}.items():
        before = told(model, {})
        call(model)
        assert told(model, {}) == before, name


def test_a_backward_pass_that_was_begun_can_be_ended():
    class Counting(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            y = super().forward(x) * self.scale
            with torch.no_grad():
                self.scale += 1
                self.head.weight.clamp_(-0.1, 0.1)
            return y

    model = Counting()
    loss = (model.conv(BATCH).mean((2, 3)) @ model.head.weight.T * model.scale).sum()
    expected = torch.autograd.grad(loss, model.conv.weight, retain_graph=True)[0]
    survey(model, LOADER, ["conv"])
    torch.testing.assert_close(torch.autograd.grad(loss, model.conv.weight)[0], expected)


def test_what_goes_on_within_is_seen_until_the_end():
    model = Noting()
    with inference(model):
        model(BATCH)
        model(BATCH)
        assert model.calls == 2
        assert len(model.nested["shapes"][0]) == 2
    assert (model.calls, model.nested) == (0, {"shapes": [[]]})


class InPlace(Plain):
    """Normalises its input where it lies."""

    def forward(self, x):
        x.sub_(0.5).mul_(4)
        return super().forward(x)


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_works_in_place_is_given_copies(name):
    torch.manual_seed(0)
    model = InPlace()
    image, batch = IMAGE.clone(), BATCH.clone()
    CALLS[name](model)
    assert torch.equal(image, IMAGE)
    assert torch.equal(batch, BATCH)


def test_what_it_is_given_again_and_again_is_the_same_every_time(tmp_path):
    torch.manual_seed(0)
    model, plain = InPlace(), Plain()
    plain.load_state_dict(model.state_dict())
    scaled = (BATCH - 0.5) * 4
    loader = [(BATCH, torch.zeros(4))]
    with torch.no_grad():
        expected = plain.conv(scaled).amax((2, 3))
    for _ in range(2):
        found = survey(model, loader, ["conv"], encoder=lambda x: x.flatten(1))
        torch.testing.assert_close(found.top["conv"].values[:, 0], expected.amax(0))
    assert overlay_grid(model, "conv", IMAGE).tobytes() == overlay_grid(model, "conv", IMAGE).tobytes()
    assert pair_grid(model, "conv", IMAGE).tobytes() == pair_grid(model, "conv", IMAGE).tobytes()
    assert layers(model, BATCH).rows
    seen = []
    model.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with Monitor(model, FolderWriter(tmp_path), probe=BATCH, every=1) as monitor:
        for step in range(3):
            monitor.step(step)
    assert len(seen) >= 3
    for each in seen:
        torch.testing.assert_close(each, scaled)


def test_what_stands_beside_the_image_is_given_anew_at_every_step():
    class Two(Plain):
        def forward(self, x, weight):
            weight.mul_(0.5)
            return super().forward(x * weight)

    torch.manual_seed(0)
    weight, model = torch.full((1, 3, 1, 1), 2.0), Two()
    options = {"channels": [0], "steps": 4, "size": 12, "transforms": "none"}
    found = maximize(model, "conv", inputs=lambda images: (images, weight), **options)
    assert torch.equal(weight, torch.full((1, 3, 1, 1), 2.0))
    torch.testing.assert_close(found.scores, maximize(_same(model), "conv", **options).scores)


def _same(model):
    """Return a network that is the same with a weight of 1."""
    plain = Plain()
    plain.load_state_dict(model.state_dict())
    return plain


def test_an_inverse_may_work_in_place():
    torch.manual_seed(0)
    image = IMAGE.clone()
    explain(Plain(), image, 1, method="gradient", invert=lambda batch: batch.mul_(0.5))
    overlay_grid(Plain(), "conv", image, invert=lambda batch: batch.mul_(0.5))
    assert torch.equal(image, IMAGE)


def test_random_numbers_of_every_kind_go_on_behind_maximize():
    class Drawing(Plain):
        def forward(self, x):
            return super().forward(x) + 0 * (random.random() + np.random.rand() + float(torch.rand(())))

    drawing, plain = Drawing(), Plain()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    maximize(drawing, "conv", channels=[0], steps=3, size=12)
    maximize(plain, "conv", [0], steps=2, size=12, preprocess=lambda x: x + 0 * random.random())
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before
