"""From values to levels: which range a picture shows, and which level each value gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from torchlens_viz.colormaps import NAN, NEGATIVE_INFINITY, POSITIVE_INFINITY
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.ranges import finite_range


@dataclass(frozen=True, slots=True)
class Limits:
    """The values that the first and the last level stand for, per group of tiles.

    `low` and `high` are (G,) float64 on the tiles' device, where G is 1 for one range over all tiles, or the
    number of tiles. `all_finite` says whether the tiles hold neither NaN nor infinity.
    """

    low: torch.Tensor
    high: torch.Tensor
    all_finite: bool

    @property
    def have_both_signs(self) -> bool:
        """Whether values on both sides of zero are shown."""
        return bool((self.low.min() < 0) & (self.high.max() > 0))

    def symmetric(self) -> Limits:
        """Return limits with zero in the middle that include these."""
        most = torch.maximum(self.low.abs(), self.high.abs())
        return Limits(-most, most, self.all_finite)


def find_limits(
    tiles: torch.Tensor, *, normalize: bool, scale_each: bool, value_range: Sequence[float] | None
) -> Limits:
    """Find the range of values that a picture shows.

    Args:
        tiles: (T, C, H, W) floating point; T, H and W at least 1.
        normalize: Take the range from the finite values; otherwise it is [0, 1].
        scale_each: A range for each tile, not one for all.
        value_range: The range (low, high), fixed by the caller.

    Raises:
        InvalidArgumentError: The options contradict each other, or the range is no range.
    """
    if value_range is not None and (len(value_range) != 2 or not _is_range(*value_range)):
        raise InvalidArgumentError(
            f"`value_range` must be (low, high) with low <= high, both finite, got {tuple(value_range)}"
        )
    for name, given in (("scale_each", scale_each), ("value_range", value_range is not None)):
        if given and not normalize:
            raise InvalidArgumentError(
                f"`{name}` has no effect with `normalize=False`; leave one of them out"
            )
    if scale_each and value_range is not None:
        raise InvalidArgumentError("`scale_each` and `value_range` exclude each other; leave one of them out")
    groups = (tiles if scale_each else tiles[None]).flatten(1)
    low, high, all_finite = finite_range(groups)
    if not normalize or value_range is not None:
        fixed = (0.0, 1.0) if value_range is None else value_range
        low, high = (torch.tensor([limit], dtype=torch.float64, device=tiles.device) for limit in fixed)
    return Limits(low.double(), high.double(), all_finite)


def to_levels(tiles: torch.Tensor, limits: Limits, *, levels: int, signed: bool) -> torch.Tensor:
    """Give every value the nearest of `levels` equally spaced levels.

    Args:
        tiles: (T, C, H, W) floating point.
        limits: The values of the first and the last level; what lies beyond gets the first or the last.
        levels: How many levels there are.
        signed: Whether the limits lie symmetrically about zero. Where all values are equal, the level is the
            middle one, except that zero gets the first level of limits that are not signed.

    Returns:
        (T, C, H, W) uint8 on the tiles' device. Non-finite values get a level without a meaning.
    """
    width = limits.high - limits.low
    is_constant = width == 0
    scale = torch.where(is_constant, 0, (levels - 1) / width)
    has_middle = is_constant if signed else is_constant & (limits.low != 0)
    base = torch.where(has_middle, (levels - 1) // 2, 0)
    compute = _compute_dtype(tiles.dtype, width)
    low, high, scale, base = (
        value.to(compute)[:, None, None, None] for value in (limits.low, limits.high, scale, base + 0.5)
    )
    values = tiles.to(compute)
    if not limits.all_finite:
        values = values.nan_to_num(0)
    return values.clamp(low, high).sub_(low).mul_(scale).add_(base).to(torch.uint8)


def special_codes(tiles: torch.Tensor) -> torch.Tensor:
    """Return the palette entry of each pixel that is not finite in some channel, and 0 elsewhere.

    Args:
        tiles: (T, C, H, W).

    Returns:
        (T, 1, H, W) uint8. NaN in any channel outweighs an infinity.
    """
    codes = torch.zeros_like(tiles[:, :1], dtype=torch.uint8)
    for code, is_code in (
        (NEGATIVE_INFINITY, tiles == -torch.inf),
        (POSITIVE_INFINITY, tiles == torch.inf),
        (NAN, tiles.isnan()),
    ):
        codes.masked_fill_(is_code.any(1, keepdim=True), code)
    return codes


def _is_range(low: float, high: float) -> bool:
    return isfinite(low) and isfinite(high) and low <= high


def _compute_dtype(dtype: torch.dtype, width: torch.Tensor) -> torch.dtype:
    # Float32 holds neither the width of a range that fills it nor the scale of a very narrow one.
    extreme = (width > 1e37) | ((width > 0) & (width < 1e-30))
    if dtype == torch.float64 or bool(extreme.any()):
        return torch.float64
    return torch.float32
