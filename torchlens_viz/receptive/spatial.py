"""Spatial rules: which extents convolutions, pooling, padding and resizing put out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from torchlens_viz.nested import map_tensors
from torchlens_viz.receptive.extents import (
    Extents,
    UnknownOperationError,
    Windows,
    adaptive,
    over,
    padded,
    resized,
    slide,
    sliding,
    transposed,
)
from torchlens_viz.receptive.places import standings


def extents_in(*values: Any) -> list[Extents]:
    """Return all extents among the arguments of an operation, which nests them in no more than these."""
    found: list[Extents] = []
    for value in values:
        if isinstance(value, Extents):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += extents_in(*value)
        elif isinstance(value, dict):
            found += extents_in(*value.values())
    return found


def bound(signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name; those left out are None."""
    names = signature.split()
    return {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}


def as_extents(value: Any) -> Extents:
    """Return the input of an operation, which must not be a constant."""
    if not isinstance(value, Extents):
        raise UnknownOperationError("an operation whose input is a constant")
    return value


def shape_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    """Return the shape of what an operation puts out, and let it refuse what does not fit."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="meta")

    output = func(*map_tensors(empty, args), **map_tensors(empty, kwargs))
    if not isinstance(output, torch.Tensor):
        raise UnknownOperationError(f"`{func.__name__}` puts out more than a tensor")
    return output.shape


def _per_axis(value: Any, axes: int) -> list[Any]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    return values * axes if len(values) == 1 else values


def _sizes(
    sizes: Sequence[int],
    kernels: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Return how many positions a convolution puts out along each axis; below one, it does not fit."""
    return [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(
            sizes, kernels, strides, paddings, dilations, strict=False
        )
    ]


def convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extents:
    """A convolution, transposed or not: a window over all channels of a group."""
    is_transposed = "transpose" in func.__name__
    order = "output_padding groups dilation" if is_transposed else "dilation groups"
    given = bound(f"input weight bias stride padding {order}", args, kwargs)
    x, weight, groups = as_extents(given["input"]), given["weight"], given["groups"] or 1
    axes = weight.ndim - 2
    strides, dilations = (_per_axis(given[name] or 1, axes) for name in ("stride", "dilation"))
    padding = given["padding"] or 0
    if padding == "same":  # asking the operation itself may give a warning about even kernels
        shape = torch.Size([x.shape[0], weight.shape[0], *x.shape[2:]])
        paddings = [
            (kernel - 1) * each // 2 for kernel, each in zip(weight.shape[2:], dilations, strict=True)
        ]
    else:
        paddings = _per_axis(0 if padding == "valid" else padding, axes)
        sizes = _sizes(x.shape[2:], weight.shape[2:], strides, paddings, dilations)
        fits = x.ndim == weight.ndim and x.shape[1] == weight.shape[1] * groups and min(sizes) > 0
        if fits and not is_transposed:  # which takes a hundredth of the time of asking the operation
            shape = torch.Size([x.shape[0], weight.shape[0], *sizes])
        else:
            shape = shape_of(func, args, kwargs)
    windows: list[Windows | None] = []
    extents = zip(weight.shape[2:], strides, paddings, dilations, strict=True)
    for axis, (kernel, stride, before, dilation) in enumerate(extents):
        size = {"kernel": kernel, "stride": stride, "before": before, "dilation": dilation}
        if is_transposed:
            windows.append(transposed(x.shape[axis + 2], shape[axis + 2], **size))
            if windows[-1] is None:
                raise UnknownOperationError("a transposed convolution with positions that see nothing")
        else:
            looks_beside = kernel > 1 or stride > 1 or before > 0
            windows.append(sliding(shape[axis + 2], **size) if looks_beside else None)
    if groups == 1 or all(part.stride(1) == 0 for part in x.parts):
        seen = [(part if part.stride(1) == 0 else over(part, 1)).narrow(1, 0, 1) for part in x.parts]
    else:
        seen = [part.unflatten(1, (groups, -1)).amax(2) for part in x.parts]  # type: ignore[no-untyped-call]
    places = [place.mean([1]).moved(lambda number: number.narrow(1, 0, 1)) for place in x.places]
    thick = [place.moved(lambda number: number.expand(seen[0].shape)) for place in places]
    made = slide(Extents(seen, thick), windows)
    repeat = shape[1] // made.shape[1]
    parts = made.parts if made.shape[1] == 1 else [part.repeat_interleave(repeat, 1) for part in made.parts]
    places = [place.moved(lambda number: number.narrow(1, 0, 1).expand(shape)) for place in made.places]
    return Extents([part.expand(shape) for part in parts], places)


