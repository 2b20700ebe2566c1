"""Sheets as the documented contract draws them, in plain numpy, and what is read off a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchlens_viz.draw import text as lettering
from torchlens_viz.draw.blend import Blend
from torchlens_viz.draw.palette import Colormap, colormap
from torchlens_viz.receptive.field import ReceptiveField

MAGENTA, GREEN, CYAN, WHITE = (255, 0, 255), (0, 255, 0), (0, 255, 255), (255, 255, 255)
RED, BLUE, DARK = (103, 0, 31), (5, 48, 97), (40, 40, 40)  # the ends of RdBu_r, and lines around its tiles
HEADER = 22
SIGNED_MAPS = ["seismic", "RdBu_r"]


def overlay(
    image: torch.Tensor,
    maps: torch.Tensor,
    field: ReceptiveField,
    *,
    interpolation: str = "bicubic",
    upscale: int = 1,
    **colours: object,
) -> torch.Tensor:
    """Maps over an image, (K, 3, H, W), each value over the pixel that its position stands over."""
    options = {"alpha": 0.6, "cmap": "auto", "scale_each": False, "value_range": None, **colours}
    return Blend.of(maps, **options).tiles(
        image,
        maps,
        origins=field.center((0, 0)),
        steps=field.stride,
        interpolation=interpolation,
        upscale=upscale,
    )


def drawn_range(tiles: np.ndarray, normalize: bool, value_range: Any, signed: bool) -> tuple[float, float]:
    """The range that tiles are drawn in."""
    finite = tiles[np.isfinite(tiles)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if isinstance(value_range, str):
        low, high, value_range = *robust_ends(finite), None
    if not normalize:
        low, high = 0.0, 1.0
    if value_range is not None:
        low, high = value_range
    most = max(abs(low), abs(high))
    return (-most, most) if signed else (float(low), float(high))


def robust_ends(finite: np.ndarray) -> tuple[float, float]:
    """Limits that leave out one value in 200 at either end, of those that are not zero."""
    if not finite.size:
        return 0.0, 1.0
    ordered = np.sort(finite[finite != 0])
    low = high = 0.0
    if ordered.size:
        cut = (ordered.size - 1) // 200
        low, high = ordered[cut], ordered[-1 - cut]
    if (finite == 0).any():
        low, high = min(low, 0.0), max(high, 0.0)
    if finite.min() < 0 <= low:
        low = finite[finite < 0].max()
    if finite.max() > 0 >= high:
        high = finite[finite > 0].min()
    return (float(finite.min()), float(finite.max())) if low == high else (float(low), float(high))


def drawn_levels(
    tile: np.ndarray, low: float, high: float, last: int, signed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest level of each pixel, twice: where two are nearest within rounding, both of them."""
    if low == high:
        middle = last // 2 if signed or low != 0 else 0
        position = np.full(tile.shape, float(middle))
    else:
        position = (np.clip(np.nan_to_num(tile), low, high) - low) / (high - low) * last
    return np.floor(position + 0.5 - 1e-3), np.floor(position + 0.5 + 1e-3)


def laid_out(
    tiles: list[np.ndarray], columns: int, padding: int, page: int, frame: int | None = None
) -> np.ndarray:
    """Tiles on a sheet, row by row, with padding about each, and in it a line around the tile."""
    height, width = tiles[0].shape[:2]
    columns, rows = min(columns, len(tiles)), math.ceil(len(tiles) / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, *tiles[0].shape[2:])
    sheet = np.full(shape, page)
    for index, tile in enumerate(tiles):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        if padding and frame is not None:
            about = sheet[top - 1 : top + height + 1, left - 1 : left + width + 1]
            about[[0, -1]] = about[:, [0, -1]] = frame
        sheet[top : top + height, left : left + width] = tile
    return sheet


def assert_drawn_as_promised(
    image: Image.Image,
    values: torch.Tensor,
    *,
    normalize: bool = True,
    scale_each: bool = False,
    value_range: Any = None,
    cmap: str = "auto",
    nrow: int | None = None,
    padding: int = 1,
    upscale: int | None = None,
) -> None:
    """Compare a sheet with values (T, C, H, W), C being 1 or 3, drawn by the contract."""
    tiles = values.double().numpy()
    count, channels, height, width = tiles.shape
    factor = upscale or math.ceil(32 / max(height, width))
    columns = nrow or math.ceil(math.sqrt(count))
    low, high = drawn_range(tiles, normalize, value_range, False)
    if cmap == "auto":
        cmap = "RdBu_r" if channels == 1 and normalize and low < 0 < high else "gray"
    signed, last = cmap in SIGNED_MAPS, 255 if channels == 3 else 250
    is_gray = cmap == "gray" and np.isfinite(tiles).all()
    assert image.mode == "RGB"
    allowed = []
    for choice in (0, 1):
        parts = []
        for tile in tiles:
            ends = drawn_range(tile if scale_each else tiles, normalize, value_range, signed)
            part = drawn_levels(tile, *ends, last, signed)[choice].astype(int)
            if channels == 1:
                for code, found in ((254, tile == -np.inf), (253, tile == np.inf), (252, np.isnan(tile))):
                    part[found] = code
            enlarged = part.repeat(factor, 1).repeat(factor, 2)
            parts.append(enlarged.transpose(1, 2, 0) if channels == 3 else enlarged[0])
        # In gray, white is the last level; in signed maps it is zero, and a line parts it from the page.
        page = 255 if channels == 3 else 125 if signed else 250 if is_gray else 251
        allowed.append(laid_out(parts, columns, padding, page, 251 if signed and channels == 1 else None))
    if channels == 1:
        table = np.array(colormap(cmap).palette).reshape(256, 3)
        allowed = [table[part] for part in allowed]
    actual = np.array(image)
    assert actual.shape == allowed[0].shape
    assert ((actual == allowed[0]) | (actual == allowed[1])).all()


