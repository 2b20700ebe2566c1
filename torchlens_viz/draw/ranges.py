"""The range of the finite values of a group, whatever else the group holds."""

from __future__ import annotations

from math import isfinite

import torch


def finite_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Find the least and the greatest finite value of each group.

    Args:
        groups: (G, K) floating point, K at least 1.

    Returns:
        Two tensors (G,) of the input's dtype, 0 and 1 for a group without a finite value; and whether all
        values of all groups are finite. Costs one host sync.
    """
    # Two vectorised passes: aminmax along a dimension is not vectorised, and many times slower.
    lows, highs = groups.amin(1), groups.amax(1)
    if isfinite((highs.double() - lows.double()).sum().item()):
        return lows, highs, True
    is_finite = groups.isfinite()
    lows = groups.masked_fill(~is_finite, torch.inf).amin(1)
    highs = groups.masked_fill(~is_finite, -torch.inf).amax(1)
    none = lows > highs
    return lows.masked_fill(none, 0), highs.masked_fill(none, 1), bool(is_finite.all())
