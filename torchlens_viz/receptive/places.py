"""Places: over which input pixel each element of a tensor stands, wherever the network moves it.

For every spatial axis of the input, each element of a tensor has a number, and a grid says over which pixel
the elements of a number stand. What only moves elements (permuting, slicing, reshaping into windows and back)
moves their numbers in the same way. So it is always known along which dimension the positions of an axis lie,
or that they lie along several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import torch


class Grid(NamedTuple):
    """Where the positions of a map lie along one axis, in input pixels: the first one, and their distance."""

    origin: float
    step: float


class Standing(NamedTuple):
    """How the elements of a tensor lie along one axis of the input.

    Attributes:
        dim: The dimension of the tensor along which they change; where they change along none, the one in
            which such an axis lies in (N, C, ...). None where that is not free, or they change along several.
        grid: The first position along it and the distance of neighbours; None where that differs.
        varies: Whether they change at all.
    """

    dim: int | None
    grid: Grid | None
    varies: bool


@final
class Place(NamedTuple):
    """Over which pixel, along one axis of the input, each element of a tensor stands.

    Attributes:
        number: float64 of the tensor's shape, broadcast along what it does not change with.
        grid: Elements of number n stand over pixel `grid.origin + n * grid.step`.
    """

    number: torch.Tensor
    grid: Grid

    @classmethod
    def along(cls, dim: int, shape: Sequence[int], grid: Grid) -> Place:
        """Return the place of positions that lie along a dimension, one after the other."""
        line = torch.arange(shape[dim], dtype=torch.float64, device="cpu")
        return cls(line.view(-1, *[1] * (len(shape) - dim - 1)).expand(tuple(shape)), grid)

    @classmethod
    def at(cls, shape: Sequence[int], grid: Grid) -> Place:
        """Return the place of elements that all stand over one pixel; the step is that of larger maps."""
        return cls(torch.zeros((), dtype=torch.float64, device="cpu").expand(tuple(shape)), grid)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Place:
        """Return the place of the same elements in another order or number."""
        return Place(move(self.number), self.grid)

    def pixels(self) -> torch.Tensor:
        """Return the pixel of each element."""
        return self.grid.origin + self.number * self.grid.step

    def dims(self) -> list[int]:
        """Return the dimensions along which it changes."""
        (number,) = thin([self.number], keep=())
        return [
            dim
            for dim, size in enumerate(number.shape)
            if size > 1 and not bool((number.narrow(dim, 0, 1) == number).all())
        ]

    def mean(self, dims: Sequence[int]) -> Place:
        """Return the place of what is made of all elements along some dimensions, which stay with size 1."""
        (number,) = thin([self.number], keep=[dim for dim in range(self.number.ndim) if dim not in dims])
        dims = [dim for dim in dims if number.shape[dim] > 1]
        return Place(number.mean(dims, keepdim=True) if dims else number, self.grid)


def thin(parts: Sequence[torch.Tensor], *, keep: Sequence[int]) -> list[torch.Tensor]:
    """Return tensors of as many dimensions with size 1 where all of them are broadcast, but in some."""
    strides = [part.stride() for part in parts]
    broadcast = [
        dim
        for dim, size in enumerate(parts[0].shape)
        if dim not in keep and size > 1 and not any(each[dim] for each in strides)
    ]
    return [
        part.as_strided([1 if dim in broadcast else size for dim, size in enumerate(part.shape)], each)
        if broadcast
        else part
        for part, each in zip(parts, strides, strict=True)
    ]


def standings(places: Sequence[Place]) -> list[Standing]:
    """Tell of each axis how the elements of a tensor lie along it."""
    dims = [place.dims() for place in places]
    taken = {dim for each in dims for dim in each}
    ndim = places[0].number.ndim
    found = []
    for axis, (place, own) in enumerate(zip(places, dims, strict=True)):
        origin, step = place.grid
        if len(own) == 1:
            line = place.number[tuple(slice(None) if dim == own[0] else 0 for dim in range(ndim))]
            steps = np.diff(line.numpy())
            is_even = bool((np.abs(steps - steps[0]) <= 1e-9 * (1 + abs(steps[0]))).all())
            first, each = float(line[0]), float(steps[0])
            grid = Grid(origin + first * step, each * step) if is_even and each else None
            found.append(Standing(own[0], grid, varies=True))
        elif own:
            found.append(Standing(None, None, varies=True))
        else:
            first = float(place.number.flatten()[0]) if place.number.numel() else 0.0
            is_free = ndim == len(places) + 2 and axis + 2 not in taken
            grid = Grid(origin + first * step, step)
            found.append(Standing(axis + 2 if is_free else None, grid, varies=False))
    return found


def common_places(known: Sequence[Sequence[Place]], shape: Sequence[int]) -> list[Place]:
    """Return the places of a union: those of the maps in it, not of what is broadcast over them.

    Args:
        known: The places of each tensor in it.
        shape: That of the union.
    """
    shape = tuple(shape)
    wide = [[place.moved(lambda number: number.expand(shape)) for place in places] for places in known]
    if all(_are_alike(each, wide[0]) for each in wide[1:]):
        return wide[0]
    stand = [standings(places) for places in wide]
    found = []
    for axis, (place, _) in enumerate(zip(wide[0], stand[0], strict=True)):
        own = [(each[axis], how[axis]) for each, how in zip(wide, stand, strict=True)]
        even = [how for _, how in own if how.varies and how.grid is not None]
        if even:
            grids = [how.grid for how in even if how.dim == even[0].dim and how.grid is not None]
            grid = Grid(sum(each.origin for each in grids) / len(grids), grids[0].step)
            assert even[0].dim is not None
            found.append(Place.along(even[0].dim, shape, grid))
            continue
        uneven = [each for each, how in own if how.varies]
        if len(uneven) == 1:
            found.append(uneven[0])
        elif uneven:
            pixels = sum(each.pixels() for each in uneven)
            assert isinstance(pixels, torch.Tensor)
            found.append(Place(pixels / len(uneven), Grid(0.0, 1.0)))
        else:
            maps = [
                how[axis].grid
                for each, how in zip(known, stand, strict=True)
                if each[axis].number.ndim == len(shape)
                and axis + 2 < len(shape)
                and each[axis].number.shape[axis + 2] == shape[axis + 2]
            ]
            whole = [grid for grid in maps if grid is not None] or [place.grid]
            origin = sum(each.origin for each in whole) / len(whole)
            found.append(Place.at(shape, Grid(origin, whole[0].step)))
    return found


def _are_alike(one: Sequence[Place], other: Sequence[Place]) -> bool:
    """Tell whether two tensors of one shape are seen to stand in the same places, without looking far."""
    return all(
        each.grid == place.grid
        and each.number.stride() == place.number.stride()
        and (each.number is place.number or torch.equal(*thin([each.number, place.number], keep=())))
        for each, place in zip(one, other, strict=True)
    )
