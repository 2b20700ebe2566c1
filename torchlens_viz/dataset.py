"""`survey`: one pass over a data set, statistics and top inputs of every channel; merged across processes."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz.activations import capture
from torchlens_viz.batches import Batch, Indices, InputOf, Numbering, inputs_in
from torchlens_viz.errors import (
    DistributedError,
    InvalidArgumentError,
    InvalidTypeError,
    NoDataError,
)
from torchlens_viz.layers import Selector, select
from torchlens_viz.logbooks import Logbook, Progress, fingerprint
from torchlens_viz.modes import inference
from torchlens_viz.progress import counter
from torchlens_viz.resumption import checksum
from torchlens_viz.sharing import gathered, world
from torchlens_viz.statistics import Bins
from torchlens_viz.surveys import Survey
from torchlens_viz.tallies import Observation, Tally, empty_tally

_NOTHING: Final = "`loader` must yield at least one batch, got none; was it used up before?"


def survey(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Selector,
    *,
    top_k: int = 9,
    indices: Indices = None,
    input_of: InputOf = None,
    device: torch.device | str | None = None,
    channel_dim: int = 1,
    bins: Bins = None,
    correlations: bool = False,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    distributed: bool = True,
) -> Survey:
    """Find what a data set makes of the layers of a network, in one pass and without keeping activations.

    For each selected layer: the statistics of every channel over all values, and the inputs that drive it
    hardest. Each input counts once per channel, at its peak; of several calls of a layer for one batch, at
    the highest. Ties go to the smaller index, then to the first position in row order. NaN is counted in the
    statistics and is never a peak; an input whose map holds nothing else (or -Inf) has none.

    The model runs in eval mode and without gradients, in the type it has; its flags and the random numbers
    are restored. Ctrl-C ends the pass; what was seen until then is returned.

    Under torch.distributed each process surveys its share, of a `DistributedSampler` or of `indices` of its
    own, and all of them return the same, merged survey. Inputs that a `DistributedSampler` gives to a second
    process to make the shares equal count once.

    Args:
        model: The network.
        loader: Batches: tensors (N, ...), tuples or lists that begin with one, or mappings; see `input_of`.
        layers: Which layers, as in `capture`.
        top_k: How many inputs to keep per channel; 0 for statistics alone.
        indices: The index of each input, where it is not the place in the order of iteration: as many ints
            as there are inputs, or a function of a batch that gives them. Each must be named once. A
            DataLoader that shuffles needs it.
        input_of: Which part of a batch is the input: a key, a place, or a function of the batch. The function
            may return a tuple or a dict, with which the model is called. By default of a tuple or list the
            first part, and of a mapping the first of the keys `pixel_values`, `image`, `images`, `img`,
            `input`, `inputs`, `x`.
        device: Where batches are moved to; by default, where the model's first parameter is.
        channel_dim: The dimension of the channels; -1 for tokens (N, L, C).
        bins: Edges of a histogram, as in `RunningStats`.
        correlations: Gather the correlation of every two channels' peaks too, for `Survey.duplicates`.
        progress: Show a bar with images per second, where tqdm is installed.
        checkpoint: A file in which to keep what was found so far. A survey that was broken off, even by
            kill -9, goes on from there when it is started again: inputs that are in it are read and passed
            over. Each process has its own, with its rank appended to the name.
        checkpoint_seconds: How often to write it; 0 for after every batch.
        distributed: Survey together with the other processes of torch.distributed, where it is initialised.

    Returns:
        Statistics and top inputs by layer. Layers that never ran are in `not_called`.

    Raises:
        LayerNotFoundError: A selector matches nothing.
        InvalidArgumentError: The loader shuffles, a layer changes its channels from batch to batch or has no
            row per input, or an argument does not fit.
        InvalidTypeError: A batch holds no tensor, or an argument has another type.
        NoDataError: The loader yields nothing.
        ArchiveError: The checkpoint was begun with other settings, weights or data, or cannot be used.
        DistributedError: Another process failed or died.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())
        >>> net[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
        >>> images = torch.arange(24.0).view(6, 1, 2, 2)
        >>> found = survey(net, images.split(4), "1", top_k=2, progress=False)
        >>> found.top["1"].samples[0].tolist(), found.top["1"].positions[0].tolist()
        ([5, 4], [[1, 1], [1, 1]])
        >>> found.dead("1").tolist(), found.samples_seen
        ([1], 6)
    """
    names = [layer.name for layer in select(model, layers)]
    top_k = _checked(top_k, checkpoint_seconds)
    rank, processes = world() if distributed else (0, 1)
    first = next(model.parameters(), None)
    place = torch.device(device) if device is not None else None if first is None else first.device
    settings = {
        "layers": names,
        "top_k": top_k,
        "channel_dim": channel_dim,
        "bins": bins if bins is None or isinstance(bins, str) else [float(edge) for edge in bins],
        "correlations": correlations,
        "processes": processes,
    }
    if checkpoint is not None or processes > 1:
        settings["weights"] = checksum(model)

    def work() -> list[Any]:
        # What may fail in one process alone is done here, so that the others hear of it.
        numbering = Numbering(loader, indices, input_of, shared=processes > 1)
        own = {**settings, "rank": rank, "indices": checksum(numbering.listed), "inputs": inputs_in(loader)}
        path = None if checkpoint is None else f"{os.fspath(checkpoint)}{f'.{rank}' if processes > 1 else ''}"
        book = None if path is None else Logbook(path, own, seconds=checkpoint_seconds)
        empty = empty_tally(top_k=top_k, channel_dim=channel_dim, bins=bins)
        run = _Pass(model, names, numbering, book, place, empty, alike=correlations)
        with counter(shown=progress and rank == 0, total=inputs_in(loader), unit="images") as count:
            run.go(loader, count)
        if processes == 1:
            return [run.progress]
        tallies = {name: Tally.from_dict(tally.to_dict()) for name, tally in run.progress.tallies.items()}
        listed = None if numbering.listed is None else numbering.listed[: numbering.place]
        return [(settings, listed, run.progress._replace(tallies=tallies))]

    found = gathered(work) if processes > 1 else work()
    if processes > 1:
        return _united(found, names, top_k, model)
    if found[0].inputs == 0:
        raise NoDataError(_NOTHING)
    return _survey_of(found[0], top_k, model)


@final
class _Pass:
    """One pass over a loader; `progress` always speaks of whole batches."""

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
        """Survey all batches, or those before Ctrl-C."""
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


def _survey_of(found: Progress, top_k: int, model: nn.Module) -> Survey:
    about = {
        "samples_seen": found.inputs,
        "top_k": top_k,
        "is_complete": found.is_complete,
        "input_shape": found.shape,
    }
    return Survey(found.tallies, about, model)


def _united(
    shares: Sequence[tuple[dict[str, Any], torch.Tensor | None, Progress]],
    names: Sequence[str],
    top_k: int,
    model: nn.Module,
) -> Survey:
    """Merge what all processes found.

    Raises:
        DistributedError: They surveyed other layers or other weights than this one, or the same inputs.
    """
    ours = shares[0][0]
    for other, (settings, _, _) in enumerate(shares):
        for key, value in settings.items():
            if ours[key] != value:
                raise DistributedError(
                    f"all processes must survey the same: `{key}` is {ours[key]!r} in process 0 and "
                    f"{value!r} in process {other}"
                )
    listed = [indices for _, indices, _ in shares if indices is not None]
    if listed:
        ordered = torch.cat(listed).sort().values
        repeated = ordered[1:][ordered.diff() == 0]
        if len(repeated):
            raise DistributedError(
                f"`indices` must name each input in one process only, got {int(repeated[0])} in two; "
                "give each its own, or use a DistributedSampler without `indices`"
            )
    parts = [progress for _, _, progress in shares if progress.inputs]
    if not parts:
        raise NoDataError(_NOTHING)
    merged = _survey_of(parts[0], top_k, model)
    for part in parts[1:]:
        merged = merged.merge(_survey_of(part, top_k, model))
    return merged


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


def _checked(top_k: int, seconds: float) -> int:
    try:
        count = operator.index(top_k)
    except TypeError:
        raise InvalidTypeError(f"`top_k` must be an int, got {top_k!r}") from None
    if count < 0 or isinstance(top_k, bool):
        raise InvalidArgumentError(f"`top_k` must be 0 or more, got {top_k}")
    if not seconds >= 0:
        raise InvalidArgumentError(f"`checkpoint_seconds` must be 0 or more, got {seconds}")
    return count
