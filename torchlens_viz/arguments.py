"""What an argument may be: integers, numbers, flags, choices, lists; tensors of plain numbers; indices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import inf, isfinite
from numbers import Real
from typing import Any, Final, TypeVar

import numpy as np
import torch

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, in_one_line, kind_of, one_line

T = TypeVar("T")

_MOST_SHOWN: Final = 80  # characters of a value in a message
_MOST_INDICES: Final = 2**20
_USUAL: Final = (torch.Tensor, torch.nn.Parameter)


def shown(value: object) -> str:
    """Return a value as a message shows it: in one short line, whatever it is."""
    try:
        if is_a(value, torch.Tensor):
            shape = "" if value.is_nested else f" of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
            return f"a tensor{shape}"
        text = str.__str__(repr(value))
    except Exception:  # a value of the caller's may do anything
        text = f"a value of type {kind_of(value)}"
    return in_one_line(text, _MOST_SHOWN)


def is_a(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Tell whether a value is of a class, whatever it says itself when it is asked."""
    return issubclass(type(value), kinds)


def made_of(value: Any, make: Callable[[Any], T], rule: str) -> T:
    """Return what a function makes of a value of the caller's, which may raise anything as it is looked at.

    Raises:
        InvalidArgumentError: It has another value than the rule says.
        InvalidTypeError: It is of another kind.
    """
    try:
        return make(value)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(rule) from None
    except Exception:
        raise InvalidTypeError(rule) from None


def integer(value: object, name: str, *, least: int | None = None, most: int | None = None) -> int:
    """Return an option named `name` as an int: numpy's and torch's count, a bool does not.

    Raises:
        InvalidArgumentError: It is below `least` or above `most`.
        InvalidTypeError: It is no integer.
    """
    found = _as_index(value)
    if found is None:
        raise InvalidTypeError(f"`{name}` must be an int, got {shown(value)}")
    if least is not None and found < least:
        raise InvalidArgumentError(f"`{name}` must be at least {least}, got {shown(found)}")
    if most is not None and found > most:
        raise InvalidArgumentError(f"`{name}` must be at most {most}, got {shown(found)}")
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
    found = real(value, name)
    rules = [
        ("finite", isfinite(found)),
        (f"at least {least}", least is None or found >= least),
        (f"above {above}", above is None or found > above),
        (f"at most {most}", most is None or found <= most),
    ]
    for rule, holds in rules:
        if not holds:
            raise InvalidArgumentError(f"`{name}` must be {rule}, got {shown(value)}")
    return found


