"""A small classifier and images for it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from torchlens_viz.attribution.way import Method

METHODS = get_args(Method)


def classifier(**options) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, **options), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.fixture
def net() -> nn.Sequential:
    return classifier()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 12, 16)


class Wrapped(nn.Module):
    """Puts out what a function makes of the output of a network."""

    def __init__(self, net: nn.Module, make) -> None:
        super().__init__()
        self.net = net
        self.make = make

    def forward(self, images: torch.Tensor):
        return self.make(self.net(images))
