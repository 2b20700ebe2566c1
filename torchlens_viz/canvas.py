"""From tiles of numbers to one picture: levels, enlargement, layout, labels and legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log10, sqrt
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz import colormaps, lettering
from torchlens_viz.colormaps import LEVELS, PADDING, TEXT, Colormap, Table, colormap
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.scaling import Limits, find_limits, special_codes, to_levels
from torchlens_viz.tiling import compose

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]

_TILE_SIZE: Final = 32
_MOST_PIXELS: Final = 2**28
_BAR_HEIGHT: Final = 10
_MARGIN: Final = 4
_GAP: Final = 2  # at least, between the labels of neighbours
_LONGEST_LINE: Final = 640


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How tiles are drawn; `torchlens_viz.kernel_grid` explains the options."""

    normalize: bool = True
    scale_each: bool = False
    value_range: Sequence[float] | None = None
    cmap: str | Table | Colormap = "auto"
    nrow: int | None = None
    padding: int = 1
    upscale: int | None = None
    interpolation: Interpolation = "nearest"
    labels: bool | Sequence[str] = False
    legend: bool = False
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("nrow", self.nrow, 1),
            ("upscale", self.upscale, 1),
            ("max_tiles", self.max_tiles, 1),
            ("padding", self.padding, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidTypeError(f"`{name}` must be an int, got {value!r}")
            if value is not None and value < least:
                raise InvalidArgumentError(f"`{name}` must be at least {least}, got {value}")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise InvalidArgumentError(
                f'`interpolation` must be "nearest", "bilinear" or "bicubic", got {self.interpolation!r}'
            )
        if self.interpolation != "nearest" and self.upscale == 1:
            raise InvalidArgumentError(
                f"`interpolation={self.interpolation!r}` has no effect with `upscale=1`; leave one out"
            )
        if not _is_auto(self.cmap):
            colormap(self.cmap)


def draw(tiles: torch.Tensor, style: Style, *, labels: Sequence[str], notes: Sequence[str]) -> Image.Image:
    """Draw tiles as one sheet.

    Args:
        tiles: (T, 1, H, W) values, or (T, 3, H, W) colours; those beyond `max_tiles` may be missing.
        style: How to draw them.
        labels: A label for every tile, for when the style asks for labels and does not bring its own.
        notes: Lines for the legend.

    Returns:
        An image of mode "RGB" for colours, "L" for finite values in gray, else "P".
    """
    count = len(labels)
    shown = count if style.max_tiles is None else min(style.max_tiles, count)
    if not isinstance(style.labels, bool):
        labels = _own_labels(style.labels, count)
    tiles = tiles.detach()[:shown]
    layout = _Layout.of(tiles, style)  # refuses what is too large, so it comes before the work
    tiles = _as_floating(tiles, style)
    limits = find_limits(
        tiles, normalize=style.normalize, scale_each=style.scale_each, value_range=style.value_range
    )
    colours = _choose_colours(tiles, style, limits)
    if colours.diverging:
        limits = limits.symmetric()
    image = _paint(tiles, limits, colours, style, layout)
    if style.labels is not False:
        room = layout.tile_width + layout.padding - _GAP
        size = lettering.fitting_size(labels[:shown], room)
        for (x, y), label in zip(layout.corners(), labels, strict=False):
            text = label if size < lettering.SIZES[0] else lettering.shortened(label, room)
            below = (lettering.SIZES[0] - size) // 2  # small letters stand as close to their tile
            lettering.write_line(image, (x, y + below), text, _entry(image, colours, TEXT), size)
    lines = [f"{shown} of {count} shown"] if shown < count else []
    if style.legend:
        return _with_caption(image, colours, [*lines, *notes], limits)
    return _with_caption(image, colours, lines, None) if lines else image


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where tiles go, in output pixels."""

    count: int
    columns: int
    upscale: int
    tile_height: int
    tile_width: int
    padding: int
    header: int

    @classmethod
    def of(cls, tiles: torch.Tensor, style: Style) -> _Layout:
        count, _, height, width = tiles.shape
        upscale = style.upscale or ceil(_TILE_SIZE / max(height, width))
        header = 0 if style.labels is False else lettering.LINE_HEIGHT
        columns = style.nrow or ceil(sqrt(count))
        layout = cls(count, columns, upscale, height * upscale, width * upscale, style.padding, header)
        rows = ceil(count / columns)
        pixels = rows * (layout.tile_height + header + style.padding)
        pixels *= min(columns, count) * (layout.tile_width + style.padding)
        if pixels > _MOST_PIXELS:
            raise InvalidArgumentError(
                f"the sheet would have {pixels:,} pixels ({count} tiles of {layout.tile_height} x "
                f"{layout.tile_width}), more than {_MOST_PIXELS:,}; choose fewer tiles with `max_tiles`, "
                "`filters` or `channels`, or pass `upscale=1`"
            )
        return layout

    def corners(self) -> list[tuple[int, int]]:
        """Return the upper left corner (x, y) of every tile's label."""
        places = (divmod(index, self.columns) for index in range(self.count))
        return [
            (
                self.padding + column * (self.tile_width + self.padding),
                self.padding + row * (self.header + self.tile_height + self.padding),
            )
            for row, column in places
        ]


def _is_auto(cmap: str | Table | Colormap) -> bool:
    return isinstance(cmap, str) and cmap == "auto"


def _own_labels(given: Sequence[str], count: int) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidTypeError(f"`labels` must be True or a list of {count} strings, got {given!r}")
    labels = [" ".join(str(label).split()) for label in given]
    if len(labels) != count:
        raise InvalidArgumentError(f"`labels` must be {count} strings, one per tile, got {len(labels)}")
    return labels


def _as_floating(tiles: torch.Tensor, style: Style) -> torch.Tensor:
    if tiles.dtype == torch.uint8 and not style.normalize:
        return tiles.float() / 255
    is_exact = tiles.dtype == torch.float32 or tiles.dtype.itemsize <= 2
    return tiles.float() if is_exact else tiles.double()


def _choose_colours(tiles: torch.Tensor, style: Style, limits: Limits) -> Colormap:
    if not _is_auto(style.cmap):
        return colormap(style.cmap)
    signed = tiles.shape[1] == 1 and style.normalize and limits.have_both_signs
    return colormap("RdBu_r" if signed else "gray")


def _paint(
    tiles: torch.Tensor, limits: Limits, colours: Colormap, style: Style, layout: _Layout
) -> Image.Image:
    is_colour = tiles.shape[1] == 3
    codes = None if limits.all_finite else special_codes(tiles)
    repeat = layout.upscale
    levels = to_levels(tiles, limits, levels=256 if is_colour else LEVELS, signed=colours.diverging)
    if style.interpolation != "nearest" and repeat > 1:
        last = 255 if is_colour else LEVELS - 1
        levels = _smoothly_enlarged(levels, codes, repeat, style.interpolation, last)
        repeat = 1

    def laid_out(parts: torch.Tensor, pad_value: int, upscale: int) -> npt.NDArray[np.uint8]:
        sheet = compose(
            parts,
            columns=layout.columns,
            padding=layout.padding,
            pad_value=pad_value,
            upscale=upscale,
            header=layout.header,
        )
        pixels: npt.NDArray[np.uint8] = sheet.movedim(0, 2).contiguous().numpy(force=True)
        return pixels

    pixels = laid_out(levels, 255 if is_colour else PADDING, repeat)
    if codes is not None:
        special = laid_out(codes, 0, layout.upscale)[..., 0]
        for code in colormaps.SPECIAL_COLOURS:
            pixels[special == code] = colours.palette[code] if is_colour else code
    if is_colour:
        return Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0])
    if codes is None and colours.name == "gray":
        return image.point(colours.palette[:, 0].tolist())
    image.putpalette(colours.palette.tobytes())
    return image


