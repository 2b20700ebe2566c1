"""The moments of one tensor per channel, in few passes over memory: `measure`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torchlens_viz.moments import Moments

# Values worked on at a time: on a CPU what stays in the cache, elsewhere what keeps temporary memory small.
# A sum of that many ones is exact in float32.
_BLOCK_ON_CPU: Final = 2**19
_BLOCK_ELSEWHERE: Final = 2**24
_WIDE_ENOUGH: Final = 2**10
# Sums about zero lose log10(mean**2 / variance) of float64's 16 digits; from here on they are taken about the
# mean instead, in a second pass.
_FAR_FROM_ZERO: Final = 1e4


class Measured(NamedTuple):
    """The moments of a tensor, and what the passes came upon besides.

    Attributes:
        moments: Returns the moments, in float64 and int64. It does what little there is left to do, which
            takes several times as long right after a layer as it does later, among others of its kind.
        peaks: (N, C) float32 or float64, the largest value of each map, for (N, C, ...) values of which none
            is NaN or Inf; None where they were not found on the way.
    """

    moments: Callable[[], Moments]
    peaks: torch.Tensor | None


class _Sums(NamedTuple):
    """What a pass over memory gives: arrays (R, C), a row for each part of the tensor."""

    first: npt.NDArray[Any]
    second: npt.NDArray[Any]
    low: npt.NDArray[Any]
    high: npt.NDArray[Any]
    zeros: npt.NDArray[Any] | None


class _Layout(NamedTuple):
    """A tensor as a matrix: one dimension is summed over, the other one runs through the channels."""

    matrix: torch.Tensor
    dim: int
    channels: int


def measure(values: torch.Tensor, channel_dim: int, edges: torch.Tensor | None) -> Measured:
    """Measure one tensor.

    On a CPU in one pass over memory, and in two more over the channels in which NaN, Inf or a mean far from
    zero is found. On other devices always in the same two passes, so that nothing waits for the device.

    Args:
        values: Any dense real tensor, of one dimension or more.
        channel_dim: The dimension that runs through the channels.
        edges: (E,) increasing float64 edges of a histogram, on the device of `values`, or None.

    Returns:
        The moments and the peaks, on the device of `values`.
    """
    channels = values.shape[channel_dim]
    if values.numel() == 0:
        nothing = _nothing(channels, values.device, edges)
        return Measured(lambda: nothing, None)
    layout = _as_matrix(values, channel_dim)
    histogram = None if edges is None else _histogram(layout, edges)
    if values.device.type != "cpu":
        moments = _measured_anywhere(layout)._replace(histogram=histogram)
        return Measured(lambda: moments, None)
    each = values.numel() // channels
    sums = _sums_on_cpu(layout)
    is_odd = _is_odd(sums, each)
    is_by_map = layout.dim == 1 and sums.high.size == len(layout.matrix) and channel_dim % values.ndim == 1
    peaks = torch.from_numpy(sums.high) if is_by_map else None
    if not is_odd.any():
        return Measured(lambda: _moments_of(sums, each)._replace(histogram=histogram), peaks)
    odd = torch.from_numpy(is_odd.nonzero()[0])
    anew = _measured_anywhere(_as_matrix(values.index_select(channel_dim, odd), channel_dim))
    pairs = zip(_moments_of(sums, each)[:-1], anew[:-1], strict=True)  # neither has a histogram yet
    mended = Moments(*(ours.index_copy(0, odd, theirs) for ours, theirs in pairs))._replace(
        histogram=histogram
    )
    return Measured(lambda: mended, peaks if np.isfinite(sums.first).all() else None)


def _is_odd(sums: _Sums, each: int) -> npt.NDArray[np.bool_]:
    """Tell for which channels sums about zero do not do: NaN, Inf, and a mean that is far from zero."""
    with np.errstate(invalid="ignore", over="ignore"):
        total, squares = np.add.reduce(sums.first), np.add.reduce(sums.second)
        # Beside NaN and Inf nothing holds, so that a channel with them is odd.
        is_odd: npt.NDArray[np.bool_] = ~(
            total * total <= each * _FAR_FROM_ZERO / (1 + _FAR_FROM_ZERO) * squares
        )
        is_odd |= ~np.isfinite(squares)
    if is_odd.any():  # what is constant is known exactly
        is_odd &= ~((np.minimum.reduce(sums.low) == np.maximum.reduce(sums.high)) & np.isfinite(total))
    return is_odd


def _moments_of(sums: _Sums, each: int) -> Moments:
    low = np.minimum.reduce(sums.low).astype(np.float64)
    high = np.maximum.reduce(sums.high).astype(np.float64)
    is_constant = low == high  # its moments are known exactly
    zeros = np.zeros(len(low)) if sums.zeros is None else np.add.reduce(sums.zeros)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is measured anew
        total = np.add.reduce(sums.first)
        mean = total / each
        squares = np.add.reduce(sums.second) - total * mean
    np.copyto(mean, low, where=is_constant)
    squares[is_constant | (squares < 0)] = 0
    count = torch.full((len(low),), each, device="cpu")
    return Moments(
        total=count,
        finite=count,
        zeros=torch.from_numpy(zeros.astype(np.int64)),
        low=torch.from_numpy(low),
        high=torch.from_numpy(high),
        mean=torch.from_numpy(mean),
        squares=torch.from_numpy(squares),
    )


def _sums_on_cpu(layout: _Layout) -> _Sums:
    """Sum up block by block.

    Calls are few: each takes its time anew, since what streams through the cache drives their code out.
    """
    matrix, dim, channels = layout
    blocks = [block for block, _ in _blocks(layout)]
    room = torch.empty(max(block.numel() for block in blocks), dtype=torch.float64, device="cpu")
    wide = room
    found: list[tuple[torch.Tensor, ...]] = []
    for block in blocks:
        if wide.shape != block.shape:
            wide = room[: block.numel()].view(block.shape)
        wide.copy_(block)
        values = block if block.dtype == torch.float32 else wide
        extremes = values.amin(dim), values.amax(dim)
        found.append((wide.sum(dim), wide.mul_(wide).sum(dim), *extremes, wide.amin()))
    *sums, nearest = zip(*found, strict=True)
    zeros = None
    # Most layers have no zero at all, which the squares tell sooner than counting does.
    if not torch.stack(nearest).amin() > 0:
        # Comparing floats into floats of the same type is vectorised; into bool it is not.
        kind = matrix.dtype if matrix.dtype == torch.float32 else torch.float64
        rooms = (torch.empty(block.shape, dtype=kind, device="cpu") for block in blocks)
        is_zero = (torch.eq(block, 0, out=room) for block, room in zip(blocks, rooms, strict=True))
        zeros = torch.cat([part.sum(dim) for part in is_zero]).view(-1, channels).numpy()
    first, second, low, high = (torch.cat(each).view(-1, channels).numpy() for each in sums)
    return _Sums(first, second, low, high, zeros)


def _measured_anywhere(layout: _Layout) -> Moments:
    """Measure in two passes, leaving out what is not finite."""
    matrix, dim, channels = layout
    blocks = list(_blocks(layout))
    room = max(block.numel() for block, _ in blocks)
    # Comparing floats into floats of the same type is vectorised; into bool it is not.
    kind = matrix.dtype if matrix.dtype == torch.float32 else torch.float64
    narrow_room = torch.empty(room, dtype=kind, device=matrix.device)
    wide_room = torch.empty(room, dtype=torch.float64, device=matrix.device)

    def in_channels(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts)).view(-1, channels).double()

    found: list[tuple[torch.Tensor, ...]] = []
    for block, _ in blocks:
        wide = wide_room[: block.numel()].view(block.shape).copy_(block)
        narrow = narrow_room[: block.numel()].view(block.shape)
        values = block if block.dtype == torch.float32 else wide
        found.append(
            (
                torch.nan_to_num(values, inf, inf, inf, out=narrow).amin(dim),
                torch.nan_to_num(values, -inf, -inf, -inf, out=narrow).amax(dim),
                torch.eq(values, 0, out=narrow).sum(dim),
                torch.mul(values, 0, out=narrow).eq_(0).sum(dim),
                wide.nan_to_num_(0, 0, 0).sum(dim),
            )
        )
    lows, highs, zeros, finites, firsts = map(in_channels, zip(*found, strict=True))
    low, high, finite = lows.amin(0), highs.amax(0), finites.sum(0).long()
    mean = firsts.sum(0) / finite.clamp(min=1)
    about = mean.repeat(matrix.shape[1 - dim] // channels)
    found = []
    for block, row in blocks:
        wide = wide_room[: block.numel()].view(block.shape).copy_(block)
        wide.sub_(about if dim == 0 else about[row : row + len(block), None]).nan_to_num_(0, 0, 0)
        found.append((wide.sum(dim), wide.mul_(wide).sum(dim)))
    first, second = (in_channels(part).sum(0) for part in zip(*found, strict=True))
    squares = second - first.square() / finite.clamp(min=1)
    is_constant = low == high  # its moments are known exactly
    return Moments(
        total=torch.full_like(finite, matrix.numel() // channels),
        finite=finite,
        zeros=zeros.sum(0).long(),
        low=low,
        high=high,
        mean=torch.where(is_constant, low, mean + first / finite.clamp(min=1)),
        squares=squares.clamp(min=0).masked_fill(is_constant, 0),
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
    if channel_dim == 1 and values.is_contiguous() and values.shape[2:].numel() > 1:
        return _Layout(values.flatten(0, 1).flatten(1), 1, channels)
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
    for columns in torch.split(matrix, size if layout.dim == 1 else width, dim=1):
        rows = max(1, size // columns.shape[1])
        for number, block in enumerate(torch.split(columns, rows)):
            yield block, number * rows


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
