"""What one batch shows of one layer, call by call, and what is known of the layer with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, NamedTuple, final

import numpy.typing as npt
import torch

from torchlens_viz.arguments import has_float64, plain, wide
from torchlens_viz.dataset.tally import Tally
from torchlens_viz.errors import InvalidArgumentError, TorchlensVizError
from torchlens_viz.stats.classes import class_sums
from torchlens_viz.stats.comoments import comoments
from torchlens_viz.stats.meaning import meaning
from torchlens_viz.stats.peaks import Peaks, added, find_peaks, find_totals, united
from torchlens_viz.stats.slopes import slopes_of_each, summed
from torchlens_viz.stats.topk import RunningTop

# How many inputs and bytes may be pending: more would take memory, or let much pass that is below the newest
# bar.
_MOST_PENDING: Final = 256
_PENDING_SHARE: Final = 1 / 4
_PENDING_BYTES: Final = 2**22


class Told(NamedTuple):
    """What is known of the inputs of a batch besides.

    Attributes:
        labels: (N,) int64, their classes; None where nobody asked.
        embeddings: (N, D), where an encoder puts them; None where there is none.
    """

    labels: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


NOTHING_TOLD: Final = Told()


@final
class Observation:
    """What one batch shows of a layer, taken in call by call while the model runs.

    Args:
        name: The layer's name, for messages.
        tally: What is known of it so far.
        samples: (N,) int64 on the CPU, the index of each input.
        in_order: Whether they increase, and are larger than all before.
        alike: Whether to find out how alike the channels respond.
        by_input: Whether anything will be told of the inputs.
    """

    def __init__(
        self, name: str, tally: Tally, samples: torch.Tensor, *, in_order: bool, alike: bool, by_input: bool
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
        self._by_input = by_input
        self._activity: torch.Tensor | None = None  # (N, C), summed over positions and calls
        self._positions = 0
        self._slopes: tuple[torch.Tensor, torch.Tensor] | None = None  # G and P, (N, C) each
        self.calls = 0

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
                self._find_peaks(self._rows(values, channel_dim), highest, channel_dim)
            if self._by_input:
                self._add_activity(self._rows(values, channel_dim), channel_dim)
        except TorchlensVizError as error:
            raise type(error)(f"`{self._name}` cannot be surveyed: {error}") from error

    def weigh(
        self, values: torch.Tensor, gradient: torch.Tensor | None, channel_dim: int, *, is_only: bool
    ) -> None:
        """Take in how much what one call of the layer put out mattered for a score.

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

    def learn(self, values: torch.Tensor, gradient: torch.Tensor | None, channel_dim: int) -> None:
        """Take in what the loss says of what one call of the layer put out; of several, each is replaced.

        Args:
            values: What it put out, (N, ...).
            gradient: That of the loss there; None for zero.
            channel_dim: Which of its dimensions counts channels.

        Raises:
            InvalidArgumentError: It does not have one row per input, or no gradient.
        """
        try:
            found = slopes_of_each(self._rows(values, channel_dim), gradient, channel_dim)
        except TorchlensVizError as error:
            raise type(error)(f"`{self._name}` cannot be surveyed: {error}") from error
        before = self._slopes
        self._slopes = found if before is None else (before[0] + found[0], before[1] + found[1])

    def finish(self, told: Told = NOTHING_TOLD) -> Tally:
        """Return what is known with this batch.

        Args:
            told: What is known of its inputs besides.

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
                **self._sums(told),
            )
            if self._relevance is not None and before.relevant is not None:
                samples = self._samples.to(self._relevance.values.device, non_blocking=True)
                relevant = before.relevant.with_peaks(self._relevance, samples, in_order=self._in_order)
                after = replace(after, relevant=relevant)
            if self._peaks is None:
                return after
            if before.top is not None:
                after = self._with_peaks(after, self._peaks)
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

    def _sums(self, told: Told) -> dict[str, Any]:
        """Return the sums of the batches before and of this one, by the field of `Tally`."""
        new: dict[str, Any] = {}
        slopes = self._slopes
        if slopes is not None:
            new["slopes"] = summed(*slopes)
        if self._alike and self._peaks is not None:
            new["alike"] = comoments(self._peaks.values)
        if self._activity is not None:
            activity = self._activity / self._positions
            if told.labels is not None:
                new["classes"] = class_sums(told.labels, activity, slopes)
            if told.embeddings is not None:
                new["meaning"] = meaning(activity, told.embeddings)
        before = {name: getattr(self._tally, name) for name in new}
        return {name: part if before[name] is None else before[name].plus(part) for name, part in new.items()}

    def _rows(self, values: torch.Tensor, channel_dim: int) -> torch.Tensor:
        rows = plain(values)
        if rows.ndim < 2 or len(rows) != self._inputs or channel_dim % rows.ndim == 0:
            raise InvalidArgumentError(
                f"it must put out one row per input, got shape {tuple(values.shape)} for {self._inputs} "
                f"inputs with `channel_dim` {channel_dim}; choose a layer before inputs are folded into "
                "another dimension, or behind that, or pass `top_k=0` and no `loss`, `by_class` or `encoder` "
                "for statistics alone"
            )
        return rows

    def _find_peaks(self, rows: torch.Tensor, highest: npt.NDArray[Any] | None, channel_dim: int) -> None:
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

    def _add_activity(self, rows: torch.Tensor, channel_dim: int) -> None:
        maps = rows.movedim(channel_dim, 1)
        maps = maps.reshape(*maps.shape[:2], -1)
        total = maps.sum(2, dtype=torch.float64) if has_float64(maps.device) else wide(maps).sum(2)
        self._activity = total if self._activity is None else self._activity + total
        self._positions += maps.shape[2]
