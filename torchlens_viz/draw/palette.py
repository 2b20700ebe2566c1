"""Colour tables: 251 levels for values, and five entries for what is not a value.

Every sheet uses the same 256-entry palette layout, whichever values it holds: a NaN that appears in one tile
changes no other pixel. 251 is odd, so that a diverging table has an exact middle, level 125, for zero.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from torchlens_viz.arguments import shown
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
_LINE: Final = (40, 40, 40)
_PALE: Final = 230  # a middle at least as light as this is as good as white

# Colours at equal distances; what lies between is linear. The brewer scheme's middle is a light grey
# (247, 247, 247); here zero is white.
_ANCHORS: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    "gray": (_BLACK, _WHITE),
    "viridis": (
        (68, 1, 84),
        (71, 13, 96),
        (72, 24, 106),
        (72, 35, 116),
        (71, 45, 123),
        (69, 54, 129),
        (66, 64, 134),
        (63, 73, 137),
        (59, 82, 139),
        (55, 90, 141),
        (51, 99, 141),
        (47, 106, 142),
        (44, 114, 142),
        (41, 122, 142),
        (38, 129, 142),
        (35, 137, 142),
        (33, 144, 140),
        (31, 152, 139),
        (31, 159, 136),
        (33, 166, 133),
        (40, 174, 128),
        (49, 181, 123),
        (62, 188, 116),
        (76, 194, 108),
        (93, 201, 99),
        (110, 206, 88),
        (130, 211, 76),
        (150, 216, 63),
        (171, 220, 50),
        (192, 223, 36),
        (213, 226, 26),
        (234, 229, 26),
        (253, 231, 37),
    ),
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
# Those of matplotlib, each of which has a reversed form as well.
_DIVERGING_ELSEWHERE: Final = re.compile(
    "(PiYG|PRGn|BrBG|PuOr|RdGy|RdBu|RdYlBu|RdYlGn|Spectral|coolwarm|bwr|berlin|managua|vanimo)(_r)?"
)
NAMES: Final = ("gray", "hot", "viridis", "seismic", "RdBu_r")


@dataclass(frozen=True, slots=True)
class Colormap:
    """A colour per level, and the colours of the page, of the lines around tiles and of text.

    `levels` is (251, 3) uint8. A diverging map is meant for values with zero in the middle, drawn white.
    """

    name: str
    levels: Table
    diverging: bool

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour of the padding: dark where zero is as white as the page, white elsewhere."""
        return _LINE if self.page != PADDING else _WHITE

    @property
    def page(self) -> int:
        """Entry of the page, on which tiles and words stand: white, be it the level in the middle."""
        middle = LEVELS // 2
        return middle if self.diverging and int(self.levels[middle].min()) >= _PALE else PADDING

    @property
    def palette(self) -> Table:
        """All 256 entries, (256, 3) uint8: the levels, padding, NaN, +Inf, -Inf and text."""
        special = [SPECIAL_COLOURS[code] for code in (NAN, POSITIVE_INFINITY, NEGATIVE_INFINITY)]
        extra = np.array([self.background, *special, _BLACK], np.uint8)
        return np.concatenate([self.levels, extra])


def colormap(cmap: str | Table | Colormap) -> Colormap:
    """Return a colour map by its name, or made of a table of colours.

    Args:
        cmap: `"gray"`, `"hot"` or `"viridis"` (for values without a middle), `"seismic"` or `"RdBu_r"`
            (diverging: blue is negative, white zero, red positive); where matplotlib is installed, any name
            that it knows; or 256 colours, (256, 3) uint8, which count as a map without a middle; or a
            `Colormap`. The maps of our own have the colours of matplotlib's, except that the middle of
            `"RdBu_r"` is pure white.

    Raises:
        InvalidArgumentError: There is no such map, or the table has another shape.
        InvalidTypeError: It is something else.
    """
    if isinstance(cmap, Colormap):
        return cmap
    if isinstance(cmap, str):
        return _named(cmap)
    if isinstance(cmap, np.ndarray):
        if cmap.shape != (256, 3) or cmap.dtype != np.uint8:
            raise InvalidArgumentError(
                f"`cmap` must be (256, 3) uint8 where it is an array, got {cmap.shape} {cmap.dtype}"
            )
        return Colormap("table", _resampled(cmap), diverging=False)
    raise InvalidTypeError(
        f"`cmap` must be the name of a colour map or an array (256, 3) of uint8, got {type(cmap).__name__}"
    )


@cache
def _named(name: str) -> Colormap:
    if name == "hot":
        levels = _hot()
    elif name in _ANCHORS:
        levels = _between(_ANCHORS[name])
    else:
        levels = _of_matplotlib(name)
    levels.flags.writeable = False
    is_diverging = name in _DIVERGING or _DIVERGING_ELSEWHERE.fullmatch(name) is not None
    return Colormap(name, levels, is_diverging)


def _of_matplotlib(name: str) -> Table:
    try:
        from matplotlib import colormaps
    except ImportError:
        raise InvalidArgumentError(
            f'`cmap` must be "auto" or one of {", ".join(NAMES)}, got {shown(name)}; matplotlib, which is '
            "not installed, has more: `python -m pip install matplotlib`"
        ) from None
    if name not in colormaps:
        near = difflib.get_close_matches(name, [*NAMES, *colormaps], n=3)
        raise InvalidArgumentError(
            f'`cmap` must be "auto", one of {", ".join(NAMES)} or a name that matplotlib knows, got {name!r}'
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    colours = colormaps[name](np.linspace(0, 1, LEVELS))[:, :3]
    levels: Table = (colours * 255).round().astype(np.uint8)
    return levels


def _resampled(table: Table) -> Table:
    """Choose 251 of the 256 colours, the first and the last among them."""
    levels: Table = table[np.linspace(0, len(table) - 1, LEVELS).round().astype(int)]
    return levels


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
