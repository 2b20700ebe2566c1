"""`survey`: statistics and top inputs of every channel over a data set, merged across processes."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from torchlens_viz.ablation.losses import Loss, labels_of
from torchlens_viz.arguments import flag, function, integer, real, shown
from torchlens_viz.dataset.checkpoint import Logbook, Progress
from torchlens_viz.dataset.gradients import Gradients, Target, questions_of
from torchlens_viz.dataset.loader import Batch, Indices, Numbering, inputs_in
from torchlens_viz.dataset.observation import Told
from torchlens_viz.dataset.result import Survey
from torchlens_viz.dataset.run import Pass
from torchlens_viz.dataset.tally import Tally, empty_tally
from torchlens_viz.distributed import gathered, world
from torchlens_viz.errors import (
    DistributedError,
    InvalidArgumentError,
    NoDataError,
    calling,
)
from torchlens_viz.files.paths import as_path
from torchlens_viz.files.tensors import checksum
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.inputs import InputOf
from torchlens_viz.models.layers import Selector, select, unwrap
from torchlens_viz.models.state import inference, require_values, usable_device
from torchlens_viz.nested import cloned
from torchlens_viz.progress import counter, is_shown
from torchlens_viz.stats.running import Bins, edges_of

Encoder: TypeAlias = Callable[..., torch.Tensor] | Literal["output"]

_SHOWN: Final = 5  # layers that a warning names
_NOTHING: Final = "`loader` must yield at least one batch, got none; was it used up before?"


def survey(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Selector,
    *,
    top_k: int = 9,
    indices: Indices = None,
    input_of: InputOf = None,
    inputs: ModelInputs = None,
    device: torch.device | str | None = None,
    channel_dim: int | None = None,
    bins: Bins = None,
    correlations: bool = False,
    target: Target | None = None,
    loss: Loss | None = None,
    label_of: InputOf = None,
    by_class: bool = False,
    encoder: Encoder | None = None,
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
            may return a tuple or a dict, with which the model is called, by position or by name, or a list of
            images. By default of a tuple or list the first part, and of a mapping the first of the keys
            `pixel_values`, `image`, `images`, `img`, `input`, `inputs`, `x`.
        inputs: What the model takes beside the images that `input_of` finds, the same for all of them, as in
            `torchlens_viz.maximize`.
        device: Where batches are moved to; by default, where the model's first parameter is.
        channel_dim: The dimension that counts channels in what all of the layers put out: 1 in (N, C, H, W),
            -1 in tokens (N, L, C). None finds it for each layer by itself, as in `torchlens_viz.capture`.
        bins: Edges of a histogram, as in `RunningStats`.
        correlations: Gather the correlation of every two channels' peaks too, for `Survey.duplicates`.
        loss: Estimate the effect of every channel on it too, for `Survey.effects`: `f(output, batch) ->
            (N,)`, a number per input, where the tensors of the batch are on the model's device; or
            `"cross_entropy"`, of logits (N, classes) and the labels in the batch. One backward pass more for
            each batch. The model runs as a private copy, as with `target`.
        label_of: Which part of a batch has the classes, as in `ablate`, for `"cross_entropy"` and `by_class`.
        by_class: Sum up by the labels of the batches too, for `Survey.selectivity`, and with a `loss` for
            `Survey.effects.by_class`. At most 1,024 classes: for each of them 8 bytes a channel, and 48 with
            a `loss`.
        encoder: Gather how alike the inputs are that drive a channel, for `Survey.monosemanticity`: a
            function or module that is called as the model is and makes of each input an embedding, (N, D), or
            `"output"`, what the network itself puts out. It takes 8 D bytes a channel.
        target: Makes of what the model puts out, and of the batch as the loader yields it, a score for each
            input, (N,): `lambda output, batch: output[:, 3]`. With it, the inputs for whose score each
            channel mattered most are gathered in the same pass, `Survey.top_by_relevance`: by activation
            times the gradient of the score, summed over the map. What a channel puts out where nothing
            depends on it does not count, and what lowers the score counts as negative. The model runs as a
            private copy that shares its weights, with gradients of what the layers put out alone.
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
            row per input, `target` makes no score or one that no layer leads to, or an argument does not fit.
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
    model = called_with(model, inputs)
    selected = select(model, layers)
    surveyed = model
    by_class = flag(by_class, "by_class")
    if label_of is not None and loss != "cross_entropy" and not by_class:
        raise InvalidArgumentError(
            '`label_of` has no effect without `loss="cross_entropy"` or `by_class`; leave it out'
        )
    if encoder != "output":
        function(encoder, "encoder")
    top_k = integer(top_k, "top_k", least=0)
    if not (checkpoint_seconds := real(checkpoint_seconds, "checkpoint_seconds")) >= 0:
        # Infinity writes at the end alone.
        raise InvalidArgumentError(f"`checkpoint_seconds` must be 0 or more, got {shown(checkpoint_seconds)}")
    correlations = flag(correlations, "correlations")
    if function(target, "target") is not None and top_k == 0:
        raise InvalidArgumentError(
            "`target` has no effect with `top_k=0`, which keeps no inputs; give `top_k` of 1 or more"
        )
    bins = edges_of(bins)
    file = None if checkpoint is None else as_path(checkpoint, "checkpoint")
    rank, processes = world() if flag(distributed, "distributed") else (0, 1)
    first = next(model.parameters(), None)
    place = usable_device(device) if device is not None else None if first is None else first.device
    settings = {
        "layers": [layer.name for layer in selected],
        "top_k": top_k,
        "channel_dim": channel_dim,
        "bins": None if bins is None else list(bins),
        "correlations": correlations,
        "target": target is not None,
        "processes": processes,
        "loss": _name_of(loss),
        "by_class": by_class,
        "encoder": _name_of(encoder),
    }
    require_values(model, is_placed=device is not None)
    if checkpoint is not None or processes > 1:
        settings["weights"] = checksum(unwrap(model))

    def work() -> list[Any]:
        nonlocal surveyed
        # What may fail in one process alone is done here, so that the others hear of it.
        numbering = Numbering(loader, indices, input_of, shared=processes > 1)
        own = {**settings, "rank": rank, "indices": checksum(numbering.listed), "inputs": inputs_in(loader)}
        path = None if file is None else f"{file}{f'.{rank}' if processes > 1 else ''}"
        book = None if path is None else Logbook(path, own, seconds=checkpoint_seconds)
        empty = empty_tally(top_k=top_k, channel_dim=channel_dim, bins=bins, by_relevance=target is not None)
        questions = questions_of(target, loss, label_of, place)
        run = Pass(
            model, selected, numbering, book, place, empty,
            alike=correlations, channel_dim=channel_dim,
            gradients=Gradients(model, questions) if questions else None,
            tell=partial(_told, label_of, encoder, by_class=by_class) if by_class or encoder else None,
        )  # fmt: skip
        with counter(shown=rank == 0 and is_shown(progress), total=inputs_in(loader), unit="images") as count:
            run.go(loader, count)
        surveyed = called_with(model, numbering.inputs)
        if processes == 1:
            return [run.progress]
        tallies = {name: Tally.from_dict(tally.to_dict()) for name, tally in run.progress.tallies.items()}
        listed = None if numbering.listed is None else numbering.listed[: numbering.place]
        return [(settings, listed, run.progress._replace(tallies=tallies))]

    found = gathered(work) if processes > 1 else work()
    parts = [share[2] for share in found] if processes > 1 else found
    _say_what_was_missed([part for part in parts if part.inputs])
    if processes > 1:
        return _united(found, [layer.name for layer in selected], top_k, surveyed)
    if found[0].inputs == 0:
        raise NoDataError(_NOTHING)
    return _survey_of(found[0], top_k, surveyed)


def _name_of(given: object) -> str | None:
    """Return what a checkpoint tells one function from others by."""
    if given is None or isinstance(given, str):
        return given
    return str(getattr(given, "__qualname__", type(given).__qualname__))


def _told(label_of: InputOf, encoder: Encoder | None, output: Any, batch: Batch, *, by_class: bool) -> Told:
    """Return what a batch tells of its inputs besides.

    Raises:
        InvalidArgumentError: It holds no labels, or the encoder makes no embedding of each input.
    """
    labels = labels_of(batch.whole, label_of) if by_class else None
    inputs = len(batch.samples)
    if by_class and (labels is None or len(labels) != inputs):
        what = "none" if labels is None else f"{len(labels)} for {inputs} inputs"
        raise InvalidArgumentError(
            f"`by_class` needs the class of each input, got {what}; let the loader yield (inputs, labels), "
            "or say with `label_of` where they are"
        )
    if encoder is None:
        return Told(labels)
    if isinstance(encoder, str):
        found = output
    else:
        with inference(encoder) if isinstance(encoder, nn.Module) else nullcontext():
            with calling("encoder(inputs)", "make an embedding of each input, called as the model is"):
                args, kwargs = cloned((batch.args, batch.kwargs))
                found = encoder(*args, **kwargs)
    is_tensor = isinstance(found, torch.Tensor)
    if not is_tensor or found.shape[:1] != (inputs,) or found.ndim < 2 or not found.is_floating_point():
        what = f"{found.dtype} of shape {tuple(found.shape)}" if is_tensor else type(found).__name__
        raise InvalidArgumentError(
            f"`encoder` must make a floating-point tensor with a row per input, ({inputs}, ...), got {what}; "
            "pass a function of what the model is called with that makes one"
        )
    return Told(labels, found.detach().flatten(1))


def _survey_of(found: Progress, top_k: int, model: nn.Module) -> Survey:
    about = {
        "samples_seen": found.inputs,
        "top_k": top_k,
        "is_complete": found.is_complete,
        "input_shape": found.shape,
    }
    return Survey(found.tallies, about, model)


def _say_what_was_missed(parts: Sequence[Progress]) -> None:
    """Warn of layers whose figures are of fewer inputs than the survey's, though of some."""
    total = sum(part.inputs for part in parts)
    seen: Counter[str] = Counter()
    for part in parts:
        seen.update({name: tally.inputs for name, tally in part.tallies.items()})
    fewer = [f"`{name}` {inputs:,}" for name, inputs in seen.items() if 0 < inputs < total]
    if fewer:
        more = f" and {len(fewer) - _SHOWN:,} layers more" if len(fewer) > _SHOWN else ""
        warnings.warn(
            f"these layers saw fewer than the {total:,} inputs of the survey: {', '.join(fewer[:_SHOWN])}"
            f"{more}; they did not run in every batch, or in another thread: see `inputs_seen`",
            stacklevel=3,
        )


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
