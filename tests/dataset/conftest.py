"""What the tests of the survey share."""

from __future__ import annotations

import pytest
from torch import nn


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3)
    ).train()
