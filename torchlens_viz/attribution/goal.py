"""The number that an explanation is about: one score per image, made of whatever a model puts out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch

from torchlens_viz.arguments import indices_of, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, calling

Target: TypeAlias = int | Sequence[int] | torch.Tensor | Callable[[Any], torch.Tensor] | None


@final
class Goal:
    """What of a model's output counts, checked.

    Args:
        target: As `torchlens_viz.explain` takes it.
        images: How many images are explained.

    Attributes:
        function: The caller's, if there is one.
        classes: (N,) int64 on the CPU, the output that counts of each image; None for a function, and where
            it is the highest, until that was seen once.

    Raises:
        InvalidArgumentError: A class is negative, or there are not as many as images.
        InvalidTypeError: It is of another kind.
    """

    def __init__(self, target: Target, images: int) -> None:
        self._images = images
        self.function = target if callable(target) else None
        self.classes: torch.Tensor | None = None
        if target is None or self.function is not None:
            return
        given: Any = target
        if isinstance(target, torch.Tensor):
            with contextlib.suppress(Exception):  # sparse, on no device, of more values than memory holds
                given = target.tolist() if target.numel() <= images else target
        try:
            indices = indices_of(given, 2**31, "target")
        except InvalidTypeError as error:
            raise InvalidTypeError(
                "`target` must be None, an int, an int for each image, or a function of the output, got "
                f"{shown(target)}"
            ) from error
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"`target` must be an index from 0, or None for the highest output, got {shown(target)}"
            ) from error
        if hasattr(given, "__len__") and len(indices) != images:
            raise InvalidArgumentError(
                f"`target` must have an int for each of {images} images, got {len(indices)}; pass one int "
                "for all of them"
            )
        self.classes = torch.tensor(indices, device="cpu").expand(images).clone()

    def scores(self, output: Any, rows: int) -> torch.Tensor:
        """Return the score of every row, (rows,) floating point, on the graph of the output.

        Args:
            output: What the model put out.
            rows: How many rows it was given: a multiple of the images, which follow one another in each.

        Raises:
            InvalidArgumentError: The output has no such class, or is no number per image.
        """
        if self.function is not None:
            return self._called(output, rows)
        logits = _logits(output, rows)
        if self.classes is None:
            self.classes = logits.detach().argmax(1)[: self._images].cpu()
        highest = int(self.classes.max())
        if highest >= logits.shape[1]:
            raise InvalidArgumentError(
                f"`target` must be an index from 0 to {logits.shape[1] - 1}, since the model puts out "
                f"{logits.shape[1]} numbers per image, got {highest}"
            )
        index = self.classes.repeat(rows // self._images).to(logits.device)
        return logits.gather(1, index[:, None])[:, 0]

    def _called(self, output: Any, rows: int) -> torch.Tensor:
        assert self.function is not None
        rule = f"make a tensor ({rows},), a number per image, of what the model puts out, {_kind(output)}"
        with calling("target(output)", rule):
            scores = self.function(output)
        if not isinstance(scores, torch.Tensor) or not scores.is_floating_point() or scores.shape != (rows,):
            raise InvalidArgumentError(
                f"`target` must make a floating-point tensor ({rows},), a number per image, of what the "
                f"model puts out, got {_kind(scores)}; reduce each image to one number, by `.sum`, `.mean` "
                "or an index"
            )
        return scores


def _logits(output: Any, rows: int) -> torch.Tensor:
    """Return (rows, classes); of a mapping, such as transformers' models put out, that is `logits`."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        output = output["logits"]
    if not isinstance(output, torch.Tensor):
        raise InvalidArgumentError(
            f"`target` must be a function where the model puts out {_kind(output)}: pass one such as "
            f"`target=lambda output: {_example(output, 'output')}`, which makes a number per image of it"
        )
    if not output.is_floating_point() or output.ndim not in (1, 2) or len(output) != rows:
        raise InvalidArgumentError(
            f"`target` must be a function where the model puts out {_kind(output)} for {rows} images, not "
            f"(N, classes): pass a function `f(output) -> (N,)` that makes a number per image of it, such as "
            f"`target=lambda output: {_example(output, 'output')}`"
        )
    return output[:, None] if output.ndim == 1 else output


def _example(value: Any, text: str) -> str:
    """Return an expression that makes a number per image of such a value, which `text` stands for."""
    if isinstance(value, torch.Tensor):
        if value.ndim < 2:
            return f"{text}.float()"
        rest = ".flatten(1).mean(1)" if value.ndim > 2 else ""
        return f"{text}[:, {min(3, value.shape[1] - 1)}]{rest}"
    if isinstance(value, Mapping):
        found = [key for key, each in value.items() if _is_floating(each)]
        return _example(value[found[0]], f"{text}[{found[0]!r}]") if found else f"{text}['logits'][:, 3]"
    if isinstance(value, tuple | list) and value and isinstance(value[0], Mapping):  # one for each image
        found = [key for key, each in value[0].items() if _is_floating(each)]
        key = "scores" if "scores" in found or not found else found[0]
        return f"torch.stack([each[{key!r}].sum() for each in {text}])"
    if isinstance(value, tuple | list) and value:
        return _example(value[0], f"{text}[0]")
    return f"{text}.logits[:, 3]"


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, list(value)[:6]))}"
    return f"a {type(value).__name__}"
