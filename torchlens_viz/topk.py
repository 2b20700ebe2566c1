"""The k inputs that drive each channel hardest, kept batch by batch and merged: `RunningTop` -> `Top`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch

from torchlens_viz.errors import InvalidArgumentError

_NOBODY: Final = torch.iinfo(torch.int64).max  # the index of an empty place: it comes after every input


class Peaks(NamedTuple):
    """The peaks of one batch in one layer.

    Attributes:
        values: (N, C), the largest value of each map; -inf where there is none but NaN.
        positions: (N, C, P) int64, where it stands: row and column, or as many as the map has axes. Those of
            peaks that cannot get among the top k may be -1.
    """

    values: torch.Tensor
    positions: torch.Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Top:
    """The inputs with the highest peaks, for each channel of a layer; the highest comes first.

    Each input counts once per channel. Of equal values the smaller sample index comes first. With fewer than
    k inputs there are fewer columns; a channel that has fewer than another one, because of NaN, has NaN and
    -1 in the places that are left.

    Attributes:
        values: (C, k), the peaks, in the type of the layer but at least float32.
        samples: (C, k) int64, the index of the input.
        positions: (C, k, 2) int64, row and column of the peak, the first in row order; row 0 for layers
            (N, C, L) and both 0 for (N, C). (C, k, 3) where the layer puts out volumes.
    """

    values: torch.Tensor
    samples: torch.Tensor
    positions: torch.Tensor


@final
class RunningTop:
    """The k highest peaks of every channel so far; it never changes, `with_peaks` and `union` make new ones.

    Args:
        k: How many to keep, at least 1.
    """

    __slots__ = ("_best", "_positions", "_samples", "_values", "k")

    def __init__(self, k: int) -> None:
        self.k = k
        self._values: torch.Tensor | None = None  # (C, up to k), the highest first
        self._samples = torch.empty(0)
        self._positions = torch.empty(0)
        self._best = torch.empty(0)  # (C,), how many inputs have the highest value

    def peaks(
        self,
        values: torch.Tensor,
        channel_dim: int,
        *,
        in_order: bool = False,
        highest: torch.Tensor | None = None,
    ) -> Peaks:
        """Find the peaks of one batch.

        A CPU looks for the position of those alone that may get among the top k, which are few after the
        first batches. Other devices find all in one reduction, so that nothing waits for them.

        Args:
            values: (N, C, ...) real numbers, dense.
            channel_dim: The dimension that runs through the channels.
            in_order: As for `with_peaks`: equal values of later inputs do not count then.
            highest: (N, C), the largest value of each map, where that is known and none is NaN.
        """
        axes = values.movedim(channel_dim, 1)
        shape = axes.shape[2:]
        maps = axes.reshape(*axes.shape[:2], -1)
        maps = maps if maps.is_floating_point() else maps.double()
        maps = maps.float() if maps.device.type != "cpu" and maps.dtype.itemsize < 4 else maps
        if maps.shape[2] == 0:
            raise InvalidArgumentError(
                f"a layer must put out maps with values, got shape {tuple(axes.shape)}"
            )
        if maps.device.type == "cpu":
            highest, positions = self._found_on_cpu(maps, shape, in_order, highest)
        else:
            highest, flat = _without_nan(maps).max(2)
            positions = _unravelled(flat, shape)
        highest = highest if highest.dtype == torch.float64 else highest.float()
        return Peaks(highest, positions)

    def with_peaks(self, peaks: Peaks, samples: torch.Tensor, *, in_order: bool) -> RunningTop:
        """Return the top k of what was there and one more batch.

        Args:
            peaks: From `peaks`, of this very object.
            samples: (N,) int64 on the device of the peaks, the index of each input of the batch.
            in_order: Whether they increase, and all of them are larger than those before.

        Raises:
            InvalidArgumentError: The batch has other channels or axes than those before.
        """
        values, where = peaks.values.T, peaks.positions.transpose(0, 1)
        count = values.shape[0]
        highest = values.amax(1)
        batch = RunningTop(self.k)
        batch._best = ((values == highest[:, None]) & (values > -inf)).sum(1)
        numbers = samples.expand(count, -1).masked_fill(values == -inf, _NOBODY)
        batch._values, batch._samples, batch._positions = values, numbers, where
        return self._joined(batch, in_order=in_order)

    def union(self, other: RunningTop) -> RunningTop:
        """Return the top k of what both have seen, on whatever device the other one is.

        Raises:
            InvalidArgumentError: They have different k, channels or axes.
        """
        if self.k != other.k:
            raise InvalidArgumentError(f"`other` must keep the same number, {self.k}, got {other.k}")
        if other._values is None:
            return self
        return self._joined(other, in_order=False)

    def bar(self) -> torch.Tensor | None:
        """Return what a value must reach to get among the top k, (C,); None if anything can."""
        if self._values is None or self._values.shape[1] < self.k:
            return None
        return self._values[:, -1]

    def fits(self, peaks: Peaks) -> bool:
        """Tell whether peaks have the channels and axes of those before, if there were any."""
        shape = (len(self._values), self._positions.shape[2]) if self._values is not None else None
        return shape in (None, (peaks.values.shape[1], peaks.positions.shape[2]))

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the highest value of each channel, -inf for none, and how many inputs reached it."""
        if self._values is None:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        return self._values[:, 0], self._best

    def compute(self) -> Top:
        """Return the top k so far, in new tensors on the CPU."""
        if self._values is None:
            nothing = torch.empty(0, 0)
            return Top(values=nothing, samples=nothing.long(), positions=torch.empty(0, 0, 2).long())
        values, samples, positions = self._values.cpu(), self._samples.cpu(), self._positions.cpu()
        is_empty = samples == _NOBODY
        columns = int((~is_empty).any(0).sum())
        values, samples, positions, is_empty = (
            part[:, :columns] for part in (values, samples, positions, is_empty)
        )
        return Top(
            values=values.masked_fill(is_empty, torch.nan),
            samples=samples.masked_fill(is_empty, -1),
            positions=positions.masked_fill(is_empty[..., None], -1),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return k and all tensors, for `from_dict`; they are on the device of the values."""
        if self._values is None:
            return {"k": self.k}
        tensors = (self._values, self._samples, self._positions, self._best)
        return {"k": self.k, **dict(zip(("values", "samples", "positions", "best"), tensors, strict=True))}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RunningTop:
        """Return what `to_dict` described."""
        top = cls(state["k"])
        if "values" in state:
            top._values, top._samples = state["values"], state["samples"]
            top._positions, top._best = state["positions"], state["best"]
        return top

    def _found_on_cpu(
        self, maps: torch.Tensor, shape: torch.Size, in_order: bool, highest: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        highest = maps.amax(2) if highest is None else highest.to(maps.dtype)
        is_spoilt = highest.isnan()
        if bool(is_spoilt.any()):
            highest[is_spoilt] = _without_nan(maps[is_spoilt]).amax(1)
        bar = self.bar()
        is_candidate = highest > -inf
        if bar is not None:
            is_candidate &= highest > bar if in_order else highest >= bar
        elif len(maps) > self.k:
            is_candidate &= highest >= highest.topk(self.k, dim=0).values[-1]
        positions = torch.full((*highest.shape, max(2, len(shape))), -1, dtype=torch.int64)
        images, channels = is_candidate.nonzero(as_tuple=True)
        if len(images):
            chosen = _rows(maps, images, channels)
            if bool(is_spoilt.any()):
                chosen = _without_nan(chosen)
            positions[images, channels] = _unravelled(_argmax(chosen), shape)
        return highest, positions

    def _joined(self, other: RunningTop, *, in_order: bool) -> RunningTop:
        theirs = other._values
        assert theirs is not None
        ours = RunningTop(self.k)
        if self._values is None:
            parts = [theirs, other._samples, other._positions]
            ours._best = other._best
        else:
            if len(self._values) != len(theirs):
                raise InvalidArgumentError(f"there must be {len(self._values)} channels, got {len(theirs)}")
            if self._positions.shape[2] != other._positions.shape[2]:
                raise InvalidArgumentError(
                    f"positions must have {self._positions.shape[2]} axes, got {other._positions.shape[2]}"
                )
            device = self._values.device
            if device.type == "cpu" and in_order and self._values.shape[1] == self.k:
                return self._joined_where_needed(other)
            parts = [
                torch.cat([mine, their.to(device)], 1)
                for mine, their in (
                    (self._values, theirs),
                    (self._samples, other._samples),
                    (self._positions, other._positions),
                )
            ]
            ours._best = _united_counts(self, other)
        ours._values, ours._samples, ours._positions = _highest(parts, self.k, in_order=in_order)
        return ours

    def _joined_where_needed(self, other: RunningTop) -> RunningTop:
        """Join where a later input, on a CPU, passes the bar of a channel; most do not after a while."""
        assert self._values is not None
        assert other._values is not None
        ours = RunningTop(self.k)
        ours._best = _united_counts(self, other)
        old = (self._values, self._samples, self._positions)
        rows = (other._values > self._values[:, -1:]).any(1).nonzero().flatten()
        if len(rows) == 0:
            ours._values, ours._samples, ours._positions = old
            return ours
        new = (other._values, other._samples, other._positions)
        parts = [torch.cat([mine[rows], theirs[rows]], 1) for mine, theirs in zip(old, new, strict=True)]
        changed = _highest(parts, self.k, in_order=True)
        dtype = parts[0].dtype
        ours._values, ours._samples, ours._positions = (
            (mine.to(dtype) if mine.is_floating_point() else mine).index_copy(0, rows, part)
            for mine, part in zip(old, changed, strict=True)
        )
        return ours


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


def _rows(maps: torch.Tensor, images: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Return some maps as rows; those that lie one after the other are copied as blocks."""
    if maps.is_contiguous():
        return maps.flatten(0, 1).index_select(0, images * maps.shape[1] + channels)
    return maps[images, channels]


def _argmax(rows: torch.Tensor) -> torch.Tensor:
    """Return the place of the first maximum in each row, on a CPU; numpy finds it several times as fast."""
    if rows.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.argmax(rows.numpy(), axis=1))
    return rows.argmax(1)


