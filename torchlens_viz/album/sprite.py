"""Sprites: many small pictures in one, and where each stands in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, features
from torch.nn import functional as F

from torchlens_viz.arguments import wide
from torchlens_viz.draw.palette import LEVELS, PADDING, Colormap, colormap
from torchlens_viz.draw.scale import Limits, special_codes, to_levels

Pixels: TypeAlias = npt.NDArray[np.uint8]

_WIDTH: Final = 1024  # about as wide as a sprite may be
_SHARE: Final = 0.995  # of the values lie within the limits
_SAMPLED: Final = 2**21  # values, of which the limits are found
_QUALITY: Final = 82


class Range(NamedTuple):
    """Which values the first and the last colour stand for.

    Attributes:
        low: The value of the first colour.
        high: The value of the last colour.
        beyond: The share of the finite values beyond them, drawn as the nearer limit.
        signed: Whether zero is in the middle, and white.
    """

    low: float
    high: float
    beyond: float
    signed: bool


def robust_range(values: Sequence[torch.Tensor], *, signed: bool) -> Range:
    """Return limits that 99.5 % of the values keep, so that a few large ones do not make all others pale.

    Args:
        values: Tensors of any shape; what is not finite does not count.
        signed: Whether the limits must lie symmetrically about zero.
    """
    flat = [wide(each.detach()).cpu().flatten() for each in values]
    found = torch.cat([each[each.isfinite()] for each in flat]) if flat else torch.zeros(0, device="cpu")
    if not len(found):
        return Range(-1.0 if signed else 0.0, 1.0, 0.0, signed)
    some = found[:: max(1, len(found) // _SAMPLED)]
    if signed:
        sizes = found.abs()
        most = _quantile(some.abs(), _SHARE) or sizes.max().item()
        beyond = (sizes > most).double().mean().item()
        return Range(-most, most, beyond, signed)
    low = min(0.0, found.min().item()) if found.min() <= 0 else _quantile(some, 1 - _SHARE)
    high = _quantile(some, _SHARE)
    if high <= low:
        high = found.max().item()
    beyond = ((found < low) | (found > high)).double().mean().item()
    return Range(low, high, beyond, signed)


def _quantile(values: torch.Tensor, share: float) -> float:
    place = min(len(values), max(1, round(share * len(values))))
    return float(values.kthvalue(place).values)


def coded(tiles: torch.Tensor, limits: Range) -> Pixels:
    """Return tiles (K, h, w) as the palette entries of their colours, (K, h, w); NaN and Inf have theirs."""
    planes = tiles.detach().cpu().float()[:, None]
    low, high = (np.array([limit], np.float64) for limit in (limits.low, limits.high))
    finite = bool(planes.isfinite().all())
    levels = to_levels(planes, Limits(low, high, finite), levels=LEVELS, signed=limits.signed)
    if not finite:
        codes = special_codes(planes)
        levels = torch.where(codes != 0, codes, levels)
    return levels[:, 0].numpy()


def colours_for(limits: Range) -> Colormap:
    """Return the colours of such values."""
    return colormap("RdBu_r" if limits.signed else "gray")


def gradient(limits: Range, steps: int = 10) -> str:
    """Return the colours of a range, from the lowest to the highest, as CSS takes them."""
    levels = colours_for(limits).levels
    places = [round(step * (LEVELS - 1) / steps) for step in range(steps + 1)]
    return ",".join("#" + bytes(levels[place].tolist()).hex() for place in places)


def shrunk(tiles: torch.Tensor, side: int) -> tuple[torch.Tensor, int]:
    """Return tiles (K, h, w) with no side above `side`, each pixel the mean of a square, and its side."""
    factor = -(-max(tiles.shape[1:]) // side)
    if factor == 1:
        return tiles, 1
    smaller = F.avg_pool2d(tiles[:, None].float(), factor, ceil_mode=True, count_include_pad=False)
    return smaller[:, 0], factor


@final
@dataclass(frozen=True)
class Block:
    """Tiles of one size within a sprite.

    Attributes:
        number: The block's own number in the page.
        columns: How many stand side by side.
        rows: How many stand above one another.
        y: The first row of pixels.
        height: Of a tile, in pixels.
        width: Of a tile, in pixels.
        sprite: The number of the sprite.
    """

    number: int
    columns: int
    rows: int
    y: int
    height: int
    width: int
    sprite: int

    def tile(self, place: int) -> str:
        """Return the classes of the element that shows a tile."""
        row, column = divmod(place, self.columns)
        return f"t b{self.number} c{column} r{row}"


@final
class Sprite:
    """Gathers tiles, block by block, and makes one picture of them.

    Args:
        number: The sprite's number in the page.
        gap: Pixels between tiles, so that neighbours do not show where a tile is enlarged.
    """

    def __init__(self, number: int, *, gap: int = 1) -> None:
        self.number, self.gap = number, gap
        self.blocks: list[Block] = []
        self._tiles: list[Pixels] = []
        self._height = 0

    def add(self, number: int, tiles: Pixels) -> Block:
        """Add tiles (K, h, w) or (K, h, w, 3) as a block of that number."""
        count, height, width = tiles.shape[:3]
        columns = max(1, min(count, _WIDTH // (width + self.gap)))
        rows = -(-count // columns)
        block = Block(number, columns, rows, self._height, height, width, self.number)
        self.blocks.append(block)
        self._tiles.append(tiles)
        self._height += rows * (height + self.gap)
        return block

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return max(each.columns * (each.width + self.gap) for each in self.blocks), self._height

    def pixels(self, fill: int) -> Pixels:
        """Return the whole, (H, W) or (H, W, 3), with `fill` between tiles."""
        width, height = self.size
        whole = np.full((height, width, *self._tiles[0].shape[3:]), fill, np.uint8)
        for block, tiles in zip(self.blocks, self._tiles, strict=True):
            for place, tile in enumerate(tiles):
                row, column = divmod(place, block.columns)
                y, x = block.y + row * (block.height + self.gap), column * (block.width + self.gap)
                whole[y : y + block.height, x : x + block.width] = tile
        return whole

    def forget(self) -> None:
        """Let go of the pixels."""
        self._tiles.clear()

    def as_values(self, colours: Colormap) -> bytes:
        """Return it as PNG with a palette; what is between tiles lets the page through."""
        image = Image.fromarray(self.pixels(PADDING))
        image.putpalette(colours.palette.tobytes())
        return _saved(image, "PNG", optimize=True, transparency=PADDING)

    def as_colours(self) -> bytes:
        """Return it in colour, without loss."""
        return _saved(Image.fromarray(self.pixels(255)), "PNG", optimize=True)

    def as_photographs(self) -> bytes:
        """Return it in colour as a photograph: small, and near enough."""
        return photograph(Image.fromarray(self.pixels(128)))


def photograph(image: Image.Image) -> bytes:
    """Return an RGB picture as WebP, or where Pillow has none as JPEG."""
    if features.check("webp"):
        return _saved(image, "WEBP", quality=_QUALITY, method=4)
    return _saved(image, "JPEG", quality=_QUALITY)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fitted(pixels: torch.Tensor, side: int) -> Pixels:
    """Return a picture (3, h, w) in [0, 1] amid gray, (side, side, 3): shrunk where it is larger."""
    tile = torch.full((3, side, side), 0.5, device="cpu")
    if pixels.numel():
        shrink = max(1.0, max(pixels.shape[1:]) / side)
        if shrink > 1:
            size = [max(1, round(extent / shrink)) for extent in pixels.shape[1:]]
            pixels = F.interpolate(pixels[None].float(), size=size, mode="area")[0]
        rows, columns = pixels.shape[1:]
        top, left = (side - rows) // 2, (side - columns) // 2
        tile[:, top : top + rows, left : left + columns] = pixels
    whole: Pixels = (tile.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, 2).numpy()
    return whole


def as_bytes(pixels: torch.Tensor) -> Image.Image:
    """Return (3, H, W) in [0, 1] as a picture."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, 2).contiguous().numpy()
    return Image.fromarray(values)
