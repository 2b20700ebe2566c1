"""Rows of pictures of any size, each in the middle of a tile: `draw_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Final

import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz.draw.canvas import check_size, draw
from torchlens_viz.draw.style import Style

_SMALLEST: Final = 64  # the side to which small patches are enlarged, by whole factors


def draw_rows(
    rows: Sequence[Sequence[torch.Tensor]], words: Sequence[Sequence[str]], *, tile: int, style: Style
) -> Image.Image:
    """Draw patches of any size, each in the middle of a tile.

    Args:
        rows: Patches (3, h, w), or (3, w) of signals, in [0, 1]; a row for each channel.
        words: A label for each.
        tile: The longer side to which all are shrunk by one factor, where the largest is larger.
        style: How to draw them; its number of columns is that of the longest row.

    Returns:
        An image of mode "RGB", gray where a patch ends and white where there is none.

    Raises:
        InvalidArgumentError: It would be too large.
    """
    planes = [[patch[:, None] if patch.ndim == 2 else patch for patch in row] for row in rows]
    columns = max(map(len, rows))
    extents = [patch.shape[1:] for row in planes for patch in row]
    height, width = (max([1, *(extent[axis] for extent in extents)]) for axis in (0, 1))
    shrink = max(1.0, max(height, width) / tile)
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
