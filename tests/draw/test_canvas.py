"""Tiles on a sheet, pixel by pixel, against a plain numpy drawing of the documented contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.pixels import (
    CYAN,
    GREEN,
    HEADER,
    MAGENTA,
    SIGNED_MAPS,
    STYLES,
    WHITE,
    assert_drawn_as_promised,
    colours,
    has_ink,
    ramp,
    written,
)
from torchlens_viz import feature_grid, kernel_grid
from torchlens_viz.draw.text import text_width
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.grids.features import feature_sheet

# The contract in numpy, one tile and one pixel at a time where that is plainest.


def test_the_comparison_can_fail():
    values = ramp(5, 1, 4, 6)
    image = feature_grid(values[:, 0])
    assert_drawn_as_promised(image, values)
    changed = image.copy()
    changed.putpixel((40, 5), (12, 34, 56))
    for other, options in ((changed, {}), (image, {"scale_each": True}), (image, {"nrow": 2})):
        with pytest.raises(AssertionError, match="assert"):
            assert_drawn_as_promised(other, values, **options)


# The pixels.


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


@pytest.mark.parametrize(("value", "colour"), [(0.0, 0), (3.0, 128), (-3.0, 128)])
def test_constant_map_is_drawn_as_such(value, colour):
    image = feature_grid(torch.full((1, 4, 4), value), padding=0)
    assert image.mode == "RGB"
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
    widest = max(text_width(str(index)) for index in range(count)) if layout["labels"] else 0
    across = max(width * factor + padding, widest + 6 if widest else 0)  # a cell is as wide as its label
    down = height * factor + header + padding
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
    pixels = np.array(feature_sheet(maps, interpolation="bilinear", upscale=7, padding=0, nrow=4))
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
    levels = np.array(feature_sheet(maps, interpolation="bicubic", upscale=4, padding=0))
    assert levels.max() == 250
    assert levels.min() == 0
    assert levels.mean() == pytest.approx(125, abs=1)


# The number of tiles.


def test_first_tiles_are_drawn_as_if_they_were_all_and_the_rest_is_mentioned():
    maps = ramp(20, 40, 40)
    few, chosen = feature_grid(maps, max_tiles=7), feature_grid(maps, channels=range(7))
    assert few.width >= chosen.width
    assert few.height > chosen.height
    assert np.array_equal(colours(few)[: chosen.height, : chosen.width], colours(chosen))
    assert has_ink(colours(few)[chosen.height :], WHITE)


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


# Limits and devices.


def test_largest_sheet_is_limited_by_its_own_pixels_only():
    with pytest.raises(InvalidArgumentError, match=r"pixels \(20000 tiles of 128 x 128\)"):
        feature_grid(torch.zeros(1).expand(20_000, 128, 128))
    few = feature_grid(torch.zeros(1).expand(20_000, 128, 128), max_tiles=2)
    assert few.size == (259, 160)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [{}, {"scale_each": True}, {"cmap": "hot", "labels": True, "legend": True}]
)
def test_cuda_tensors_are_drawn_as_on_the_cpu(options):
    maps = ramp(8, 1, 9, 9)
    maps[0, 0, 4, 4], maps[1, 0, 4, 4] = math.nan, math.inf
    here, there = feature_sheet(maps[:, 0], **options), feature_sheet(maps[:, 0].cuda(), **options)
    assert here.mode == there.mode
    difference = np.array(here).astype(int) - np.array(there).astype(int)
    assert np.abs(difference).max() <= 1
    weight = ramp(8, 3, 5, 5)
    assert kernel_grid(weight.cuda()).tobytes() == kernel_grid(weight).tobytes()


# Pages.


@pytest.mark.parametrize("rank", [None, "mean"])
@pytest.mark.parametrize("size", [1, 3, 4, 6, 12])
def test_every_tile_is_on_exactly_one_page(size, rank):
    values = torch.arange(12.0).flip(0)[:, None, None].expand(12, 32, 32)
    seen = []
    for page in range(math.ceil(12 / size)):
        options = {"max_tiles": size, "page": page, "value_range": (0, 250), "padding": 0, "nrow": 1}
        pixels = np.array(feature_sheet(values, sort_by=rank, cmap="viridis", **options))
        seen += [int(pixels[top, 0]) for top in range(0, 32 * min(size, 12 - page * size), 32)]
    assert sorted(seen) == list(range(12))
    assert seen == sorted(seen, reverse=True)


def test_page_of_kernels_is_the_sheet_of_its_filters():
    weight = torch.rand(10, 3, 40, 40)
    part = kernel_grid(weight, filters=range(8, 10), value_range=(0, 1))
    page = colours(kernel_grid(weight, max_tiles=4, page=2, value_range=(0, 1)))
    assert np.array_equal(page[: part.height, : part.width], colours(part))


@pytest.mark.parametrize(
    "draw",
    [
        lambda **page: feature_grid(torch.rand(10, 3, 3), **page),
        lambda **page: kernel_grid(torch.rand(10, 3, 3, 3), **page),
    ],
)
def test_pages_that_do_not_exist_raise(draw):
    with pytest.raises(InvalidArgumentError, match=r"`page` must be below 3 \(10 tiles, 4 on each\), got 3"):
        draw(max_tiles=4, page=3)
    with pytest.raises(InvalidArgumentError, match=r"`page` must be at least 0, got -1"):
        draw(max_tiles=4, page=-1)
    with pytest.raises(InvalidArgumentError, match=r"`page` has no effect without `max_tiles`"):
        draw(page=1)
    with pytest.raises(InvalidTypeError, match=r"`page` must be an int, got 1\.0"):
        draw(max_tiles=4, page=1.0)


# Pages of rows: a filter's tiles stay together, in their columns.


@pytest.mark.parametrize("rank", [None, "norm"])
@pytest.mark.parametrize("most", [3, 4, 5, 6, 8, 14, 15, 99])
@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (torch.rand(5, 6, 32, 32), {"channels": [4, 1, 0]}),
        (torch.rand(5, 3, 32, 32), {"cmap": "gray"}),
        (torch.rand(5, 1, 3, 32, 32), {}),
        (torch.rand(5, 3, 3, 32, 32), {}),
    ],
    ids=["channels", "named map", "slices", "slices in colour"],
)
def test_pages_hold_whole_rows(monkeypatch, weight, options, most, rank):
    options = {**options, "value_range": (0, 1), "padding": 0, "upscale": 1, "sort_by": rank}
    whole = colours(kernel_grid(weight, **options))
    assert whole.shape == (5 * 32, 3 * 32, 3)
    size = most // 3 * 3
    pages = math.ceil(15 / size)
    lines = written(monkeypatch)
    for page in range(pages):
        pixels = colours(kernel_grid(weight, max_tiles=most, page=page, **options))
        expected = whole[page * size // 3 * 32 : (page + 1) * size // 3 * 32]
        assert np.array_equal(pixels[: len(expected), :96], expected), page
    by = "" if rank is None else f", ranked by {rank}"
    counts = [f"{start + 1} to {min(start + size, 15)}" for start in range(size, 15, size)]
    assert lines == [f"{count} of 15 shown{by}" for count in [str(size), *counts]] * (pages > 1)
    with pytest.raises(InvalidArgumentError, match=rf"below {pages} \(15 tiles, {size} on each\), got 5"):
        kernel_grid(weight, max_tiles=most, page=5, **options)


def test_labels_of_the_caller_go_with_the_rows_of_a_page():
    weight, names = torch.rand(4, 5, 40, 40), [f"tile {index}" for index in range(8)]
    options = {"channels": [1, 3], "value_range": (0, 1)}
    second = colours(kernel_grid(weight, labels=names, max_tiles=5, page=1, **options))
    expected = colours(kernel_grid(weight, labels=names[4:], filters=[2, 3], **options))
    assert np.array_equal(second[: len(expected), : expected.shape[1]], expected)


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (torch.rand(5, 6, 3, 3), {"channels": [4, 1, 0]}),
        (torch.rand(1, 3, 3, 3), {"cmap": "gray"}),
        (torch.rand(5, 1, 3, 3, 3), {}),
    ],
)
def test_fewer_tiles_than_a_row_has_raise(weight, options):
    with pytest.raises(
        InvalidArgumentError, match=r"`max_tiles` must be at least 3, .* got 2; raise it, or choose fewer"
    ):
        kernel_grid(weight, max_tiles=2, **options)
