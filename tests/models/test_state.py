"""Whatever is done with a model: flags, buffers and random numbers are given back as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import Noisy, mixed_model
from torchlens_viz import ablate, compare, explain, layers, overlay_grid, receptive_field, survey
from torchlens_viz.models.state import inference


def test_inference_leaves_every_flag_and_the_random_numbers():
    model = mixed_model(Noisy())
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


class Restless(nn.Module):
    """Draws from every kind of generator, and counts in place and by a new buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("usual", torch.zeros(4))
        self.own = torch.Generator()
        self.python, self.legacy, self.new = (
            random.Random(0),
            np.random.RandomState(0),
            np.random.default_rng(0),
        )

    def forward(self, x):
        y = self.conv(x)
        self.count += 1
        self.usual = 0.9 * self.usual + 0.1 * y.detach().mean((0, 2, 3))
        drawn = random.random() + np.random.rand() + self.python.random() + self.legacy.rand()
        drawn += self.new.random() + float(torch.rand(1)) + float(torch.rand(1, generator=self.own))
        return self.last(y) + 0 * drawn


def state_of(model):
    return {
        **{name: (id(each), each.tolist()) for name, each in model.named_buffers()},
        "flags": [module.training for module in model.modules()],
        "torch": [torch.get_rng_state().tolist(), model.own.get_state().tolist()],
        "python": [random.getstate(), model.python.getstate()],
        "numpy": [
            str(np.random.get_state()),
            str(model.legacy.get_state()),
            str(model.new.bit_generator.state),
        ],
    }


IMAGES = torch.rand(2, 3, 8, 8)
USES = {
    "survey": lambda model: survey(model, [IMAGES], "last", progress=False),
    "survey, with a target": lambda model: survey(
        model, [IMAGES], "last", progress=False, target=lambda output, batch: output.flatten(1)[:, 0]
    ),
    "overlay": lambda model: overlay_grid(model, "last", IMAGES[:1]),
    "layers": lambda model: layers(model, IMAGES),
    "receptive field": lambda model: receptive_field(model, "last", (1, 3, 8, 8)),
    "compare": lambda model: compare(model, model, [IMAGES]),
    "explain": lambda model: explain(model, IMAGES[:1], lambda output: output.flatten(1)[:, 0]),
    "ablate": lambda model: ablate(
        model, [(IMAGES, torch.zeros(2).long())], "conv", loss=lambda output, batch: output.mean((1, 2, 3))
    ),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_the_forward_pass_counts_and_draws_is_as_it_was(use):
    model = Restless()
    before = state_of(model)
    with torch.no_grad():
        model(IMAGES)
    after = state_of(model)
    assert all(before[key] != after[key] for key in before if key != "flags")  # or else nothing is tested
    USES[use](model)
    assert state_of(model) == after


@pytest.mark.parametrize("use", ["survey", "overlay"])
def test_an_interruption_leaves_no_counts_either(use):
    model = Restless()
    before = state_of(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.last.register_forward_hook(interrupt):
        USES[use](model)
    assert state_of(model) == before
