"""What the tests of recording share: small networks, and a process that is left as it was."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 3),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(4, 5, 3),
            relu2=nn.ReLU(True),
        )
    ).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def bare_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3)).eval()


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was(process_as_it_was: None) -> None:
    pass
