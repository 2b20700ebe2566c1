"""Dimensions made of factors, each of inputs, channels or places, and what rearrangements make of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import Final, NamedTuple, TypeAlias

Kind: TypeAlias = frozenset[str]
Shape: TypeAlias = Sequence[int]

INPUT: Final[Kind] = frozenset({"input"})
CHANNEL: Final[Kind] = frozenset({"channel"})
PLACE: Final[Kind] = frozenset({"place"})


class Factor(NamedTuple):
    """A part of a dimension; of several kinds where these can no longer be told apart."""

    size: int
    kind: Kind


# The factors of a dimension, the slowest first; of one element there are none, but for inputs and channels.
Dim: TypeAlias = tuple[Factor, ...]
Dims: TypeAlias = tuple[Dim, ...]


def laid_out(shape: Shape, channel: int, before: Dims | None = None) -> Dims:
    """Return the dimensions of what has new channels: the first counts inputs, unless it is that of channels.

    Args:
        shape: Of what was made.
        channel: The dimension that counts channels.
        before: Those of what it was made of, as many, where they are known.
    """
    if before is None or len(before) != len(shape):
        before = tuple(_dim(size, INPUT if place == 0 else PLACE) for place, size in enumerate(shape))
    found = [_without_channels(dim) for dim in resized(before, shape)]
    found[channel] = (Factor(shape[channel], CHANNEL),)
    return tuple(found)


def channel_dim(dims: Dims) -> int | None:
    """Return the dimension that counts channels; None where there is none, or where there are several.

    One that counts nothing else goes before one that counts places too, as after space-to-depth. One that
    counts inputs too does not count.
    """
    kinds = [kind_of(dim) for dim in dims]
    pure = [place for place, kind in enumerate(kinds) if kind == CHANNEL]
    found = pure or [place for place, dim in enumerate(dims) if _has_channels(dim)]
    return found[0] if len(found) == 1 else None


def input_dim(dims: Dims) -> int | None:
    """Return the dimension that counts inputs and nothing else; None where there is not one."""
    found = [place for place, dim in enumerate(dims) if kind_of(dim) == INPUT]
    return found[0] if len(found) == 1 else None


def unknown(shape: Shape) -> Dims:
    """Return the dimensions of what has no channels that anybody knows of."""
    return tuple(_dim(size, PLACE) for size in shape)


def sizes_of(dims: Dims) -> tuple[int, ...]:
    """Return the shape that has these dimensions."""
    return tuple(map(size_of, dims))


def kind_of(dim: Dim) -> Kind:
    """Return all that a dimension counts."""
    return frozenset().union(*(factor.kind for factor in dim))


def resized(dims: Dims, made: Shape) -> Dims:
    """Return the dimensions of as many, of other sizes: sliced, concatenated, padded, pooled or expanded."""
    return tuple(
        dim if size_of(dim) == size else _dim(size, kind_of(dim) or PLACE)
        for dim, size in zip(dims, made, strict=True)
    )


def broadcast(dims: Dims, made: Shape, others: Iterable[Dims] = ()) -> Dims | None:
    """Return what dimensions become that are broadcast, if they can be, with those of others."""
    if len(dims) > len(made):
        return None
    aligned = (*([()] * (len(made) - len(dims))), *dims)
    if any(size_of(dim) not in (1, size) for dim, size in zip(aligned, made, strict=True)):
        return None
    found = list(resized(aligned, made))
    for other in others:
        for place in range(-min(len(other), len(made)), 0):
            is_open = size_of(aligned[place]) == 1 and found[place] == _dim(made[place], PLACE)
            if is_open and size_of(other[place]) == made[place]:
                found[place] = other[place]
    return tuple(found)


def permuted(dims: Dims, order: Iterable[int]) -> Dims:
    """Return dimensions in another order."""
    return tuple(dims[place] for place in order)


def dropped(dims: Dims, places: Collection[int]) -> Dims:
    """Return dimensions without some."""
    return tuple(dim for place, dim in enumerate(dims) if place not in places)


def inserted(dims: Dims, place: int, size: int) -> Dims:
    """Return dimensions with a new one, which counts copies or parts."""
    return (*dims[:place], _dim(size, PLACE), *dims[place:])


def unfolded(dims: Dims, made: Shape) -> Dims:
    """Return the dimensions of windows over the last two: their places beside channels, then one each."""
    *around, channels, rows, columns = dims
    inside = _dim(made[-2] // max(size_of(channels), 1), PLACE)
    return (*around, (*channels, *inside), _dim(made[-1], kind_of((*rows, *columns)) or PLACE))


def repeated(dims: Dims, times: Sequence[int]) -> Dims:
    """Return the dimensions of what was repeated along each, and along new ones in front."""
    aligned = (*([()] * (len(times) - len(dims))), *dims)
    return tuple(
        dim if count == 1 else (*_dim(count, kind_of(dim) or PLACE), *dim)
        for count, dim in zip(times, aligned, strict=True)
    )


def indexed(dims: Dims, places: Collection[int], made: Shape) -> Dims | None:
    """Return what an advanced index over some dimensions leaves of them; None where the shape does not fit.

    What it makes stands where they stood, or in front where these were no neighbours.
    """
    new = len(made) - (len(dims) - len(places))
    if new < 0 or not places:
        return None
    kind: Kind = frozenset().union(*(kind_of(dims[place]) for place in places)) or PLACE
    kept = dropped(dims, places)
    at = min(places) if max(places) - min(places) < len(places) else 0
    return resized((*kept[:at], *([(Factor(0, kind),)] * new), *kept[at:]), made)


def multiplied(left: Dims | None, right: Dims | None, made: Shape) -> tuple[Dims, bool]:
    """Return the dimensions of a product of matrices, and whether it made channels; None is for weights.

    Rows of the left and columns of the right stay, and what is summed over is gone: queries times keys have
    no channels, and what weighs values with them has those of the values. Where weights sum over channels,
    or nothing has any, they make new ones; where they mix places, channels stay.
    """
    rows, columns = unknown(made[-2:])
    is_new = False
    known = left if right is None else right if left is None else None
    if known is not None:
        summed = known[-1 if right is None else -2]
        is_new = kind_of(summed) >= CHANNEL or not any(kind_of(dim) >= CHANNEL for dim in known)
        if is_new:
            rows, columns = ((Factor(size, CHANNEL),) for size in made[-2:])
    if left is not None:
        rows = left[-2]
    if right is not None:
        columns = right[-1]
    around = (left if left is not None else right or ())[:-2]
    return resized((*around, rows, columns), made), is_new


def reshaped(dims: Dims, made: Shape) -> Dims:
    """Return the dimensions of what has as many elements: taken together, or taken apart again.

    Where dimensions of several kinds were cut across, each of those that came of them may count all of it.
    """
    if 0 in made or prod(sizes_of(dims)) != prod(made):
        return unknown(made)
    found: list[Dim] = [()] * len(made)
    for before, after in _runs([size_of(dim) for dim in dims], made):
        factors = [factor for place in before for factor in dims[place]]
        sizes = [made[place] for place in after]
        parts = _shared_out(_joined(factors), sizes)
        if parts is None:
            kind = kind_of(tuple(factors))
            parts = [_dim(size, kind) for size in sizes]
        for place, part in zip(after, parts, strict=True):
            found[place] = part
    return tuple(found)


def _runs(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of as many elements into the shortest runs of dimensions with as many elements each.

    Dimensions of one element at the end of either belong to the last run.
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [i], [j]
        mine, other = old[i], new[j]
        i, j = i + 1, j + 1
        while mine != other and (i < len(old) if mine < other else j < len(new)):
            if mine < other:
                mine, left, i = mine * old[i], [*left, i], i + 1
            else:
                other, right, j = other * new[j], [*right, j], j + 1
        runs.append((left, right))
    if runs:
        runs[-1][0].extend(range(i, len(old)))
        runs[-1][1].extend(range(j, len(new)))
    return runs


def _shared_out(factors: list[Factor], sizes: Shape) -> list[Dim] | None:
    """Give factors to dimensions of some sizes in turn, and cut them where they must be; None where not."""
    found = []
    for size in sizes:
        taken: list[Factor] = []
        if size == 1 and factors and factors[0].size == 1:
            taken.append(factors.pop(0))
        left = size
        while left > 1:
            if not factors:
                return None
            first = factors.pop(0)
            if left % first.size == 0:
                if first.size > 1 or first.kind >= INPUT:  # one channel that has no dimension is none
                    taken.append(first)
                left //= first.size
            elif first.size % left == 0:
                taken.append(first._replace(size=left))
                factors.insert(0, first._replace(size=first.size // left))
                left = 1
            else:
                return None
        found.append(tuple(taken))
    return found


def _joined(factors: Iterable[Factor]) -> list[Factor]:
    """Make one of neighbours of the same kind."""
    found: list[Factor] = []
    for factor in factors:
        if found and found[-1].kind == factor.kind:
            found[-1] = factor._replace(size=found[-1].size * factor.size)
        else:
            found.append(factor)
    return found


def _has_channels(dim: Dim) -> bool:
    """Tell whether a dimension counts channels, and not those of each input one after the other."""
    kind = kind_of(dim)
    return kind >= CHANNEL and not kind >= INPUT


def _without_channels(dim: Dim) -> Dim:
    """Return a dimension whose channels count as places from here on, but for those among inputs."""
    if not _has_channels(dim):
        return dim
    return tuple(
        factor._replace(kind=(factor.kind - CHANNEL) | PLACE) if factor.kind >= CHANNEL else factor
        for factor in dim
        if factor.size > 1
    )


def _dim(size: int, kind: Kind) -> Dim:
    return () if size == 1 and kind == PLACE else (Factor(size, kind),)


def size_of(dim: Dim) -> int:
    """Return of how many elements a dimension is."""
    return prod(factor.size for factor in dim)
