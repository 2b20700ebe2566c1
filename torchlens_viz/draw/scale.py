"""From values to levels: which range a picture shows, and which level each value gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any, Final, Literal, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from torchlens_viz.arguments import made_of, shown, wide
from torchlens_viz.draw.palette import NAN, NEGATIVE_INFINITY, POSITIVE_INFINITY
from torchlens_viz.errors import InvalidArgumentError

ValueRange: TypeAlias = Sequence[float] | Literal["robust"]

_CUT: Final = 200  # one in so many values at either end lies beyond robust limits


@dataclass(frozen=True, slots=True)
class Limits:
    """The values that the first and the last level stand for, per group of tiles.

    `low` and `high` are (G,) float64; G is 1 for one range over all tiles, or the number of tiles. They are
    numpy's, since so few numbers cost less there. `all_finite` says whether the tiles hold neither NaN nor
    infinity.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    all_finite: bool

    @property
    def have_both_signs(self) -> bool:
        """Whether values on both sides of zero are shown."""
        return bool(self.low.min() < 0 < self.high.max())

    def symmetric(self) -> Limits:
        """Return limits with zero in the middle that include these."""
        most = np.maximum(np.abs(self.low), np.abs(self.high))
        return Limits(-most, most, self.all_finite)


def find_limits(
    tiles: torch.Tensor, *, normalize: bool, scale_each: bool, value_range: ValueRange | None
) -> Limits:
    """Find the range of values that a picture shows.

    Args:
        tiles: (T, C, H, W) floating point; T, H and W at least 1.
        normalize: Take the range from the finite values; otherwise it is [0, 1].
        scale_each: A range for each tile, not one for all.
        value_range: The range (low, high), fixed by the caller, or `"robust"` for `robust_range`.

    Raises:
        InvalidArgumentError: The options contradict each other, or the range is no range.
        InvalidTypeError: The range does not consist of numbers.
    """
    robust = is_robust(value_range)
    fixed = (0.0, 1.0)
    if value_range is not None and not is_robust(value_range):
        fixed = _as_range(value_range)
    for name, given in (("scale_each", scale_each), ("value_range", value_range is not None)):
        if given and not normalize:
            raise InvalidArgumentError(
                f"`{name}` has no effect with `normalize=False`; leave one of them out"
            )
    if scale_each and value_range is not None and not robust:
        raise InvalidArgumentError("`scale_each` and `value_range` exclude each other; leave one of them out")
    groups = (tiles if scale_each else tiles[None]).flatten(1)
    *found, all_finite = robust_range(groups) if robust else finite_range(groups)
    if not normalize or (value_range is not None and not robust):
        return Limits(np.array([fixed[0]]), np.array([fixed[1]]), all_finite)
    low, high = (wide(limit).numpy(force=True) for limit in found)
    return Limits(low, high, all_finite)


@np.errstate(all="ignore")  # what overflows is found and done in another way
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
    if tiles.dtype == torch.float64:
        return _placed(tiles, limits, levels, signed)
    placed = _placed(tiles.float(), limits, levels, signed)
    exceeds = _exceed_float32(limits)
    if exceeds.any():
        # These tiles only: the others must look as they do without them.
        chosen = torch.from_numpy(exceeds).expand(len(tiles)).to(tiles.device)
        part = Limits(limits.low[exceeds], limits.high[exceeds], limits.all_finite)
        placed[chosen] = _placed(wide(tiles[chosen]), part, levels, signed).to(tiles.device)
    return placed


