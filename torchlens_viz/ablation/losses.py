"""Losses input by input, and the labels that a batch holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import torch
from torch.nn import functional as F

from torchlens_viz.arguments import wide
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, calling
from torchlens_viz.models.inputs import InputOf, part_of

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor] | Literal["cross_entropy"]

_USUAL_KEYS: Final = ("label", "labels", "target", "targets", "y")


def labels_of(batch: Any, rule: InputOf) -> torch.Tensor | None:
    """Return the class of each input of a batch, (N,) int64, or None where it holds none.

    Args:
        batch: As a loader yields it: of a tuple or list the second part, of a mapping the value under the
            first of the keys `label`, `labels`, `target`, `targets`, `y`.
        rule: In place of that, a key, a place, or a function of the batch.

    Raises:
        InvalidTypeError: What `rule` names is not one integer per input.
    """
    found: Any = None
    if rule is not None:
        found = part_of(batch, rule, "label_of")
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in _USUAL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if isinstance(found, list | tuple) and all(isinstance(each, int) for each in found):
        found = torch.tensor(found, device="cpu")
    if isinstance(found, torch.Tensor) and found.ndim == 1 and _counts(found.dtype):
        return found.long()
    if rule is not None:
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InvalidTypeError(f"`label_of` must find one integer per input, (N,), got {what}")
    return None


def _counts(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def losses_of(loss: Loss, output: Any, batch: Any, inputs: int, rule: InputOf) -> torch.Tensor:
    """Return the loss of every input of a batch, (N,), on the graph of `output`.

    Args:
        loss: `f(output, batch) -> (N,)`, or `"cross_entropy"` of logits (N, classes) and labels.
        output: What the network put out.
        batch: What the loader yielded.
        inputs: How many inputs that are.
        rule: Where the labels are, for `"cross_entropy"`.

    Raises:
        InvalidArgumentError: It is not one number per input, or there are no labels.
        InvalidTypeError: It is no tensor, or the output is none.
    """
    if callable(loss):
        with calling("loss(output, batch)", f"return one number per input, ({inputs},)"):
            found = loss(output, batch)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
            raise InvalidTypeError(f"`loss` must return a tensor of floating numbers, (N,), got {kind}")
    elif loss == "cross_entropy":
        labels = labels_of(batch, rule)
        if labels is None:
            raise InvalidArgumentError(
                '`loss="cross_entropy"` needs the class of each input, got batches without; let the loader '
                "yield (inputs, labels), or say with `label_of` where they are"
            )
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise InvalidTypeError(
                f'`loss="cross_entropy"` needs a network that puts out (N, classes), got {what}; pass a '
                "function `f(output, batch) -> (N,)`"
            )
        logits = wide(output)
        found = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
    else:
        raise InvalidArgumentError(
            f'`loss` must be a function `f(output, batch) -> (N,)` or "cross_entropy", got {loss!r}'
        )
    if found.shape != (inputs,):
        raise InvalidArgumentError(
            f"`loss` must return one number per input, ({inputs},), got shape {tuple(found.shape)}; losses "
            'of torch do so with `reduction="none"`'
        )
    return found


def hits_of(output: Any, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Return of every input whether the largest output is its class, (N,) float64, where both are there."""
    if labels is None or not isinstance(output, torch.Tensor) or output.ndim != 2:
        return None
    return wide((output.argmax(1) == labels.to(output.device)).float())
