"""`project` on VGG16, 224 pixels, 64 channels of `features.10`, against going back through the whole image.

`python -m benchmarks --only project` has captum's loop over units.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.models import vgg16

from torchlens_viz import project

LAYER = 10
CHANNELS = 64
ROUNDS = 5


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vgg16(weights=None).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", ["deconvnet", "gradient"])
def test_project_one_by_one(versus, network, image, rule):
    """Against going back through the whole image for each unit, with one forward pass for all."""
    cut = network.features[: LAYER + 1]
    found = project(network, f"features.{LAYER}", image, range(CHANNELS), rule="gradient")

    def theirs():
        leaf = image.clone().requires_grad_()
        maps = cut(leaf)[0]
        return [
            torch.autograd.grad(maps[channel, *found.positions[channel].tolist()], leaf, retain_graph=True)
            for channel in range(CHANNELS // 4)
        ]

    versus(
        lambda: project(network, f"features.{LAYER}", image, range(CHANNELS), rule=rule),
        theirs,
        target="",
        rounds=ROUNDS,
        share=1 / 4,
        note="theirs with its forward pass counted 4 times",
    )
