"""Text in pictures: the font, text that fits, and title, scale and notes around a sheet."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from math import ceil, inf, log10
from typing import Final, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from torchlens_viz.draw.palette import LEVELS, TEXT, Colormap
from torchlens_viz.draw.scale import Limits, to_levels

SIZE: Final = 16  # of letters, in pixels: half of that where a screen has two for one, still to be read
TITLE_SIZE: Final = 20
LINE_HEIGHT: Final = 22
TITLE_HEIGHT: Final = 28

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
_BAR_HEIGHT: Final = 14
_MARGIN: Final = 4
_NARROWEST: Final = 400  # that lines are broken to
_MOST_LINES: Final = 4  # that a line is broken into


@lru_cache(maxsize=4096)
def text_width(text: str, size: int = SIZE) -> int:
    """Return the pixels that a line of text takes, in pictures with and without smooth edges of letters."""
    text, font = _lettered(text, size)
    return ceil(max(font.getlength(text, mode) for mode in ("1", "L")))


def wrapped(text: str, width: int, size: int = SIZE) -> list[str]:
    """Break a text between words into at most 4 lines of at most `width` pixels; none where it is empty.

    A word that is longer, and what remains for the last line, are shortened.
    """
    words, lines = text.split(), [""]
    for place, word in enumerate(words):
        longer = f"{lines[-1]} {word}".lstrip()
        if not lines[-1] or text_width(longer, size) <= width:
            lines[-1] = longer
        elif len(lines) < _MOST_LINES:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[place:]])
            break
    return [shortened(line, width, size) for line in lines if line]


def shortened(text: str, width: int, size: int = SIZE) -> str:
    """Return `text`, or its two ends around an ellipsis, so that it takes at most `width` pixels.

    Where not even one letter fits, nothing is left of it.
    """
    if text_width(text, size) <= width:
        return text

    def ends(kept: int) -> str:
        head = (kept + 1) // 2
        return text[:head] + "…" + text[len(text) - (kept - head) :]

    fitting = bisect_right(range(1, len(text)), width, key=lambda kept: text_width(ends(kept), size))
    return ends(fitting) if fitting else ""


def write_line(
    image: Image.Image,
    at: tuple[int, int],
    text: str,
    fill: int | tuple[int, int, int],
    size: int = SIZE,
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


def entry(image: Image.Image, colours: Colormap, code: int) -> int | tuple[int, int, int]:
    """Return what a palette entry is called in an image's own mode."""
    if image.mode == "P":
        return code
    red, green, blue = (int(part) for part in colours.palette[code])
    return (red, green, blue) if image.mode == "RGB" else red


def captioned(
    image: Image.Image,
    colours: Colormap,
    *,
    title: str | None,
    limits: Limits | None,
    lines: Sequence[str],
) -> Image.Image:
    """Return an image with a title above it and, below it, the scale and lines of text.

    Args:
        image: The sheet, of mode "P" with the palette of `colours`, "L" or "RGB".
        colours: Its colours.
        title: A line above the sheet.
        limits: The values of the first and the last level, for the scale; None for no scale.
        lines: Lines below, broken to the width of the sheet, or to 400 pixels where it is narrower.

    Returns:
        An image of the same mode; the sheet's own pixels are unchanged in it.
    """
    lines, bar = [_in_one_line(line) for line in lines], None
    if limits is not None:
        low, high = _distinct(limits.low[0].item(), limits.high[0].item())
        if len(limits.low) > 1:
            lines.insert(0, "each tile has its own range")
        elif image.mode == "RGB":
            lines.insert(0, f"values from {low} to {high}{_zero(limits)}")
        else:
            bar = _scale(image, colours, low, high)
        if not limits.all_finite:
            lines.append("magenta: NaN, green: +Inf, cyan: -Inf")
    bars = [] if bar is None else [bar]
    room = max([image.width, _NARROWEST, *(each.width + 2 * _MARGIN for each in bars)]) - 2 * _MARGIN
    above = wrapped(title or "", room, TITLE_SIZE)
    below = [part for line in lines for part in wrapped(line, room)]
    widths = [each.width for each in bars] + [text_width(line) for line in below]
    widths += [text_width(line, TITLE_SIZE) for line in above]
    top = 2 * _MARGIN + TITLE_HEIGHT * len(above) if above else 0
    count = len(bars) + len(below)
    canvas = _blank(
        image,
        colours,
        max([image.width, *(width + 2 * _MARGIN for width in widths)]),
        top + image.height + (2 * _MARGIN + LINE_HEIGHT * count if count else 0),
    )
    canvas.paste(image, (0, top))
    ink = entry(canvas, colours, TEXT)
    for place, line in enumerate(above):
        write_line(canvas, (_MARGIN, _MARGIN + TITLE_HEIGHT * place), line, ink, TITLE_SIZE)
    y = top + image.height + _MARGIN
    for each in bars:
        canvas.paste(each, (_MARGIN, y))
        y += LINE_HEIGHT
    for place, line in enumerate(below):
        write_line(canvas, (_MARGIN, y + LINE_HEIGHT * place), line, ink)
    return canvas


def _scale(image: Image.Image, colours: Colormap, low: str, high: str) -> Image.Image:
    """Draw all levels in a row, between the values of the first and the last."""
    before = text_width(low) + _MARGIN
    width = before + LEVELS + _MARGIN + text_width(high)
    strip = _blank(image, colours, width, LINE_HEIGHT)
    levels = np.arange(LEVELS, dtype=np.uint8) if image.mode == "P" else colours.levels[:, 0]
    strip.paste(Image.fromarray(np.tile(levels, (_BAR_HEIGHT, 1))), (before, 4))
    ink = entry(image, colours, TEXT)
    write_line(strip, (0, 0), low, ink)
    write_line(strip, (before + LEVELS + _MARGIN, 0), high, ink)
    return strip


def _zero(limits: Limits) -> str:
    """Say which gray of a picture in colour stands for zero, where its range has one."""
    if not limits.low[0] <= 0 <= limits.high[0]:
        return ""
    point = torch.zeros((1, 1, 1, 1), device="cpu")
    return f", zero is gray {to_levels(point, limits, levels=256, signed=False).item()} of 255"


def _blank(image: Image.Image, colours: Colormap, width: int, height: int) -> Image.Image:
    canvas = Image.new(image.mode, (width, height), entry(image, colours, colours.page))
    if image.mode == "P":
        canvas.putpalette(colours.palette.tobytes())
    return canvas


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _distinct(low: float, high: float) -> tuple[str, str]:
    """Write two numbers short, and long enough to tell them apart."""
    width = high - low
    digits = 3 + max(0, int(log10(max(abs(low), abs(high)) / width))) if 0 < width < inf else 3
    return f"{low:.{digits}g}", f"{high:.{digits}g}"
