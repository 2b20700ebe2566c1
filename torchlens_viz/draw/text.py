"""Words on pictures: the font, and text made to fit a width."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from math import ceil
from typing import Final, TypeAlias

from PIL import Image, ImageDraw, ImageFont

SIZES: Final = (12, 10, 8)  # the first is that of all text that has room enough
LINE_HEIGHT: Final = 16


# Fonts of the usual systems that cover scripts beyond Latin, the smaller ones first.
_FALLBACKS: Final = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "seguisym.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
)
_NO_CHARACTER: Final = "\U0010ffff"

Font: TypeAlias = ImageFont.ImageFont | ImageFont.FreeTypeFont


@lru_cache(maxsize=4096)
def text_width(text: str, size: int = SIZES[0]) -> int:
    """Return the pixels that a line of text takes, in pictures with and without smooth edges of letters."""
    text, font = _lettered(text, size)
    return ceil(max(font.getlength(text, mode) for mode in ("1", "L")))


def fitting_size(texts: Sequence[str], width: int) -> int:
    """Return the largest size at which every text takes at most `width` pixels, or the first if none does."""
    longest = max(texts, key=text_width)
    return next((size for size in SIZES if text_width(longest, size) <= width), SIZES[0])


def shortened(text: str, width: int) -> str:
    """Return `text`, or its two ends around an ellipsis, so that it takes at most `width` pixels.

    Where not even one letter fits, nothing is left of it.
    """
    if text_width(text) <= width:
        return text

    def ends(kept: int) -> str:
        head = (kept + 1) // 2
        return text[:head] + "…" + text[len(text) - (kept - head) :]

    fitting = bisect_right(range(1, len(text)), width, key=lambda kept: text_width(ends(kept)))
    return ends(fitting) if fitting else ""


def write_line(
    image: Image.Image,
    at: tuple[int, int],
    text: str,
    fill: int | tuple[int, int, int],
    size: int = SIZES[0],
) -> None:
    """Write one line of text with its upper left corner at `at`, (x, y)."""
    text, font = _lettered(text, size)
    draw = ImageDraw.Draw(image)
    (left, top), stencil = _stencil(text, font, draw.fontmode)
    draw.bitmap((at[0] + left, at[1] + top), stencil, fill=fill)


@lru_cache(maxsize=512)
def _stencil(text: str, font: Font, mode: str) -> tuple[tuple[int, int], Image.Image]:
    """Return a line of text as a mask, and where its upper left corner stands; most lines come again."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    draw.fontmode = mode
    left, top, right, bottom = (round(side) for side in draw.textbbox((0, 0), text, font=font))
    right = max(right, ceil(font.getlength(text, mode)))
    left, top = left - LINE_HEIGHT, top - LINE_HEIGHT  # letters may reach beyond the box that is told
    stencil = Image.new("L", (right + LINE_HEIGHT - left, bottom + LINE_HEIGHT - top))
    draw = ImageDraw.Draw(stencil)
    draw.fontmode = mode
    draw.text((-left, -top), text, fill=255, font=font)
    return (left, top), stencil


def _lettered(text: str, size: int) -> tuple[str, Font]:
    """Choose a font that has every letter: Pillow's own, or one of the system.

    Where there is none, what Pillow's lacks is written as an escape, such as \\u4e2d: not nice, but not lost.
    """
    own = _pillows(size)
    if all(_has(own, letter) for letter in text):
        return text, own
    for name in _FALLBACKS:
        font = _of_system(name, size)
        if font is not None and all(_has(font, letter) for letter in text):
            return text, font
    return "".join(letter if _has(own, letter) else ascii(letter)[1:-1] for letter in text), own


@cache
def _pillows(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _of_system(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _has(font: Font, letter: str) -> bool:
    """Tell whether a font has a letter, and not only the sign for one that it lacks."""
    if letter.isspace():
        return True
    try:
        drawn, missing = font.getmask(letter), font.getmask(_NO_CHARACTER)
    except UnicodeEncodeError:  # Pillow without FreeType has letters of Latin-1 only
        return False
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