def pooling(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extents:
    """A pooling: a window over each channel."""
    order = "ceil_mode" if "avg" in func.__name__ else "dilation ceil_mode return_indices"
    given = bound(f"input kernel_size stride padding {order}", args, kwargs)
    x, shape = as_extents(given["input"]), shape_of(func, args, kwargs)
    axes = len(shape) - 2
    kernels = _per_axis(given["kernel_size"], axes)
    strides = _per_axis(given["stride"] or kernels, axes)
    paddings = _per_axis(given["padding"] or 0, axes)
    dilations = _per_axis(given.get("dilation") or 1, axes)
    sizes = zip(shape[2:], kernels, strides, paddings, dilations, strict=True)
    return slide(
        x,
        [
            sliding(out, kernel=kernel, stride=stride, before=before, dilation=dilation)
            for out, kernel, stride, before, dilation in sizes
        ],
    )


def adaptive_pooling(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extents:
    """A pooling whose windows divide the map."""
    x, shape = as_extents(args[0] if args else kwargs.get("input")), shape_of(func, args, kwargs)
    return slide(x, [adaptive(*sizes) for sizes in zip(x.shape[2:], shape[2:], strict=True)])


def pad(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extents:
    """Padding: positions beyond the border; channels beyond the last one depend on nothing."""
    given = bound("input pad mode value", args, kwargs)
    x, widths = as_extents(given["input"]), list(given["pad"])
    before, after = ([0] * (x.ndim - len(widths) // 2) + widths[start::2][::-1] for start in (0, 1))
    repeats = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}.get(given["mode"] or "constant")
    # Along the axes of the input lie more positions of theirs, along the other dimensions constants.
    along = {how.dim for how in standings(x.places)} if x.ndim == len(x.places) + 2 else set()
    windows: list[Windows | None] = [None] * x.ndim
    inner = list(windows)
    outer = [0, 0] * x.ndim
    for dim, (size, first, last) in enumerate(zip(x.shape, before, after, strict=True)):
        if dim in along and (first or last):
            windows[dim] = sliding(size + first + last, kernel=1, stride=1, before=first, dilation=1)
            inner[dim] = padded(size, first, last, repeats) if repeats else windows[dim]
        elif repeats and (first or last):
            raise UnknownOperationError(f"`pad` with {given['mode']!r} where no axis lies")
        else:
            outer[2 * (x.ndim - 1 - dim) : 2 * (x.ndim - dim)] = [first, last]
    made = slide(x, windows, inner, first=0) if any(windows) else Extents(x.parts, x.places)
    if any(outer):
        parts = [F.pad(part, outer, value=-torch.inf) for part in made.parts]
        made = Extents(parts, [place.moved(partial(_padded, widths=outer)) for place in made.places])
    return made


def _padded(number: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Return the numbers of elements beside which constants are put, which stand nowhere."""
    return F.pad(number, widths, value=float(number.mean()))


def interpolate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extents:
    """A resizing, by any kind of interpolation."""
    given = bound("input size scale_factor mode align_corners recompute_scale_factor antialias", args, kwargs)
    x, shape = as_extents(given.pop("input")), shape_of(func, args, kwargs)
    axes = x.ndim - 2
    given["mode"] = given["mode"] or "nearest"
    given["antialias"] = bool(given["antialias"])
    windows = []
    for axis in range(axes):
        size, out = x.shape[axis + 2], shape[axis + 2]
        line = [size if each == axis else 1 for each in range(axes)]
        alone = dict(given)
        step = size / out
        if given["size"] is not None:
            alone["size"] = [out if each == axis else 1 for each in range(axes)]
        else:
            factor = _per_axis(given["scale_factor"], axes)[axis]
            alone["scale_factor"] = [factor if each == axis else 1.0 for each in range(axes)]
            step = step if given["recompute_scale_factor"] else 1 / factor

        def resize(
            units: torch.Tensor, line: list[int] = line, alone: dict[str, Any] = alone
        ) -> torch.Tensor:
            resized_units: torch.Tensor = func(units.view(1, -1, *line), **alone)
            return resized_units.reshape(len(units), -1)

        windows.append(resized(size, resize, aligned=bool(given["align_corners"]), step=step))
    return slide(x, windows)