def _without_nan(maps: torch.Tensor) -> torch.Tensor:
    return maps.nan_to_num(-inf, inf, -inf)


def _unravelled(flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return places along each axis, at least two, from places in row order."""
    sizes = [1] * max(0, 2 - len(shape)) + list(shape)
    places, rest = [], flat
    for size in reversed(sizes[1:]):
        places.append(rest.remainder(size))
        rest = rest.div(size, rounding_mode="floor")
    places.append(rest)
    return torch.stack(places[::-1], -1)


def _united_counts(ours: RunningTop, theirs: RunningTop) -> torch.Tensor:
    mine, count = ours.best()
    assert theirs._values is not None
    # A batch is not sorted yet.
    other = theirs._values.amax(1).to(mine.device)
    their_count = theirs._best.to(mine.device)
    return count * (mine >= other) + their_count * (other >= mine)


def _highest(parts: list[torch.Tensor], k: int, *, in_order: bool) -> list[torch.Tensor]:
    """Return the first k columns in the order of value, highest first, and then of sample."""
    values, samples, positions = parts
    if not in_order:
        order = samples.sort(dim=1, stable=True).indices
        values, samples = values.gather(1, order), samples.gather(1, order)
        positions = positions.gather(1, order[..., None].expand_as(positions))
    # An empty place has the lowest value there is, so that it comes last.
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    where = order[..., None].expand(-1, -1, positions.shape[2])
    return [values.gather(1, order), samples.gather(1, order), positions.gather(1, where)]
