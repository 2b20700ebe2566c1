"""Sheets of kernels and maps, pixel by pixel, against a plain numpy drawing of the documented contract."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.utils import make_grid as torchvision_grid

from torchlens_viz import feature_grid, kernel_grid, save_feature_grid, save_kernel_grid
from torchlens_viz.draw import text as lettering
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError

MAGENTA, GREEN, CYAN, WHITE = (255, 0, 255), (0, 255, 0), (0, 255, 255), (255, 255, 255)
RED, BLUE, DARK = (103, 0, 31), (5, 48, 97), (40, 40, 40)  # the ends of RdBu_r, and its padding
HEADER = 16
SIGNED_MAPS = ["seismic", "RdBu_r"]


# The contract in numpy, one tile and one pixel at a time where that is plainest.


def drawn_range(tiles: np.ndarray, normalize: bool, value_range: Any, signed: bool) -> tuple[float, float]:
    finite = tiles[np.isfinite(tiles)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if not normalize:
        low, high = 0.0, 1.0
    if value_range is not None:
        low, high = value_range
    most = max(abs(low), abs(high))
    return (-most, most) if signed else (float(low), float(high))


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


def laid_out(tiles: list[np.ndarray], columns: int, padding: int, background: int) -> np.ndarray:
    height, width = tiles[0].shape[:2]
    columns, rows = min(columns, len(tiles)), math.ceil(len(tiles) / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, *tiles[0].shape[2:])
    sheet = np.full(shape, background)
    for index, tile in enumerate(tiles):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
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
    assert image.mode == ("RGB" if channels == 3 else "L" if is_gray else "P")
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
        background = 255 if channels == 3 else 250 if is_gray else 251  # in gray, white is the last level
        allowed.append(laid_out(parts, columns, padding, background))
    actual = np.array(image).astype(int)
    if is_gray and channels == 1:
        actual = np.rint(actual * 250 / 255).astype(int)
    assert actual.shape == allowed[0].shape
    assert ((actual == allowed[0]) | (actual == allowed[1])).all()


def colours(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def ramp(*shape: int, signed: bool = True) -> torch.Tensor:
    """Random values of an even range, of which none lies halfway between two levels."""
    values = torch.randint(-1009 if signed else 0, 1010, shape) / 1009
    values.view(-1)[0], values.view(-1)[-1] = -1.0 if signed else 0.0, 1.0
    return values


def test_the_comparison_can_fail():
    values = ramp(5, 1, 4, 6)
    image = feature_grid(values[:, 0])
    assert_drawn_as_promised(image, values)
    changed = image.copy()
    changed.putpixel((40, 5), (image.getpixel((40, 5)) + 1) % 251)
    for other, options in ((changed, {}), (image, {"scale_each": True}), (image, {"nrow": 2})):
        with pytest.raises(AssertionError, match="assert"):
            assert_drawn_as_promised(other, values, **options)


# The pixels.

STYLES = [
    {},
    {"scale_each": True},
    {"value_range": (-0.5, 0.25)},
    {"value_range": [0, 2]},
    {"normalize": False},
    {"nrow": 1},
    {"nrow": 50},
    {"padding": 0, "nrow": 3},
    {"padding": 7, "upscale": 1},
    {"upscale": 3, "scale_each": True},
]
style_names = [",".join(f"{name}={value}" for name, value in style.items()) or "plain" for style in STYLES]


@pytest.mark.parametrize("style", STYLES, ids=style_names)
@pytest.mark.parametrize("cmap", ["auto", "gray", "hot", *SIGNED_MAPS])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
def test_feature_sheet_is_drawn_as_promised(style, cmap, signed):
    maps = ramp(7, 1, 5, 9, signed=signed)
    assert_drawn_as_promised(feature_grid(maps[:, 0], cmap=cmap, **style), maps, cmap=cmap, **style)


@pytest.mark.parametrize("style", STYLES, ids=style_names)
def test_colour_kernels_are_drawn_as_promised(style):
    weight = ramp(6, 3, 4, 5)
    assert_drawn_as_promised(kernel_grid(weight, **style), weight, **style)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale_each", [False, True])
def test_colour_kernels_have_torchvisions_pixels(normalize, scale_each):
    weight = ramp(6, 3, 4, 5, signed=normalize)
    scale_each = scale_each and normalize
    options = {"normalize": normalize, "scale_each": scale_each}
    sheet = torchvision_grid(weight, nrow=3, padding=0, **options)
    sheet = sheet.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).movedim(0, 2)  # as in save_image
    image = kernel_grid(weight, nrow=3, padding=0, upscale=1, **options)
    difference = np.array(image).astype(int) - sheet.numpy().astype(int)
    assert np.abs(difference).max() <= 1  # a value halfway between two colours
    assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("style", STYLES, ids=style_names)
def test_kernels_of_other_depth_show_input_channel_0(style):
    weight = ramp(5, 4, 3, 3)
    weight[0, 0, 0, 0], weight[1, 0, 0, 0] = -0.75, 0.5
    weight[:, 1:] *= 9  # must not widen the range
    assert_drawn_as_promised(kernel_grid(weight, **style), weight[:, :1], **style)


@pytest.mark.parametrize("cmap", ["gray", "hot", *SIGNED_MAPS])
def test_named_map_draws_the_channels_of_a_colour_kernel_as_separate_tiles(cmap):
    weight = ramp(4, 3, 4, 5)
    expected = weight.reshape(12, 1, 4, 5)
    assert_drawn_as_promised(kernel_grid(weight, cmap=cmap), expected, cmap=cmap, nrow=3)


def test_chosen_channels_of_a_colour_kernel_are_tiles_too():
    weight = ramp(4, 3, 4, 5)
    chosen = weight[:, [2, 0]].reshape(8, 1, 4, 5)
    assert_drawn_as_promised(kernel_grid(weight, channels=[2, 0]), chosen, nrow=2)


def test_several_channels_make_a_row_per_filter_and_a_column_per_channel():
    weight = ramp(6, 8, 3, 3)
    tiles = torch.stack([weight[row, column] for row in (5, 0) for column in (1, 7, 2)])[:, None]
    assert_drawn_as_promised(kernel_grid(weight, filters=[5, 0], channels=[1, 7, 2]), tiles, nrow=3)


@pytest.mark.parametrize(
    "chosen", [[4, 1, 1], (4, 1, 1), np.array([4, 1, 1]), torch.tensor([4, 1, 1]), iter([4, 1, 1])]
)
def test_channels_may_be_any_list_of_integers(chosen):
    maps = ramp(6, 1, 4, 4)
    assert_drawn_as_promised(feature_grid(maps[:, 0], channels=chosen), maps[[4, 1, 1]])


@pytest.mark.parametrize("chosen", [4, np.int64(4), torch.tensor(4), range(4, 5)])
def test_one_channel_may_be_any_integer(chosen):
    maps = ramp(6, 1, 4, 4)
    assert_drawn_as_promised(feature_grid(maps[:, 0], channels=chosen), maps[4:5])


@pytest.mark.parametrize("sample", [0, 2, np.int64(2)])
def test_chosen_sample_of_the_batch_is_drawn(sample):
    batch = ramp(3, 4, 5, 5)
    assert_drawn_as_promised(feature_grid(batch, sample=sample), batch[sample][:, None])


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 2), (5, 3), (7, 3), (9, 3), (10, 4)])
def test_sheet_is_near_square_and_rather_wide_than_high(count, columns):
    image = feature_grid(torch.rand(count, 40, 40), padding=0)
    assert image.size == (columns * 40, math.ceil(count / columns) * 40)


@pytest.mark.parametrize(
    ("size", "factor"), [((1, 1), 32), ((3, 3), 11), ((31, 2), 2), ((32, 1), 1), ((200, 3), 1)]
)
def test_tiles_are_brought_to_32_pixels(size, factor):
    height, width = size
    image = feature_grid(torch.rand(1, *size), padding=0)
    assert image.size == (width * factor, height * factor)


@pytest.mark.parametrize("cmap", SIGNED_MAPS)
def test_zero_is_exactly_white_and_positive_is_red(cmap):
    maps = torch.tensor([0.0, 3.0, -1.0, 0.0]).reshape(1, 1, 4)
    pixels = colours(feature_grid(maps, cmap=cmap, padding=0, upscale=1))[0]
    assert [tuple(pixel) for pixel in pixels[[0, 3]]] == [WHITE, WHITE]
    assert pixels[1][0] > pixels[1][2]
    assert pixels[2][2] > pixels[2][0]


@pytest.mark.parametrize(("value", "mode", "colour"), [(0.0, "L", 0), (3.0, "L", 128), (-3.0, "L", 128)])
def test_constant_map_is_drawn_as_such(value, mode, colour):
    image = feature_grid(torch.full((1, 4, 4), value), padding=0)
    assert image.mode == mode
    assert set(np.array(image).ravel().tolist()) == {colour}


def test_constant_kernel_beside_others_is_in_the_middle_of_its_own_range():
    weight = torch.cat([torch.full((1, 3, 2, 2), 5.0), ramp(1, 3, 2, 2)])
    pixels = colours(kernel_grid(weight, scale_each=True, padding=0, upscale=1))
    assert set(pixels[:, :2].ravel().tolist()) == {127}


# What numbers a tensor may hold, and how.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_drawn_as_their_values(dtype):
    maps = ramp(5, 1, 6, 6).to(dtype)
    assert_drawn_as_promised(feature_grid(maps[:, 0]), maps)
    weight = ramp(5, 3, 3, 3).to(dtype)
    assert_drawn_as_promised(kernel_grid(weight), weight)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
def test_integers_are_drawn_as_their_values(dtype):
    maps = torch.randint(0, 100, (4, 1, 6, 6)).to(dtype)
    assert_drawn_as_promised(feature_grid(maps[:, 0]), maps)


def test_integers_that_float32_cannot_tell_apart_are_told_apart():
    maps = torch.arange(4).reshape(1, 1, 2, 2) + 2**30
    assert_drawn_as_promised(feature_grid(maps[:, 0]), maps)
    assert set(np.array(feature_grid(maps[:, 0])).ravel().tolist()) == {0, 85, 170, 255}


def test_without_normalize_bytes_are_taken_as_they_are():
    weight = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    image = kernel_grid(weight, normalize=False, padding=0, upscale=1)
    assert np.array_equal(np.array(image), np.concatenate(weight.movedim(1, 3).numpy(), 1))


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.to(memory_format=torch.channels_last),
        lambda tensor: tensor.repeat_interleave(2, 3)[..., ::2],
        lambda tensor: tensor[:, :, :1].expand(-1, -1, 5, -1),
    ],
)
def test_memory_layout_does_not_matter(rearranged):
    weight = rearranged(ramp(6, 3, 5, 5))
    assert_drawn_as_promised(kernel_grid(weight), weight)
    assert_drawn_as_promised(feature_grid(weight), weight[0][:, None])


def test_tensor_that_requires_grad_is_drawn_without_a_trace():
    maps = torch.rand(3, 4, 4, requires_grad=True)
    version = maps._version
    feature_grid(maps * 2, labels=True, legend=True)
    feature_grid(maps)
    kernel_grid(torch.rand(2, 3, 3, 3, requires_grad=True), scale_each=True)
    assert (maps.grad, maps._version) == (None, version)


def test_inference_tensors_are_drawn():
    with torch.inference_mode():
        maps = ramp(4, 1, 5, 5)
        inside = feature_grid(maps[:, 0])
    assert maps.is_inference()
    assert_drawn_as_promised(inside, maps)
    assert_drawn_as_promised(feature_grid(maps[:, 0]), maps)


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_source_is_never_changed(dtype, interpolation):
    weight = (torch.randn(4, 3, 3, 3) * 50).to(dtype)
    if dtype.is_floating_point:
        weight[0, 0, 0, 0], weight[1, 0, 0, 0] = math.nan, math.inf
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[0].weight = nn.Parameter(weight, requires_grad=dtype.is_floating_point)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    for options in ({}, {"scale_each": True}, {"channels": [0, 1], "labels": True, "legend": True}):
        kernel_grid(model, interpolation=interpolation, **options)
        feature_grid(model[0].weight, interpolation=interpolation, labels=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


# NaN and infinities.


@pytest.mark.parametrize("style", [*STYLES[:4], {"normalize": False}])
@pytest.mark.parametrize("cmap", ["gray", "hot", *SIGNED_MAPS])
def test_what_is_not_finite_has_its_colour_and_changes_no_other_pixel(cmap, style):
    maps = ramp(4, 5, 5)
    maps[:, 0, 0], maps[:, 0, 1] = -1.0, 1.0  # what is replaced below sets no range
    clean = feature_grid(maps, cmap=cmap, upscale=2, **style)
    maps[0, 2, 2], maps[1, 3, 1], maps[2, 4, 4] = math.nan, math.inf, -math.inf
    dirty = feature_grid(maps, cmap=cmap, upscale=2, **style)
    assert_drawn_as_promised(dirty, maps[:, None], cmap=cmap, upscale=2, **style)
    seen, expected = colours(dirty), colours(clean)
    if style.get("nrow") is None:
        for colour, row, column in ((MAGENTA, 5, 5), (GREEN, 7, 14), (CYAN, 20, 9)):
            expected[row : row + 2, column : column + 2] = colour
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize(("value", "colour"), [(math.nan, MAGENTA), (math.inf, GREEN), (-math.inf, CYAN)])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_colour_kernel_shows_what_is_not_finite_in_any_channel(value, colour, channel):
    weight = ramp(2, 3, 4, 4)
    weight[0, :, 0, 0], weight[0, :, 0, 1] = -1.0, 1.0
    expected = colours(kernel_grid(weight, padding=0, upscale=1))
    weight[1, channel, 2, 3] = value
    expected[2, 7] = colour
    assert np.array_equal(colours(kernel_grid(weight, padding=0, upscale=1)), expected)


def test_sheet_without_any_finite_value_is_drawn():
    image = feature_grid(torch.full((2, 3, 3), math.nan), padding=0)
    assert {tuple(pixel) for pixel in colours(image).reshape(-1, 3)} == {MAGENTA}


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALES = [0.0, 1e-300, 1e-42, 1e-7, 1.0, 3e4, 1e38, 1e308]


@st.composite
def any_tiles(draw: st.DrawFn, channels: int) -> torch.Tensor:
    """Tiles (T, C, H, W) of any float type, scale and offset, finite or not."""
    dtype = draw(st.sampled_from(DTYPES))
    count, height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tiles = torch.rand((count, channels, height, width), generator=generator, dtype=torch.float64) * 2 - 1
    if draw(st.booleans()):
        tiles = tiles.abs()
    scales = draw(st.lists(st.sampled_from(SCALES), min_size=count, max_size=count))
    tiles = tiles * torch.tensor(scales, dtype=torch.float64)[:, None, None, None]
    tiles = tiles + draw(st.sampled_from([0.0, 0.0, 1.0, -1e4]))
    for value in (math.nan, math.inf, -math.inf):
        chance = draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]))
        tiles[torch.rand(tiles.shape, generator=generator) < chance] = value
    return tiles.to(dtype)


CMAPS = st.sampled_from(["gray", "hot", *SIGNED_MAPS])
LAYOUT = st.fixed_dictionaries(
    {
        "nrow": st.sampled_from([None, 1, 2, 5]),
        "padding": st.integers(0, 3),
        "upscale": st.sampled_from([None, 2, 3]),
        "interpolation": st.sampled_from(["nearest", "bilinear", "bicubic"]),
        "labels": st.booleans(),
        "legend": st.booleans(),
    }
)
SCALING = st.sampled_from(
    [
        {},
        {"scale_each": True},
        {"normalize": False},
        {"value_range": (-0.5, 2.0)},
        {"value_range": (1.0, 1.0)},
    ]
)


def check_every_tile(
    tiles: torch.Tensor, layout: dict[str, Any], scaling: dict[str, Any], sheet: Image.Image, alone: Any
) -> None:
    """Hold the size of a sheet against the promise, and each finite tile against the same tile alone."""
    count, _, height, width = tiles.shape
    factor = layout["upscale"] or math.ceil(32 / max(height, width))
    columns = min(count, layout["nrow"] or math.ceil(math.sqrt(count)))
    padding, header = layout["padding"], HEADER if layout["labels"] else 0
    across, down = width * factor + padding, height * factor + header + padding
    size = (columns * across + padding, math.ceil(count / columns) * down + padding)
    if layout["legend"]:
        assert sheet.width >= size[0]
        assert sheet.height > size[1]
    else:
        assert sheet.size == size
    finite = tiles[tiles.isfinite()].double()
    if not scaling and finite.numel():
        scaling = {"value_range": (finite.min().item(), finite.max().item())}
    pixels = colours(sheet)
    for index, tile in enumerate(tiles):
        if not tile.isfinite().all():
            continue
        single = alone(tile, **scaling, upscale=factor, interpolation=layout["interpolation"], padding=0)
        top, left = padding + header + index // columns * down, padding + index % columns * across
        shown = pixels[top : top + height * factor, left : left + width * factor]
        assert np.array_equal(shown, colours(single)), index


@settings(max_examples=100)
@given(any_tiles(1), LAYOUT, SCALING, CMAPS)
def test_every_finite_map_looks_as_it_does_alone(tiles, layout, scaling, cmap):
    if layout["upscale"] is None and max(tiles.shape[2:]) >= 32:
        layout["interpolation"] = "nearest"
    sheet = feature_grid(tiles[:, 0], **layout, **scaling, cmap=cmap)
    check_every_tile(
        tiles, layout, scaling, sheet, lambda tile, **style: feature_grid(tile, cmap=cmap, **style)
    )


@settings(max_examples=60)
@given(any_tiles(1), LAYOUT, st.sampled_from([{}, {"normalize": False}, {"value_range": (-0.5, 2.0)}]))
def test_every_finite_map_looks_as_it_does_alone_in_colours_chosen_by_range(tiles, layout, scaling):
    sheet = feature_grid(tiles[:, 0], **layout, **scaling)
    check_every_tile(tiles, layout, scaling, sheet, feature_grid)


@settings(max_examples=80)
@given(any_tiles(3), LAYOUT, SCALING)
def test_every_finite_colour_kernel_looks_as_it_does_alone(tiles, layout, scaling):
    sheet = kernel_grid(tiles, **layout, **scaling)
    check_every_tile(tiles, layout, scaling, sheet, lambda tile, **style: kernel_grid(tile[None], **style))


# Interpolation.


def enlarged_linearly(tile: np.ndarray, factor: int) -> np.ndarray:
    """Bilinear enlargement with pixel centres at half, one axis after the other."""
    for axis in (0, 1):
        places = (np.arange(tile.shape[axis] * factor) + 0.5) / factor - 0.5
        nodes = np.arange(tile.shape[axis])
        tile = np.apply_along_axis(lambda line, at=places, n=nodes: np.interp(at, n, line), axis, tile)
    return tile


def test_bilinear_is_linear_between_pixel_centres():
    maps = torch.rand(4, 5, 3)
    pixels = np.array(feature_grid(maps, interpolation="bilinear", upscale=7, padding=0, nrow=4))
    low, high = maps.min().item(), maps.max().item()
    expected = [enlarged_linearly((tile.double().numpy() - low) / (high - low), 7) * 255 for tile in maps]
    assert np.abs(pixels - np.concatenate(expected, 1)).max() <= 1.5  # a level is one gray and a bit


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_smooth_tiles_have_more_levels_and_the_size_of_plain_ones(interpolation):
    maps = ramp(3, 5, 5, signed=False)
    smooth = feature_grid(maps, interpolation=interpolation)
    plain = feature_grid(maps)
    assert smooth.size == plain.size
    assert len(set(np.array(smooth).ravel().tolist())) > len(set(np.array(plain).ravel().tolist()))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hole", [(3, 3, 3, 3), (2, 5, 2, 5), (0, 5, 0, 1), (0, 7, 0, 6)])
def test_smoothing_does_not_bleed_from_what_is_not_finite(interpolation, value, hole):
    top, bottom, left, right = hole
    maps = torch.full((2, 8, 8), 0.5)
    maps[0, 0, 7], maps[1, 0, 7] = 0.5, 3.5
    maps[0, top : bottom + 1, left : right + 1] = value
    style = {"value_range": (0, 1), "cmap": "gray", "upscale": 4, "padding": 0}
    pixels = colours(feature_grid(maps, interpolation=interpolation, **style))[:, :32]
    special = np.zeros((32, 32), bool)
    special[top * 4 : bottom * 4 + 4, left * 4 : right * 4 + 4] = True
    assert (pixels[~special] == 128).all()
    assert len({tuple(pixel) for pixel in pixels[special]}) == 1
    assert tuple(pixels[special][0]) in {MAGENTA, GREEN, CYAN}


def test_smoothing_stays_inside_tiles():
    maps = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    pixels = np.array(feature_grid(maps, interpolation="bicubic", padding=0, nrow=2))
    assert set(pixels[:, :32].ravel()) == {0}
    assert set(pixels[:, 32:].ravel()) == {255}


def test_smoothing_a_tile_that_fills_float32_stays_in_range():
    maps = torch.tensor([[3e38, -3e38], [-3e38, 3e38]])[None]
    maps = maps.repeat(1, 3, 3)
    levels = np.array(feature_grid(maps, interpolation="bicubic", upscale=4, padding=0))
    assert levels.max() == 250
    assert levels.min() == 0
    assert levels.mean() == pytest.approx(125, abs=1)


# Labels, legend and the number of tiles.


def tile_areas(image: Image.Image, count: int, columns: int, size: int, padding: int, header: int) -> list:
    pixels = colours(image)
    areas = []
    for index in range(count):
        top = padding + header + index // columns * (size + header + padding)
        left = padding + index % columns * (size + padding)
        areas.append(pixels[top : top + size, left : left + size])
    return areas


def has_ink(pixels: np.ndarray, background: tuple[int, int, int]) -> bool:
    return bool((pixels != np.array(background)).any())


@pytest.mark.parametrize("labels", [True, ["first", "second", "third", "a very long label indeed", "ü"]])
@pytest.mark.parametrize(("cmap", "background"), [("gray", WHITE), ("RdBu_r", DARK)])
def test_labels_stand_above_their_tiles_and_change_no_pixel_of_them(labels, cmap, background):
    maps = ramp(5, 40, 40)
    plain = feature_grid(maps, cmap=cmap, padding=2)
    labelled = feature_grid(maps, cmap=cmap, padding=2, labels=labels)
    assert labelled.mode == plain.mode
    assert labelled.size == (plain.width, plain.height + 2 * HEADER)
    for before, after in zip(
        tile_areas(plain, 5, 3, 40, 2, 0), tile_areas(labelled, 5, 3, 40, 2, HEADER), strict=True
    ):
        assert np.array_equal(before, after)
    pixels = colours(labelled)
    for index in range(5):
        top, left = 2 + index // 3 * (40 + HEADER + 2), 2 + index % 3 * 42
        assert has_ink(pixels[top : top + HEADER, left : left + 40], background), index
    gap = pixels[2 : 2 + HEADER, [40 + 2, 82 + 2, 124 + 2]]
    assert not has_ink(gap[:, :2], background)  # neighbours do not run into each other
    assert not has_ink(pixels[-42 - HEADER : -42, -42:], background)  # there is no sixth tile


def test_labels_differ_where_their_texts_do():
    maps = ramp(3, 40, 40)
    headers = [colours(feature_grid(maps, labels=labels))[:HEADER] for labels in (["a"] * 3, ["b"] * 3)]
    assert not np.array_equal(*headers)


def test_default_labels_are_the_indices_of_channels_and_filters():
    maps, weight = ramp(9, 40, 40), ramp(6, 4, 40, 40)
    assert same(feature_grid(maps, channels=[8, 3], labels=True), maps[[8, 3]], ["8", "3"])
    rows = kernel_grid(weight, filters=[5], channels=[3, 0], labels=True)
    assert same(rows, weight[5, [3, 0]], ["5/3", "5/0"])
    assert same(kernel_grid(weight, filters=[2, 4], labels=True), weight[[2, 4], 0], ["2/0", "4/0"])
    assert same(kernel_grid(weight[:, :1], filters=[2, 4], labels=True), weight[[2, 4], 0], ["2", "4"])


def same(image: Image.Image, maps: torch.Tensor, labels: list[str]) -> bool:
    return np.array_equal(colours(image), colours(feature_grid(maps, labels=labels)))


def test_numbers_of_deep_layers_are_told_apart_on_small_tiles():
    maps = torch.zeros(3, 3, 3)
    labels = ["100/107", "100/117", "110/107"]  # the same where shortened to "10…7" or "1…7"
    pixels = colours(feature_grid(maps, labels=labels, nrow=3))[1 : 1 + HEADER, 1:]
    first, second, third = (pixels[:, at : at + 33] for at in (0, 34, 68))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert all(has_ink(part, WHITE) for part in (first, second, third))


def test_label_over_several_lines_stays_in_its_line():
    maps = ramp(2, 40, 40)
    assert same(feature_grid(maps, labels=["a\nb", "c\td"]), maps, ["a b", "c d"])


@pytest.mark.parametrize("kind", [np.array, tuple])
def test_labels_may_be_any_sequence(kind):
    maps = ramp(2, 40, 40)
    assert same(feature_grid(maps, labels=kind(["1", "2"])), maps, ["1", "2"])


LEGENDS = [{}, {"scale_each": True}, {"cmap": "hot"}, {"cmap": "RdBu_r"}, {"cmap": "gray"}]


@pytest.mark.parametrize("style", LEGENDS)
def test_legend_stands_below_and_changes_nothing_above(style):
    maps = ramp(5, 40, 40)
    maps[0, 3, 3] = math.nan
    plain, explained = feature_grid(maps, **style), feature_grid(maps, legend=True, **style)
    assert explained.mode == plain.mode
    above = colours(explained)[: plain.height, : plain.width]
    assert np.array_equal(above, colours(plain))
    background = tuple(colours(plain)[0, 0])
    assert has_ink(colours(explained)[plain.height :], background)
    assert not has_ink(colours(explained)[plain.height :, -1:], background)  # nothing is clipped


@pytest.mark.parametrize("cmap", ["gray", "hot", *SIGNED_MAPS])
def test_legend_shows_every_level_of_the_map_in_order(cmap):
    image = colours(feature_grid(ramp(4, 40, 40), cmap=cmap, legend=True))
    plain = feature_grid(ramp(4, 40, 40), cmap=cmap)
    scale = colours(feature_grid(torch.arange(251.0).reshape(1, 1, 251) - 125, cmap=cmap, padding=0))[0]
    bar = image[plain.height + 4 + 8]  # through the middle of the line of text
    starts = [at for at in range(len(bar) - 250) if np.array_equal(bar[at : at + 251], scale)]
    assert len(starts) == 1


def test_colour_legend_names_the_limits_in_words():
    weight = ramp(9, 3, 40, 40)
    first, second = kernel_grid(weight, legend=True), kernel_grid(weight * 2, legend=True)
    assert first.mode == "RGB"
    assert np.array_equal(colours(kernel_grid(weight)), colours(first)[:124, :124])
    assert not np.array_equal(colours(first)[124:], colours(second)[124:, : first.width])


@pytest.mark.parametrize(
    ("low", "high", "options", "line"),
    [
        (-1.0, 3.0, {}, "values from -1 to 3, zero is gray 64 of 255"),
        (-2.0, 0.5, {}, "values from -2 to 0.5, zero is gray 204 of 255"),
        (0.0, 2.0, {}, "values from 0 to 2, zero is gray 0 of 255"),
        (-2.0, 0.0, {}, "values from -2 to 0, zero is gray 255 of 255"),
        (-1.0, 3.0, {"value_range": (-4, 4)}, "values from -4 to 4, zero is gray 128 of 255"),
        (-1.0, 3.0, {"normalize": False}, "values from 0 to 1, zero is gray 0 of 255"),
        (0.5, 2.0, {}, "values from 0.5 to 2"),
        (-2.0, -0.5, {}, "values from -2 to -0.5"),
        (-1.0, 3.0, {"scale_each": True}, "each tile has its own range"),
    ],
)
def test_colour_legend_says_which_gray_is_zero(monkeypatch, low, high, options, line):
    weight = torch.linspace(low, high, 96).reshape(2, 3, 4, 4)
    weight[1, :, 0, 0] = torch.clamp(torch.zeros(3), low, high)
    lines: list[str] = []
    monkeypatch.setattr(lettering, "write_line", lambda image, at, text, *rest: lines.append(text))
    sheet = kernel_grid(weight, legend=True, padding=0, upscale=40, **options)
    assert lines == [line, "2 x 3 kernels of 4 x 4"]
    if "zero" in line:
        assert colours(sheet)[5, 165].tolist() == [int(line.split("gray ")[1].split()[0])] * 3


def legend_of(maps: torch.Tensor, **options: Any) -> np.ndarray:
    plain = feature_grid(maps, **options)
    return colours(feature_grid(maps, legend=True, **options))[plain.height :]


def test_legend_tells_close_limits_apart():
    near, far = legend_of(torch.tensor([[[1000.0, 1000.5]]])), legend_of(torch.tensor([[[1000.0, 1001.0]]]))
    assert near.shape != far.shape or not np.array_equal(near, far)


def test_long_layer_name_does_not_make_a_long_picture():
    model = nn.ModuleDict({"a" * 1000: nn.Conv2d(3, 2, 3)})
    assert kernel_grid(model, legend=True).width <= 640


def test_first_tiles_are_drawn_as_if_they_were_all_and_the_rest_is_mentioned():
    maps = ramp(20, 40, 40)
    few, chosen = feature_grid(maps, max_tiles=7), feature_grid(maps, channels=range(7))
    assert few.width >= chosen.width
    assert few.height > chosen.height
    assert np.array_equal(colours(few)[: chosen.height, : chosen.width], colours(chosen))
    assert has_ink(colours(few)[chosen.height :], DARK)


def test_enough_tiles_leave_nothing_to_mention():
    maps = ramp(5, 40, 40)
    assert feature_grid(maps, max_tiles=5).tobytes() == feature_grid(maps).tobytes()
    assert feature_grid(maps, max_tiles=99).tobytes() == feature_grid(maps).tobytes()


def test_labels_of_tiles_that_are_not_drawn_may_be_given():
    maps = ramp(5, 40, 40)
    names = ["a", "b", "c", "d", "e"]
    few = colours(feature_grid(maps, max_tiles=2, labels=names))
    expected = colours(feature_grid(maps[:2], labels=names[:2]))
    assert np.array_equal(few[: len(expected), : expected.shape[1]], expected)


# Files.


def test_saved_sheets_are_the_drawn_ones_and_take_the_place_of_older_ones(tmp_path):
    weight, maps = ramp(6, 3, 5, 5), ramp(6, 5, 5)
    path = tmp_path / "new" / "folders" / "sheet.png"
    assert save_kernel_grid(weight, path, labels=True) == path
    with Image.open(path) as read:
        assert read.mode == "RGB"
        assert np.array_equal(colours(read), colours(kernel_grid(weight, labels=True)))
    assert save_feature_grid(maps, str(path)) == path
    with Image.open(path) as read:
        assert read.mode == "P"
        assert np.array_equal(colours(read), colours(feature_grid(maps)))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_layer_is_given_after_the_path(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    with Image.open(save_kernel_grid(model, tmp_path / "k.png", "1")) as read:
        assert np.array_equal(colours(read), colours(kernel_grid(model[1].weight)))


def test_gray_sheets_are_saved_with_one_byte_a_pixel(tmp_path):
    with Image.open(save_feature_grid(torch.rand(2, 4, 4), tmp_path / "m.png")) as read:
        assert read.mode == "L"


@pytest.mark.parametrize(
    "failing",
    [
        lambda path: save_kernel_grid(torch.zeros(2, 3), path),
        lambda path: save_kernel_grid(torch.zeros(2, 3, 3, 3), path, filters=9),
        lambda path: save_kernel_grid(nn.Conv2d(3, 1, 1), path, "nothing"),
        lambda path: save_feature_grid(torch.zeros(2, 3), path),
        lambda path: save_feature_grid(torch.zeros(1, 2, 3, 3), path, sample=4),
    ],
)
def test_failure_leaves_the_old_file_and_makes_no_folder(tmp_path, failing):
    old = tmp_path / "old.png"
    old.write_bytes(b"precious")
    for path in (old, tmp_path / "new" / "sheet.png"):
        with pytest.raises((ValueError, LookupError), match=r"must|no layer"):
            failing(path)
    assert old.read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.png"]


def test_path_without_a_known_suffix_is_refused(tmp_path):
    with pytest.raises(PictureError, match=r"must end in a picture suffix.*append \.png"):
        save_kernel_grid(torch.zeros(1, 3, 3, 3), tmp_path / "sheet")
    assert list(tmp_path.iterdir()) == []


def test_file_where_a_folder_is_needed_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(PictureError, match="cannot write"):
        save_feature_grid(torch.zeros(1, 3, 3), tmp_path / "notes" / "sheet.png")
    assert (tmp_path / "notes").read_text() == "mine"


def test_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_feature_grid(torch.rand(1, 4, 4), tmp_path / "m.png")
    before = path.read_bytes()

    def break_off(self: Path, target: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", break_off)
    with pytest.raises(PictureError, match="no space left on device"):
        save_feature_grid(torch.rand(1, 4, 4), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.png"]


# Bad input: one clear message, whatever is wrong.

MAPS = torch.rand(4, 5, 5)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
    NESTED = torch.nested.nested_tensor([torch.rand(2, 4, 4), torch.rand(2, 4, 5)])
WEIGHT = torch.rand(4, 6, 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": False, "scale_each": True}, "`scale_each` has no effect with `normalize=False`"),
        ({"normalize": False, "value_range": (0, 1)}, "`value_range` has no effect with `normalize=False`"),
        ({"scale_each": True, "value_range": (0, 1)}, "exclude each other"),
        (
            {"interpolation": "bicubic", "upscale": 1},
            "`interpolation='bicubic'` has no effect with",
        ),
        ({"interpolation": "cubic"}, '"nearest", "bilinear" or "bicubic", got \'cubic\''),
        ({"cmap": "jett"}, "viridis, seismic, RdBu_r.*got 'jett'"),
        ({"nrow": 0}, "`nrow` must be at least 1, got 0"),
        ({"padding": -1}, "`padding` must be at least 0, got -1"),
        ({"upscale": 0}, "`upscale` must be at least 1, got 0"),
        ({"max_tiles": 0}, "`max_tiles` must be at least 1, got 0"),
        ({"labels": ["a"]}, "`labels` must be 4 strings, one per tile, got 1"),
        ({"labels": []}, "`labels` must be 4 strings, one per tile, got 0"),
        ({"channels": []}, "`channels` must choose at least one, got an empty list"),
        ({"channels": [0, 9]}, "`channels` must be indices from 0 to [35], got 9"),
        ({"channels": -1}, "`channels` must be indices from 0 to [35], got -1"),
        ({"upscale": 10_000}, r"the sheet would have [\d,]+ pixels .*; choose fewer tiles with `max_tiles`"),
    ],
)
def test_options_that_would_be_ignored_or_mean_nothing_raise(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        feature_grid(MAPS, **options)
    with pytest.raises(InvalidArgumentError, match=message):
        kernel_grid(WEIGHT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nrow": 2.0}, r"`nrow` must be an int, got 2\.0"),
        ({"padding": True}, "`padding` must be an int, got True"),
        ({"upscale": "2"}, "`upscale` must be an int, got '2'"),
        ({"cmap": None}, "`cmap` must be the name of a colour map or .* got NoneType"),
        ({"cmap": ["gray"]}, "`cmap` must be the name of a colour map or .* got list"),
        ({"value_range": 5}, r"`value_range` must be \(low, high\)"),
        ({"value_range": (None, 1)}, r"`value_range` must be .* got \(None, 1\)"),
        ({"labels": "abcd"}, "`labels` must be True or a list of 4 strings, got 'abcd'"),
        ({"labels": 4}, "`labels` must be True or a list of 4 strings, got 4"),
        ({"labels": None}, "`labels` must be True or a list of 4 strings, got None"),
        ({"channels": 1.0}, r"`channels` must be an int or a list of ints, got 1\.0"),
        ({"channels": "1"}, "`channels` must be an int or a list of ints, got '1'"),
        ({"channels": True}, "`channels` must be an int or a list of ints, got True"),
        ({"channels": [True, False, True, True]}, "`channels` must be an int or a list of ints"),
        ({"channels": torch.tensor([True, False])}, "`channels` must be an int or a list of ints"),
        ({"channels": np.array([True, False])}, "`channels` must be an int or a list of ints"),
        ({"channels": torch.tensor(1.0)}, "`channels` must be an int or a list of ints"),
    ],
)
def test_options_of_another_type_raise_type_error(options, message):
    with pytest.raises(InvalidTypeError, match=message):
        feature_grid(MAPS, **options)
    with pytest.raises(InvalidTypeError, match=message):
        kernel_grid(WEIGHT, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filters": 4}, InvalidArgumentError, "`filters` must be indices from 0 to 3, got 4"),
        ({"filters": []}, InvalidArgumentError, "`filters` must choose at least one"),
        ({"filters": [0.5]}, InvalidTypeError, r"`filters` must be an int or a list of ints, got \[0\.5\]"),
        (
            {"channels": [0, 1], "nrow": 3},
            InvalidArgumentError,
            "`nrow` has no effect where several channels",
        ),
        ({"layer": "0"}, InvalidArgumentError, "`layer` has no effect on a weight tensor"),
    ],
)
def test_options_of_kernels_that_cannot_be_met_raise(options, error, message):
    with pytest.raises(error, match=message):
        kernel_grid(WEIGHT, **options)


def test_columns_are_not_chosen_where_a_named_map_has_a_row_per_filter():
    with pytest.raises(InvalidArgumentError, match="`nrow` has no effect where several channels are drawn"):
        kernel_grid(torch.rand(4, 3, 5, 5), cmap="gray", nrow=2)


@pytest.mark.parametrize("shape", [(), (3,), (3, 3), (2, 0, 3, 3), (0, 1, 3, 3), (3, 4, 0), (1, 1, 1, 1, 1)])
def test_activations_without_maps_raise_with_their_shape(shape):
    text = str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InvalidArgumentError, match=rf"at least one pixel, got shape {text}"):
        feature_grid(torch.zeros(shape))


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (np.zeros((3, 4, 4)), "`activation` must be a tensor .*, got ndarray"),
        ((torch.zeros(3, 4, 4),), "got tuple; of a layer that puts out several tensors, choose one"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "real numbers to draw, got torch.complex64"),
        (
            torch.zeros(3, 4, 4, device="meta"),
            "real numbers to draw, got torch.float32 on meta; load its values",
        ),
        (
            torch.ones(3, 4, 4).to_sparse(),
            r"`activation` must be a dense tensor, got .*sparse_coo; .*\.to_dense\(\)`",
        ),
        (
            torch.ones(3, 4, 4).to_mkldnn(),
            r"must be a dense tensor, got layout torch\._mkldnn; .*\.to_dense\(\)`",
        ),
        (
            NESTED,
            r"must be one dense tensor, got a nested one; take its parts one by one with `\.unbind\(\)`",
        ),
    ],
)
def test_what_is_no_real_tensor_raises_type_error(activation, message):
    with pytest.raises(InvalidTypeError, match=message):
        feature_grid(activation)


@pytest.mark.parametrize(("shape", "sample"), [((2, 3, 4, 4), 2), ((2, 3, 4, 4), -1), ((3, 4, 4), 1)])
def test_sample_out_of_range_raises_with_the_shape(shape, sample):
    last = shape[0] - 1 if len(shape) == 4 else 0
    with pytest.raises(InvalidArgumentError, match=rf"from 0 to {last}, got {sample} \(shape \({shape[0]}, "):
        feature_grid(torch.zeros(shape), sample=sample)


@pytest.mark.parametrize("sample", [True, 0.0, "0", None])
def test_sample_that_is_no_integer_raises_type_error(sample):
    with pytest.raises(InvalidTypeError, match=f"`sample` must be an int, got {sample!r}"):
        feature_grid(torch.zeros(2, 3, 4, 4), sample=sample)


def test_largest_sheet_is_limited_by_its_own_pixels_only():
    with pytest.raises(InvalidArgumentError, match=r"pixels \(20000 tiles of 128 x 128\)"):
        feature_grid(torch.zeros(1).expand(20_000, 128, 128))
    few = feature_grid(torch.zeros(1).expand(20_000, 128, 128), max_tiles=2)
    assert few.size == (259, 154)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [{}, {"scale_each": True}, {"cmap": "hot", "labels": True, "legend": True}]
)
def test_cuda_tensors_are_drawn_as_on_the_cpu(options):
    maps = ramp(8, 1, 9, 9)
    maps[0, 0, 4, 4], maps[1, 0, 4, 4] = math.nan, math.inf
    here, there = feature_grid(maps[:, 0], **options), feature_grid(maps[:, 0].cuda(), **options)
    assert here.mode == there.mode
    difference = np.array(here).astype(int) - np.array(there).astype(int)
    assert np.abs(difference).max() <= 1
    weight = ramp(8, 3, 5, 5)
    assert kernel_grid(weight.cuda()).tobytes() == kernel_grid(weight).tobytes()