def _placed(values: torch.Tensor, limits: Limits, levels: int, signed: bool) -> torch.Tensor:
    width = limits.high - limits.low
    is_constant = width == 0
    # Float64 holds neither a width of twice its greatest number nor the scale of a width near its least one.
    unit = np.ones_like(width)
    unit[np.isinf(width)] = 2.0**-2
    unit[(width > 0) & (width < 2.0**-900)] = 2.0**600
    low, high = limits.low * unit, limits.high * unit
    scale = np.where(is_constant, 0, (levels - 1) / (high - low))
    has_middle = is_constant if signed else is_constant & (low != 0)
    base = np.where(has_middle, (levels - 1) // 2 + 0.5, 0.5)
    numbers = torch.from_numpy(np.array([low, high, scale, base, unit])).to(values.dtype)
    by: list[Any]  # a number each, which torch works with faster than with a tensor, or (T, 1, 1, 1)
    by = numbers[:, 0].tolist() if len(width) == 1 else [*numbers.to(values.device)[..., None, None, None]]
    if not limits.all_finite:
        values = values.nan_to_num(0)
    if values.dtype == torch.float64:
        values = values * by[4]
    return values.clamp(*by[:2]).sub_(by[0]).mul_(by[2]).add_(by[3]).to(torch.uint8)


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


def is_robust(value_range: object) -> TypeGuard[Literal["robust"]]:
    """Tell whether robust limits are asked for, in the place of two numbers."""
    return isinstance(value_range, str) and value_range == "robust"


def share_beyond(tiles: torch.Tensor, limits: Limits) -> float:
    """Return the share of the finite values of tiles (T, C, H, W) that lie beyond the limits, 0 to 1."""
    values = wide(tiles)
    low, high = (
        torch.from_numpy(limit).to(values.device)[:, None, None, None] for limit in (limits.low, limits.high)
    )
    is_finite = values.isfinite()
    outside = ((values < low) | (values > high)) & is_finite
    return (outside.sum() / is_finite.sum().clamp(min=1)).item()


def words_for(beyond: float | None, *, robust: bool) -> list[str]:
    """Return what is to be said of a share of values that the limits cut off, for a legend."""
    if beyond is None or (beyond == 0 and not robust):
        return []
    share = "under 0.1%" if 0 < beyond < 0.0005 else f"{beyond:.1%}"
    words = f"{share} of the values beyond" if beyond else "no value beyond"
    return [f"limits at {1 / _CUT:.1%} and {1 - 1 / _CUT:.1%}, {words}" if robust else words]


def _as_range(value_range: Any) -> tuple[float, float]:
    rule = (
        f'`value_range` must be (low, high) with low <= high, both finite, or "robust", got '
        f"{shown(value_range)}"
    )
    limits = made_of(value_range, lambda given: [float(limit) for limit in islice(given, 3)], rule)
    if len(limits) != 2 or not all(map(isfinite, limits)) or limits[0] > limits[1]:
        raise InvalidArgumentError(rule)
    return limits[0], limits[1]


def _exceed_float32(limits: Limits) -> npt.NDArray[np.bool_]:
    # Float32 holds neither the width of a range that fills it, nor the scale of a very narrow one, nor limits
    # that lie close together far from zero, unless they are float32 values themselves.
    low, high = limits.low, limits.high
    width = high - low
    is_close = width < 1e-3 * np.maximum(np.abs(low), np.abs(high))
    is_inexact = is_close & ((low.astype(np.float32) != low) | (high.astype(np.float32) != high))
    exceeds: npt.NDArray[np.bool_] = (width > 1e37) | ((width > 0) & (width < 1e-30)) | is_inexact
    return exceeds


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
    if isfinite((wide(highs) - wide(lows)).sum().item()):
        return lows, highs, True
    is_finite = groups.isfinite()
    lows = groups.masked_fill(~is_finite, torch.inf).amin(1)
    highs = groups.masked_fill(~is_finite, -torch.inf).amax(1)
    none = lows > highs
    return lows.masked_fill(none, 0), highs.masked_fill(none, 1), bool(is_finite.all())


def robust_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Find limits of each group beyond which few of its values lie, whatever these are.

    Of the finite values other than zero, 0.5 % lie below and 0.5 % above: zero, of which rectified maps are
    full, says nothing of how far the others reach. It lies within the limits where it occurs, and where
    values of both signs occur, the limits have both. Groups of fewer than 201 such values are not cut, nor
    are those of which nothing but one value would be left.

    Args:
        groups: As in `finite_range`, whose limits these never exceed.

    Returns:
        As `finite_range`.
    """
    lows, highs, all_finite = finite_range(groups)
    if len(groups) == 1 and groups.device.type == "cpu":
        inner_lows, inner_highs = _selected(groups[0], all_finite, lows, highs)
    else:
        inner_lows, inner_highs = _sorted(groups, lows, highs)
    if bool(((lows <= 0) & (highs >= 0)).any()):
        has_zero = (groups == 0).any(1)
        inner_lows = torch.where(has_zero, inner_lows.clamp(max=0), inner_lows)
        inner_highs = torch.where(has_zero, inner_highs.clamp(min=0), inner_highs)
    # A sign that is all but cut off keeps its value next to zero, so that colours are as without the cut.
    is_lost = (lows < 0) & (inner_lows >= 0)
    if bool(is_lost.any()):
        nearest = groups.masked_fill(~(groups.isfinite() & (groups < 0)), -torch.inf).amax(1)
        inner_lows = torch.where(is_lost, nearest, inner_lows)
    is_lost = (highs > 0) & (inner_highs <= 0)
    if bool(is_lost.any()):
        nearest = groups.masked_fill(~(groups.isfinite() & (groups > 0)), torch.inf).amin(1)
        inner_highs = torch.where(is_lost, nearest, inner_highs)
    nothing_left = inner_lows == inner_highs
    return lows.where(nothing_left, inner_lows), highs.where(nothing_left, inner_highs), all_finite


def _selected(
    values: torch.Tensor, all_finite: bool, lows: torch.Tensor, highs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the limits (1,) of the values (K,) of a single group, by selection."""
    numbers = (values.float() if values.dtype.itemsize < 4 else values).detach().numpy()
    numbers = numbers[numbers != 0]
    if not all_finite:
        numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return lows, highs
    cut = (len(numbers) - 1) // _CUT
    ends = [cut, len(numbers) - 1 - cut]
    numbers.partition(ends)
    low, high = torch.from_numpy(numbers[ends]).to(values.dtype)[:, None]
    return low, high


def _sorted(
    groups: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    counts = groups.isfinite() & (groups != 0)
    ordered = groups.masked_fill(~counts, torch.inf).sort(1).values
    last = counts.sum(1) - 1
    cut = last.clamp(min=0) // _CUT
    ends = [ordered.gather(1, at.clamp(min=0)[:, None])[:, 0] for at in (cut, last - cut)]
    return torch.where(last < 0, lows, ends[0]), torch.where(last < 0, highs, ends[1])
