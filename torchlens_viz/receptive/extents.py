"""Extents: on which input pixels the values of a network depend, and how dependence combines.

In place of an image goes an `Extents`, a tensor without values: for every element and every spatial axis of
the input it knows the first and the last pixel that the element depends on. It knows both twice: with padding
as pixels beyond the border, so that a convolution sees as much there as in the middle, and without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch

from torchlens_viz.receptive.places import Grid, Place, Standing, standings, thin

Indices: TypeAlias = npt.NDArray[np.int64]


class UnknownOperationError(Exception):
    """The model does something of which it is not known what depends on what."""


@final
class Extents(torch.Tensor):
    """The input pixels on which each element of a tensor depends, and over which of them it stands.

    `parts` holds, for every spatial axis of the input, the first pixel negated and the last pixel, each as a
    tensor of the shape that the model sees, so that a union is a maximum. -inf stands for no pixel at all.
    What is equal along a dimension is broadcast along it, which keeps the work small. All this is held twice:
    in the first half of `parts`, padding is a part of a larger image; in the second half it is no pixel.
    """

    parts: tuple[torch.Tensor, ...]
    places: tuple[Place, ...]

    @staticmethod
    def __new__(cls: type[Extents], parts: Sequence[torch.Tensor], places: Sequence[Place]) -> Extents:
        """Make a tensor of the shape of the parts."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, parts[0].shape, dtype=torch.float32, device=torch.device("cpu")
        )
        made.parts, made.places = tuple(parts), tuple(places)
        return made

    @classmethod
    def of_input(cls, shape: Sequence[int]) -> Extents:
        """Return the extents of an input (N, C, ...): every pixel depends on itself alone."""
        parts = []
        for axis, size in enumerate(shape[2:]):
            line = torch.arange(size, dtype=torch.float32, device="cpu")
            line = line.view(-1, *[1] * (len(shape) - 3 - axis))
            parts += [(-line).expand(shape), line.expand(shape)]
        return cls(parts * 2, [Place.along(dim, shape, Grid(0.0, 1.0)) for dim in range(2, len(shape))])

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Extents:
        """Return the same elements in another order or number."""
        return Extents([move(part) for part in self.parts], [place.moved(move) for place in self.places])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse: there are no values to work on. `receptive.rules` knows what to do instead."""
        raise UnknownOperationError(f"`{func}` of extents")

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


def over(part: torch.Tensor, *dims: int) -> torch.Tensor:
    """Return the maximum over dimensions, which stay with size 1."""
    shape = [1 if dim in dims else size for dim, size in enumerate(part.shape)]
    (part,) = thin([part], keep=())  # what is broadcast stays broadcast
    dims = tuple(dim for dim in dims if part.shape[dim] > 1)
    return (part.amax(dims, keepdim=True) if dims else part).expand(shape)


def union(parts: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return the maximum of tensors broadcast to a shape."""
    first, *others = thin([part.expand(shape) for part in parts], keep=())
    for other in others:
        first = torch.maximum(first, other)
    return first.expand(shape)


def mixing(
    x: Extents, dims: Sequence[int], shape: Sequence[int] | None = None, *, keepdim: bool = True
) -> Extents:
    """Return what depends on everything along some dimensions.

    Args:
        x: What is mixed.
        dims: The dimensions.
        shape: What comes out, where these dimensions stay.
        keepdim: Whether they stay, with size 1, where there is no `shape`.
    """
    dims = [dim % x.ndim for dim in dims]
    parts = [over(part, *dims) for part in x.parts]
    if shape is not None:
        whole = tuple(shape)
        places = [place.mean(dims) for place in x.places]
        return Extents(
            [part.expand(whole) for part in parts],
            [place.moved(lambda number: number.expand(whole)) for place in places],
        )
    reduced = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    places = []
    for place, how in zip(x.places, standings(x.places), strict=True):
        if how.dim in dims and how.grid is not None:
            pooled = adaptive(x.shape[how.dim], 1)
            origin, step = how.grid
            grid = Grid(origin + pooled.origin * step, pooled.step * step)
            places.append(Place.at(reduced, grid))
        else:
            places.append(place.mean(dims).moved(lambda number: number.expand(reduced)))
    made = Extents(parts, places)
    return made if keepdim else made.moved(lambda part: part.squeeze(dims))


