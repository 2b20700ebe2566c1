"""A small training run that is held to be healthy while it runs, and the faults that this catches."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlens_viz import RunningStats, capture
from torchlens_viz.testing import assert_finite, assert_no_dead_channels, assert_std, assert_zero_fraction


def build() -> nn.Sequential:
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 8, 3, padding=1),
        relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(8, 16, 3, padding=1, stride=2),
        relu2=nn.ReLU(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(16, 2),
    )
    return nn.Sequential(layers)


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes that run down or across, in noise, and which of them."""
    labels = torch.randint(2, (32,), generator=generator)
    down = torch.arange(12).remainder(4).ge(2).float().expand(12, 12)
    images = torch.where(labels.view(-1, 1, 1).bool(), down, down.T)
    return (images + 0.3 * torch.randn(32, 12, 12, generator=generator)).unsqueeze(1) - 0.5, labels


def train(net: nn.Sequential, *, lr: float = 0.05, steps: int = 60, spoil=None) -> float:
    """Train with checks after every tenth step; return the share of a new batch that is right."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        images, labels = batch(generator)
        if spoil is not None:
            spoil(step, images)
        with capture(net, "*", reduce=RunningStats) as seen:
            loss = F.cross_entropy(net(images), labels)
        if step % 10 == 0:
            when = f"in step {step}"
            assert_finite(seen, msg=when)
            assert_no_dead_channels(seen, layers="relu*", max_dead=4, msg=when)
            assert_zero_fraction(seen, 0, 0.9, layers="relu*", per="layer", msg=when)
            assert_std(seen, 1e-3, 20, layers=["conv*", "head"], per="layer", msg=when)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, labels = batch(generator)
    with torch.no_grad():
        return (net(images).argmax(1) == labels).float().mean().item()


def test_a_healthy_training_passes():
    assert train(build()) > 0.95


def test_a_learning_rate_that_is_too_high_is_caught():
    with pytest.raises(AssertionError) as caught:
        train(build(), lr=30.0)
    assert str(caught.value).startswith("in step 10\n")


def test_dead_relus_are_caught():
    net = build()
    net.conv2.bias.data[:6] = -100.0
    message = (
        r"^in step 0\n1 of 2 failed\n`relu2`: [6-9] of 16 channels \(\d+\.\d%\) are dead, at most 4 allowed\n"
        r"  channels: 0 \(max 0\), 1 \(max 0\), 2 \(max 0\), 3 \(max 0\), 4 \(max 0\) and \d more\n"
        r"  dead: no value of 1152 in the channel exceeds eps = 0$"
    )
    with pytest.raises(AssertionError, match=message):
        train(net)


def test_a_nan_in_one_image_is_caught_where_it_arises():
    def spoil(step, images):
        if step == 20:
            images[3, 0, 5, 5] = float("nan")

    message = (
        r"^in step 20\n7 of 7 failed\n`conv1`: 72 of 36,864 values \(0.2%\) are NaN or infinite, in 8 of 8 "
    )
    with pytest.raises(AssertionError, match=message):
        train(build(), spoil=spoil)
