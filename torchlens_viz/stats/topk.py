"""The k inputs that drive each channel hardest, kept batch by batch and merged: `RunningTop` -> `Top`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final, final

import torch

from torchlens_viz.arguments import integer
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.peaks import Peaks

_NOBODY: Final = torch.iinfo(torch.int64).max  # the index of an empty place: it comes after every input


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

    def __repr__(self) -> str:
        channels, kept = self.values.shape
        lines = [f"Top {kept} inputs of {channels} channels: value #sample at position"]
        for channel in range(min(channels, 8)):
            rows = zip(self.values[channel], self.samples[channel], self.positions[channel], strict=True)
            peaks = [f"{value:.4g} #{sample} at {tuple(place.tolist())}" for value, sample, place in rows]
            more = ", ..." if kept > 3 else ""
            lines.append(f"  {channel}: {', '.join(peaks[:3])}{more}")
        return "\n".join([*lines, f"  ... {channels - 8} more"] if channels > 8 else lines)


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
        self._samples = torch.empty(0, device="cpu")
        self._positions = torch.empty(0, device="cpu")
        self._best = torch.empty(0, device="cpu")  # (C,), how many inputs have the highest value

    def with_peaks(self, peaks: Peaks, samples: torch.Tensor, *, in_order: bool) -> RunningTop:
        """Return the top k of what was there and one more batch.

        Args:
            peaks: From `find_peaks`, with the `k` and the `bar` of this very object.
            samples: (N,) int64 on the device of the peaks, the index of each input of the batch.
            in_order: Whether they increase, and all of them are larger than those before.

        Raises:
            InvalidArgumentError: The batch has other channels or axes than those before.
        """
        if in_order and self.bar() is not None and self.fits(peaks) and peaks.values.device.type == "cpu":
            return self._with_later(peaks, samples)
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

    @property
    def channels(self) -> int | None:
        """How many channels there are; None before the first batch."""
        return None if self._values is None else len(self._values)

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
            nothing = torch.empty(0, device="cpu")
            return nothing, nothing.long()
        return self._values[:, 0], self._best

    def compute(self) -> Top:
        """Return the top k so far, in new tensors on the CPU."""
        if self._values is None:
            nothing = torch.empty(0, 0, device="cpu")
            return Top(
                values=nothing, samples=nothing.long(), positions=nothing[..., None].expand(0, 0, 2).long()
            )
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
        top = cls(integer(state["k"], "k", least=1, most=2**31))
        if "values" in state:
            _check_state(state)
            top._values, top._samples = state["values"], state["samples"]
            top._positions, top._best = state["positions"], state["best"]
        return top

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

    def _with_later(self, peaks: Peaks, samples: torch.Tensor) -> RunningTop:
        """Take in inputs that come after all before, on a CPU: after a while few channels change."""
        assert self._values is not None
        highest, best, bar = peaks.values.amax(0), self._values[:, 0], self._values[:, -1]
        ours = RunningTop(self.k)
        ours._values, ours._samples, ours._positions = self._values, self._samples, self._positions
        ours._best = self._best
        rows = ((highest >= best) & (highest > -inf)).nonzero().flatten()
        if len(rows):
            reached = (peaks.values[:, rows] == highest[rows]).sum(0)
            before = self._best[rows] * (best[rows] == highest[rows])
            ours._best = self._best.index_copy(0, rows, before + reached)
        rows = (highest > bar).nonzero().flatten()
        if len(rows):
            old = (self._values, self._samples, self._positions)
            new = _passing(peaks, samples, rows, bar[rows])
            parts = [torch.cat([mine[rows], theirs], 1) for mine, theirs in zip(old, new, strict=True)]
            ours._values, ours._samples, ours._positions = (
                mine.to(part.dtype).index_copy(0, rows, part)
                for mine, part in zip(old, _highest(parts, self.k, in_order=True), strict=True)
            )
        return ours


def _check_state(state: Mapping[str, Any]) -> None:
    """Refuse what no `RunningTop` holds, such as an edited file may.

    Raises:
        InvalidArgumentError: A tensor is missing, or of another type or shape.
    """
    parts: list[Any] = [state.get(name) for name in ("values", "samples", "positions", "best")]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise InvalidArgumentError("the top inputs must be tensors: values, samples, positions and best")
    values, samples, positions, best = parts
    shape, kinds = tuple(values.shape), {samples.dtype, positions.dtype, best.dtype}
    if (
        kinds != {torch.int64}
        or not values.is_floating_point()
        or values.ndim != 2
        or shape[1] > state["k"]
        or (tuple(samples.shape), tuple(positions.shape[:-1]), tuple(best.shape)) != (shape, shape, shape[:1])
        or not 2 <= positions.shape[-1] <= 3
    ):
        raise InvalidArgumentError(
            "the top inputs must be values and samples (C, k), positions (C, k, 2 or 3)"
        )
    if bool((samples < 0).any()) or bool(values.isnan().any()) or bool((best < 0).any()):
        raise InvalidArgumentError("the top inputs must have indices from 0 and no NaN")


def _passing(
    peaks: Peaks, samples: torch.Tensor, rows: torch.Tensor, bar: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the peaks above the bar in R channels, side by side: values, samples (R, M), positions."""
    values, positions = peaks.values.T[rows], peaks.positions.transpose(0, 1)
    is_above = values > bar[:, None]
    counts = is_above.sum(1)
    channels, images = is_above.nonzero(as_tuple=True)
    places = torch.arange(len(channels), device="cpu") - (counts.cumsum(0) - counts)[channels]
    shape = (len(rows), int(counts.max()))
    found = (
        values.new_full(shape, -inf),
        samples.new_full(shape, _NOBODY),
        positions.new_full((*shape, positions.shape[2]), -1),
    )
    there = (values[channels, images], samples[images], positions[rows[channels], images])
    for part, content in zip(found, there, strict=True):
        part[channels, places] = content
    return found


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