def spread(known: Sequence[Extents], shape: Sequence[int]) -> Extents:
    """Return what depends on all that some extents do, broadcast to a shape, in the places of the first."""
    parts = [union(each, shape) for each in zip(*(x.parts for x in known), strict=True)]
    return Extents(parts, [place.moved(lambda number: number.expand(shape)) for place in known[0].places])


def slide(
    x: Extents,
    windows: Sequence[Windows | None],
    inner: Sequence[Windows | None] | None = None,
    *,
    first: int = 2,
) -> Extents:
    """Look through windows along dimensions; None leaves a dimension as it is.

    Args:
        x: What is looked at.
        windows: A window per dimension.
        inner: The windows for where padding is no pixel, if they are others.
        first: The dimension that the first window lies along.
    """
    if x.ndim != len(x.places) + 2 or len(windows) != x.ndim - first:
        raise UnknownOperationError(f"windows over a tensor of shape {tuple(x.shape)}")
    if not any(windows):
        return x
    by_dim = dict(enumerate(windows, first))
    shape = list(x.parts[0].shape)
    for dim, each in by_dim.items():
        shape[dim] = shape[dim] if each is None else len(each.taps)
    stand = standings(x.places)
    parts = []
    for index, part in enumerate(x.parts):
        is_inner, place = divmod(index, 2 * len(x.places))
        axis, is_last = divmod(place, 2)
        how, grid = stand[axis], stand[axis].grid or x.places[axis].grid
        (part,) = thin([part], keep=[] if how.dim is None else [how.dim])
        if not is_inner:
            _check_axes(part, how.dim, [dim for dim, each in by_dim.items() if each is not None])
        for dim, each in enumerate(inner if inner and is_inner else windows, first):
            if each is not None:
                step = grid.step if is_last else -grid.step
                beyond = None if is_inner else step
                part = greatest(part, dim, each, beyond if dim == how.dim else 0.0)
        parts.append(part.expand(shape))
    places = [_slid(place, how, by_dim, shape) for place, how in zip(x.places, stand, strict=True)]
    return Extents(parts, places)


def _slid(place: Place, how: Standing, by_dim: Mapping[int, Windows | None], shape: Sequence[int]) -> Place:
    """Return where what windows look at stands: in their middle."""
    number = place.number
    for dim, each in by_dim.items():
        if each is None:
            continue
        is_own = dim == how.dim or (how.varies and how.dim is None)
        if not is_own or (not how.varies and number.shape[dim] > 1):
            number = number.narrow(dim, 0, 1)  # all the same along it
        elif how.grid is not None:
            origin, step = how.grid
            return Place.along(dim, shape, Grid(origin + each.origin * step, each.step * step))
        else:
            taps = torch.from_numpy(each.taps.clip(0, number.shape[dim] - 1))
            seen = number.index_select(dim, taps.flatten())
            number = seen.unflatten(dim, taps.shape).mean(dim + 1)  # type: ignore[no-untyped-call]
    return Place(number.expand(shape), place.grid)


def _check_axes(part: torch.Tensor, dim: int | None, windowed: Sequence[int]) -> None:
    """Refuse a tensor in which what an axis of the input sees changes along another dimension."""
    if dim is not None and not (part.shape[dim] > 1 and _is_constant(part, dim)):
        return
    if not all(_is_constant(part, other) for other in windowed if other != dim):
        raise UnknownOperationError("windows over a tensor whose axes have changed places")


def _is_constant(part: torch.Tensor, dim: int) -> bool:
    return bool((part.narrow(dim, 0, 1) == part).all())


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
    inside = windows.taps.clip(0, size - 1)  # in numpy, which takes a fraction of the time for so few
    seen = np.take(line.numpy(), inside, axis=dim)
    beyond = (windows.taps - inside).reshape(*inside.shape, *[1] * (line.ndim - dim - 1))
    if slope is None:
        seen = np.where(beyond != 0, np.float32(-np.inf), seen)
    elif slope:
        seen = seen + (beyond * slope).astype(np.float32)
    return torch.from_numpy(seen.max(dim + 1))
