"""Inputs: which part of a batch a model takes, and what it is said to fail for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import nn

from torchlens_viz.arguments import shown
from torchlens_viz.errors import (
    CaptureMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    ModelFailedError,
    TorchlensVizError,
    calling,
    is_out_of_memory,
    one_line,
    reason_of,
)
from torchlens_viz.models.layers import unwrap
from torchlens_viz.nested import tensors

InputOf: TypeAlias = str | int | Callable[[Any], Any] | None

_USUAL_KEYS: Final = ("pixel_values", "image", "images", "img", "input", "inputs", "x")


def input_of(batch: Any, rule: InputOf) -> Any:
    """Return the part of a batch that a model takes.

    Args:
        batch: A tensor; a tuple or list, of which the first is taken; or a mapping, of which the value under
            the first of the keys `pixel_values`, `image`, `images`, `img`, `input`, `inputs`, `x` is taken.
        rule: In place of that, a key, a place, or a function of the batch.

    Raises:
        InvalidArgumentError: There is no such part.
        InvalidTypeError: It is no tensor.
    """
    found = part_of(batch, rule)
    if isinstance(found, torch.Tensor) or (callable(rule) and next(tensors(found), None) is not None):
        return found
    raise InvalidTypeError(
        f"`loader` must yield tensors, tuples that begin with one, or mappings with one, got a "
        f"{_told(batch)}; say with `input_of` which part is the input"
    )


def part_of(batch: Any, rule: InputOf, name: str = "input_of") -> Any:
    """Do as `input_of` with what may hold something else than tensors, such as an item of a dataset.

    Args:
        batch: The batch or item.
        rule: As for `input_of`.
        name: What that option is called.
    """
    if callable(rule):
        with calling(f"{name}(batch)", "return a part of what the loader or data set yields"):
            return rule(batch)
    if rule is not None:
        if not isinstance(rule, str | int):
            raise InvalidTypeError(f"`{name}` must be a key, a place or a function, got {shown(rule)}")
        try:
            return batch[rule]
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"`{name}` must be a part of every batch, got {shown(rule)} for a {_told(batch)}"
            ) from error
    if isinstance(batch, Mapping):
        key = next((key for key in _USUAL_KEYS if key in batch), None)
        if key is None:
            raise InvalidArgumentError(
                f"`input_of` must say which part of a batch is the input, got a {_told(batch)}; pass one of "
                "its keys"
            )
        return batch[key]
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def images_in(given: Any) -> torch.Tensor | list[torch.Tensor]:
    """Return the images among what a model is called with: a batch (N, ...), or a list of N images (C, H, W).

    Of a mapping that is what stands under the first of the keys that `input_of` looks for. Else, as of a
    tuple, it is the first of at least three dimensions, or the first where there is none.
    """
    parts = list(given) if isinstance(given, tuple) else [given]
    if isinstance(given, Mapping):
        parts = [*(given[key] for key in _USUAL_KEYS if key in given), *given.values()]
    for part in parts:
        if isinstance(part, list) and part and all(_is_one_image(each) for each in part):
            return part
        for tensor in tensors(part):
            if tensor.ndim >= 3:
                return tensor
    return next(tensors(parts))


def _is_one_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3


def _told(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    return f"{type(batch).__name__}"


@contextmanager
def shown_to(
    model: nn.Module,
    given: Any,
    name: str = "image",
    remedy: str = "what it takes beside images goes into `inputs`",
) -> Iterator[None]:
    """Say of whatever a model raises within the block that it did not take such an input.

    Args:
        model: The model that runs.
        given: What it is given: tensors, by themselves or within others.
        name: What the option is called that it was made of.
        remedy: What to do about it.

    Raises:
        CaptureMemoryError: There is not memory enough.
        ModelFailedError: It failed.
    """
    try:
        yield
    except TorchlensVizError:
        raise
    except Exception as error:
        first = next(tensors(given), None)
        what = type(given).__name__ if first is None else f"{first.dtype} of shape {tuple(first.shape)}"
        kind = type(unwrap(model)).__name__
        if is_out_of_memory(error):
            raise CaptureMemoryError(
                f"`{name}` is more than there is memory for: {kind} fails for {what} ({reason_of(error)}); "
                "make it smaller, or take a larger device"
            ) from error
        raise ModelFailedError(
            f"`{name}` must be what the model takes: {kind} fails for {what} ({one_line(error)}); {remedy}"
        ) from error