def _smoothly_enlarged(
    levels: torch.Tensor, codes: torch.Tensor | None, factor: int, mode: str, last: int
) -> torch.Tensor:
    """Enlarge each tile by itself; a pixel that is not finite is drawn over later and must not spread."""
    values = levels.float()
    if codes is not None:
        # It takes the mean of the finite pixels within reach: any other value would show around it.
        is_finite = (codes == 0).float()
        share = F.avg_pool2d(is_finite, 5, stride=1, padding=2)
        around = F.avg_pool2d(values * is_finite, 5, stride=1, padding=2) / share.clamp(min=0.01)
        values = torch.where(codes == 0, values, around)
    enlarged = F.interpolate(values, scale_factor=float(factor), mode=mode)
    # Rounded up a little below one half: halves are frequent, and come out a rounding error above or below.
    return enlarged.add_(0.5043).clamp_(0, last).to(torch.uint8)


def in_colour(tiles: torch.Tensor, style: Style, *, upscale: int) -> torch.Tensor:
    """Draw each tile by itself, without a sheet around it.

    Args:
        tiles: (T, 1, H, W) values, or (T, 3, H, W) colours.
        style: How to draw them; what concerns the layout is not looked at.
        upscale: Whole factor of enlargement.

    Returns:
        (T, 3, H', W') uint8 on the CPU.
    """
    alone = replace(style, nrow=1, padding=0, upscale=upscale, labels=False, legend=False, max_tiles=None)
    column = np.array(draw(tiles, alone, labels=[""] * len(tiles), notes=()).convert("RGB"))
    return torch.from_numpy(column.reshape(len(tiles), -1, *column.shape[1:])).movedim(3, 1)


