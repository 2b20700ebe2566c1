"""The moments of one tensor per channel, in few passes over memory: `measure`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torchlens_viz.arguments import has_float64
from torchlens_viz.stats.channels import Moments, Sums, no_moments, with_sums
from torchlens_viz.stats.pairs import Pairs, measured_in_pairs

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
        moments: The moments, or the sums they are made of: right after a layer, whatever is small takes
            several times as long as it does later on, among others of its kind.
        peaks: (N, C) float32 or float64, the largest value of each map, for (N, C, ...) values of which none
            is NaN or Inf; None where they were not found on the way.
    """

    moments: Moments | Sums | Pairs
    peaks: npt.NDArray[Any] | None


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
        edges: (E,) increasing edges of a histogram, on the device of `values`, or None: in float64, or where
            the device has none rounded up to float32, which counts float32 values the same.

    Returns:
        The moments, on the device of `values`, and the peaks.
    """
    channels, device = values.shape[channel_dim], values.device
    is_narrow = not has_float64(device)
    if values.numel() == 0:
        place = torch.device("cpu") if is_narrow else device
        return Measured(no_moments(channels, place, None if edges is None else len(edges) + 1), None)
    if is_narrow:
        with torch.inference_mode(False), torch.no_grad():
            pairs = measured_in_pairs(values.movedim(channel_dim, 0).flatten(1))
            histogram = None if edges is None else _histogram(_as_matrix(values, channel_dim), edges)
            return Measured(pairs._replace(histogram=histogram), None)
    layout = _as_matrix(values, channel_dim)
    peaks = None
    if device.type == "cpu":
        sums = _sums_on_cpu(layout)
        is_odd = _is_odd(sums)
        is_by_map = (
            layout.dim == 1 and sums.high.size == len(layout.matrix) and channel_dim % values.ndim == 1
        )
        if is_by_map and np.isfinite(sums.first).all():
            peaks = sums.high
        if edges is None and not is_odd.any():
            return Measured(sums, peaks)
    # Tensors made in inference mode could not be used together with others later on.
    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cpu":
            moments = _measured_anywhere(layout)
        else:
            moments = with_sums(no_moments(channels, device), [sums])  # what is odd is measured anew
            if is_odd.any():
                odd = torch.from_numpy(is_odd.nonzero()[0])
                anew = _measured_anywhere(_as_matrix(values.index_select(channel_dim, odd), channel_dim))
                both = zip(moments[:-1], anew[:-1], strict=True)  # neither has a histogram yet
                moments = Moments(*(ours.index_copy(0, odd, theirs) for ours, theirs in both))
        histogram = None if edges is None else _histogram(layout, edges)
        return Measured(moments._replace(histogram=histogram), peaks)


def _is_odd(sums: Sums) -> npt.NDArray[np.bool_]:
    """Tell for which channels sums about zero do not do: NaN, Inf, and a mean that is far from zero."""
    with np.errstate(invalid="ignore", over="ignore"):
        limit = sums.each * _FAR_FROM_ZERO / (1 + _FAR_FROM_ZERO) * sums.second
        # Beside NaN nothing holds, so that a channel with it is odd, as one is that is too large to tell.
        is_odd: npt.NDArray[np.bool_] = ~((sums.first * sums.first <= limit) & (limit < inf))
    if is_odd.any():  # what is constant is known exactly
        is_constant = np.minimum.reduce(sums.low) == np.maximum.reduce(sums.high)
        is_odd &= ~(is_constant & np.isfinite(sums.second))
    return is_odd


def _sums_on_cpu(layout: _Layout) -> Sums:
    """Sum up block by block.

    Calls are few: each takes its time anew, since what streams through the cache drives their code out.
    """
    matrix, dim, channels = layout
    blocks = [block for block, _ in _blocks(layout)]
    room = torch.empty(max(block.numel() for block in blocks), dtype=torch.float64, device="cpu")
    wide = room
    found: list[tuple[torch.Tensor, ...]] = []
    has_zeros = False
    for block in blocks:
        if wide.shape != block.shape:
            wide = room[: block.numel()].view(block.shape)
        wide.copy_(block)
        values = block if block.dtype == torch.float32 else wide
        found.append((values.amin(dim), values.amax(dim), wide.sum(dim), wide.mul_(wide).sum(dim)))
        # Most layers have no zero at all, which the squares tell sooner than counting does.
        has_zeros = has_zeros or not wide.amin().item() > 0
    low, high, first, second = (
        torch.cat(part).view(-1, channels).numpy() for part in zip(*found, strict=True)
    )
    zeros = None
    if has_zeros:
        # Comparing floats into floats of the same type is vectorised; into bool it is not.
        kind = matrix.dtype if matrix.dtype == torch.float32 else torch.float64
        rooms = (torch.empty(block.shape, dtype=kind, device="cpu") for block in blocks)
        is_zero = (torch.eq(block, 0, out=room) for block, room in zip(blocks, rooms, strict=True))
        counts = torch.cat([part.sum(dim) for part in is_zero]).view(-1, channels).numpy()
        zeros = np.add.reduce(counts, dtype=np.float64).astype(np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        totals = np.add.reduce(first), np.add.reduce(second)
    return Sums(matrix.numel() // channels, *totals, low, high, zeros)


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
        same = block.to(edges.dtype)
        place = torch.bucketize(same.contiguous(), edges, right=True).masked_fill_(~same.isfinite(), bins - 1)
        numbers = torch.arange(block.shape[1 - dim], device=matrix.device)
        numbers = (numbers if dim == 0 else (numbers + row).unsqueeze(1)) % channels * bins
        place = (place + numbers).view(-1)
        counts.scatter_add_(0, place, torch.ones_like(place))
    return counts.view(channels, bins)[:, :-1]
