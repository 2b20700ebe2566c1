"""What a survey knows of one layer: statistics, top inputs, correlations; batch by batch and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, final, get_args

import numpy.typing as npt
import torch

from torchlens_viz.arguments import a_name, integer, one_of, plain
from torchlens_viz.errors import InvalidArgumentError, LayerNotCapturedError, TorchlensVizError
from torchlens_viz.hooks.followers import Follower
from torchlens_viz.models.layers import nearest
from torchlens_viz.stats.comoments import Comoments, comoments, together
from torchlens_viz.stats.peaks import Peaks, added, find_peaks, find_totals, united
from torchlens_viz.stats.running import Bins, RunningStats
from torchlens_viz.stats.slopes import Slopes
from torchlens_viz.stats.topk import RunningTop

V = TypeVar("V")

_PARTS: Final = ("stats", "top", "relevant", "alike", "slopes")
# How many inputs and bytes may be pending: more would take memory, or let much pass that is below the newest
# bar.
_MOST_PENDING: Final = 256
_PENDING_SHARE: Final = 1 / 4
_PENDING_BYTES: Final = 2**22


class ByLayer(dict[str, V]):
    """A value for each layer that ran, by name."""

    def __getitem__(self, name: str) -> V:
        return super().__getitem__(a_name(name, "layer"))

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
        relevant: The inputs for whose score it mattered most; None where none was asked for.
        alike: How alike its channels respond; None where that was not asked for, or nothing was seen.
        slopes: What the loss says of its channels; None where no loss was given, or nothing was seen.
        inputs: How many inputs went through the layer.
        most_calls: The most calls that one batch took.
        follower: What comes after the layer, which tells whether a channel that never exceeds zero is off.
        pending: Peaks of later batches with their samples, which `top` does not know yet: to sort in several
            batches at once takes less time than one after the other.
    """

    stats: RunningStats
    top: RunningTop | None
    relevant: RunningTop | None = None
    alike: Comoments | None = None
    slopes: Slopes | None = None
    inputs: int = 0
    most_calls: int = 0
    follower: Follower = ""
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
        if self.inputs and other.inputs and (self.slopes is None) != (other.slopes is None):
            raise InvalidArgumentError("both must have been surveyed with a `loss`, or neither")
        if (self.top is None) != (other.top is None):
            raise InvalidArgumentError("both must have top inputs, or neither")
        if (self.relevant is None) != (other.relevant is None):
            raise InvalidArgumentError("both must have top inputs by relevance, or neither; give `target`")
        return Tally(
            stats=self.stats.fresh(channel_dim=other.stats.channel_dim).merge(self.stats).merge(other.stats),
            top=None if self.top is None or other.top is None else self.top.union(other.top),
            relevant=None
            if self.relevant is None or other.relevant is None
            else self.relevant.union(other.relevant),
            alike=alike,
            slopes=other.slopes if self.slopes is None else self.slopes.plus(other.slopes),
            inputs=self.inputs + other.inputs,
            most_calls=max(self.most_calls, other.most_calls),
            follower=self.follower or other.follower,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a flat dict of numbers and tensors on the CPU, for `from_dict`."""
        if self.pending:
            return self.settled().to_dict()
        found: dict[str, Any] = {name: getattr(self, name) for name in ("inputs", "most_calls", "follower")}
        parts: dict[str, dict[str, Any]] = {"stats": self.stats.to_dict()}
        if self.top is not None:
            parts["top"] = self.top.to_dict()
        if self.relevant is not None:
            parts["relevant"] = self.relevant.to_dict()
        if self.alike is not None:
            parts["alike"] = self.alike._asdict()
        if self.slopes is not None:
            parts["slopes"] = self.slopes._asdict()
        for part, content in parts.items():
            for name, value in content.items():
                found[f"{part}.{name}"] = value.cpu() if isinstance(value, torch.Tensor) else value
        return found

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tally:
        """Return what `to_dict` described."""
        stats, top, relevant, alike, slopes = (
            {
                name.removeprefix(f"{part}."): value
                for name, value in state.items()
                if name.startswith(f"{part}.")
            }
            for part in _PARTS
        )
        found = cls(
            stats=RunningStats.from_dict(stats),
            top=RunningTop.from_dict(top) if top else None,
            relevant=RunningTop.from_dict(relevant) if relevant else None,
            alike=Comoments(**alike) if alike else None,
            slopes=Slopes(**slopes) if slopes else None,
            inputs=integer(state["inputs"], "inputs", least=0, most=2**62),
            most_calls=integer(state["most_calls"], "most_calls", least=0, most=2**62),
            follower=one_of(state.get("follower", ""), "follower", get_args(Follower)),
        )
        found._check()
        return found

    def _check(self) -> None:
        """Refuse parts that are not of the same channels, such as an edited file may hold."""
        channels = self.stats.channels
        tops = [top for top in (self.top, self.relevant) if top is not None]
        of_tops = [top.channels for top in tops]
        of_alike = None
        if self.alike is not None:
            shapes = {getattr(part, "shape", None) for part in self.alike}
            kinds = {getattr(part, "dtype", None) for part in self.alike}
            of_alike = len(self.alike.inputs) if kinds == {torch.float64} else -1
            if shapes != {(of_alike, of_alike)}:
                raise InvalidArgumentError("the co-moments must be (C, C) of float64")
        of_parts = [*of_tops, *([] if self.alike is None else [of_alike])]
        if any(count != channels for count in of_parts) or (channels is None) != (self.inputs == 0):
            raise InvalidArgumentError(
                f"all parts must be of the same channels, got {channels}, {of_tops} and {of_alike}"
            )
        if len({top.k for top in tops}) > 1:
            raise InvalidArgumentError(f"all tops must keep as many inputs, got {[top.k for top in tops]}")


def empty_tally(*, top_k: int, channel_dim: int | None, bins: Bins, by_relevance: bool = False) -> Tally:
    """Return what is known before the first batch."""
    stats = RunningStats(channel_dim=channel_dim, bins=bins)
    top = RunningTop(top_k) if top_k else None
    return Tally(stats=stats, top=top, relevant=top if by_relevance else None)


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
        self._relevance: Peaks | None = None
        self._alike = alike
        self.calls = 0
        self.slopes: Slopes | None = None  # what the loss says of it, where there is one

    @property
    def channel_dim(self) -> int | None:
        """Which dimension counted channels in the batches before; None where there was none."""
        return self._stats.channel_dim

    def see(self, values: torch.Tensor, channel_dim: int) -> None:
        """Take in what one call of the layer put out; nothing of it is kept.

        Args:
            values: (N, ...).
            channel_dim: Which of its dimensions counts channels.

        Raises:
            InvalidArgumentError: It does not have one row per input.
            InvalidTypeError: It has no real numbers.
        """
        self.calls += 1
        if self._stats.channel_dim is None:
            self._stats = self._stats.fresh(channel_dim=channel_dim)
        try:
            highest = self._stats._update_with_peaks(values)
            if self._tally.top is not None or self._alike:
                self._find_peaks(values, highest, channel_dim)
        except TorchlensVizError as error:
            raise type(error)(f"`{self._name}` cannot be surveyed: {error}") from error

    def weigh(
        self, values: torch.Tensor, gradient: torch.Tensor | None, channel_dim: int, *, is_only: bool
    ) -> None:
        """Take in how much what one call of the layer put out mattered.

        Args:
            values: What it put out, (N, ...).
            gradient: That of the score there; None for zero.
            channel_dim: Which of its dimensions counts channels.
            is_only: Whether it was the only call. Of several the sum counts, so that none tells alone what is
                too little.
        """
        top = self._tally.relevant
        assert top is not None
        found = find_totals(
            plain(values),
            None if gradient is None else plain(gradient),
            channel_dim,
            k=top.k if is_only else self._inputs,
            bar=top.bar() if is_only else None,
            in_order=self._in_order,
        )
        self._relevance = found if self._relevance is None else added(self._relevance, found)

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
                slopes=self.slopes if before.slopes is None else before.slopes.plus(self.slopes),
            )
            if self._relevance is not None and before.relevant is not None:
                samples = self._samples.to(self._relevance.values.device, non_blocking=True)
                relevant = before.relevant.with_peaks(self._relevance, samples, in_order=self._in_order)
                after = replace(after, relevant=relevant)
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

    def _find_peaks(self, values: torch.Tensor, highest: npt.NDArray[Any] | None, channel_dim: int) -> None:
        rows = plain(values)
        if rows.ndim < 2 or len(rows) != self._inputs or channel_dim % rows.ndim == 0:
            raise InvalidArgumentError(
                f"it must put out one row per input, got shape {tuple(values.shape)} for {self._inputs} "
                f"inputs with `channel_dim` {channel_dim}; choose another layer, or pass "
                "`top_k=0` for statistics alone"
            )
        top = self._tally.top or RunningTop(1)
        peaks = find_peaks(
            rows,
            channel_dim,
            k=top.k,
            bar=top.bar(),
            in_order=self._in_order,
            highest=highest,
        )
        self._peaks = peaks if self._peaks is None else united(self._peaks, peaks)
