"""How numbers of each input change with what layers put out: a backward pass a batch for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchlens_viz.ablation.losses import Loss, losses_of
from torchlens_viz.arguments import shown
from torchlens_viz.dataset.loader import Batch
from torchlens_viz.errors import InvalidArgumentError, calling
from torchlens_viz.hooks.forward import refuse_torchscript
from torchlens_viz.models.copying import private_copy
from torchlens_viz.models.inputs import InputOf
from torchlens_viz.models.layers import Layer, called_alike, named_layers, unwrap
from torchlens_viz.models.state import going_back

Target: TypeAlias = Callable[[Any, Any], torch.Tensor]
Name: TypeAlias = Literal["target", "loss"]


class Question(NamedTuple):
    """What is asked of a network.

    Attributes:
        name: As an option of `survey`.
        numbers: Makes of what the network puts out, and of the batch, a number for each input, (N,).
    """

    name: Name
    numbers: Callable[[Any, Batch], torch.Tensor]


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


# Is told the question, the call of a layer, the gradient there (None for zero), and if it was the only call.
Tell: TypeAlias = Callable[[Name, Taken, torch.Tensor | None, bool], None]


@final
class Gradients:
    """A copy of a model that shares its weights, and what its layers put out in the batch that is under way.

    No parameter of the copy requires a gradient, so that a graph begins at the first of the layers, and the
    backward pass ends there. Each gradient is told when the backward pass comes to it, and not kept. Nor is
    what layers put out copied, but where the network writes to it.

    Args:
        model: The network; it stays as it is.
        questions: What gradients are taken of, with a backward pass for each.

    Raises:
        CaptureError: The model is TorchScript.
        InvalidArgumentError: It has lazy parameters, without values yet.
        InvalidTypeError: It cannot be copied.
    """

    def __init__(self, model: nn.Module, questions: Sequence[Question]) -> None:
        refuse_torchscript(model)
        self._questions = tuple(questions)
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
                    f"`layers` must run with gradients where there is a `{self._questions[0].name}`, but "
                    f"`{layer}` runs within `torch.no_grad` or reentrant checkpointing; leave it out, or "
                    "switch that off"
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
        """Take the gradients of every question.

        Args:
            output: What the network makes of the batch.
            batch: The batch.
            tell: Is told of each call of a layer, in any order.

        Raises:
            InvalidArgumentError: There is no number for each input, or none that depends on a layer.
        """
        numbers = [question.numbers(output, batch) for question in self._questions]
        for place, (question, each) in enumerate(zip(self._questions, numbers, strict=True), 1):
            with torch.enable_grad():
                total = each.sum()
            self._go_back(question.name, total, tell, is_last=place == len(numbers))

    def _go_back(self, name: Name, total: torch.Tensor, tell: Tell, *, is_last: bool) -> None:
        counts = Counter(each.layer for each in self._calls)
        left = dict(enumerate(self._calls))
        is_connected = False

        def told(number: int, gradient: torch.Tensor | None) -> None:
            nonlocal is_connected
            each = left.pop(number)
            is_connected |= gradient is not None
            with torch.no_grad():
                tell(name, each, gradient, counts[each.layer] == 1)

        edges = {number: each.at for number, each in left.items() if each.at is not None}
        roots: dict[int, Any] = {number: each.leaf for number, each in left.items() if each.leaf is not None}
        if next(iter(edges), None) not in roots:  # a graph leads from before the layers to all that follows
            roots = dict(edges)
        hooks = [
            edge.node.register_prehook(partial(_seen_by_hook, told, number, edge.output_nr))
            for number, edge in edges.items()
            if number not in roots
        ]
        try:
            if total.requires_grad and roots:
                with going_back():
                    found = torch.autograd.grad(
                        total, list(roots.values()), allow_unused=True, retain_graph=not is_last
                    )
                for number, gradient in zip(roots, found, strict=True):
                    told(number, gradient)
        finally:
            for hook in hooks:
                hook.remove()
        for number in list(left):
            told(number, None)
        if not counts:
            raise InvalidArgumentError(
                f"`layers` must run where there is a `{name}`, but none of them did in the copy of the model "
                "that gradients are taken with: choose others, or put what `model.forward` was replaced by "
                "into a class"
            )
        if not is_connected:
            raise InvalidArgumentError(
                f"`{name}` must depend on what the layers put out, but no gradient leads from it to "
                f"{', '.join(f'`{each}`' for each in list(counts)[:4])}: it detaches, or they lie beside the "
                f"way to it; choose another {name} or other layers"
            )


def _seen_by_hook(
    told: Callable[[int, torch.Tensor | None], None],
    number: int,
    place: int,
    gradients: tuple[torch.Tensor | None, ...],
) -> None:
    told(number, gradients[place])


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a weight, and a copy of what a forward pass may write to."""
    made = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    return made.clone() if made.is_inference() else made


def questions_of(
    target: Target | None, loss: Loss | None, label_of: InputOf, device: torch.device | None
) -> list[Question]:
    """Return what a survey asks of a network.

    Args:
        target: Makes a score for each input.
        loss: Makes a loss for each input, or names one.
        label_of: Where the labels are, for a loss that is named.
        device: Where the loss is given the batch.
    """
    found: list[Question] = []
    if target is not None:
        found.append(Question("target", partial(_scores, target)))
    if loss is not None:
        found.append(Question("loss", partial(_losses, loss, label_of, device)))
    return found


def _losses(
    loss: Loss, label_of: InputOf, device: torch.device | None, output: Any, batch: Batch
) -> torch.Tensor:
    return losses_of(loss, output, batch.all_on(device), len(batch.samples), label_of)


def _scores(target: Target, output: Any, batch: Batch) -> torch.Tensor:
    rows = len(batch.samples)
    rule = f"a floating-point tensor ({rows},), a number per input, of the model's output and of the batch"
    with calling("target(output, batch)", f"make {rule}"):
        scores = target(output, batch.whole)
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point() or scores.shape != (rows,):
        is_tensor = isinstance(scores, torch.Tensor)
        what = f"{scores.dtype} of shape {tuple(scores.shape)}" if is_tensor else shown(scores)
        raise InvalidArgumentError(
            f"`target` must make {rule}, got {what}; reduce each input to one number, by `.sum`, `.mean` "
            "or an index"
        )
    return scores
