"""Words on pictures: the font, and text made to fit a width."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from math import ceil
from typing import Final

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE: Final = 12
LINE_HEIGHT: Final = 16


@cache
def font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the font that Pillow ships."""
    return ImageFont.load_default(FONT_SIZE)


def text_width(text: str) -> int:
    """Return the pixels that a line of text takes, in pictures with and without smooth edges of letters."""
    return ceil(max(font().getlength(text, mode) for mode in ("1", "L")))


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


def write_line(image: Image.Image, at: tuple[int, int], text: str, fill: int | tuple[int, int, int]) -> None:
    """Write one line of text with its upper left corner at `at`, (x, y)."""
    ImageDraw.Draw(image).text(at, text, fill=fill, font=font())
