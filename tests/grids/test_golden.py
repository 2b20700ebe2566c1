"""Sheets against pictures looked at once; `pytest tests/grids/test_golden.py --overwrite` renews them.

No picture here has words: letters differ between versions of the font. Sheets with words are read back in the
boxes where the letters must stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz import feature_grid, kernel_grid, pair_grid
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.grids.features import feature_sheet
from torchlens_viz.grids.kernels import _drawn as kernel_file

GOLDEN = Path(__file__).parent / "golden"
MOST_BYTES = 100_000
HEADER = 22


# Inputs in closed form, rounded to steps, so that no version of any library can change them.


def rounded(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.rint(values * 101) / 101).float()


def gratings(filters: int, channels: int, size: int) -> torch.Tensor:
    """Kernels (O, I, k, k) such as a first layer learns: gratings of all directions, some in colour."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    kernels = np.empty((filters, channels, size, size))
    for index in range(filters):
        angle, speed = math.pi * index / filters, 0.7 + 0.35 * (index % 4)
        across = rows * math.sin(angle) + columns * math.cos(angle)
        for channel in range(channels):
            shift = channel * (index % 3)
            window = np.exp(-(rows**2 + columns**2) / (size * size / 7))
            kernels[index, channel] = np.cos(across * speed + shift) * window
    return rounded(kernels)


def waves(count: int, height: int, width: int, *, signed: bool = True) -> torch.Tensor:
    """Maps (C, H, W), each of another wavelength."""
    rows, columns = np.mgrid[:height, :width]
    maps = [
        np.sin(rows * (0.3 + 0.1 * each) + 0.4) * np.cos(columns * 0.2 * (each + 1)) for each in range(count)
    ]
    return rounded(np.stack(maps) if signed else np.abs(np.stack(maps)))


def not_finite() -> torch.Tensor:
    maps = waves(4, 8, 8)
    maps[0, 2, 2:5], maps[1, 5, 5], maps[2, 0, 7] = math.nan, math.inf, -math.inf
    maps[3] = math.nan
    return maps


def colour_with_holes() -> torch.Tensor:
    weight = gratings(6, 3, 7)
    weight[1, 0, 3, 3], weight[2, 1, 0, 0], weight[5, 2, 6, 6] = math.nan, math.inf, -math.inf
    return weight


def pairs() -> Image.Image:
    model = nn.Sequential(nn.Conv2d(3, 6, 5, bias=False))
    with torch.no_grad():
        model[0].weight.copy_((gratings(6, 3, 5) * 16).round() / 16)  # sums without any rounding
    image = (waves(3, 24, 24, signed=False) * 16).round() / 16
    return pair_grid(model, "0", image, labels=False, sort_by="channel")


SHEETS: dict[str, Callable[[], Image.Image]] = {
    "kernels-rgb": lambda: kernel_file(gratings(16, 3, 11)),
    "kernels-rgb-scale-each": lambda: kernel_file(
        gratings(6, 3, 7) * torch.arange(1, 7).view(6, 1, 1, 1), scale_each=True, padding=3, upscale=2, nrow=6
    ),
    "kernels-rgb-not-finite": lambda: kernel_file(colour_with_holes()),
    "kernels-signed": lambda: kernel_file(gratings(9, 5, 5)),
    "kernels-channels": lambda: kernel_file(
        waves(32, 5, 5).view(4, 8, 5, 5), filters=[3, 0, 1], channels=[1, 7, 2, 0]
    ),
    "kernels-ranked": lambda: kernel_file(
        gratings(6, 2, 5) * torch.tensor([1.0, 4, 2, 6, 3, 5]).view(6, 1, 1, 1), sort_by="norm"
    ),
    "kernels-matrix": lambda: kernel_file(waves(1, 24, 40).view(24, 40, 1, 1)),
    "kernels-slices": lambda: kernel_file(gratings(6, 3, 5).view(2, 3, 3, 5, 5).transpose(1, 2)),
    "maps-gray": lambda: feature_sheet(waves(7, 9, 12, signed=False)),
    "maps-signed": lambda: feature_sheet(waves(7, 9, 12), padding=2, nrow=4),
    "maps-hot": lambda: feature_sheet(waves(6, 16, 16, signed=False), cmap="hot", padding=0),
    "maps-viridis": lambda: feature_sheet(waves(6, 16, 16), cmap="viridis", value_range=(-0.5, 1)),
    "maps-seismic": lambda: feature_sheet(waves(5, 10, 10) + 0.5, cmap="seismic", upscale=3, padding=1),
    "maps-not-finite": lambda: feature_sheet(not_finite()),
    "maps-scale-each": lambda: feature_sheet(
        waves(5, 12, 8, signed=False) * torch.arange(5).view(5, 1, 1), scale_each=True
    ),
    "maps-bicubic": lambda: feature_sheet(waves(4, 8, 8, signed=False), interpolation="bicubic", upscale=4),
    "maps-bicubic-not-finite": lambda: feature_sheet(not_finite(), interpolation="bicubic", upscale=4),
    "pairs": pairs,
}


