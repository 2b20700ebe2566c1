"""Crops: the part of an image that is enough to compute a unit, where a unit sees but a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torchlens_viz.receptive.field import ReceptiveField

Span: TypeAlias = tuple[int, int]


class Crop(NamedTuple):
    """Rows and columns of an image that hold all that a unit sees, and where the unit is in their map.

    Attributes:
        rows: The first row, and the one after the last.
        columns: The first column, and the one after the last.
        place: Row and column of the unit in the map of the crop.
    """

    rows: Span
    columns: Span
    place: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def crops_for(field: ReceptiveField, positions: Sequence[tuple[int, int]]) -> list[Crop] | None:
    """Cut out of an image what each unit sees, such that the network makes the same of it there.

    A crop begins where a window of every layer before begins: at a multiple of the layer's stride, or at the
    image's own border. What the padding at its other sides spoils, the unit does not see.

    Args:
        field: What the positions of the layer see.
        positions: Row and column of each unit.

    Returns:
        A crop for each unit, of at most four different sizes; None where no crop can do, or crops would be
        more work than to go back through the whole image for each unit.
    """
    steps = [int(step) for step in field.stride]
    if len(field.map_shape) != 2 or not field.is_exact or not field.is_uniform:
        return None
    if any(step < 1 or step != given for step, given in zip(steps, field.stride, strict=True)):
        return None
    cuts: list[Crop] = []
    for position in positions:
        rows, columns = (
            _span(start + index * step, size, step, whole)
            for start, index, size, step, whole in zip(
                field.start, position, field.size, steps, field.input_shape, strict=True
            )
        )
        place = position[0] - rows[0] // steps[0], position[1] - columns[0] // steps[1]
        cuts.append(Crop(rows, columns, place))
    height, width = field.input_shape
    # Each crop is gone through forward and back, and the whole image once more than in their place.
    work = sum(2 * rows * columns for rows, columns in (crop.size for crop in cuts))
    return cuts if work < (len(cuts) - 1) * height * width else None


def _span(first: int, size: int, step: int, whole: int) -> Span:
    """Return the part of an axis of `whole` pixels that holds `size` of them, even if some lie outside."""
    length = -(-(size + step - 1) // step) * step
    begin = max(0, first // step * step)
    if first + size > whole or begin + length >= whole:  # as far as the border, where the padding is no other
        return max(0, (whole - length) // step * step), whole
    return begin, begin + length
