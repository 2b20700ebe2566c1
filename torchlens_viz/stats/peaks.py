"""One figure of every map of a batch, its largest value or a weighted sum, and where it stands: `Peaks`."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torchlens_viz.arguments import wide
from torchlens_viz.errors import InvalidArgumentError


class Peaks(NamedTuple):
    """The peaks of one batch in one layer.

    Attributes:
        values: (N, C) float32 or float64, the largest value of each map; -inf where there is none but NaN.
        positions: (N, C, P) int64, where it stands: row and column, or as many as the map has axes. Those of
            peaks that cannot get among the top k may be -1.
    """

    values: torch.Tensor
    positions: torch.Tensor


def find_peaks(
    values: torch.Tensor,
    channel_dim: int,
    *,
    k: int,
    bar: torch.Tensor | None = None,
    in_order: bool = False,
    highest: npt.NDArray[Any] | None = None,
) -> Peaks:
    """Find the peaks of one batch.

    A CPU looks for the position of those alone that may get among the top k, which are few after the first
    batches. Other devices find all in one reduction, so that nothing waits for them.

    Args:
        values: (N, C, ...) real numbers, dense, in a type that torch computes with.
        channel_dim: The dimension that runs through the channels.
        k: How many inputs are kept per channel.
        bar: (C,), what a peak must reach to get among them; None if anything can.
        in_order: Whether a peak that is equal to the bar comes too late.
        highest: (N, C) on a CPU, the largest value of each map, where that is known and no value is NaN or
            Inf.

    Raises:
        InvalidArgumentError: The maps are empty.
    """
    axes = values.movedim(channel_dim, 1)
    maps = axes.reshape(*axes.shape[:2], -1)
    if maps.shape[2] == 0:
        raise InvalidArgumentError(f"a layer must put out maps with values, got shape {tuple(axes.shape)}")
    shape = tuple(axes.shape[2:])
    shape = (1,) * (2 - len(shape)) + shape
    if not maps.is_floating_point():
        maps = wide(maps)
    if maps.device.type == "cpu":
        return _found_on_cpu(maps, shape, k, bar, in_order=in_order, highest=highest)
    maps = maps if maps.dtype.itemsize >= 4 else maps.float()
    peaks, flat = _without_nan(maps).max(2)
    return Peaks(peaks, _unraveled(flat, shape))


def find_totals(
    values: torch.Tensor,
    weights: torch.Tensor | None,
    channel_dim: int,
    *,
    k: int,
    bar: torch.Tensor | None = None,
    in_order: bool = False,
) -> Peaks:
    """Find the sum of every map, weighed value by value, and where its largest part stands.

    Args:
        values: (N, C, ...) real numbers, dense, in a type that torch computes with.
        weights: What each value is multiplied by, of the same shape; None is zero everywhere.
        channel_dim: As in `find_peaks`.
        k: As in `find_peaks`.
        bar: As in `find_peaks`, of sums.
        in_order: As in `find_peaks`.

    Returns:
        The sums, and the first position in row order of the largest product. A sum that is NaN is none.
    """
    axes = values.movedim(channel_dim, 1)
    maps = _as_floats(axes.reshape(*axes.shape[:2], -1))
    shape = (1,) * (4 - axes.ndim) + tuple(axes.shape[2:])
    if weights is None:
        nothing = maps.new_zeros(maps.shape[:2])
        return Peaks(nothing, torch.zeros(*nothing.shape, len(shape), dtype=torch.int64, device=maps.device))
    slopes = _as_floats(weights.movedim(channel_dim, 1).reshape(maps.shape)).to(maps.dtype)
    if maps.device.type != "cpu":
        totals = torch.linalg.vecdot(maps, slopes)
        places = _without_nan(maps * slopes).argmax(2)
        return Peaks(totals.masked_fill(totals.isnan(), -inf), _unraveled(places, shape))
    # numpy writes no products, in a quarter of the time.
    sums: npt.NDArray[Any] = np.einsum("ncx,ncx->nc", maps.numpy(), slopes.numpy())
    totals = np.where(np.isnan(sums), np.asarray(-inf, sums.dtype), sums)

    def found(numbers: torch.Tensor) -> npt.NDArray[np.int64]:
        return _argmax(_without_nan(_rows(maps, numbers) * _rows(slopes, numbers)))

    return _located(totals, found, shape, _candidates(totals, k, bar, in_order=in_order))


def _as_floats(maps: torch.Tensor) -> torch.Tensor:
    if not maps.is_floating_point():
        return wide(maps)
    return maps if maps.dtype.itemsize >= 4 else maps.float()


def added(first: Peaks, second: Peaks) -> Peaks:
    """Return the sums over two calls of a layer, with the position in the call that gave more of it.

    Raises:
        InvalidArgumentError: The calls had different shapes.
    """
    where = united(first, second).positions
    return Peaks(first.values + second.values, where)


def _unraveled(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return places in a flattened map as indices along its axes, the last dimension; nothing is copied."""
    found = []
    for size in reversed(shape):
        found.append(flat % size)
        flat = flat.div(size, rounding_mode="floor")
    return torch.stack(found[::-1], -1)


