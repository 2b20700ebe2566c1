"""`ReceptiveField`: positions that are not there are refused."""

from __future__ import annotations

import pytest
from torch import nn

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.receptive.find import receptive_field


def test_positions_that_are_not_there():
    field = receptive_field(nn.Conv2d(1, 1, 3), "", (1, 1, 8, 8))
    with pytest.raises(InvalidArgumentError, match=r"an index per axis of a map of \(6, 6\), got \(6, 0\)"):
        field.region((6, 0))
    with pytest.raises(InvalidArgumentError, match="indices count from 0"):
        field.center((-1, 0))
    with pytest.raises(InvalidArgumentError, match="`position` must be an index per axis"):
        field.region((1,))
    with pytest.raises(InvalidTypeError, match="`position` must be an index per axis"):
        field.region((1.0, 2.0))
    with pytest.raises(InvalidTypeError, match="`position` must be an index per axis"):
        field.region(3)
