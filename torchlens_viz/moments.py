"""Counts, moments and extremes of a tensor per channel in few passes, and the union of two such sets."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Final, NamedTuple

import torch

# Values worked on at a time: on a CPU what stays in the cache, elsewhere what keeps temporary memory small.
# A sum of that many ones is exact in float32.
_BLOCK_ON_CPU: Final = 2**19
_BLOCK_ELSEWHERE: Final = 2**24
_WIDE_ENOUGH: Final = 2**10
# Sums about zero lose log10(mean**2 / variance) of float64's 16 digits; from here on they are taken about the
# mean instead, in a second pass.
_FAR_FROM_ZERO: Final = 1e4


class Moments(NamedTuple):
    """What is known of the values of each channel; every field has shape (C,), `histogram` (C, bins)."""

    total: torch.Tensor
    finite: torch.Tensor
    zeros: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor  # the sum of squared distances from the mean
    histogram: torch.Tensor | None


class Measured(NamedTuple):
    """The moments of a tensor, and what the passes came upon besides.

    Attributes:
        moments: The moments.
        peaks: The largest value of each map, for (N, C, ...) values of which none is NaN or Inf; None where
            they were not found on the way.
    """

    moments: Moments
    peaks: torch.Tensor | None


class _Sums(NamedTuple):
    finite: torch.Tensor
    zeros: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    peaks: torch.Tensor | None = None


class _Layout(NamedTuple):
    """A tensor as a matrix: one dimension is summed over, the other one runs through the channels."""

    matrix: torch.Tensor
    dim: int
    channels: int


def measure(values: torch.Tensor, channel_dim: int, edges: torch.Tensor | None) -> Measured:
    """Measure one tensor.

    On a CPU in two passes over memory, a few more where NaN, Inf or a mean far from zero is found. On other
    devices always in the same passes, so that nothing waits for the device.

    Args:
        values: Any dense real tensor, of one dimension or more.
        channel_dim: The dimension that runs through the channels.
        edges: (E,) increasing float64 edges of a histogram, on the device of `values`, or None.

    Returns:
        The moments, in float64 and int64, and the peaks, on the device of `values`.
    """
    channels = values.shape[channel_dim]
    if values.numel() == 0:
        return Measured(_nothing(channels, values.device, edges), None)
    layout = _as_matrix(values, channel_dim)
    each = values.numel() // channels
    total = torch.full((channels,), each, dtype=torch.int64, device=values.device)
    histogram = None if edges is None else _histogram(layout, edges)
    if values.device.type == "cpu":
        sums = _sweep(layout, is_clean=True)
        if bool(sums.first.isfinite().all()):
            mean = sums.first / each
            squares = sums.second - sums.first * mean
            is_far = (mean * sums.first > _FAR_FROM_ZERO * squares) & (sums.low != sums.high)
            if bool(is_far.any()):
                centred = _sweep(layout, is_clean=True, shift=mean)
                squares = centred.second - centred.first.square() / each
                mean = mean + centred.first / each
            found = _finish(total, sums._replace(finite=total), mean, squares, histogram)
            has_maps = sums.peaks is not None and channel_dim % values.ndim == 1
            return Measured(found, sums.peaks if has_maps else None)
    sums = _sweep(layout, is_clean=False)
    count = sums.finite.clamp(min=1)
    mean = sums.first / count
    centred = _sweep(layout, is_clean=False, shift=mean)
    squares = centred.second - centred.first.square() / count
    return Measured(_finish(total, sums, mean + centred.first / count, squares, histogram), None)


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


def _finish(
    total: torch.Tensor,
    sums: _Sums,
    mean: torch.Tensor,
    squares: torch.Tensor,
    histogram: torch.Tensor | None,
) -> Moments:
    is_constant = sums.low == sums.high  # its moments are known exactly
    return Moments(
        total=total,
        finite=sums.finite,
        zeros=sums.zeros,
        low=sums.low,
        high=sums.high,
        mean=torch.where(is_constant, sums.low, mean),
        squares=squares.clamp(min=0).masked_fill(is_constant, 0),
        histogram=histogram,
    )


def _nothing(channels: int, device: torch.device, edges: torch.Tensor | None) -> Moments:
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
        histogram=None if edges is None else count.new_zeros(channels, len(edges) + 1),
    )


def _as_matrix(values: torch.Tensor, channel_dim: int) -> _Layout:
    channels = values.shape[channel_dim]
    last = values.movedim(channel_dim, -1)
    if last.is_contiguous() or channel_dim % values.ndim == values.ndim - 1:
        rows = last.reshape(-1, channels)
        # Several rows side by side: a sum that runs down few columns keeps neither cache nor threads busy.
        side_by_side = 1
        while len(rows) % (2 * side_by_side) == 0 and side_by_side * channels < _WIDE_ENOUGH:
            side_by_side *= 2
        return _Layout(rows.reshape(-1, side_by_side * channels), 0, channels)
    inner = values.shape[channel_dim % values.ndim + 1 :].numel()
    return _Layout(values.reshape(-1, inner), 1, channels)


def _blocks(layout: _Layout) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield parts of the matrix with the place of their first row."""
    size = _BLOCK_ON_CPU if layout.matrix.device.type == "cpu" else _BLOCK_ELSEWHERE
    matrix, width = layout.matrix, layout.matrix.shape[1]
    wide = size if layout.dim == 1 else width
    for place in range(0, width, wide):
        columns = matrix[:, place : place + wide]
        rows = max(1, size // columns.shape[1])
        for row in range(0, len(columns), rows):
            yield columns[row : row + rows], row


def _sweep(layout: _Layout, *, is_clean: bool, shift: torch.Tensor | None = None) -> _Sums:
    """Sum over the matrix, block by block; with a `shift`, only the two sums about it are of use.

    Where it `is_clean`, every value is taken to be finite, and nothing counts them; otherwise what is not
    finite is left out, and the second sum needs a shift.
    """
    matrix, dim, channels = layout
    about = None
    if shift is not None:
        about = shift.repeat(matrix.shape[1 - dim] // channels)
        about = about if dim == 0 else about.unsqueeze(1)
    blocks = list(_blocks(layout))
    room = max(block.numel() for block, _ in blocks)
    wide_room = torch.empty(room, dtype=torch.float64, device=matrix.device)
    # Comparing floats into floats of the same type is vectorised; into bool it is not.
    kind = matrix.dtype if matrix.dtype == torch.float32 else torch.float64
    narrow_room = torch.empty(room, dtype=kind, device=matrix.device)
    found: list[tuple[torch.Tensor, ...]] = []
    has_zeros = False
    for block, row in blocks:
        wide = wide_room[: block.numel()].view(block.shape).copy_(block)
        narrow = narrow_room[: block.numel()].view(block.shape)
        values = block if block.dtype == torch.float32 else wide
        others: list[torch.Tensor] = []
        if about is None and is_clean:
            others += [values.amin(dim), values.amax(dim)]
        elif about is None:
            others.append(torch.nan_to_num(values, inf, inf, inf, out=narrow).amin(dim))
            others.append(torch.nan_to_num(values, -inf, -inf, -inf, out=narrow).amax(dim))
            others.append(torch.eq(values, 0, out=narrow).sum(dim))
            others.append(torch.mul(values, 0, out=narrow).eq_(0).sum(dim))
        else:
            wide.sub_(about if dim == 0 else about[row : row + len(block)])
        if not is_clean:
            wide.nan_to_num_(0, 0, 0)
        first = wide.sum(dim)
        second = first if about is None and not is_clean else wide.mul_(wide).sum(dim)
        if about is None and is_clean:
            # Most layers have no zero at all, which the squares tell sooner than counting does.
            has_zeros = has_zeros or not wide.amin() > 0
            others.append(torch.eq(block, 0, out=narrow).sum(dim) if has_zeros else torch.zeros_like(first))
        found.append((first, second, *others))
    columns = [torch.cat(parts).view(-1, channels).double() for parts in zip(*found, strict=True)]
    first, second = columns[0].sum(0), columns[1].sum(0)
    if about is not None:
        return _Sums(first, first, first, first, first, second)
    low, high, zeros = columns[2].amin(0), columns[3].amax(0), columns[4].sum(0).long()
    finite = zeros if is_clean else columns[5].sum(0).long()
    is_by_map = dim == 1 and is_clean and len(columns[3]) * channels == len(matrix)
    return _Sums(finite, zeros, low, high, first, second, columns[3] if is_by_map else None)


def _histogram(layout: _Layout, edges: torch.Tensor) -> torch.Tensor:
    """Count the finite values of each channel below, between and above the edges: (C, E + 1)."""
    matrix, dim, channels = layout
    bins = len(edges) + 2  # the last one is for what is not finite
    counts = torch.zeros(channels * bins, dtype=torch.int64, device=matrix.device)
    for block, row in _blocks(layout):
        wide = block.double()
        place = torch.bucketize(wide.contiguous(), edges, right=True).masked_fill_(~wide.isfinite(), bins - 1)
        numbers = torch.arange(block.shape[1 - dim], device=matrix.device)
        numbers = (numbers if dim == 0 else (numbers + row).unsqueeze(1)) % channels * bins
        place = (place + numbers).view(-1)
        counts.scatter_add_(0, place, torch.ones_like(place))
    return counts.view(channels, bins)[:, :-1]
