"""`project` on VGG16, 224 pixels, 64 channels of `features.10`, against captum's loop over units.

Both go back from the same units by the same rules. captum's network has no in-place ReLUs, which it cannot
hook, and frozen weights; it runs the whole network for each unit, and is given 4 units for each 64 of ours.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from torchlens_viz import project

LAYER = 10
CHANNELS = 64
THEIR_CHANNELS = 4
ROUNDS = 5


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vgg16(weights=None).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def captums(network, kind):
    attr = pytest.importorskip("captum.attr")
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return getattr(attr, kind)(twin, twin.features[LAYER])


@pytest.mark.parametrize(
    ("rule", "kind"), [("deconvnet", "NeuronDeconvolution"), ("guided", "NeuronGuidedBackprop")]
)
def test_project_captum(versus, network, image, rule, kind):
    method = captums(network, kind)
    found = project(network, f"features.{LAYER}", image, range(CHANNELS), rule=rule)

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [
                method.attribute(image, (channel, *found.positions[channel].tolist()))
                for channel in range(THEIR_CHANNELS)
            ]

    for ours, other in zip(found.images, theirs(), strict=False):
        assert (ours - other[0]).norm() <= 1e-3 * other.norm()
    versus(
        lambda: project(network, f"features.{LAYER}", image, range(CHANNELS), rule=rule),
        theirs,
        target=">= 10",
        rounds=ROUNDS,
        share=THEIR_CHANNELS / CHANNELS,
        note="64 channels",
    )


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
