"""What the tests of the monitor share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def probe():
    return torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))
