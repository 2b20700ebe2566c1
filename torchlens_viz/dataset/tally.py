"""What a survey knows of one layer: statistics, top inputs, correlations; batch by batch and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeVar, final

import numpy.typing as npt
import torch

from torchlens_viz.arguments import plain
from torchlens_viz.errors import InvalidArgumentError, LayerNotCapturedError, TorchlensVizError
from torchlens_viz.models.layers import nearest
from torchlens_viz.stats.peaks import Peaks, find_peaks, united
from torchlens_viz.stats.running import Bins, RunningStats
from torchlens_viz.stats.topk import RunningTop

V = TypeVar("V")

_PARTS: Final = ("stats", "top", "alike")
# How many inputs and bytes may be pending: more would take memory, or let much pass that is below the newest
# bar.
_MOST_PENDING: Final = 256
_PENDING_SHARE: Final = 1 / 4
_PENDING_BYTES: Final = 2**22


class ByLayer(dict[str, V]):
    """A value for each layer that ran, by name."""

    def __missing__(self, name: str) -> V:
        raise LayerNotCapturedError(
            f"the survey knows nothing of `{name}`: it was not selected, or did not run; "
            f"{nearest(name, list(self))}"
        )


@final
@dataclass(frozen=True, kw_only=True)
class Tally:
    """What is known of one layer; it never changes, so that a batch counts as a whole or not at all.

    Attributes:
        stats: The statistics of its values.
        top: The inputs with the highest peaks; None where none were asked for.
        alike: How alike its channels respond; None where that was not asked for, or nothing was seen.
        inputs: How many inputs went through the layer.
        most_calls: The most calls that one batch took.
        pending: Peaks of later batches with their samples, which `top` does not know yet: to sort in several
            batches at once takes less time than one after the other.
    """

    stats: RunningStats
    top: RunningTop | None
    alike: Comoments | None = None
    inputs: int = 0
    most_calls: int = 0
    pending: tuple[tuple[Peaks, torch.Tensor], ...] = ()

    def settled(self) -> Tally:
        """Return the same with nothing pending."""
        if not self.pending or self.top is None:
            return self
        values, positions = (
            torch.cat(parts) for parts in zip(*(peaks for peaks, _ in self.pending), strict=True)
        )
        samples = torch.cat([samples for _, samples in self.pending])
        top = self.top.with_peaks(Peaks(values, positions), samples, in_order=True)
        return replace(self, top=top, pending=())

    def union(self, other: Tally) -> Tally:
        """Return what both know together, on the device of this one.

        Raises:
            InvalidArgumentError: They are of other channels, or of other options.
        """
        if self.pending or other.pending:
            return self.settled().union(other.settled())
        if self.inputs and other.inputs and (self.alike is None) != (other.alike is None):
            raise InvalidArgumentError("both must have `correlations`, or neither")
        alike = self.alike or other.alike
        if self.alike is not None and other.alike is not None:
            alike = together(self.alike, other.alike)
        if (self.top is None) != (other.top is None):
            raise InvalidArgumentError("both must have top inputs, or neither")
        return Tally(
            stats=self.stats.fresh().merge(self.stats).merge(other.stats),
            top=None if self.top is None or other.top is None else self.top.union(other.top),
            alike=alike,
            inputs=self.inputs + other.inputs,
            most_calls=max(self.most_calls, other.most_calls),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a flat dict of numbers and tensors on the CPU, for `from_dict`."""
        if self.pending:
            return self.settled().to_dict()
        found: dict[str, Any] = {"inputs": self.inputs, "most_calls": self.most_calls}
        parts: dict[str, dict[str, Any]] = {"stats": self.stats.to_dict()}
        if self.top is not None:
            parts["top"] = self.top.to_dict()
        if self.alike is not None:
            parts["alike"] = self.alike._asdict()
        for part, content in parts.items():
            for name, value in content.items():
                found[f"{part}.{name}"] = value.cpu() if isinstance(value, torch.Tensor) else value
        return found

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tally:
        """Return what `to_dict` described."""
        stats, top, alike = (
            {
                name.removeprefix(f"{part}."): value
                for name, value in state.items()
                if name.startswith(f"{part}.")
            }
            for part in _PARTS
        )
        return cls(
            stats=RunningStats.from_dict(stats),
            top=RunningTop.from_dict(top) if top else None,
            alike=Comoments(**alike) if alike else None,
            inputs=state["inputs"],
            most_calls=state["most_calls"],
        )


def empty_tally(*, top_k: int, channel_dim: int, bins: Bins) -> Tally:
    """Return what is known before the first batch."""
    stats = RunningStats(channel_dim=channel_dim, bins=bins)
    return Tally(stats=stats, top=RunningTop(top_k) if top_k else None)


