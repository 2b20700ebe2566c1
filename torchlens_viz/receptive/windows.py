"""Windows: which positions of its input each position of a convolution, pooling or resizing looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Indices: TypeAlias = npt.NDArray[np.int64]


class Windows(NamedTuple):
    """The windows of an operation along one axis.

    Attributes:
        taps: (positions, T) the input positions that each output position looks at; below zero, and from the
            size of the input on, is padding. Short rows repeat an entry.
        origin: Where the window of position 0 has its middle, in input positions.
        step: How far apart the middles of neighbours are.
    """

    taps: Indices
    origin: float
    step: float


def sliding(out: int, *, kernel: int, stride: int, before: int, dilation: int) -> Windows:
    """Return the windows of a convolution or pooling with `before` positions of padding in front."""
    taps = np.arange(out)[:, None] * stride - before + np.arange(kernel) * dilation
    return Windows(taps, (kernel - 1) * dilation / 2 - before, float(stride))


def padded(size: int, before: int, after: int, mode: str) -> Windows:
    """Return the windows, one position wide, of padding that repeats the map, as `numpy.pad` calls it."""
    taps = np.pad(np.arange(size), (max(before, 0), max(after, 0)), mode)  # type: ignore[call-overload]
    taps = taps[max(-before, 0) : len(taps) - max(-after, 0)]
    return Windows(taps[:, None], -float(before), 1.0)


def transposed(
    size: int, out: int, *, kernel: int, stride: int, before: int, dilation: int
) -> Windows | None:
    """Return the windows of a transposed convolution, or None where a position has none.

    Input positions beyond the border do not exist here: transposed convolutions do not pad.
    """
    offset = np.arange(out)[:, None] + before - np.arange(kernel) * dilation
    source = offset // stride
    is_tap = (offset % stride == 0) & (source >= 0) & (source < size)
    if not is_tap.any(1).all():
        return None
    some = source[np.arange(out), is_tap.argmax(1)][:, None]
    middle = (before - (kernel - 1) * dilation / 2) / stride
    return Windows(np.where(is_tap, source, some), middle, 1 / stride)


def adaptive(size: int, out: int) -> Windows:
    """Return the windows of an adaptive pooling from `size` to `out` positions."""
    first = np.arange(out) * size // out
    last = -(-(np.arange(1, out + 1) * size) // out) - 1
    taps = np.minimum(first[:, None] + np.arange((last - first).max() + 1), last[:, None])
    return Windows(taps, (size / out - 1) / 2, size / out)


def resized(
    size: int, resize: Callable[[torch.Tensor], torch.Tensor], *, aligned: bool, step: float
) -> Windows:
    """Return the windows of a linear interpolation, found by resizing every unit vector.

    Args:
        size: Positions of the input.
        resize: Makes of (size, size), a batch of vectors, the resized ones (size, out).
        aligned: Whether the first and last positions of input and output coincide.
        step: How far apart neighbours lie, where not `aligned`.
    """
    is_tap = (resize(torch.eye(size, device="cpu")) != 0).numpy().T
    out = len(is_tap)
    most = int(is_tap.sum(1).max())
    order = np.argsort(~is_tap, axis=1, kind="stable")[:, :most]
    taps = np.where(np.take_along_axis(is_tap, order, 1), order, order[:, :1])
    if aligned:
        return Windows(taps, 0.0, (size - 1) / (out - 1) if out > 1 else 1.0)
    return Windows(taps, step / 2 - 0.5, step)


def greatest(line: torch.Tensor, dim: int, windows: Windows, slope: float | None) -> torch.Tensor:
    """Return the greatest value in each window.

    Args:
        line: Values along `dim`, with any other dimensions. Of size 1 there, where `slope` is zero, it stands
            for values that are all equal, and stays as it is.
        dim: The dimension that the windows lie along.
        windows: The windows.
        slope: How much values change from one position to the next beyond the border; None for -inf there.
    """
    size = line.shape[dim]
    if slope == 0 and size == 1:
        return line  # broadcast along this dimension
    taps = torch.from_numpy(windows.taps)
    inside = taps.clamp(0, size - 1)
    values = line.index_select(dim, inside.flatten()).unflatten(dim, taps.shape)  # type: ignore[no-untyped-call]
    beyond: Any = (taps - inside).view(*taps.shape, *[1] * (line.ndim - dim - 1))
    if slope is None:
        values = values.masked_fill(beyond != 0, -torch.inf)
    elif slope:
        values = values + beyond * slope
    most: torch.Tensor = values.amax(dim + 1)
    return most
