"""Counts, moments and extremes of channels, and the union of such sets: `Moments`, `Sums`."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

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


def pooled(each: Moments) -> Moments:
    """Return the moments of all channels together, as those of one channel."""
    finite = each.finite.sum(0, keepdim=True)
    mean = (each.mean * each.finite).sum(0, keepdim=True) / finite.clamp(min=1)
    between = ((each.mean - mean).square() * each.finite).sum(0, keepdim=True)
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
    return mean + distance * share, squares + their_squares + distance * distance * count * share
