"""One pass over a loader: every layer's tally, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import nn

from torchlens_viz.dataset.checkpoint import Logbook, Progress, fingerprint
from torchlens_viz.dataset.loader import Batch, Numbering
from torchlens_viz.dataset.tally import Observation, Tally
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.sink import Sink, real_tensor
from torchlens_viz.models.layers import Layer, unwrap
from torchlens_viz.models.state import inference


@final
class Pass:
    """One pass over a loader; `progress` always speaks of whole batches.

    Args:
        model: The network.
        layers: Its layers that are surveyed.
        numbering: What tells the input and the indices of a batch.
        book: Where to keep what was found so far; None keeps nothing.
        device: Where batches are moved to; None leaves them where they are.
        empty: What is known of every layer before the first batch.
        alike: Whether to find out how alike the channels respond.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        numbering: Numbering,
        book: Logbook | None,
        device: torch.device | None,
        empty: Tally,
        *,
        alike: bool,
    ) -> None:
        self._model, self._numbering, self._book, self._device = model, numbering, book, device
        self._alike = alike
        self._layers = tuple(layers)
        self._watch = _Watch()
        self.progress = Progress(tallies=dict.fromkeys((layer.name for layer in layers), empty))

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
            with inference(self._model), self._hooks():
                for raw in loader:
                    batch = self._numbering.read(raw)
                    if self.progress.batches == 0 and self._book is not None:
                        before = self._begin(batch, before)
                    if before is not None and self.progress.batches < before.batches:
                        self._pass_over(batch, before)
                    else:
                        self._survey(batch)
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

    def _hooks(self) -> Capture[None]:
        """Make the calls of all layers reach the observations of the batch that is under way."""
        refuse_torchscript(self._model)
        check = partial(refuse_unhookable, self._model, self._layers, stop=False, compiled="eager")
        return Capture(unwrap(self._model), self._layers, check, self._watch)

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

    def _survey(self, batch: Batch) -> None:
        now, shape = self.progress, batch.shape
        inputs = len(batch.samples)
        if inputs == 0:  # all of it is another process's
            self.progress = now._replace(batches=now.batches + 1)
            return
        in_order = self._numbering.are_in_order(batch.samples)
        self._watch.begin(
            {
                name: Observation(name, tally, batch.samples, in_order=in_order, alike=self._alike)
                for name, tally in now.tallies.items()
            }
        )
        there = batch.to(self._device)
        self._model(*there.args, **there.kwargs)
        with torch.inference_mode(False), torch.no_grad():
            tallies = self._watch.end()
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


@final
class _Watch(Sink[None]):
    """Hands what every layer puts out to its observation of the batch that is under way."""

    __slots__ = ("_aliases", "_calls", "_seen")

    def __init__(self) -> None:
        self._seen: dict[str, Observation] = {}
        self._calls = Counter[str]()
        self._aliases: dict[str, str] = {}

    def begin(self, batch: dict[str, Observation]) -> None:
        """Begin a batch; what a pass that was broken off left of the one before is forgotten."""
        self._seen = batch
        self._calls.clear()

    def end(self) -> dict[str, Tally]:
        """Return what is known of each layer with this batch.

        Raises:
            InvalidArgumentError: A layer put out something other than one tensor per call.
        """
        for name, calls in self._calls.items():
            if self._seen[name].calls != calls:
                raise InvalidArgumentError(
                    f"`{name}` cannot be surveyed: it must put out one tensor, got "
                    f"{self._seen[name].calls} in {calls} calls; choose a layer inside it"
                )
        found = {name: seen.finish() for name, seen in self._seen.items() if name not in self._aliases}
        return {name: found[self._aliases.get(name, name)] for name in self._seen}

    def open(self, layers: Sequence[str]) -> None:
        """Begin; what comes before the first batch is not looked at."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> None:
        """Take in what a layer put out; nothing of it is kept."""
        self._seen[layer].see(real_tensor(tensor, layer).detach())

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Count a call, and note that what is known of one name is known of all."""
        first, *others = names
        self._calls[first] += 1
        self._aliases.update(dict.fromkeys(others, first))


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