def _entry(image: Image.Image, colours: Colormap, code: int) -> int | tuple[int, int, int]:
    """Return what a palette entry is called in an image's own mode."""
    if image.mode == "P":
        return code
    red, green, blue = (int(part) for part in colours.palette[code])
    return (red, green, blue) if image.mode == "RGB" else red


def _with_caption(
    image: Image.Image, colours: Colormap, lines: list[str], limits: Limits | None
) -> Image.Image:
    """Return the image with lines of text below it, and above those the scale where limits are given."""
    lines = list(lines)
    bar = None
    if limits is not None:
        has_one_range = len(limits.low) == 1
        low, high = _distinct(limits.low[0].item(), limits.high[0].item())
        if not has_one_range:
            lines.insert(0, "each tile has its own range")
        elif image.mode == "RGB":
            lines.insert(0, f"values from {low} to {high}")
        else:
            bar = (low, high)
        if not limits.all_finite:
            lines.append("magenta: NaN, green: +Inf, cyan: -Inf")
    longest = max(image.width, _LONGEST_LINE) - 2 * _MARGIN
    lines = [lettering.shortened(line, longest) for line in lines]
    low_width = lettering.text_width(bar[0]) if bar else 0
    widths = [lettering.text_width(line) for line in lines]
    if bar:
        widths.append(low_width + lettering.text_width(bar[1]) + LEVELS + 2 * _MARGIN)
    width = max(image.width, *(2 * _MARGIN + each for each in widths))
    height = image.height + 2 * _MARGIN + lettering.LINE_HEIGHT * len(widths)
    canvas = Image.new(image.mode, (width, height), _entry(image, colours, PADDING))
    if image.mode == "P":
        canvas.putpalette(colours.palette.tobytes())
    canvas.paste(image, (0, 0))
    ink = _entry(image, colours, TEXT)
    y = image.height + _MARGIN
    if bar:
        x = _MARGIN + low_width + _MARGIN
        lettering.write_line(canvas, (_MARGIN, y), bar[0], ink)
        canvas.paste(_scale_bar(image.mode, colours), (x, y + 2))
        lettering.write_line(canvas, (x + LEVELS + _MARGIN, y), bar[1], ink)
        y += lettering.LINE_HEIGHT
    for line in lines:
        lettering.write_line(canvas, (_MARGIN, y), line, ink)
        y += lettering.LINE_HEIGHT
    return canvas


def _distinct(low: float, high: float) -> tuple[str, str]:
    """Write two numbers short, and long enough to tell them apart."""
    width = high - low
    digits = 3 + max(0, int(log10(max(abs(low), abs(high)) / width))) if 0 < width < inf else 3
    return f"{low:.{digits}g}", f"{high:.{digits}g}"


def _scale_bar(mode: str, colours: Colormap) -> Image.Image:
    levels = np.arange(LEVELS, dtype=np.uint8) if mode == "P" else colours.levels[:, 0]
    bar = Image.fromarray(np.tile(levels, (_BAR_HEIGHT, 1)))
    if mode == "P":
        bar.putpalette(colours.palette.tobytes())
    return bar