@final
class Observation:
    """What one batch shows of a layer, taken in call by call while the model runs.

    Args:
        name: The layer's name, for messages.
        tally: What is known of it so far.
        samples: (N,) int64 on the CPU, the index of each input.
        in_order: Whether they increase, and are larger than all before.
        alike: Whether to find out how alike the channels respond.
    """

    def __init__(
        self, name: str, tally: Tally, samples: torch.Tensor, *, in_order: bool, alike: bool
    ) -> None:
        self._name = name
        self._tally = tally
        self._samples = samples
        self._inputs = len(samples)
        self._in_order = in_order
        self._stats = tally.stats.fresh()
        self._peaks: Peaks | None = None
        self._alike = alike
        self.calls = 0

    def see(self, values: torch.Tensor) -> None:
        """Take in what one call of the layer put out; nothing of it is kept.

        Raises:
            InvalidArgumentError: It does not have one row per input.
            InvalidTypeError: It has no real numbers.
        """
        self.calls += 1
        try:
            highest = self._stats._update_with_peaks(values)
            if self._tally.top is not None or self._alike:
                self._find_peaks(values, highest)
        except TorchlensVizError as error:
            raise type(error)(f"`{self._name}` cannot be surveyed: {error}") from error

    def finish(self) -> Tally:
        """Return what is known with this batch.

        Raises:
            InvalidArgumentError: The layer had other channels or axes in the batches before.
        """
        before = self._tally
        if self.calls == 0:
            return before
        try:
            after = replace(
                before,
                stats=before.stats._followed_by(self._stats),
                inputs=before.inputs + self._inputs,
                most_calls=max(before.most_calls, self.calls),
            )
            if self._peaks is None:
                return after
            if before.top is not None:
                after = self._with_peaks(after, self._peaks)
            if self._alike:
                alike = comoments(self._peaks.values)
                after = replace(after, alike=alike if before.alike is None else together(before.alike, alike))
        except TorchlensVizError as error:
            raise type(error)(
                f"`{self._name}` cannot be surveyed, because its shape changed from batch to batch: {error}"
            ) from error
        return after

    def _with_peaks(self, tally: Tally, peaks: Peaks) -> Tally:
        samples = self._samples.to(peaks.values.device, non_blocking=True)
        assert tally.top is not None
        if self._in_order and tally.top.bar() is not None and tally.top.fits(peaks):
            tally = replace(tally, pending=(*tally.pending, (peaks, samples)))
            waiting = sum(len(numbers) for _, numbers in tally.pending)
            size = sum(part.nbytes for found, _ in tally.pending for part in found)
            is_due = waiting > min(_MOST_PENDING, _PENDING_SHARE * tally.inputs)
            return tally.settled() if is_due or size > _PENDING_BYTES else tally
        tally = tally.settled()
        assert tally.top is not None
        return replace(tally, top=tally.top.with_peaks(peaks, samples, in_order=self._in_order))

    def _find_peaks(self, values: torch.Tensor, highest: npt.NDArray[Any] | None) -> None:
        rows = plain(values)
        if rows.ndim < 2 or len(rows) != self._inputs or self._tally.stats.channel_dim % rows.ndim == 0:
            raise InvalidArgumentError(
                f"it must put out one row per input, got shape {tuple(values.shape)} for {self._inputs} "
                f"inputs with `channel_dim` {self._tally.stats.channel_dim}; choose another layer, or pass "
                "`top_k=0` for statistics alone"
            )
        top = self._tally.top or RunningTop(1)
        peaks = find_peaks(
            rows,
            self._tally.stats.channel_dim,
            k=top.k,
            bar=top.bar(),
            in_order=self._in_order,
            highest=highest,
        )
        self._peaks = peaks if self._peaks is None else united(self._peaks, peaks)


class Comoments(NamedTuple):
    """Sums over the inputs on which both channels of a pair had a finite figure: (C, C) float64 each.

    Attributes:
        inputs: How many.
        sums: The sum of the row's channel.
        squares: The sum of its squares.
        products: The sum of the products.
    """

    inputs: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor


def comoments(figures: torch.Tensor) -> Comoments:
    """Measure one batch.

    Args:
        figures: (N, C), one figure of each input and channel; those that are not finite are left out.
    """
    wide = figures.double()
    is_known = wide.isfinite()
    known, wide = is_known.double(), wide.masked_fill(~is_known, 0)
    return Comoments(known.T @ known, wide.T @ known, wide.square().T @ known, wide.T @ wide)


def together(ours: Comoments, theirs: Comoments) -> Comoments:
    """Return the sums over the inputs of both."""
    return Comoments(*(mine + other.to(mine.device) for mine, other in zip(ours, theirs, strict=True)))


def correlation(sums: Comoments) -> torch.Tensor:
    """Return Pearson's correlation of every pair of channels, (C, C); NaN where one does not vary.

    Nor is there one of fewer than three inputs: two points always lie on a line. A channel whose spread is
    less than a millionth of its size does not vary.
    """
    count = sums.inputs.clamp(min=1)
    mean = sums.sums / count
    spread = (sums.squares / count - mean.square()).clamp(min=0)
    # What is left of a constant after its square is taken from itself.
    spread = spread.masked_fill(spread <= 1e-12 * sums.squares / count, 0)
    shared = sums.products / count - mean * mean.T
    is_unknown = (spread * spread.T == 0) | (sums.inputs < 3)
    return (shared / (spread * spread.T).sqrt()).masked_fill(is_unknown, torch.nan).clamp(-1, 1)
