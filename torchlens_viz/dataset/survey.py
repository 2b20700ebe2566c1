"""`survey`: statistics and top inputs of every channel over a data set, merged across processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import nn

from torchlens_viz.arguments import integer
from torchlens_viz.dataset.checkpoint import Logbook, Progress
from torchlens_viz.dataset.loader import Indices, InputOf, Numbering, inputs_in
from torchlens_viz.dataset.result import Survey
from torchlens_viz.dataset.run import Pass
from torchlens_viz.dataset.tally import Tally, empty_tally
from torchlens_viz.distributed import gathered, world
from torchlens_viz.errors import (
    DistributedError,
    InvalidArgumentError,
    NoDataError,
)
from torchlens_viz.files.tensors import checksum
from torchlens_viz.models.layers import Selector, select
from torchlens_viz.progress import counter, is_shown
from torchlens_viz.stats.running import Bins

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
    progress: bool | None = None,
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
        progress: Show a bar with images per second; None shows it where tqdm is installed and somebody can
            see it.
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
    selected = select(model, layers)
    top_k = integer(top_k, "top_k", least=0)
    if not checkpoint_seconds >= 0:  # infinity writes at the end alone
        raise InvalidArgumentError(f"`checkpoint_seconds` must be 0 or more, got {checkpoint_seconds}")
    rank, processes = world() if distributed else (0, 1)
    first = next(model.parameters(), None)
    place = torch.device(device) if device is not None else None if first is None else first.device
    settings = {
        "layers": [layer.name for layer in selected],
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
        run = Pass(model, selected, numbering, book, place, empty, alike=correlations)
        with counter(shown=rank == 0 and is_shown(progress), total=inputs_in(loader), unit="images") as count:
            run.go(loader, count)
        if processes == 1:
            return [run.progress]
        tallies = {name: Tally.from_dict(tally.to_dict()) for name, tally in run.progress.tallies.items()}
        listed = None if numbering.listed is None else numbering.listed[: numbering.place]
        return [(settings, listed, run.progress._replace(tallies=tallies))]

    found = gathered(work) if processes > 1 else work()
    if processes > 1:
        return _united(found, [layer.name for layer in selected], top_k, model)
    if found[0].inputs == 0:
        raise NoDataError(_NOTHING)
    return _survey_of(found[0], top_k, model)


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
