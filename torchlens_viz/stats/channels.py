"""What the values of each channel were: counts, moments, extremes, and their union."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import numpy.typing as npt
import torch

from torchlens_viz.arguments import named_device, number
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.notebook import Page, profile
from torchlens_viz.notebook import number as cell

_Array = TypeVar("_Array", torch.Tensor, npt.NDArray[Any])


class Moments(NamedTuple):
    """What is known of the values of each channel; every field has shape (C,), `histogram` (C, bins)."""

    total: torch.Tensor
    finite: torch.Tensor
    zeros: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor  # the sum of squared distances from the mean
    histogram: torch.Tensor | None = None

    def to(self, device: torch.device) -> Moments:
        """Return the same on a device."""
        there = Moments(*(part.to(device) for part in self[:-1]))
        return there._replace(histogram=None if self.histogram is None else self.histogram.to(device))


class Sums(NamedTuple):
    """What one pass over a tensor on a CPU tells, of which every value is finite.

    Attributes:
        each: How many values a channel has.
        first: (C,) float64, their sum.
        second: (C,) float64, the sum of their squares.
        low: (R, C), the smallest value of each of R parts.
        high: (R, C), the largest value of each part.
        zeros: (C,), how many of them are zero; None where none is.
    """

    each: int
    first: npt.NDArray[Any]
    second: npt.NDArray[Any]
    low: npt.NDArray[Any]
    high: npt.NDArray[Any]
    zeros: npt.NDArray[Any] | None

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.first)

    @property
    def nbytes(self) -> int:
        """About how much memory they take."""
        return self.low.nbytes + self.high.nbytes


def union(ours: Moments, theirs: Moments) -> Moments:
    """Return the moments of all values of both, after Chan, Golub and LeVeque (1979)."""
    mean, squares = _united(
        (ours.finite.double(), ours.mean, ours.squares), (theirs.finite.double(), theirs.mean, theirs.squares)
    )
    histogram = None
    if ours.histogram is not None and theirs.histogram is not None:
        histogram = ours.histogram + theirs.histogram
    return Moments(
        total=ours.total + theirs.total,
        finite=ours.finite + theirs.finite,
        zeros=ours.zeros + theirs.zeros,
        low=torch.minimum(ours.low, theirs.low),
        high=torch.maximum(ours.high, theirs.high),
        mean=mean,
        squares=squares,
        histogram=histogram,
    )


def with_sums(ours: Moments, sums: Iterable[Sums]) -> Moments:
    """Return the moments, without a histogram, of what was there on a CPU and of tensors in their turn.

    That is the same to the last bit however many tensors are taken in at once.
    """
    total, finite, zeros, low, high, mean, squares = (part.numpy() for part in ours[:-1])
    with np.errstate(over="ignore", invalid="ignore"):  # squares of what is beyond 1e154
        for theirs in sums:
            their_low = np.minimum.reduce(theirs.low).astype(np.float64)
            their_high = np.maximum.reduce(theirs.high).astype(np.float64)
            about = theirs.first / theirs.each
            distances = np.maximum(theirs.second - theirs.first * about, 0)
            is_constant = their_low == their_high  # its moments are known exactly
            if is_constant.any():
                about, distances = (
                    np.where(is_constant, their_low, about),
                    np.where(is_constant, 0, distances),
                )
            mean, squares = _united((finite, mean, squares), (theirs.each, about, distances))
            total, finite = total + theirs.each, finite + theirs.each
            zeros = zeros if theirs.zeros is None else zeros + theirs.zeros
            low, high = np.minimum(low, their_low), np.maximum(high, their_high)
    return Moments(*map(torch.from_numpy, (total, finite, zeros, low, high, mean, squares)))


def no_moments(channels: int, device: torch.device, bins: int | None = None) -> Moments:
    """Return the moments of no values at all, with or without a histogram."""
    count = torch.zeros(channels, dtype=torch.int64, device=device)
    number = count.double()
    return Moments(
        total=count,
        finite=count,
        zeros=count,
        low=number + inf,
        high=number - inf,
        mean=number,
        squares=number,
        histogram=None if bins is None else count.new_zeros(channels, bins),
    )


def require_moments(parts: Mapping[str, torch.Tensor], bins: tuple[float, ...] | None) -> None:
    """Refuse moments that no values have, such as an edited file may hold.

    Raises:
        InvalidArgumentError: They are of other shapes, or no counts.
    """
    channels = parts["total"].shape
    columns = () if bins is None else (len(bins) + 1,)
    for name, part in parts.items():
        shape = (*channels, *columns) if name == "histogram" else tuple(channels)
        if len(channels) != 1 or part.shape != shape:
            raise InvalidArgumentError(
                f"`state` must hold (C,) for each of its parts, got `{name}` of shape {tuple(part.shape)}"
            )
    total, finite, zeros = parts["total"], parts["finite"], parts["zeros"]
    is_counted = (zeros >= 0) & (zeros <= finite) & (finite <= total) & ~(parts["squares"] < 0)
    if not bool(is_counted.all()) or ("histogram" in parts and bool((parts["histogram"] < 0).any())):
        raise InvalidArgumentError("`state` must count 0 <= zeros <= finite <= total values")


def pooled(each: Moments) -> Moments:
    """Return the moments of all channels together, as those of one channel."""
    finite = each.finite.sum(0, keepdim=True)
    mean = (each.mean * each.finite).sum(0, keepdim=True) / finite.clamp(min=1)
    distance = each.mean - mean
    between = (distance * each.finite * distance).sum(
        0, keepdim=True
    )  # 0 where there is no value, if far away
    return Moments(
        total=each.total.sum(0, keepdim=True),
        finite=finite,
        zeros=each.zeros.sum(0, keepdim=True),
        low=each.low.amin(0, keepdim=True),
        high=each.high.amax(0, keepdim=True),
        mean=mean,
        squares=each.squares.sum(0, keepdim=True) + between,
        histogram=None if each.histogram is None else each.histogram.sum(0, keepdim=True),
    )


def _united(ours: tuple[_Array, _Array, _Array], theirs: tuple[Any, _Array, _Array]) -> tuple[_Array, _Array]:
    """Return mean and squares of two sets, of each of which the count, the mean and the squares are given."""
    (count, mean, squares), (their_count, their_mean, their_squares) = ours, theirs
    share = their_count / (count + their_count).clip(1)
    distance = their_mean - mean
    # In this order, since the square of a distance from the mean of no values may be beyond all numbers.
    return mean + distance * share, squares + their_squares + (distance * share) * (distance * count)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ChannelStats:
    """What the values of each channel were, over everything that was seen.

    All but `count` and `nonfinite` speak of the finite values alone; they are NaN for a channel without any.

    Attributes:
        mean: (C,) float64.
        std: (C,) float64, of the population: the mean squared distance from the mean, under the root.
        min: (C,) float64.
        max: (C,) float64.
        zero_fraction: (C,) float64, the share of values that are exactly zero, 0 to 1.
        nonfinite: (C,) int64, how many values were NaN or infinite.
        count: (C,) int64, how many values were seen, these included.
        bins: The E edges of the histogram, increasing, or None.
        histogram: (C, E + 1) int64, or None. Column i counts `bins[i - 1] <= value < bins[i]`; the first
            column counts what is below all edges, the last one what is at or above the last.
    """

    mean: torch.Tensor
    std: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor
    zero_fraction: torch.Tensor
    nonfinite: torch.Tensor
    count: torch.Tensor
    bins: tuple[float, ...] | None = None
    histogram: torch.Tensor | None = None

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.count)

    def dead(self, eps: float = 0.0) -> torch.Tensor:
        """Return the channels whose maximum never exceeded `eps`: (D,) int64, increasing."""
        eps = number(eps, "eps")
        return (self.max <= eps).nonzero().flatten()

    def pooled(self) -> ChannelStats:
        """Return the statistics of all channels taken together, as those of one channel."""
        finite = self.count - self.nonfinite
        moments = Moments(
            total=self.count,
            finite=finite,
            zeros=(self.zero_fraction.nan_to_num(0) * finite).round().long(),
            low=self.min.nan_to_num(torch.inf),
            high=self.max.nan_to_num(-torch.inf),
            mean=self.mean.nan_to_num(0),
            squares=self.std.nan_to_num(0).square() * finite,
            histogram=self.histogram,
        )
        return stats_of(pooled(moments), self.bins)

    def to(self, device: torch.device | str) -> ChannelStats:
        """Return the same statistics on another device."""
        device, parts = named_device(device), self.to_dict()
        parts = {n: part.to(device) for n, part in parts.items() if isinstance(part, torch.Tensor)}
        return replace(self, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, tensors as they are: `ChannelStats(**stats.to_dict())` is the same."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        names = ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")
        spans = [f"{name} {_span(getattr(self, name))}" for name in names if self.channels]
        return f"ChannelStats({', '.join([f'{self.channels} channels', *spans])})"

    def _repr_html_(self) -> str:
        page = Page(f"ChannelStats of {self.channels:,} channels")
        names = ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")
        columns = {name: getattr(self, name).tolist() for name in names}
        heads = ("figure", "least", "greatest", "by channel, bars from zero")
        spans = [
            (name, cell(min(values)), cell(max(values)), profile(values, f"{name} of each channel"))
            for name, values in columns.items()
            if values
        ]
        page.table(heads, spans, len(spans))
        rows = (
            [cell(channel), *(cell(columns[name][channel]) for name in names)]
            for channel in range(self.channels)
        )
        page.table(("channel", *names), rows, self.channels)
        return str(page)


def stats_of(moments: Moments, bins: tuple[float, ...] | None) -> ChannelStats:
    """Return moments as statistics, in new tensors."""
    is_empty, count = moments.finite == 0, moments.finite.clamp(min=1)

    def known(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(is_empty, torch.nan)

    return ChannelStats(
        mean=known(moments.mean),
        std=known((moments.squares / count).sqrt()),
        min=known(moments.low),
        max=known(moments.high),
        zero_fraction=known(moments.zeros.double() / count),
        nonfinite=moments.total - moments.finite,
        count=moments.total.clone(),
        bins=bins,
        histogram=None if moments.histogram is None else moments.histogram.clone(),
    )


def _span(values: torch.Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
