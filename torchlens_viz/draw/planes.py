"""Planes: maps of one to three dimensions as tiles, volumes by slices across one of their axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch.nn import functional as F

from torchlens_viz.arguments import indices_of, one_of
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError

Plane: TypeAlias = Literal["depth", "height", "width"]
Figure = TypeVar("Figure", int, float)
Slices: TypeAlias = int | Sequence[int] | Literal["all", "max"] | None

_STRIP_WIDTH: Final = 256  # at least, of maps of one dimension, whose positions are enlarged to that
_STRIP_HEIGHT: Final = 24
_LONGEST: Final = 2048  # pixels of a strip, unless it is to be enlarged


@dataclass(frozen=True, slots=True)
class Slicing:
    """Which planes of a volume (D, H, W) are shown.

    Attributes:
        axis: The axis across which the slices lie, from 0.
        places: Which slices, by index; none is the maximum along the axis.
        count: How many slices there are.
    """

    axis: int
    places: tuple[int, ...]
    count: int

    @classmethod
    def of(
        cls, sizes: Sequence[int], plane: Plane | None, slices: Slices, *, default: int | None = None
    ) -> Slicing | None:
        """Choose planes of values of some sizes, or None where these have no slices.

        Args:
            sizes: Of the spatial axes.
            plane: Across which axis the slices lie; None is the first of three.
            slices: An index or several, `"all"`, `"max"` for the maximum along the axis, or None.
            default: The slice that None stands for; the middle one unless it is given.

        Raises:
            InvalidArgumentError: There is no such plane or slice, or there are no three axes.
            InvalidTypeError: `slices` is of another type.
        """
        if len(sizes) != 3:
            given = [name for name, value in (("plane", plane), ("slices", slices)) if value is not None]
            if given:
                raise InvalidArgumentError(
                    f"`{given[0]}` has no effect on maps of {' x '.join(map(str, sizes))}, which have no "
                    "slices; leave it out"
                )
            return None
        names = get_args(Plane)
        axis = names.index(one_of("depth" if plane is None else plane, "plane", names))
        count = sizes[axis]
        if slices is None:
            return cls(axis, (count // 2 if default is None else default,), count)
        if isinstance(slices, str):
            one_of(slices, "slices", ("all", "max"))
            return cls(axis, tuple(range(count)) if slices == "all" else (), count)
        return cls(axis, tuple(indices_of(slices, count, "slices")), count)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Return the planes (..., P, h, w) of values (..., D, H, W): P slices, or their maximum."""
        slices = values.movedim(self.axis - 3, -3)
        return slices[..., list(self.places), :, :] if self.places else slices.amax(-3, keepdim=True)

    def within(self, figures: Sequence[Figure]) -> tuple[Figure, ...]:
        """Return the two of three figures, one per axis, that concern the planes themselves."""
        return tuple(figure for axis, figure in enumerate(figures) if axis != self.axis)

    def labels(self) -> list[str]:
        """Return what to write after a tile's own label: which slice it is."""
        return [f"@{place}" for place in self.places] or ["@max"]

    def note(self) -> str:
        """Return a line that says which planes these are."""
        name = get_args(Plane)[self.axis]
        if not self.places:
            return f"the maximum along {name}"
        if len(self.places) == 1:
            return f"slice {self.places[0]} of {self.count} along {name}"
        return f"after @: the slice, of {self.count} along {name}"


class Planes(NamedTuple):
    """Maps as tiles.

    Attributes:
        tiles: (K, P, h, w), of each map its planes.
        labels: What to write after a map's own label, for each plane.
        notes: Lines for a legend.
        style: How to draw them.
    """

    tiles: torch.Tensor
    labels: list[str]
    notes: list[str]
    style: Style


def planes_of(maps: torch.Tensor, style: Style, plane: Plane | None, slices: Slices) -> Planes:
    """Return maps of one to three dimensions as tiles.

    Maps of one dimension become strips of colour, one below the other: 24 pixels high, or where the style
    says how much to enlarge, one position. Those of more than 2048 positions are shortened to that, unless it
    does: each pixel is the value farthest from zero of those in its place.

    Args:
        maps: (K, L), (K, H, W) or (K, D, H, W).
        style: How to draw them; what it leaves open is decided for strips.
        plane: As in `Slicing.of`.
        slices: As in `Slicing.of`.

    Raises:
        InvalidArgumentError: As `Slicing.of`.
        InvalidTypeError: As `Slicing.of`.
    """
    slicing = Slicing.of(maps.shape[1:], plane, slices)
    if slicing is not None:
        tiles = slicing.take(maps)
        return Planes(tiles, slicing.labels(), [slicing.note()], style)
    if maps.ndim == 3:
        return Planes(maps[:, None], [""], [], style)
    notes, length = [], maps.shape[1]
    if style.upscale is None and length > _LONGEST:
        maps = strongest(maps, _LONGEST)
        notes = [f"each pixel: the value farthest from zero of {length / _LONGEST:.3g} positions"]
    factor = style.upscale or ceil(_STRIP_WIDTH / maps.shape[1])
    rows = ceil(_STRIP_HEIGHT / factor) if style.upscale is None else 1
    smooth = style.interpolation if factor > 1 else "nearest"
    style = replace(style, upscale=factor, nrow=style.nrow or 1, interpolation=smooth)
    return Planes(maps[:, None, None].expand(-1, 1, rows, -1), [""], notes, style)


def strongest(values: torch.Tensor, length: int) -> torch.Tensor:
    """Return values (K, L) shortened to (K, length): of those in each place, the one farthest from zero.

    A place with a NaN is NaN.
    """
    values = values if values.is_floating_point() and values.dtype.itemsize > 2 else values.float()
    high, low = (sign * F.adaptive_max_pool1d(sign * values[None], length)[0] for sign in (1, -1))
    return torch.where(high.abs() >= low.abs(), high, low)