def united(first: Peaks, second: Peaks) -> Peaks:
    """Return the peaks of inputs that went through a layer twice; of equal ones, the first.

    Raises:
        InvalidArgumentError: The calls had different shapes.
    """
    if first.values.shape != second.values.shape or first.positions.shape != second.positions.shape:
        raise InvalidArgumentError(
            "a layer that is called several times for one batch must put out the same inputs, channels and "
            f"axes each time, got {tuple(first.values.shape)} and then {tuple(second.values.shape)}"
        )
    is_higher = second.values > first.values
    return Peaks(
        torch.where(is_higher, second.values, first.values),
        torch.where(is_higher[..., None], second.positions, first.positions),
    )


def _found_on_cpu(
    maps: torch.Tensor,
    shape: tuple[int, ...],
    k: int,
    bar: torch.Tensor | None,
    *,
    in_order: bool,
    highest: npt.NDArray[Any] | None,
) -> Peaks:
    """Find the peaks, and the positions of those that count; what is small is left to numpy."""
    if highest is None:
        found = maps.amax(2)
        if bool(found.isnan().any()):
            maps = _without_nan(maps)
            found = maps.amax(2)
        peaks = (found if found.dtype == torch.float64 else found.float()).numpy()
    else:
        peaks = highest if maps.dtype == torch.float64 else highest.astype(np.float32, copy=False)
    is_candidate = _candidates(peaks, k, bar, in_order=in_order)
    if highest is None:
        is_candidate &= peaks > -inf
    return _located(peaks, lambda numbers: _argmax(_rows(maps, numbers)), shape, is_candidate)


def _candidates(
    peaks: npt.NDArray[Any], k: int, bar: torch.Tensor | None, *, in_order: bool
) -> npt.NDArray[np.bool_]:
    """Tell which figures (N, C) may get among the top k of their channel."""
    if bar is not None:
        found: npt.NDArray[np.bool_] = peaks > bar.numpy() if in_order else peaks >= bar.numpy()
        return found
    if len(peaks) > k:
        best: npt.NDArray[np.bool_] = peaks >= np.partition(peaks, -k, axis=0)[-k]
        return best
    return np.ones_like(peaks, bool)


def _located(
    peaks: npt.NDArray[Any],
    places: Callable[[torch.Tensor], npt.NDArray[np.int64]],
    shape: tuple[int, ...],
    is_candidate: npt.NDArray[np.bool_],
) -> Peaks:
    """Return figures with the positions of candidates, which `places` finds in flattened maps."""
    positions = np.full((peaks.size, len(shape)), -1)
    candidates = np.flatnonzero(is_candidate)
    if len(candidates):
        flat = places(torch.from_numpy(candidates))
        for axis, along in enumerate(np.unravel_index(flat, shape)):
            positions[candidates, axis] = along
    return Peaks(torch.from_numpy(peaks), torch.from_numpy(positions.reshape(*peaks.shape, -1)))


def _rows(maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return some of N * C maps as rows; those that lie one after the other are copied as blocks."""
    if maps.is_contiguous():
        return maps.flatten(0, 1).index_select(0, numbers)
    return maps[numbers // maps.shape[1], numbers % maps.shape[1]]


def _argmax(rows: torch.Tensor) -> npt.NDArray[np.int64]:
    """Return the place of the first maximum in each row; numpy finds it several times as fast as torch."""
    wide = rows if rows.dtype.itemsize >= 4 else rows.float()
    places: npt.NDArray[np.int64] = np.argmax(wide.numpy(), axis=1)
    return places


def _without_nan(maps: torch.Tensor) -> torch.Tensor:
    return maps.nan_to_num(-inf, inf, -inf)
