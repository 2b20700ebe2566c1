"""Colour tables: 251 levels for values, and five entries for what is not a value.

Every sheet uses the same 256-entry palette layout, whichever values it holds: a NaN that appears in one tile
changes no other pixel. 251 is odd, so that a diverging table has an exact middle, level 125, for zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

LEVELS: Final = 251
PADDING: Final = 251
NAN: Final = 252
POSITIVE_INFINITY: Final = 253
NEGATIVE_INFINITY: Final = 254
TEXT: Final = 255

SPECIAL_COLOURS: Final = {
    NAN: (255, 0, 255),
    POSITIVE_INFINITY: (0, 255, 0),
    NEGATIVE_INFINITY: (0, 255, 255),
}

Table: TypeAlias = npt.NDArray[np.uint8]
_WHITE: Final = (255, 255, 255)
_BLACK: Final = (0, 0, 0)

# Colours at equal distances; what lies between is linear. The brewer scheme's middle is a light grey
# (247, 247, 247); here zero is white.
_ANCHORS: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    "gray": (_BLACK, _WHITE),
    "seismic": ((0, 0, 77), (0, 0, 255), _WHITE, (255, 0, 0), (128, 0, 0)),
    "RdBu_r": (
        (5, 48, 97),
        (33, 102, 172),
        (67, 147, 195),
        (146, 197, 222),
        (209, 229, 240),
        _WHITE,
        (253, 219, 199),
        (244, 165, 130),
        (214, 96, 77),
        (178, 24, 43),
        (103, 0, 31),
    ),
}
_DIVERGING: Final = frozenset({"seismic", "RdBu_r"})
NAMES: Final = ("gray", "hot", "seismic", "RdBu_r")


@dataclass(frozen=True, slots=True)
class Colormap:
    """A colour per level, and the colours of padding and text that stand out from them.

    `levels` is (251, 3) uint8. A diverging map is meant for values with zero in the middle, drawn white.
    """

    name: str
    levels: Table
    diverging: bool

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour of the padding: dark where white means zero, white elsewhere."""
        return (40, 40, 40) if self.diverging else _WHITE

    @property
    def foreground(self) -> tuple[int, int, int]:
        """Colour of text on the padding."""
        return _WHITE if self.diverging else _BLACK

    @property
    def palette(self) -> Table:
        """All 256 entries, (256, 3) uint8: the levels, padding, NaN, +Inf, -Inf and text."""
        special = [SPECIAL_COLOURS[code] for code in (NAN, POSITIVE_INFINITY, NEGATIVE_INFINITY)]
        extra = np.array([self.background, *special, self.foreground], np.uint8)
        return np.concatenate([self.levels, extra])


def colormap(name: str) -> Colormap:
    """Return a colour map by its name.

    Args:
        name: `"gray"`, `"hot"` (both for values without a middle), `"seismic"` or `"RdBu_r"` (diverging: blue
            is negative, white zero, red positive). The colours are those of the maps of these names in
            matplotlib, except that the middle of `"RdBu_r"` is pure white.

    Raises:
        InvalidArgumentError: There is no such map.
        InvalidTypeError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"`cmap` must be the name of a colour map, got {type(name).__name__}")
    if name not in NAMES:
        raise InvalidArgumentError(f'`cmap` must be "auto" or one of {", ".join(NAMES)}, got {name!r}')
    return _made(name)


@cache
def _made(name: str) -> Colormap:
    levels = _hot() if name == "hot" else _between(_ANCHORS[name])
    levels.flags.writeable = False
    return Colormap(name, levels, name in _DIVERGING)


def _between(anchors: tuple[tuple[int, int, int], ...]) -> Table:
    colours = np.array(anchors, np.float64)
    at, places = np.linspace(0, 1, LEVELS), np.linspace(0, 1, len(colours))
    return np.stack([np.interp(at, places, colours[:, i]) for i in range(3)], 1).round().astype(np.uint8)


def _hot() -> Table:
    """Rise from black through red and yellow to white, one primary colour after the other."""
    at = np.linspace(0, 1, LEVELS)
    red, green = 0.365079, 0.746032  # where red, then green, is full; matplotlib's figures
    ramps = [
        np.interp(at, [0, red], [0.0416, 1]),
        np.interp(at, [red, green], [0, 1]),
        np.interp(at, [green, 1], [0, 1]),
    ]
    return (np.stack(ramps, 1) * 255).round().astype(np.uint8)
