"""Memory that a network takes and then writes to, often part by part: what its dimensions come to count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchlens_viz.dimensions.factors import Dims, Factor, Shape, indexed, kind_of, resized, unknown
from torchlens_viz.dimensions.operations import Called, Known, Seen, followed, indexed_places

_TAKES = ("empty", "zeros", "ones", "full", "new_")


class Part(NamedTuple):
    """A view of memory that was taken: each of its dimensions counts what one of the whole does, by number.

    Known by the key of the whole, of this shape.
    """

    key: Any
    shape: Shape
    dims: Dims


def takes_memory(name: str) -> bool:
    """Tell whether an operation takes memory for others to write to."""
    return name.startswith(_TAKES)


def whole(key: Any, shape: Shape) -> Part:
    """Return all of what was taken.

    Args:
        key: What it is known by.
        shape: Of the tensor.
    """
    return Part(key, shape, tuple((Factor(size, frozenset({str(dim)})),) for dim, size in enumerate(shape)))


def view_of(part: Part, name: str, called: Called, tensor: torch.Tensor) -> Part:
    """Return what a view of a part is of the whole.

    Args:
        part: What was looked at.
        name: The operation.
        called: The same, with what it was given and the shape of the view.
        tensor: What it was given.
    """
    seen = followed(name, called, [Known(tensor, Seen(part.dims, 0, is_assumed=False))], 0)
    return part._replace(dims=unknown(called.made) if seen is None else seen.dims)


def whole_after(part: Part, name: str, called: Called, known: Sequence[Known], dims: Dims) -> Dims:
    """Return the dimensions of the whole after something was written to a part; of all others, nobody knows.

    Args:
        part: What was written to.
        name: The operation.
        called: The same, with what it was given.
        known: What it was given of which something is known.
        dims: Those of the part, as they are now.
    """
    into = part.dims
    if name == "index_put":
        values: Any = called.args[2]
        into = indexed(into, indexed_places(called)[0], tuple(values.shape)) or ()
        dims = next((each.seen.dims for each in known if each.tensor is values), ())
    found = list(unknown(part.shape))
    if len(into) != len(dims):
        return tuple(found)
    for place, size in enumerate(part.shape):
        there = [dim for dim, part_dim in zip(dims, into, strict=True) if kind_of(part_dim) == {str(place)}]
        if there:
            found[place] = resized((tuple(factor for dim in there for factor in dim),), (size,))[0]
    return tuple(found)
