"""Pictures of signals, images and volumes, and rows of them, each in the middle of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, sqrt
from typing import Final

import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz.draw.canvas import check_size, draw
from torchlens_viz.draw.grid import compose
from torchlens_viz.draw.style import Style

_SMALLEST: Final = 64  # the side to which small patches are enlarged, by whole factors
_SLICES: Final = 9  # of a volume, that are drawn
_WIDTH: Final = 256  # of a curve in pixels, where that is not said
_STRIP: Final = range(8, 65)  # pixels that the curve of one channel is high
_LINE: Final = 0.8  # how light the line at zero is


def draw_rows(
    rows: Sequence[Sequence[torch.Tensor]], words: Sequence[Sequence[str]], *, tile: int, style: Style
) -> Image.Image:
    """Draw patches of any size, each in the middle of a tile.

    Args:
        rows: Patches (3, h, w), or (3, d, h, w) of volumes, in [0, 1], or (C, l) of signals; a row for each
            channel.
        words: A label for each.
        tile: The longer side to which all are shrunk by one factor, where the largest is larger; curves are
            drawn that wide instead, and keep 8 pixels for each channel.
        style: How to draw them; its number of columns is that of the longest row.

    Returns:
        An image of mode "RGB", gray where a patch ends and white where there is none.

    Raises:
        InvalidArgumentError: It would be too large.
    """
    planes = _planes(rows, tile)
    columns = max(map(len, rows))
    extents = [patch.shape[1:] for row in planes for patch in row]
    height, width = (max([1, *(extent[axis] for extent in extents)]) for axis in (0, 1))
    are_curves = any(patch.ndim == 2 for row in rows for patch in row)
    shrink = 1.0 if are_curves else max(1.0, max(height, width) / tile)
    height, width = ceil(height / shrink), ceil(width / shrink)
    if style.upscale is None:
        style = replace(style, upscale=ceil(min(tile, _SMALLEST) / max(height, width)))
    check_size((len(rows) * columns, 3, height, width), style)
    tiles, labels = [], []
    for row, own in zip(planes, words, strict=True):
        missing = columns - len(row)
        tiles += [_tile(patch, height, width, shrink) for patch in row]
        tiles += [torch.ones(3, height, width, device="cpu")] * missing
        labels += [*own, *[""] * missing]
    return draw(torch.stack(tiles), style, labels=labels, notes=())


def _planes(rows: Sequence[Sequence[torch.Tensor]], tile: int) -> list[list[torch.Tensor]]:
    """Return patches as pictures (3, h, w); of signals, in one range and at one scale."""
    signals = [patch for row in rows for patch in row if patch.ndim == 2]
    longest = max([1, *(patch.shape[1] for patch in signals)])
    limits = limits_of(signals) if signals else (0.0, 1.0)

    def picture(patch: torch.Tensor) -> torch.Tensor:
        if patch.numel() == 0:
            return torch.empty(3, 0, 0, device="cpu")
        plane = pictures_of(patch[None], limits, width=tile, longest=longest)[0]
        if patch.ndim == 2:
            plane = (plane - limits[0]) / (limits[1] - limits[0])
        return plane.expand(3, -1, -1)

    return [[picture(patch) for patch in row] for row in rows]


def limits_of(signals: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the least and the greatest finite value of signals, apart by 1 where all are the same."""
    values = torch.cat([each.flatten() for each in signals])
    values = values[values.isfinite()]
    low, high = (float(end) for end in values.aminmax()) if len(values) else (0.0, 1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _tile(patch: torch.Tensor, height: int, width: int, shrink: float) -> torch.Tensor:
    tile = torch.full((3, height, width), 0.5, device="cpu")
    if patch.numel() == 0:
        return tile
    if shrink > 1:
        size = [max(1, round(extent / shrink)) for extent in patch.shape[1:]]
        patch = F.interpolate(patch[None], size=size, mode="area")[0]
    rows, columns = patch.shape[1:]
    top, left = (height - rows) // 2, (width - columns) // 2
    tile[:, top : top + rows, left : left + columns] = patch
    return tile


def pictures_of(
    images: torch.Tensor, limits: tuple[float, float], *, width: int = _WIDTH, longest: int | None = None
) -> torch.Tensor:
    """Return pictures of images of one to three spatial axes.

    Args:
        images: (N, C, H, W), which are returned as they are; signals (N, C, L); or volumes (N, C, D, H, W).
        limits: The smallest and largest value that is drawn, low below high.
        width: The width and height in pixels that curves should not exceed, where 8 pixels are enough for
            each channel.
        longest: The number of samples of a signal that is to be as wide as that; None is L.

    Returns:
        (N, C, H', W'): of a volume up to nine slices, from left to right and from top to bottom, in white
        frames; (N, 1, H', W') of a signal, a curve for each channel, the first on top. The limits stand for
        black and white.
    """
    if images.ndim == 3:
        return _curves(images, limits, width, longest or images.shape[2])
    return images if images.ndim == 4 else _montages(images, limits[1])


def slices_of(depth: int) -> list[int]:
    """Return which slices of a volume `pictures_of` draws."""
    if depth <= _SLICES:
        return list(range(depth))
    return [(2 * place + 1) * depth // (2 * _SLICES) for place in range(_SLICES)]


def slices_note(shape: tuple[int, ...]) -> list[str]:
    """Return a line that says which slices of volumes (N, C, D, H, W) are drawn, where that is not all."""
    chosen = slices_of(shape[2])
    if len(shape) < 5 or len(chosen) == shape[2]:
        return []
    return [f"slices {', '.join(map(str, chosen))} of {shape[2]}"]


def _montages(volumes: torch.Tensor, white: float) -> torch.Tensor:
    chosen = slices_of(volumes.shape[2])
    columns = ceil(sqrt(len(chosen)))
    return torch.stack(
        [
            compose(volume[:, chosen].movedim(1, 0), columns=columns, padding=1, pad_value=white)
            for volume in volumes
        ]
    )


def _curves(signals: torch.Tensor, limits: tuple[float, float], width: int, longest: int) -> torch.Tensor:
    """Draw every channel in a strip of its own, black on white, with a light line at zero."""
    low, high = limits
    count, channels, samples = signals.shape
    scale = width // longest if longest <= width else width / longest
    columns = max(1, round(samples * scale))
    strip = min(max(width // channels, _STRIP[0]), _STRIP[-1])
    values = signals.detach().cpu().float().clamp(low, high)
    if columns >= samples:
        tops = bottoms = F.interpolate(values, columns, mode="linear", align_corners=True)
    else:  # no extreme may get lost
        tops = F.adaptive_max_pool1d(values, columns)
        bottoms = -F.adaptive_max_pool1d(-values, columns)
    # Each column reaches as far as the next one, so that the curve has no gaps.
    next_tops, next_bottoms = (torch.cat((part[..., 1:], part[..., -1:]), 2) for part in (tops, bottoms))
    first, last, zero = (
        1 + ((high - torch.as_tensor(part, device="cpu")) * ((strip - 3) / (high - low))).round()
        for part in (tops.maximum(next_bottoms), bottoms.minimum(next_tops), 0.0)
    )
    rows = torch.arange(strip, device="cpu")[:, None]
    is_ink = (rows >= first[:, :, None]) & (rows <= last[:, :, None])
    paper = torch.where(rows == zero, _LINE, 1.0).expand(strip, columns)
    drawn = torch.where(is_ink, 0.0, paper).reshape(count, 1, channels * strip, columns)
    return low + (high - low) * drawn
