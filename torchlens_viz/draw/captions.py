"""Words around a sheet: its title, the scale of its colours, and lines of notes."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log10
from typing import Final

import numpy as np
import torch
from PIL import Image

from torchlens_viz.draw import text as lettering
from torchlens_viz.draw.palette import LEVELS, PADDING, TEXT, Colormap
from torchlens_viz.draw.scale import Limits, to_levels

_BAR_HEIGHT: Final = 10
_MARGIN: Final = 4
_LONGEST_LINE: Final = 640


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
        lines: Lines below. The picture grows wider for a line up to 640 pixels; what is longer is cut short.

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
    longest = max(image.width, _LONGEST_LINE) - 2 * _MARGIN
    below: list[str | Image.Image] = [lettering.shortened(line, longest) for line in lines]
    if bar is not None:
        below.insert(0, bar)
    above = [] if title is None else [lettering.shortened(_in_one_line(title), longest)]
    parts = [*above, image, *below]
    width = max(
        part.width if isinstance(part, Image.Image) else lettering.text_width(part) for part in below + above
    )
    canvas = _blank(
        image,
        colours,
        max(image.width, width + 2 * _MARGIN),
        image.height
        + sum(_MARGIN * 2 + lettering.LINE_HEIGHT * len(rows) for rows in (above, below) if rows),
    )
    y = _MARGIN if above else 0
    for part in parts:
        if part is image:
            y += _MARGIN if above else 0
            canvas.paste(image, (0, y))
            y += image.height + _MARGIN
            continue
        if isinstance(part, Image.Image):
            canvas.paste(part, (_MARGIN, y))
        else:
            lettering.write_line(canvas, (_MARGIN, y), part, entry(canvas, colours, TEXT))
        y += lettering.LINE_HEIGHT
    return canvas


def _scale(image: Image.Image, colours: Colormap, low: str, high: str) -> Image.Image:
    """Draw all levels in a row, between the values of the first and the last."""
    before = lettering.text_width(low) + _MARGIN
    width = before + LEVELS + _MARGIN + lettering.text_width(high)
    strip = _blank(image, colours, width, lettering.LINE_HEIGHT)
    levels = np.arange(LEVELS, dtype=np.uint8) if image.mode == "P" else colours.levels[:, 0]
    strip.paste(Image.fromarray(np.tile(levels, (_BAR_HEIGHT, 1))), (before, 2))
    ink = entry(image, colours, TEXT)
    lettering.write_line(strip, (0, 0), low, ink)
    lettering.write_line(strip, (before + LEVELS + _MARGIN, 0), high, ink)
    return strip


def _zero(limits: Limits) -> str:
    """Say which gray of a picture in colour stands for zero, where its range has one."""
    if not limits.low[0] <= 0 <= limits.high[0]:
        return ""
    point = torch.zeros((1, 1, 1, 1), device=limits.low.device)
    return f", zero is gray {to_levels(point, limits, levels=256, signed=False).item()} of 255"


def _blank(image: Image.Image, colours: Colormap, width: int, height: int) -> Image.Image:
    canvas = Image.new(image.mode, (width, height), entry(image, colours, PADDING))
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
