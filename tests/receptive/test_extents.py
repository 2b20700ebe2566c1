"""Extents know where they come from, and no values."""

from __future__ import annotations

import pytest
import torch

from torchlens_viz.receptive.extents import Extents, UnknownOperationError


def test_extents_have_no_values():
    with pytest.raises(UnknownOperationError, match="of extents"):
        torch.relu(Extents.of_input((1, 1, 2, 2)))
