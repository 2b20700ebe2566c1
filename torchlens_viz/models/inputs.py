"""Inputs: which part of a batch a model takes, in which order it holds items, and what a model fails for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, compress
from math import prod
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

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

_VALUES: Final = (torch.Tensor, np.ndarray, int, float)
_PROBED: Final = 4096  # so many values of an item, or a few more, are compared with those in the batch
_DISTINCT: Final = 3  # so many different items tell that they were put into another order
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


def are_reordered(items: Sequence[Any], batch: Any) -> bool | None:
    """Tell whether a batch holds items in another order, by the largest part that has their values.

    None is a batch that has the values of none.
    """
    is_there = [item is not None for item in items]  # those that could not be read, as some data sets have it
    columns = [list(compress(rows, is_there)) for rows in _columns(batch, len(items))]
    items, said, size = list(compress(items, is_there)), set[bool](), 0
    parts = [[each for each in tree_leaves(item) if isinstance(each, _VALUES)] for item in items]
    if len({len(each) for each in parts}) != 1:
        return None
    for given in sorted(zip(*parts, strict=True), key=lambda given: -_size(given[0])):
        if said and _size(given[0]) < size:
            break
        size, part = _size(given[0]), [value for each in given for value in _as_tensors(each)]
        if len(part) == len(items):
            found = [_order_of(part, rows) for rows in columns if rows[0].ndim == part[0].ndim]
            said |= {order == list(range(len(items))) for order in found if order is not None}
    return True not in said if said else None


def _size(value: Any) -> int:
    return prod(getattr(value, "shape", ()))


def _columns(batch: Any, count: int) -> Iterator[Sequence[torch.Tensor]]:
    """Yield all in a batch that has a row for each of so many items."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        yield from (each.unbind() for each in _as_tensors(batch) if each.ndim and len(each) == count)
    elif isinstance(batch, Mapping | list | tuple):
        parts = list(batch.values() if isinstance(batch, Mapping) else batch)
        rows = [value for each in parts for value in _as_tensors(each)]
        if len(rows) == len(parts) == count:
            yield rows
        for each in parts:
            yield from _columns(each, count)


def _order_of(items: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> list[int] | None:
    """Return which item each row holds; None where rows are no items, or too many of these are alike.

    One that several rows hold is named several times.
    """
    different: list[torch.Tensor] = []
    least = _DISTINCT if items[0].numel() == 1 else min(_DISTINCT, len(items))
    for item in items:
        if len(different) < least and not any(_holds(each, item) for each in different):
            different.append(item)
    if len(different) < least:
        return None
    if all(map(_holds, rows, items)):
        return list(range(len(items)))
    left, order = dict(enumerate(items)), list[int]()
    for row in rows:
        known = chain(left.items(), enumerate(items))  # those that no row held before come first
        order += [next((place for place, item in known if _holds(row, item)), -1)]
        if order[-1] < 0:
            return None
        left.pop(order[-1], None)
    return order


def _holds(row: torch.Tensor, item: torch.Tensor) -> bool:
    """Tell whether a row is an item, or one that was padded at its end with the same value throughout."""
    if row.ndim != item.ndim or any(map(int.__lt__, row.shape, item.shape)):
        return False
    for dim, least in enumerate(item.shape if row.shape != item.shape else ()):
        if row.shape[dim] > least:
            rest = row.narrow(dim, least, row.shape[dim] - least)
            if rest.numel() and bool((rest != rest.flatten()[0]).any()):
                return False
            row = row.narrow(dim, 0, least)
    if item.numel() > _PROBED:
        step = item.numel() // _PROBED
        row, item = row.reshape(-1)[::step], item.reshape(-1)[::step]
    return torch.equal(row, item if item.dtype == row.dtype else item.to(row.dtype))


def _as_tensors(value: Any) -> list[torch.Tensor]:
    """Return what holds plain numbers as a tensor on the CPU, as the only one in a list."""
    try:
        found = value if isinstance(value, torch.Tensor) else None
        if found is None and isinstance(value, _VALUES):
            found = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return []
    is_plain = found is not None and found.layout == torch.strided and found.device.type == "cpu"
    return [found.detach()] if found is not None and is_plain else []
