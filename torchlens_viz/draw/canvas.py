"""From tiles of numbers to one picture: levels, enlargement, layout, labels and legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz.arguments import wide
from torchlens_viz.draw import text
from torchlens_viz.draw.grid import compose
from torchlens_viz.draw.palette import LEVELS, PADDING, SPECIAL_COLOURS, TEXT, Colormap, colormap
from torchlens_viz.draw.scale import (
    Limits,
    find_limits,
    is_robust,
    share_beyond,
    special_codes,
    to_levels,
    words_for,
)
from torchlens_viz.draw.style import Choice, Style, choose, own_labels
from torchlens_viz.draw.text import captioned, entry
from torchlens_viz.errors import InvalidArgumentError

_TILE_SIZE: Final = 32
_MOST_PIXELS: Final = 2**28
_GAP: Final = 6  # at least, between the labels of neighbours
_WIDEST_LABEL: Final = 240  # that a cell is made wider than its tile for


def draw(
    tiles: torch.Tensor,
    style: Style,
    *,
    labels: Sequence[str],
    notes: Sequence[str],
    order: Sequence[int] | None = None,
) -> Image.Image:
    """Draw tiles as one sheet.

    Args:
        tiles: (T, 1, H, W) values, or (T, 3, H, W) colours.
        style: How to draw them.
        labels: T labels, for when the style asks for labels and does not bring its own.
        notes: Lines for the legend.
        order: The order in which to show the tiles, where it is not their own; their labels go with them.

    Returns:
        An image of mode "RGB" for colours, "L" for finite values in gray, else "P".
    """
    choice = choose(style, len(tiles), order)
    labels = choice.labels(own_labels(style, len(tiles)) or labels)
    places: list[int] | slice = choice.places
    if order is None:  # they follow one another, so that nothing needs to be copied
        places = slice(choice.places[0], choice.places[-1] + 1)
    return _draw(tiles.detach()[places], style, labels, choice.lines, notes, scale=True)


def draw_chosen(
    tiles: torch.Tensor, choice: Choice, style: Style, *, labels: Sequence[str], lines: Sequence[str]
) -> Image.Image:
    """Draw finished tiles as one sheet.

    Args:
        tiles: (K, 3, H, W) uint8, those of `choice` in its order.
        choice: Which tiles these are, of how many.
        style: How to lay them out; what concerns colours and sizes of tiles is not looked at.
        labels: A label for each that could have been chosen, for when the style asks for labels and does not
            bring its own.
        lines: Lines to write below, after how many of them are shown.

    Returns:
        An image of mode "RGB".
    """
    own = choice.labels(own_labels(style, choice.count) or labels)
    plain = replace(
        style,
        normalize=False,
        scale_each=False,
        value_range=None,
        upscale=1,
        interpolation="nearest",
        cmap="auto",
    )
    return _draw(tiles, plain, own, [*choice.lines, *lines], (), scale=False)


def _draw(
    tiles: torch.Tensor,
    style: Style,
    labels: Sequence[str],
    lines: Sequence[str],
    notes: Sequence[str],
    *,
    scale: bool,
) -> Image.Image:
    """Draw these tiles and no others; `lines` stand below always, `notes` and the scale in the legend."""
    layout = _Layout.of(tiles.shape, style, labels)  # refuses what is too large, so it comes before the work
    tiles = _as_floating(tiles, style)
    limits = find_limits(
        tiles, normalize=style.normalize, scale_each=style.scale_each, value_range=style.value_range
    )
    colours = _choose_colours(tiles, style, limits)
    if colours.diverging:
        limits = limits.symmetric()
    image = _paint(tiles, limits, colours, style, layout)
    if style.labels is not False:
        _write_labels(image, labels, layout, entry(image, colours, TEXT))
    limits_shown = limits if style.legend and scale else None
    cut = [] if limits_shown is None or style.value_range is None else _cut_off(tiles, limits, style)
    below = [*cut, *lines, *(notes if style.legend else [])]
    if not (below or style.legend or style.title):
        return image
    return captioned(image, colours, title=style.title, limits=limits_shown, lines=below)


def _cut_off(tiles: torch.Tensor, limits: Limits, style: Style) -> list[str]:
    return words_for(share_beyond(tiles, limits), robust=is_robust(style.value_range))


def check_size(shape: Sequence[int], style: Style, labels: Sequence[str] = ()) -> None:
    """Refuse tiles that `draw` would refuse for the size of their sheet, without looking at any value.

    Args:
        shape: (T, C, H, W) of the tiles.
        style: How they are to be drawn; of several pages the first is the largest.
        labels: What will be written above them, where that is known.

    Raises:
        InvalidArgumentError: The sheet would have too many pixels.
    """
    count, *rest = shape
    _Layout.of((len(choose(replace(style, page=0), count).places), *rest), style, labels)


def check_size_of_each(shape: Sequence[int], style: Style) -> None:
    """Refuse tiles (T, C, H, W) that `draw_each` would refuse for their size, as `check_size` does."""
    _Layout.of((1, *shape[1:]), _alone(style))


def draw_each(tiles: torch.Tensor, style: Style) -> list[Image.Image]:
    """Draw every tile as a picture of its own, all in the colours that they would have in one sheet.

    Args:
        tiles: (T, 1, H, W) values, or (T, 3, H, W) colours.
        style: How to draw them; what concerns the layout is not looked at.

    Returns:
        T images of one size.
    """
    alone = _alone(style)
    tile = _Layout.of(tiles[:1].shape, alone)
    together = max(1, _MOST_PIXELS // (tile.tile_height * tile.tile_width))
    if len(tiles) > together:  # what all have in common must be known before they are parted
        limits = find_limits(
            _as_floating(tiles.detach(), style),
            normalize=style.normalize,
            scale_each=style.scale_each,
            value_range=style.value_range,
        )
        alone = replace(alone, cmap=_choose_colours(tiles, style, limits))
        if style.normalize and not style.scale_each:
            alone = replace(alone, value_range=(limits.low.item(), limits.high.item()))
    images = []
    for start in range(0, len(tiles), together):
        part = tiles[start : start + together]
        column = draw(part, alone, labels=[""] * len(part), notes=())
        height = column.height // len(part)
        images += [
            column.crop((0, height * place, column.width, height * (place + 1))) for place in range(len(part))
        ]
    return images


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where tiles go, in output pixels; `gap` is what a cell is wider than its tile, for the label."""

    count: int
    columns: int
    upscale: int
    tile_height: int
    tile_width: int
    padding: int
    header: int
    gap: int

    @classmethod
    def of(cls, shape: Sequence[int], style: Style, labels: Sequence[str] = ()) -> _Layout:
        count, _, height, width = shape
        upscale = style.upscale or ceil(_TILE_SIZE / max(height, width))
        labels = () if style.labels is False else labels
        lines = max([0 if style.labels is False else 1, *(label.count("\n") + 1 for label in labels)])
        header = lines * text.LINE_HEIGHT
        widest = max([0, *(text.text_width(line) for label in labels for line in label.split("\n"))])
        needed = min(widest, _WIDEST_LABEL) + _GAP if widest else 0
        gap = max(0, needed - style.padding - width * upscale)
        columns = style.nrow or ceil(sqrt(count))
        layout = cls(count, columns, upscale, height * upscale, width * upscale, style.padding, header, gap)
        rows = ceil(count / columns)
        pixels = rows * (layout.tile_height + header + style.padding)
        pixels *= min(columns, count) * (layout.tile_width + gap + style.padding)
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
                self.padding + column * (self.tile_width + self.gap + self.padding),
                self.padding + row * (self.header + self.tile_height + self.padding),
            )
            for row, column in places
        ]