def real(value: object, name: str) -> float:
    """Return an option named `name` as a float, which may be infinite or NaN; a bool is no number.

    Raises:
        InvalidTypeError: It is no real number.
    """
    if is_a(value, bool) or not is_a(value, Real):
        raise InvalidTypeError(f"`{name}` must be a number, got {shown(value)}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return inf
    except Exception:
        raise InvalidTypeError(f"`{name}` must be a number, got {shown(value)}") from None


def pair(value: object, name: str) -> tuple[float, float]:
    """Return an option named `name` as two finite numbers (low, high), in whichever order.

    Raises:
        InvalidArgumentError: They are not finite.
        InvalidTypeError: It is not two numbers.
    """
    low, high = limits(value, name)
    return number(low, name), number(high, name)


def limits(value: object, name: str) -> tuple[float, float]:
    """Return an option named `name` as two numbers (low, high), in whichever order; infinite ones count too.

    Raises:
        InvalidTypeError: It is not two numbers.
    """
    given: Any = value
    try:
        low, high = given
    except Exception:
        raise InvalidTypeError(f"`{name}` must be (low, high), got {shown(value)}") from None
    return real(low, name), real(high, name)


def flag(value: object, name: str) -> bool:
    """Return an option named `name` as a bool: numpy's counts, 0 and 1 do not.

    Raises:
        InvalidTypeError: It is neither True nor False.
    """
    if not is_a(value, (bool, np.bool_)):
        raise InvalidTypeError(f"`{name}` must be True or False, got {shown(value)}")
    return bool(value)


def function(value: T, name: str) -> T:
    """Return an option named `name` if it is a function or None.

    Raises:
        InvalidTypeError: It is neither.
    """
    if value is not None and not callable(value):
        raise InvalidTypeError(f"`{name}` must be a function or None, got {shown(value)}")
    return value


def a_name(value: Any, name: str) -> str:
    """Return an option named `name` if it is a string.

    Raises:
        InvalidTypeError: It is none.
    """
    if not is_a(value, str):
        raise InvalidTypeError(f"`{name}` must be a string, got {shown(value)}")
    return str.__str__(value)  # not of a class of its own


def listed(value: Iterable[T], name: str, *, most: int = _MOST_INDICES) -> list[T]:
    """Return an option named `name` as a list, never longer than memory holds.

    Raises:
        InvalidArgumentError: It has more than `most` items.
        InvalidTypeError: It has no items.
    """
    is_long = type(value) is range and len(value) > most  # which need not be counted
    try:
        found = [] if is_long else list(islice(value, most + 1))
    except Exception:
        raise InvalidTypeError(f"`{name}` must be a list, got {shown(value)}") from None
    if is_long or len(found) > most:
        raise InvalidArgumentError(f"`{name}` must have at most {most:,} items, got {shown(value)}")
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
    rule = f"{', '.join(first)} or {last}" if first else last
    raise InvalidArgumentError(f"`{name}` must be {rule}, got {shown(value)}")


def named_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return a device by its name, whether this machine has it or not.

    Raises:
        InvalidArgumentError: There is no kind of device of that name.
        InvalidTypeError: It is no name.
    """
    if not is_a(device, (torch.device, str)):
        raise InvalidTypeError(f"`{name}` must be a device or its name, got {shown(device)}")
    try:
        found = torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise InvalidArgumentError(
            f"`{name}` must be a device, got {shown(device)} ({one_line(error)}); pass cpu or cuda"
        ) from error
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise InvalidArgumentError(
            f"`{name}` must be a device of this machine, got {str(found)!r} where it has {count} GPUs; leave "
            "it out, or pass cpu"
        )
    return found


def indices_of(chosen: int | Sequence[int] | None, count: int, name: str) -> list[int]:
    """Return the indices that an option named `name` chooses from `count` things; None is all of them."""
    if chosen is None:
        return list(range(count))
    indices = all_indices(chosen, name)
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise InvalidArgumentError(f"`{name}` must be indices from 0 to {count - 1}, got {shown(wrong[0])}")
    return indices


def all_indices(chosen: int | Sequence[int], name: str) -> list[int]:
    """Return the indices that an option named `name` lists, whatever there is to choose from."""
    single = _as_index(chosen)
    try:
        given = list(islice(chosen, _MOST_INDICES + 1)) if single is None else [single]  # type: ignore[arg-type]
    except Exception:
        given = [chosen]  # type: ignore[list-item]
    if len(given) > _MOST_INDICES:
        raise InvalidArgumentError(f"`{name}` must choose at most {_MOST_INDICES:,}, got {shown(chosen)}")
    indices = [index for index in map(_as_index, given) if index is not None]
    if len(indices) < len(given):
        flags = [each for each in given if is_a(each, (bool, np.bool_, torch.Tensor))]
        is_mask = any(getattr(each, "dtype", None) in (None, torch.bool, np.dtype(bool)) for each in flags)
        remedy = "; of a mask, pass `mask.nonzero().flatten()`" if is_mask else ""
        raise InvalidTypeError(f"`{name}` must be an int or a list of ints, got {shown(chosen)}{remedy}")
    if not indices:
        raise InvalidArgumentError(f"`{name}` must choose at least one, got an empty list")
    return indices


def _as_index(value: object) -> int | None:
    """Return an integer of any kind as an int, and None for all else: a bool is a mask, not an index."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.dtype(np.bool_)):
            return None
        return int.__add__(operator.index(value), 0)  # type: ignore[arg-type]  # not of a class of its own
    except Exception:
        return None


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


def has_values(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has values: one on the meta device, or of FakeTensorMode, has none."""
    if type(tensor) not in _USUAL and any(kind.__name__ == "FakeTensor" for kind in type(tensor).__mro__):
        return False
    return not tensor.is_meta


def real_numbers(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return the numbers of a tensor, detached, in a type that torch computes with.

    Those of a quantised tensor are what it stands for, and float8 becomes float32.

    Args:
        tensor: Any tensor.
        what: What the caller calls it.

    Raises:
        InvalidTypeError: It is not dense, or it holds complex numbers or none.
    """
    check_dense(tensor, what)
    is_loaded = has_values(tensor)
    if not is_loaded or tensor.is_complex():
        remedy = "take its `.real` part or its `.abs()`" if is_loaded else "load its values first"
        raise InvalidTypeError(
            f"{what} must hold real numbers to draw, got {tensor.dtype} on {tensor.device}; {remedy}"
        )
    return _in_computable_type(tensor.detach())


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers as a dense tensor in a type that torch computes with.

    Those of a quantised tensor are what it stands for, float8 becomes float32, a sparse one gets its zeros.
    Where it is plain already, it is the tensor itself.
    """
    values = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return _in_computable_type(values)


def _in_computable_type(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    # For float8 torch has hardly any operation, and which ones differs between its versions and devices.
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def has_float64(device: torch.device) -> bool:
    """Tell whether a device computes in float64; Apple's does not."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers in float64: where they are, or on the host if their device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()