def difference(actual: Image.Image, expected: Image.Image) -> str:
    """Say in which way two pictures differ, or nothing."""
    if (actual.mode, actual.size) != (expected.mode, expected.size):
        return f"mode and size are {actual.mode} {actual.size}, were {expected.mode} {expected.size}"
    if actual.getpalette() != expected.getpalette():
        return "the palette is another"
    now, before = np.array(actual), np.array(expected)
    wrong = (now != before).reshape(*now.shape[:2], -1).any(2)
    if not wrong.any():
        return ""
    row, column = (int(place) for place in np.argwhere(wrong)[0])
    return (
        f"{wrong.sum()} of {wrong.size} pixels differ, the first at row {row}, column {column}: "
        f"{now[row, column].tolist()}, was {before[row, column].tolist()}"
    )


def golden(name: str) -> Image.Image:
    with Image.open(GOLDEN / f"{name}.png") as image:
        image.load()
        return image


@pytest.mark.parametrize("name", SHEETS)
def test_sheet_is_as_it_was_when_it_was_looked_at(name, request):
    image = SHEETS[name]()
    if request.config.getoption("--overwrite"):
        save_picture(image, GOLDEN / f"{name}.png")
    assert difference(image, golden(name)) == ""


def test_changed_pixel_is_found_and_named():
    image = golden("maps-signed")
    changed = image.copy()
    changed.putpixel((17, 5), (image.getpixel((17, 5)) + 1) % 251)
    was, now = image.getpixel((17, 5)), changed.getpixel((17, 5))
    assert difference(image, image.copy()) == ""
    count = image.width * image.height
    assert difference(changed, image) == (
        f"1 of {count} pixels differ, the first at row 5, column 17: {now}, was {was}"
    )
    colour = golden("kernels-rgb")
    other = colour.copy()
    other.putpixel((3, 4), (1, 2, 3))
    assert "the first at row 4, column 3: [1, 2, 3], was [" in difference(other, colour)


def test_another_mode_size_or_palette_is_found():
    image = golden("maps-signed")
    assert difference(image.convert("RGB"), image).startswith("mode and size are RGB")
    assert difference(image.crop((0, 0, 9, 9)), image).startswith("mode and size are P (9, 9), were P")
    other = image.copy()
    other.putpalette([(value + 1) % 256 for value in image.getpalette()])
    assert difference(other, image) == "the palette is another"


def test_golden_pictures_are_those_of_the_tests_and_small():
    files = list(GOLDEN.iterdir())
    assert {path.name for path in files} == {f"{name}.png" for name in SHEETS}
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


def test_golden_pictures_have_the_modes_that_are_promised():
    for name in SHEETS:
        gray = name in ("maps-gray", "maps-scale-each", "maps-bicubic")
        coloured = "rgb" in name or name in ("kernels-slices", "pairs")
        assert golden(name).mode == ("RGB" if coloured else "L" if gray else "P"), name


# Sheets with words: where letters stand there is ink, and nowhere else.


def boxes(count: int, columns: int, size: tuple[int, int], padding: int) -> list[tuple[slice, slice]]:
    """Where the label of each tile stands: in the strip above it but for the line around the tile."""
    height, width = size
    places = []
    for index in range(count):
        top = padding + index // columns * (HEADER + height + padding)
        left = padding + index % columns * (width + padding)
        places.append((slice(top, top + HEADER - 1), slice(left, left + width + padding - 2)))
    return places


@pytest.mark.parametrize("padding", [1, 4])
@pytest.mark.parametrize(("count", "columns"), [(5, 3), (4, 2), (1, 1)])
@pytest.mark.parametrize("cmap", ["gray", "RdBu_r", "rgb"])
def test_ink_stands_in_the_box_of_each_label_and_nowhere_else(cmap, count, columns, padding):
    if cmap == "rgb":
        weight = gratings(count, 3, 9)
        plain, image = kernel_grid(weight, padding=padding), kernel_grid(weight, padding=padding, labels=True)
    else:
        maps = waves(count, 9, 9)
        plain = feature_grid(maps, cmap=cmap, padding=padding)
        image = feature_grid(maps, cmap=cmap, padding=padding, labels=True)
    pixels, expected = np.array(image.convert("RGB")), np.array(plain.convert("RGB"))
    rest = (pixels != 255).any(2)
    for index, (rows, across) in enumerate(boxes(count, columns, (36, 36), padding)):
        assert rest[rows, across].any(), f"no label above tile {index}"
        rest[rows, across] = False
        left, below = across.start, rows.stop + 1
        tile = pixels[below : below + 36, left : left + 36]
        top = padding + index // columns * (36 + padding)
        assert np.array_equal(tile, expected[top : top + 36, left : left + 36])
        rest[below : below + 36, left : left + 36] = False
        about = pixels[below - 1 : below + 37, left - 1 : left + 37]
        line = [40] * 3 if cmap == "RdBu_r" else [255] * 3
        assert (about[[0, -1]] == line).all()
        assert (about[:, [0, -1]] == line).all()
        rest[below - 1 : below + 37, left - 1 : left + 37] = False
    assert not rest.any()


def test_each_label_is_the_one_of_its_tile():
    maps = waves(6, 9, 9)
    pixels = np.array(feature_grid(maps, labels=True, nrow=3))
    for index, box in enumerate(boxes(6, 3, (36, 36), 1)):
        alone = np.array(feature_grid(maps, channels=index, labels=True, value_range=(-1, 1)))
        assert np.array_equal(pixels[box], alone[boxes(1, 1, (36, 36), 1)[0]])
        other = np.array(feature_grid(maps, channels=(index + 1) % 6, labels=True, value_range=(-1, 1)))
        assert not np.array_equal(pixels[box], other[boxes(1, 1, (36, 36), 1)[0]])
