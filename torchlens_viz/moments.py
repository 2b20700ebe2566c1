"""Counts, moments and extremes of channels, and the union of two such sets."""

from __future__ import annotations

from typing import NamedTuple

import torch


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


def union(ours: Moments, theirs: Moments) -> Moments:
    """Return the moments of all values of both, after Chan, Golub and LeVeque (1979)."""
    finite = ours.finite + theirs.finite
    share = theirs.finite.double() / finite.clamp(min=1)
    distance = theirs.mean - ours.mean
    histogram = None
    if ours.histogram is not None and theirs.histogram is not None:
        histogram = ours.histogram + theirs.histogram
    return Moments(
        total=ours.total + theirs.total,
        finite=finite,
        zeros=ours.zeros + theirs.zeros,
        low=torch.minimum(ours.low, theirs.low),
        high=torch.maximum(ours.high, theirs.high),
        mean=ours.mean + distance * share,
        squares=ours.squares + theirs.squares + distance.square() * ours.finite * share,
        histogram=histogram,
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
