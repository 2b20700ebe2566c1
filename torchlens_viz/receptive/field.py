"""Regions: the input pixels that the positions of a layer see, as a value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from torchlens_viz.arguments import made_of, shown
from torchlens_viz.errors import InvalidArgumentError

Span: TypeAlias = tuple[int, int]  # the first and the last pixel; (0, -1) holds none


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """The input pixels that the positions of a layer see, as `receptive_field` finds them.

    Everything is given per spatial axis, in input pixels. Regions are boxes: the holes that dilation leaves
    within them count as seen. A layer without positions (a vector, or tokens) has one region, that of `()`.

    Attributes:
        stride: How far apart the regions of neighbouring positions lie; less than 1 after upsampling.
        input_shape: Sizes of the input.
        map_shape: Positions of the layer; `()` where it has none.
        is_exact: True where the regions follow from the layers' geometry, without error. False where they
            were measured by gradient: what the layer depends on too weakly, or not on the inputs tried, is
            then missing, regions stop at the border, and between the probed positions they are interpolated.
    """

    stride: tuple[float, ...]
    input_shape: tuple[int, ...]
    map_shape: tuple[int, ...]
    is_exact: bool
    _origin: tuple[float, ...] = field(repr=False)
    _spans: tuple[tuple[Span, ...], ...] = field(repr=False)
    _inner: tuple[tuple[Span, ...], ...] = field(repr=False)  # without the padding

    @property
    def size(self) -> tuple[int, ...]:
        """The pixels that a position sees, padding included; the most that any position does."""
        return tuple(max(last - first + 1 for first, last in spans) for spans in self._spans)

    @property
    def start(self) -> tuple[int, ...]:
        """The first pixel that the first position sees; negative in the padding."""
        return tuple(spans[0][0] for spans in self._spans)

    @property
    def is_uniform(self) -> bool:
        """Whether every position sees `size` pixels from `start + position * stride` on.

        Positions of an adaptive pooling may see different sizes, and those of a transposed convolution
        take turns.
        """
        return all(
            span == (start + index * step, start + index * step + size - 1)
            for spans, start, step, size in zip(self._spans, self.start, self.stride, self.size, strict=True)
            for index, span in enumerate(spans)
        )

    def region(self, position: Sequence[int] = ()) -> tuple[slice, ...]:
        """Return the part of the input that a position sees: from the first pixel to the last.

        It is empty for a position that sees nothing but padding.

        Args:
            position: Index along every axis of the map, such as (row, column), from 0.

        Returns:
            A slice per spatial axis: `image[..., *field.region((3, 4))]` is the patch.

        Raises:
            InvalidArgumentError: The layer has no such position.
            InvalidTypeError: The position does not consist of ints.
        """
        place = self._checked(position) or (0,) * len(self.input_shape)
        cut = []
        for spans, index, size in zip(self._inner, place, self.input_shape, strict=True):
            first, last = spans[index]
            begin = min(max(first, 0), size)
            cut.append(slice(begin, max(begin, min(last + 1, size))))
        return tuple(cut)

    def center(self, position: Sequence[int] = ()) -> tuple[float, ...]:
        """Return the input pixel a position stands over: 0.0 is the middle of the first pixel.

        It is the middle of the region, padding included, where the geometry is that of a chain of windows.
        What lets a position see everything, such as a gate computed from a global average, does not move it.

        Args:
            position: Index along every axis of the map, from 0.

        Raises:
            InvalidArgumentError: The layer has no such position.
            InvalidTypeError: The position does not consist of ints.
        """
        place = self._checked(position) or (0,) * len(self.input_shape)
        return tuple(
            origin + index * step
            for origin, index, step in zip(self._origin, place, self.stride, strict=True)
        )

    def _checked(self, position: Sequence[int]) -> tuple[int, ...]:
        rule = f"`position` must be an index per axis of a map of {self.map_shape}, got {shown(position)}"
        place = made_of(position, lambda given: tuple(map(operator.index, islice(given, 4))), rule)
        if len(place) != len(self.map_shape) or not all(
            0 <= index < size for index, size in zip(place, self.map_shape, strict=True)
        ):
            raise InvalidArgumentError(f"{rule}; indices count from 0")
        return place
