"""One pass over a loader: every layer's tally, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import nn

from torchlens_viz.dataset.checkpoint import Logbook, Progress, fingerprint
from torchlens_viz.dataset.loader import Batch, Numbering
from torchlens_viz.dataset.tally import Observation, Tally
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.state import inference


@final
class Pass:
    """One pass over a loader; `progress` always speaks of whole batches.

    Args:
        model: The network.
        names: Its layers that are surveyed.
        numbering: What tells the input and the indices of a batch.
        book: Where to keep what was found so far; None keeps nothing.
        device: Where batches are moved to; None leaves them where they are.
        empty: What is known of every layer before the first batch.
        alike: Whether to find out how alike the channels respond.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        numbering: Numbering,
        book: Logbook | None,
        device: torch.device | None,
        empty: Tally,
        *,
        alike: bool,
    ) -> None:
        self._model, self._numbering, self._book, self._device = model, numbering, book, device
        self._alike = alike
        self._watched: dict[str, Observation] = {}
        self.progress = Progress(tallies=dict.fromkeys(names, empty))

    def go(self, loader: Iterable[Any], count: Callable[[int], object]) -> None:
        """Survey all batches, or those before Ctrl-C.

        Args:
            loader: Batches.
            count: Called after each with how many inputs it had.

        Raises:
            ArchiveError: The book was begun with other data.
            InvalidArgumentError: A layer or the indices do not fit.
        """
        before = None if self._book is None else self._book.read()
        if before is not None and before.is_complete:
            self._require_same_beginning(loader, before)
            self.progress = before
            count(before.inputs)
            return
        try:
            with ExitStack() as stack:
                stack.enter_context(inference(self._model))
                watched = self._hook(stack)
                for raw in loader:
                    batch = self._numbering.read(raw)
                    if self.progress.batches == 0 and self._book is not None:
                        before = self._begin(batch, before)
                    if before is not None and self.progress.batches < before.batches:
                        self._pass_over(batch, before)
                    else:
                        self._survey(batch, watched)
                    count(len(batch.samples))
            self._numbering.finish()
            _refuse_repeated(self.progress.tallies)
            self.progress = self.progress._replace(is_complete=True)
            if before is not None and self.progress.batches < before.batches:
                assert self._book is not None
                self._book.require_same_count(before, self.progress.inputs)
        except KeyboardInterrupt:
            if before is not None and self.progress.batches < before.batches:
                self.progress = before
            if self.progress.inputs == 0:
                raise
        if self._book is not None and self.progress.inputs:
            self._book.write(self.progress)

    def _require_same_beginning(self, loader: Iterable[Any], before: Progress) -> None:
        """Hold the first batch of a loader, if it yields one at all, to that of a finished run."""
        assert self._book is not None
        for raw in loader:
            self._book.require_same_data(before, fingerprint(self._numbering.read(raw)))
            break

    def _hook(self, stack: ExitStack) -> dict[str, Any]:
        """Make every layer's calls reach the observation of the batch that is under way."""

        def see(name: str, values: torch.Tensor) -> None:
            self._watched[name].see(values)

        def watcher(name: str) -> Callable[[torch.Tensor], None]:
            return lambda values: see(name, values)

        # A block for each, since a reduction is not told which layer it is for.
        return {
            name: stack.enter_context(capture(self._model, name, copy=False, reduce=watcher(name)))
            for name in self.progress.tallies
        }

    def _begin(self, batch: Batch, before: Progress | None) -> Progress | None:
        """Note what the first batch is, and hold that of an earlier run to it."""
        assert self._book is not None
        found = fingerprint(batch)
        self.progress = self.progress._replace(first_batch=found)
        if before is not None:
            self._book.require_same_data(before, found)
        return before

    def _pass_over(self, batch: Batch, before: Progress) -> None:
        assert self._book is not None
        if len(batch.samples):
            self._numbering.are_in_order(batch.samples)
        now = self.progress
        self.progress = now._replace(batches=now.batches + 1, inputs=now.inputs + len(batch.samples))
        if self.progress.batches == before.batches:
            self._book.require_same_count(before, self.progress.inputs)
            self.progress = before

    def _survey(self, batch: Batch, watched: dict[str, Any]) -> None:
        now, shape = self.progress, batch.shape
        inputs = len(batch.samples)
        if inputs == 0:  # all of it is another process's
            self.progress = now._replace(batches=now.batches + 1)
            return
        in_order = self._numbering.are_in_order(batch.samples)
        self._watched = {
            name: Observation(name, tally, batch.samples, in_order=in_order, alike=self._alike)
            for name, tally in now.tallies.items()
        }
        there = batch.to(self._device)
        self._model(*there.args, **there.kwargs)
        with torch.inference_mode(False), torch.no_grad():
            tallies = {name: seen.finish() for name, seen in self._watched.items()}
        for name, acts in watched.items():
            calls = len(acts.calls(name)) if name in acts else 0
            if self._watched[name].calls != calls:
                raise InvalidArgumentError(
                    f"`{name}` cannot be surveyed: it must put out one tensor, got "
                    f"{self._watched[name].calls} in {calls} calls; choose a layer inside it"
                )
            acts.clear()
        # In one step, so that Ctrl-C never leaves half a batch.
        self.progress = Progress(
            tallies=tallies,
            batches=now.batches + 1,
            inputs=now.inputs + inputs,
            shape=shape if now.inputs == 0 or now.shape == shape else None,
            first_batch=now.first_batch,
        )
        if self._book is not None:
            self._book.write_in_time(self.progress)


def _refuse_repeated(tallies: Mapping[str, Tally]) -> None:
    """Refuse indices of which one was given to two inputs, so far as the top inputs show it."""
    for tally in tallies.values():
        top = tally.settled().top
        samples = None if top is None or not tally.inputs else top.compute().samples
        if samples is None or samples.shape[1] < 2:
            continue
        ordered = samples.sort(dim=1).values
        repeated = ordered[:, 1:][(ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)]
        if len(repeated):
            raise InvalidArgumentError(
                f"`indices` must name each input once, got {int(repeated[0])} in two batches"
            )
