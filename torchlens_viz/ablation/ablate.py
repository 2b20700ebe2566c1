"""`ablate`: the true change of the loss and of the accuracy without a channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from torchlens_viz.ablation.losses import Loss, hits_of, labels_of, losses_of
from torchlens_viz.ablation.result import Ablation
from torchlens_viz.ablation.rewrite import NOTHING, Filling, Rewritten
from torchlens_viz.arguments import indices_of, integer, one_of, wide
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, NoDataError
from torchlens_viz.models.calls import arguments_of
from torchlens_viz.models.inputs import InputOf, images_in
from torchlens_viz.models.inputs import input_of as part_for
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.layers import Selector, select_one
from torchlens_viz.models.state import device_of, like_parameters
from torchlens_viz.nested import map_tensors

By: TypeAlias = Literal["zero", "mean", "resample"]


def ablate(
    model: nn.Module,
    loader: Iterable[Any],
    layer: Selector,
    channels: int | Sequence[int] | None = None,
    *,
    loss: Loss,
    by: By = "zero",
    input_of: InputOf = None,
    label_of: InputOf = None,
    channel_dim: int | None = None,
    rows: int = 256,
    seed: int = 0,
) -> Ablation:
    """Measure what a network loses with each of some channels of a layer: one replaced at a time.

    What comes before the layer runs once for as many channels as make `rows` inputs, and what comes after it
    on all of them as one batch, where its operations are known to treat every input by itself, as those of
    convolutional networks do. Of other networks `torch.vmap` does the same, and where that cannot, they run
    as a whole on the inputs repeated. The result is that of a loop over hooks.

    The model runs in eval mode and without gradients; its flags, buffers and the random numbers are
    restored.

    Args:
        model: The network.
        loader: Batches, as `survey` takes them; for `by="mean"` it is gone through twice.
        layer: Which layer, by a selector that finds exactly one. Of several calls, each has the channel
            replaced.
        channels: Which channels, by index from 0; None is all.
        loss: `f(output, batch) -> (N,)`, a number per input; the tensors of the batch are on the model's
            device. Or `"cross_entropy"`, of logits (N, classes) and the labels in the batch.
        by: What stands in the place of the channel: `"zero"`; its `"mean"` over all positions of all inputs;
            or `"resample"`, the channel of another input of the batch.
        input_of: Which part of a batch is the input, as in `survey`.
        label_of: Which part of a batch has the classes, (N,) integers. By default of a tuple or list the
            second part, and of a mapping the first of the keys `label`, `labels`, `target`, `targets`, `y`.
        channel_dim: The dimension that counts channels; None finds it.
        rows: How many inputs to run what comes after the layer on at once; as many as memory allows is
            fastest.
        seed: Which other input `"resample"` takes.

    Returns:
        The change of the mean loss and of the accuracy for each channel, with the standard error over the
        inputs.

    Raises:
        LayerNotFoundError: The selector matches nothing.
        InvalidArgumentError: The layer does not run, or puts out no channels; an index is out of range; the
            loss is not one number per input; a batch has one input and `by="resample"`.
        InvalidTypeError: An argument has another type, or the loader can be gone through only once.
        NoDataError: The loader yields nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> net[0].weight.data = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
        >>> batch = (torch.ones(4, 1, 5, 5), torch.zeros(4, dtype=torch.long))
        >>> found = ablate(net, [batch], "0", loss=lambda output, batch: -output[:, 0])
        >>> found.loss_change.tolist(), found.accuracy, found.accuracy_change.tolist()
        ([3.0, 0.0], 1.0, [0.0, 0.0])
    """
    one_of(by, "by", get_args(By))
    rows = integer(rows, "rows", least=1)
    seed = integer(seed, "seed", least=0)
    if by == "mean" and iter(loader) is loader:
        raise InvalidTypeError(
            f'`loader` must be something that can be gone through twice for `by="mean"`, got '
            f"{type(loader).__name__}; pass a list or a DataLoader"
        )
    chosen = select_one(model, layer)
    rewritten = Rewritten(model, chosen, channel_dim)
    batches = _Batches(model, loader, input_of)
    with same_random_numbers():  # the loader may draw some
        means = _means(rewritten, batches) if by == "mean" else None
        gathered = _Gathered()
        which: list[int] | None = None
        for number, (batch, args, kwargs, inputs) in enumerate(batches):
            if which is None:
                which = indices_of(channels, rewritten.look(args, kwargs), "channels")
                todo = torch.tensor([NOTHING, *which], device=device_of(model))
            if by == "resample" and inputs == 1:
                raise InvalidArgumentError(
                    '`by="resample"` needs batches of two inputs at least, got one of 1; let the loader '
                    "leave out the last with `drop_last=True`"
                )
            filling = _filling(by, means, inputs, seed + number)
            labels = labels_of(batch, label_of)
            for part in torch.split(todo, max(1, rows // inputs)):
                for output in rewritten.outputs(args, kwargs, part, filling):
                    with torch.no_grad(), same_random_numbers():
                        losses = losses_of(loss, output, batch, inputs, label_of)
                    gathered.see(losses, hits_of(output, labels))
            gathered.next()
    if which is None:
        raise NoDataError("`loader` must yield at least one batch, got none; was it used up before?")
    return gathered.result(chosen.name, by, which)


class _Batches:
    """What a loader yields, with what the network is to take of each, and how many inputs that are."""

    def __init__(self, model: nn.Module, loader: Iterable[Any], rule: InputOf) -> None:
        self._model, self._loader, self._rule = model, loader, rule

    def __iter__(self) -> Any:
        place = device_of(self._model)
        for raw in self._loader:
            batch = map_tensors(lambda tensor: tensor.to(place), raw)
            found = part_for(batch, self._rule)
            found = map_tensors(lambda tensor: like_parameters(tensor, self._model), found)
            args, kwargs = arguments_of(found)
            inputs = len(images_in(found))
            if inputs:
                yield batch, args, kwargs, inputs


def _means(rewritten: Rewritten, batches: _Batches) -> torch.Tensor:
    """Return the mean of every channel over all positions of all inputs, (C,) float64."""
    total, count = torch.zeros((), device="cpu"), 0

    def note(maps: torch.Tensor) -> None:
        nonlocal total, count
        flat = wide(maps).movedim(1, 0).flatten(1)
        total, count = total.to(flat) + flat.sum(1), count + flat.shape[1]

    for _, args, kwargs, _ in batches:
        rewritten.watch(args, kwargs, note)
    return total / max(1, count)


def _filling(by: By, means: torch.Tensor | None, inputs: int, seed: int) -> Filling:
    if means is not None:
        return lambda maps: means.to(maps).view(1, -1, *(1,) * (maps.ndim - 2))
    if by == "zero":
        return torch.zeros_like
    # A turn of the whole batch leaves no input with its own.
    generator = torch.Generator("cpu").manual_seed(seed)
    turn = int(torch.randint(1, inputs, (), generator=generator, device="cpu"))

    def turned(maps: torch.Tensor) -> torch.Tensor:
        each = maps.reshape(-1, inputs, *maps.shape[1:])  # one batch, or one for each channel
        return each.roll(turn, 1).flatten(0, 1)

    return turned


class _Gathered:
    """What is known of the network as it is and without each channel; it does not grow with the inputs."""

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._count, self._loss, self._labelled = 0, 0.0, 0
        self._mean = self._squares = self._hits = torch.zeros((), dtype=torch.float64, device="cpu")

    def see(self, losses: torch.Tensor, hits: torch.Tensor | None) -> None:
        """Take in the next of the networks, the one as it is first."""
        self._seen.append((wide(losses.detach()).cpu(), None if hits is None else hits.cpu()))

    def next(self) -> None:
        """End a batch: means and squares of distances from them are united as by Chan, Golub and LeVeque."""
        losses = torch.stack([losses for losses, _ in self._seen])
        changes, inputs = losses[1:] - losses[0], losses.shape[1]
        mean, before = changes.mean(1), self._count
        self._count += inputs
        step = mean - self._mean
        self._squares = self._squares + (changes - mean[:, None]).square().sum(1)
        self._squares = self._squares + step.square() * (before * inputs / self._count)
        self._mean = self._mean + step * (inputs / self._count)
        self._loss += losses[0].sum().item()
        hits = [each.sum() for _, each in self._seen if each is not None]
        if len(hits) == len(self._seen):
            self._hits = self._hits + torch.stack(hits)
            self._labelled += inputs
        self._seen.clear()

    def result(self, layer: str, by: str, channels: Sequence[int]) -> Ablation:
        """Return what was found."""
        count = self._count
        hits = self._hits / count if self._labelled == count else None
        spread = (self._squares / (count - 1)).sqrt() if count > 1 else torch.full_like(self._mean, torch.nan)
        return Ablation(
            layer=layer,
            by=by,
            channels=torch.tensor(channels, device="cpu"),
            loss=self._loss / count,
            accuracy=None if hits is None else hits[0].item(),
            loss_change=self._mean,
            loss_error=spread / count**0.5,
            accuracy_change=None if hits is None else hits[1:] - hits[0],
            samples_seen=count,
        )
