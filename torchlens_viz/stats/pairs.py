"""Moments on devices without float64: sums as pairs of float32, which hold as many digits."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from torchlens_viz.stats.channels import Moments

# A number as the float32 nearest to it, and what is left of it.
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_SPLIT = 4097.0  # 2**12 + 1: parts a float32 into two of 12 bits, whose products are exact


class Pairs(NamedTuple):
    """What one tensor tells, on its device, to be read later on; every field has shape (C,).

    Attributes:
        total: How many values there are.
        finite: How many of them are finite; of the others nothing else is told.
        zeros: How many are zero.
        low: The smallest, and inf where there is none.
        high: The largest, and -inf where there is none.
        unit: A power of two, in which the following are given.
        about: A value near the mean.
        first: The sum of the distances from it, as a pair.
        second: The sum of the squares of these distances, as a pair.
        histogram: (C, bins), or None.
    """

    total: torch.Tensor
    finite: torch.Tensor
    zeros: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    unit: torch.Tensor
    about: torch.Tensor
    first: Pair
    second: Pair
    histogram: torch.Tensor | None = None

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.low)

    @property
    def nbytes(self) -> int:
        """About how much memory they take."""
        return 12 * self.low.nbytes

    def moments(self) -> Moments:
        """Return what they tell on the host, in float64; this waits for the device."""
        total, count, zeros = torch.stack([self.total, self.finite, self.zeros]).cpu()
        floats = torch.stack([self.low, self.high, self.about, self.unit, *self.first, *self.second])
        low, high, about, unit, *sums = floats.cpu().double()
        first, second = sums[0] + sums[1], sums[2] + sums[3]
        number = count.clamp(min=1)
        is_constant = low == high  # its moments are known exactly
        squares = (second - first * first / number).clamp(min=0).masked_fill(is_constant, 0) * unit * unit
        return Moments(
            total=total,
            finite=count,
            zeros=zeros,
            low=low,
            high=high,
            mean=torch.where(is_constant, low, torch.where(count > 0, (about + first / number) * unit, 0)),
            squares=squares,
            histogram=None if self.histogram is None else self.histogram.cpu(),
        )


def measured_in_pairs(rows: torch.Tensor) -> Pairs:
    """Measure values (C, K) in float32 at most; nothing waits for the device."""
    values = rows if rows.dtype == torch.float32 else rows.float()
    is_finite = values.isfinite()
    inside = values.masked_fill(~is_finite, 0)
    low = values.masked_fill(~is_finite, torch.inf).amin(1)
    high = values.masked_fill(~is_finite, -torch.inf).amax(1)
    finite = is_finite.sum(1)
    # In units of about the largest value, whose squares and sums would pass what float32 holds.
    largest = inside.abs().amax(1).clamp(min=2.0**-126)
    unit = torch.exp2(torch.floor(torch.log2(largest)).clamp(max=127))
    scaled = inside / unit[:, None]
    about = (scaled / finite.clamp(min=1).float()[:, None]).sum(1)
    distance, rest = (part.masked_fill(~is_finite, 0) for part in _two_sum(scaled, -about[:, None]))
    first = _sum((distance, rest))
    square, error = _two_square(distance)
    second = _sum((square, error + 2 * distance * rest))
    return Pairs(
        total=torch.full_like(finite, rows.shape[1]),
        finite=finite,
        zeros=(values == 0).sum(1),
        low=low,
        high=high,
        unit=unit,
        about=about,
        first=first,
        second=second,
    )


def _two_sum(left: torch.Tensor, right: torch.Tensor) -> Pair:
    """Return the sum and what it leaves out, after Knuth."""
    total = left + right
    back = total - left
    return total, (left - (total - back)) + (right - back)


def _two_square(values: torch.Tensor) -> Pair:
    """Return the square and what it leaves out, after Dekker."""
    square, shifted = values * values, values * _SPLIT
    upper = shifted - (shifted - values)
    lower = values - upper
    return square, ((upper * upper - square) + 2 * upper * lower) + lower * lower


def _sum(pair: Pair) -> Pair:
    """Sum (C, K) pairs along their rows: halves are added to each other until one column is left."""
    large, small = pair
    while large.shape[1] > 1:
        half = large.shape[1] // 2
        total, error = _two_sum(large[:, :half], large[:, half : 2 * half])
        rest = small[:, :half] + small[:, half : 2 * half] + error
        if large.shape[1] % 2:
            total = torch.cat([total, large[:, -1:]], 1)
            rest = torch.cat([rest, small[:, -1:]], 1)
        large, small = total, rest
    return large[:, 0], small[:, 0]