def _alone(style: Style) -> Style:
    return replace(
        style, nrow=1, padding=0, labels=False, legend=False, title=None, max_tiles=None, page=0, sort_by=None
    )


def _write_labels(
    image: Image.Image, labels: Sequence[str], layout: _Layout, ink: int | tuple[int, int, int]
) -> None:
    room = layout.tile_width + layout.gap + layout.padding - _GAP
    for (x, y), label in zip(layout.corners(), labels, strict=True):
        lines = label.split("\n")
        y += layout.header - len(lines) * text.LINE_HEIGHT  # the last line stands next to the tile
        for place, line in enumerate(lines):
            text.write_line(image, (x, y + place * text.LINE_HEIGHT), text.shortened(line, room), ink)


def _as_floating(tiles: torch.Tensor, style: Style) -> torch.Tensor:
    if tiles.dtype == torch.uint8 and not style.normalize:
        return tiles.float() / 255
    is_exact = tiles.dtype == torch.float32 or tiles.dtype.itemsize <= 2
    return tiles.float() if is_exact else wide(tiles)


def _choose_colours(tiles: torch.Tensor, style: Style, limits: Limits) -> Colormap:
    if style.has_own_colours:
        return colormap(style.cmap)
    signed = tiles.shape[1] == 1 and style.normalize and limits.have_both_signs
    return colormap("RdBu_r" if signed else "gray")


def _paint(
    tiles: torch.Tensor, limits: Limits, colours: Colormap, style: Style, layout: _Layout
) -> Image.Image:
    is_colour = tiles.shape[1] == 3
    codes = None if limits.all_finite else special_codes(tiles)
    repeat = layout.upscale
    if is_colour:  # the three values of a pixel side by side, as pictures have them
        tiles = tiles.contiguous(memory_format=torch.channels_last)
    levels = to_levels(tiles, limits, levels=256 if is_colour else LEVELS, signed=colours.diverging)
    if style.interpolation != "nearest" and repeat > 1:
        last = 255 if is_colour else LEVELS - 1
        levels = _smoothly_enlarged(levels, codes, repeat, style.interpolation, last)
        repeat = 1

    def laid_out(
        parts: torch.Tensor, pad_value: int, upscale: int, frame: int | None = None
    ) -> npt.NDArray[np.uint8]:
        sheet = compose(
            parts,
            columns=layout.columns,
            padding=layout.padding,
            pad_value=pad_value,
            upscale=upscale,
            header=layout.header,
            gap=layout.gap,
            frame=frame,
            channels_last=True,
        )
        pixels: npt.NDArray[np.uint8] = sheet.movedim(0, 2).numpy(force=True)
        return pixels

    frame = None if is_colour or colours.page == PADDING else PADDING
    pixels = laid_out(levels, 255 if is_colour else colours.page, repeat, frame)
    if codes is not None:
        special = laid_out(codes, 0, layout.upscale)[..., 0]
        for code in SPECIAL_COLOURS:
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
    column = [np.array(image.convert("RGB")) for image in draw_each(tiles, replace(style, upscale=upscale))]
    return torch.from_numpy(np.stack(column)).movedim(3, 1)