def ramp(*shape: int, signed: bool = True) -> torch.Tensor:
    """Random values of an even range, of which none lies halfway between two levels."""
    values = torch.randint(-1009 if signed else 0, 1010, shape) / 1009
    values.view(-1)[0], values.view(-1)[-1] = -1.0 if signed else 0.0, 1.0
    return values


STYLES = [
    {},
    {"scale_each": True},
    {"value_range": (-0.5, 0.25)},
    {"value_range": [0, 2]},
    {"value_range": "robust"},
    {"value_range": "robust", "scale_each": True},
    {"normalize": False},
    {"nrow": 1},
    {"nrow": 50},
    {"padding": 0, "nrow": 3},
    {"padding": 7, "upscale": 1},
    {"upscale": 3, "scale_each": True},
]

style_names = [",".join(f"{name}={value}" for name, value in style.items()) or "plain" for style in STYLES]


def has_ink(pixels: np.ndarray, background: tuple[int, int, int]) -> bool:
    """Whether any pixel differs from the background."""
    return bool((pixels != np.array(background)).any())


WEIGHT = torch.rand(4, 6, 5, 5)

FIGURES = {
    "norm": lambda values: np.sqrt((values**2).sum()),
    "mean": np.mean,
    "std": np.std,
    "max": np.max,
}


def colours(image: Image.Image) -> np.ndarray:
    """The pixels of a picture, in RGB."""
    return np.array(image.convert("RGB"))


def ranked(values: torch.Tensor, rank: str) -> list[int]:
    """Indices of (K, ...) by a figure of their own, the greatest first, ties in order."""
    rows = np.nan_to_num(values.double().numpy(), nan=0.0, posinf=0.0, neginf=0.0).reshape(len(values), -1)
    figures = [FIGURES[rank](row) for row in rows]
    return sorted(range(len(figures)), key=lambda index: -figures[index])


def same(first: Image.Image, second: Image.Image) -> bool:
    """Whether two pictures have the same colours."""
    return np.array_equal(colours(first), colours(second))


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect every line of text that is written on a picture from now on."""
    lines: list[str] = []
    write_line = lettering.write_line

    def noted(image: Image.Image, at: tuple[int, int], text: str, *rest: Any) -> None:
        lines.append(text)
        write_line(image, at, text, *rest)

    monkeypatch.setattr(lettering, "write_line", noted)
    return lines


def drawn(plane: np.ndarray, low: float, high: float, colours: Colormap, factor: int) -> np.ndarray:
    """Draw (H, W) as (H', W', 3), each value at the nearest level of [low, high]."""
    if colours.diverging:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    width = (high - low) or 1.0
    levels = np.floor((np.clip(np.nan_to_num(plane), low, high) - low) / width * 250 + 0.5).astype(int)
    if low == high:
        levels[...] = 125 if colours.diverging or low != 0 else 0
    pixels = colours.levels[levels]
    for colour, found in ((MAGENTA, np.isnan(plane)), (GREEN, plane == np.inf), (CYAN, plane == -np.inf)):
        pixels[found] = colour
    return pixels.repeat(factor, 0).repeat(factor, 1)


def drawn_maps(maps: torch.Tensor, *, ranges: Any = None, cmap: str | None = None) -> list[np.ndarray]:
    """Draw maps (C, H, W), with one range over all unless `ranges` has one for each."""
    planes = maps.double().numpy()
    if ranges is None:
        finite = planes[np.isfinite(planes)]
        ranges = [(finite.min(), finite.max())] * len(planes)
    both_signs = min(low for low, _ in ranges) < 0 < max(high for _, high in ranges)
    colours = colormap(cmap or ("RdBu_r" if both_signs else "gray"))
    factor = math.ceil(32 / max(planes.shape[1:]))
    return [drawn(plane, *ends, colours, factor) for plane, ends in zip(planes, ranges, strict=True)]


def read(path: Path) -> np.ndarray:
    """The pixels of a file, in RGB."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def names_in(folder: Path) -> list[str]:
    """The files beneath a folder, in alphabetical order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def spread(*shape: int, signed: bool = True) -> torch.Tensor:
    """Numbers of [-1, 1] or [0, 1], both ends included, none of which lies halfway between two levels."""
    steps = torch.arange(math.prod(shape)) * 37 % 203 - 101
    steps[0], steps[-1] = -101, 101
    values = steps.reshape(shape).float() / 101
    return values if signed else (values + 1) / 2
