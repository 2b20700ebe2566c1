"""How a score or a loss changes with what layers put out, in one backward pass for each batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchlens_viz.arguments import has_float64, shown, wide
from torchlens_viz.dataset.loader import Batch
from torchlens_viz.errors import InvalidArgumentError, TorchlensVizError, one_line
from torchlens_viz.hooks.forward import refuse_torchscript
from torchlens_viz.models.copying import private_copy
from torchlens_viz.models.layers import Layer, called_alike, named_layers, unwrap
from torchlens_viz.nested import map_tensors
from torchlens_viz.stats.slopes import Slopes

Target: TypeAlias = Callable[[Any, Any], torch.Tensor]
# Of an output, a batch and how many inputs it has.
LossOf: TypeAlias = Callable[[Any, Any, int], torch.Tensor]
Tell: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor | None, bool], None]


class Taken(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: Its name.
        values: What it put out.
        version: How often that had been written to.
        at: Where the gradient of it is taken; None where there is no gradient of such values.
        leaf: What the network goes on from, where no graph led to the layer.
    """

    layer: str
    values: torch.Tensor
    version: int
    at: GradientEdge | None
    leaf: torch.Tensor | None


@final
class Relevance:
    """A copy of a model that shares its weights, and what its layers put out in the batch that is under way.

    No parameter of the copy requires a gradient, so that a graph begins at the first of the layers, and the
    backward pass ends there. Each gradient is told when the backward pass comes to it, and not kept. Nor is
    what layers put out copied, but where the network writes to it.

    Args:
        model: The network; it stays as it is.
        target: Makes of what the network puts out, and of the batch, a score for each input.

    Raises:
        CaptureError: The model is TorchScript.
        InvalidArgumentError: It has lazy parameters, without values yet.
        InvalidTypeError: It cannot be copied.
    """

    def __init__(self, model: nn.Module, target: Target) -> None:
        refuse_torchscript(model)
        self._target = target
        self._calls: list[Taken] = []
        self._written: set[str] = set()  # layers whose output the network writes to
        with torch.inference_mode(False):  # what is made in that mode takes no part in a graph
            self.model = called_alike(model, private_copy(unwrap(model), _shared))

    def within(self, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """Return the same layers of the copy."""
        known = {layer.name: layer for layer in named_layers(self.model)}
        return tuple(known[layer.name] for layer in layers)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take note of a batch within the block."""
        self._calls.clear()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            self._calls.clear()

    def take(self, tensor: torch.Tensor, layer: str) -> Taken:
        """Take in what a layer put out.

        Raises:
            InvalidArgumentError: No gradient can be had of it.
        """
        at = leaf = None
        values = tensor.detach()
        if layer in self._written:
            values = values.clone()
        if tensor.is_floating_point():
            if not torch.is_grad_enabled():
                raise InvalidArgumentError(
                    f"`layers` must run with gradients where there is a `target`, but `{layer}` runs within "
                    "`torch.no_grad` or reentrant checkpointing; leave it out, or switch that off"
                )
            leaf = None if tensor.requires_grad else values.detach().requires_grad_()
            at = get_gradient_edge(tensor if leaf is None else leaf)
        self._calls.append(Taken(layer, values, values._version, at, leaf))
        return self._calls[-1]

    def is_spoilt(self) -> bool:
        """Tell whether the network wrote to what layers put out; run again, it is copied before."""
        written = {each.layer for each in self._calls if each.values._version != each.version}
        self._written |= written
        return bool(written)

    def weigh(self, output: Any, batch: Batch, tell: Tell) -> None:
        """Take the gradients of the scores.

        Args:
            output: What the network makes of the batch.
            batch: The batch.
            tell: Is told of each call of a layer, in any order: its name, what it put out, the gradient of
                the scores there (None for zero), and whether it was the only one.

        Raises:
            InvalidArgumentError: `target` makes no score for each input, or none that depends on a layer.
        """
        scores = self._scores(output, batch)
        counts = Counter(each.layer for each in self._calls)
        left = dict(enumerate(self._calls))
        connected: list[int] = []

        def told(number: int, gradient: torch.Tensor | None) -> None:
            each = left.pop(number)
            if gradient is not None:
                connected.append(number)
            with torch.no_grad():
                tell(each.layer, each.values, gradient, counts[each.layer] == 1)

        leaves = [number for number, each in enumerate(self._calls) if each.leaf is not None]
        inner = [(number, each.at) for number, each in left.items() if each.leaf is None]
        hooks = [
            at.node.register_prehook(partial(_seen_by_hook, told, number, at.output_nr))
            for number, at in inner
            if at is not None
        ]
        try:
            if scores.requires_grad and leaves:
                roots = [self._calls[number].leaf for number in leaves]
                found = torch.autograd.grad(
                    scores.sum(), [leaf for leaf in roots if leaf is not None], allow_unused=True
                )
                for number, gradient in zip(leaves, found, strict=True):
                    told(number, gradient)
        finally:
            for hook in hooks:
                hook.remove()
        for number in list(left):
            told(number, None)
        if not connected:
            raise InvalidArgumentError(
                "`target` must depend on what the layers put out, but no gradient leads from it to "
                f"{', '.join(f'`{each}`' for each in list(counts)[:4])}: it detaches, or they lie beside the "
                "way to it; choose another target or other layers"
            )

    def _scores(self, output: Any, batch: Batch) -> torch.Tensor:
        rows = len(batch.samples)
        rule = f"a floating-point tensor ({rows},), a number per input, of the model's output and the batch"
        try:
            scores = self._target(output, batch.whole)
        except TorchlensVizError:
            raise
        except Exception as error:
            raise InvalidArgumentError(
                f"`target` must make {rule}, but it fails ({one_line(error)}); it is called as "
                "`target(output, batch)`, with the batch as the loader yields it"
            ) from error
        if not isinstance(scores, torch.Tensor) or not scores.is_floating_point() or scores.shape != (rows,):
            is_tensor = isinstance(scores, torch.Tensor)
            what = f"{scores.dtype} of shape {tuple(scores.shape)}" if is_tensor else shown(scores)
            raise InvalidArgumentError(
                f"`target` must make {rule}, got {what}; reduce each input to one number, by `.sum`, `.mean` "
                "or an index"
            )
        return scores


def _seen_by_hook(
    told: Callable[[int, torch.Tensor | None], None],
    number: int,
    place: int,
    gradients: tuple[torch.Tensor | None, ...],
) -> None:
    told(number, gradients[place])


def for_gradients(value: Any) -> Any:
    """Return what a model is called with such that a graph can keep it."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a weight, and a copy of what a forward pass may write to."""
    made = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    return made.clone() if made.is_inference() else made


@final
class Gradients:
    """What the layers of one batch put out, on the graph that leads to the loss.

    Args:
        loss: The loss of every input.
    """

    def __init__(self, loss: LossOf) -> None:
        self._loss = loss
        self._seen: list[tuple[str, torch.Tensor, int]] = []

    def keep(self, tensor: torch.Tensor, layer: str, channel_dim: int) -> torch.Tensor:
        """Take in what a layer puts out; return it, on a graph.

        Raises:
            InvalidArgumentError: It holds no numbers with a gradient.
        """
        if not tensor.is_floating_point() or tensor.is_quantized:
            raise InvalidArgumentError(
                f"`{layer}` puts out {tensor.dtype}, which has no gradient; choose other layers, or leave "
                "out `loss`"
            )
        # Where nothing before it is trained, the graph begins here.
        root = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        self._seen.append((layer, root, channel_dim))
        return root

    def clear(self) -> None:
        """Forget what a batch that was broken off has left."""
        self._seen.clear()

    def slopes(self, output: Any, batch: Any, inputs: int) -> dict[str, Slopes]:
        """Return the sums of one batch for each layer that the loss depends on, or not.

        Args:
            output: What the network put out.
            batch: What the loss is given besides.
            inputs: How many inputs there are.

        Raises:
            InvalidArgumentError: The loss depends on none of the layers, or a layer has no row per input.
        """
        seen, self._seen = self._seen, []
        losses = self._loss(output, batch, inputs)
        if not losses.requires_grad:
            raise InvalidArgumentError(
                "`loss` must depend on what the layers put out, got numbers without a gradient; is the "
                "output detached, or does no selected layer run?"
            )
        gradients = torch.autograd.grad(losses.sum(), [root for _, root, _ in seen], allow_unused=True)
        figures: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for (layer, root, dim), gradient in zip(seen, gradients, strict=True):
            if len(root) != inputs or dim == 0:
                raise InvalidArgumentError(
                    f"`{layer}` must put out one row per input for effects, got shape {tuple(root.shape)} "
                    f"for {inputs} inputs; choose another layer"
                )
            found = _figures(root.detach(), gradient, dim)
            before = figures.get(layer)
            if before is not None:  # of several calls, each is replaced
                found = (found[0] + before[0], found[1] + before[1])
            figures[layer] = found
        return {layer: _summed(*found) for layer, found in figures.items()}


def _figures(
    values: torch.Tensor, gradient: torch.Tensor | None, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G and P of every input and channel, (N, C) float64 each."""
    if gradient is None:  # nothing that it puts out reaches the loss
        nothing = wide(torch.zeros(values.shape[0], values.shape[dim], device=values.device))
        return nothing, nothing
    rows, slope = (
        (side if side.dtype.itemsize > 2 else side.float()).movedim(dim, 1).flatten(2)
        if side.ndim > 2
        else wide(side)[..., None]
        for side in (values, gradient.detach())
    )
    if has_float64(values.device):  # products are made where they are, and summed wide
        return slope.sum(2, dtype=torch.float64), (slope * rows).sum(2, dtype=torch.float64)
    return wide(slope).sum(2), (wide(slope) * wide(rows)).sum(2)


def _summed(gradients: torch.Tensor, products: torch.Tensor) -> Slopes:
    """Sum over the inputs (N, C) of a batch."""
    return Slopes(
        gradients.new_tensor(float(len(gradients))),
        gradients.sum(0),
        products.sum(0),
        gradients.square().sum(0),
        products.square().sum(0),
        (gradients * products).sum(0),
    )
