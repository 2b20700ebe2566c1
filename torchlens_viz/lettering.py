"""Words on pictures: the font, and text made to fit a width."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import Final

from PIL import Image, ImageDraw, ImageFont

SIZES: Final = (12, 10, 8)  # the first is that of all text that has room enough
LINE_HEIGHT: Final = 16


@cache
def font(size: int = SIZES[0]) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the font that Pillow ships."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int = SIZES[0]) -> int:
    """Return the pixels that a line of text takes, in pictures with and without smooth edges of letters."""
    return ceil(max(font(size).getlength(text, mode) for mode in ("1", "L")))


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
    ImageDraw.Draw(image).text(at, text, fill=fill, font=font(size))
