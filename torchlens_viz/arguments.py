"""What an argument may be: integers, numbers, choices; tensors of plain numbers; which maps and indices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

T = TypeVar("T")


def integer(value: object, name: str, *, least: int | None = None, most: int | None = None) -> int:
    """Return an option named `name` as an int: numpy's and torch's count, a bool does not.

    Raises:
        InvalidArgumentError: It is below `least` or above `most`.
        InvalidTypeError: It is no integer.
    """
    found = _as_index(value)
    if found is None:
        raise InvalidTypeError(f"`{name}` must be an int, got {value!r}")
    if least is not None and found < least:
        raise InvalidArgumentError(f"`{name}` must be at least {least}, got {found}")
    if most is not None and found > most:
        raise InvalidArgumentError(f"`{name}` must be at most {most}, got {found}")
    return found


def number(
    value: object,
    name: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> float:
    """Return an option named `name` as a finite float; a bool is no number.

    Raises:
        InvalidArgumentError: It is not finite, below `least`, above `most`, or not above `above`.
        InvalidTypeError: It is no real number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"`{name}` must be a number, got {value!r}")
    found = float(value)
    rules = [
        ("finite", isfinite(found)),
        (f"at least {least}", least is None or found >= least),
        (f"above {above}", above is None or found > above),
        (f"at most {most}", most is None or found <= most),
    ]
    for rule, holds in rules:
        if not holds:
            raise InvalidArgumentError(f"`{name}` must be {rule}, got {value!r}")
    return found


def one_of(value: Any, name: str, choices: Sequence[T]) -> T:
    """Return an option named `name` if it is one of `choices`, such as `get_args` has of a `Literal`.

    Raises:
        InvalidArgumentError: It is none of them.
    """
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    *first, last = (f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in choices)
    raise InvalidArgumentError(
        f"`{name}` must be {', '.join(first)} or {last}, got {value!r}"
        if first
        else f"`{name}` must be {last}, got {value!r}"
    )


def maps_of(
    activation: torch.Tensor,
    sample: int,
    *,
    grid: tuple[int, int] | None = None,
    what: str = "`activation`",
) -> torch.Tensor:
    """Return the maps (C, H, W) of one input of a batch, checked to be drawable.

    Args:
        activation: (N, C, H, W) or (C, H, W); with `grid`, tokens (N, L, C) or (L, C).
        sample: Which input of the batch.
        grid: Rows and columns in which the last rows * columns of the tokens lie; those before them, such as
            a class token, are left out.
        what: What the caller calls the activation.
    """
    if not isinstance(activation, torch.Tensor):
        raise InvalidTypeError(
            f"{what} must be a tensor (N, C, H, W) or (C, H, W), got {type(activation).__name__}; of a layer "
            "that puts out several tensors, choose one"
        )
    batch = real_numbers(activation, what)
    if grid is not None:
        batch = _folded(batch, grid, what)
    if batch.ndim not in (3, 4) or batch.numel() == 0:
        raise InvalidArgumentError(
            f"{what} must be (N, C, H, W) or (C, H, W) with at least one pixel, got shape "
            f"{tuple(batch.shape)}"
            + ("; tokens (N, L, C) need `grid=(rows, columns)`" if batch.ndim in (2, 3) else "")
        )
    shape = batch.shape
    if batch.ndim == 3:
        batch = batch[None]
    index = _as_index(sample)
    if index is None:
        raise InvalidTypeError(f"`sample` must be an int, got {sample!r}")
    if not 0 <= index < len(batch):
        raise InvalidArgumentError(
            f"`sample` must be an index from 0 to {len(batch) - 1}, got {index} (shape {tuple(shape)})"
        )
    return batch[index]


def indices_of(chosen: int | Sequence[int] | None, count: int, name: str) -> list[int]:
    """Return the indices that an option named `name` chooses from `count` things; None is all of them."""
    if chosen is None:
        return list(range(count))
    single = _as_index(chosen)
    try:
        given = list(chosen) if single is None else [single]  # type: ignore[arg-type]
    except TypeError:
        given = [chosen]  # type: ignore[list-item]
    indices = [index for index in map(_as_index, given) if index is not None]
    if len(indices) < len(given):
        raise InvalidTypeError(f"`{name}` must be an int or a list of ints, got {chosen!r}")
    if not indices:
        raise InvalidArgumentError(f"`{name}` must choose at least one, got an empty list")
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise InvalidArgumentError(f"`{name}` must be indices from 0 to {count - 1}, got {wrong[0]}")
    return indices


def _as_index(value: object) -> int | None:
    """Return an integer of any kind as an int, and None for all else: a bool is a mask, not an index."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.dtype(np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _folded(tokens: torch.Tensor, grid: tuple[int, int], what: str) -> torch.Tensor:
    try:
        rows, columns = (operator.index(size) for size in grid)
    except (TypeError, ValueError):
        raise InvalidTypeError(f"`grid` must be (rows, columns), got {grid!r}") from None
    if tokens.ndim not in (2, 3) or rows < 1 or columns < 1 or tokens.shape[-2] < rows * columns:
        raise InvalidArgumentError(
            f"`grid` must have at most as many places as {what} has tokens (N, L, C), got {rows} x {columns} "
            f"(shape {tuple(tokens.shape)})"
        )
    places = tokens[..., tokens.shape[-2] - rows * columns :, :]
    return places.transpose(-2, -1).reshape(*places.shape[:-2], places.shape[-1], rows, columns)


def check_dense(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor without one place in memory for every element; costs two looks at attributes.

    Args:
        tensor: Any tensor.
        what: What the caller calls it.

    Raises:
        InvalidTypeError: It is sparse, nested or in a layout of a library's own.
    """
    if tensor.is_nested:
        raise InvalidTypeError(
            f"{what} must be one dense tensor, got a nested one; take its parts one by one with `.unbind()`"
        )
    if tensor.layout is not torch.strided:
        raise InvalidTypeError(
            f"{what} must be a dense tensor, got layout {tensor.layout}; convert it with `.to_dense()`"
        )


def real_numbers(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return the numbers of a tensor, detached; of a quantised one those that it stands for.

    Args:
        tensor: Any tensor.
        what: What the caller calls it.

    Raises:
        InvalidTypeError: It is not dense, or it holds complex numbers or none.
    """
    check_dense(tensor, what)
    if tensor.is_meta or tensor.is_complex():
        remedy = "load its values first" if tensor.is_meta else "take its `.real` part or its `.abs()`"
        raise InvalidTypeError(
            f"{what} must hold real numbers to draw, got {tensor.dtype} on {tensor.device}; {remedy}"
        )
    tensor = tensor.detach()
    return tensor.dequantize() if tensor.is_quantized else tensor


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers as a dense tensor: what a quantised one stands for, the zeros of a sparse one.

    Where it is plain already, it is the tensor itself.
    """
    values = tensor.dequantize() if tensor.is_quantized else tensor
    return values if values.layout is torch.strided else values.to_dense()


def channel_tuple(channels: int | Sequence[int]) -> tuple[int, ...]:
    """Return channel indices as a tuple, refusing what is not a list of distinct indices from 0."""
    chosen = [channels] if isinstance(channels, int) else list(channels)
    try:
        indices = tuple(operator.index(channel) for channel in chosen)
    except TypeError:
        raise InvalidTypeError(f"`channels` must be an int or a list of ints, got {channels!r}") from None
    if not indices or min(indices) < 0:
        raise InvalidArgumentError(f"`channels` must be one or more indices from 0, got {channels!r}")
    return indices
