"""`kernel_grid`: which kernels a sheet shows, and in which form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.utils import make_grid as torchvision_grid

from tests.pixels import (
    SIGNED_MAPS,
    STYLES,
    WEIGHT,
    assert_drawn_as_promised,
    ramp,
    ranked,
    same,
    style_names,
    written,
)
from torchlens_viz import feature_grid, kernel_grid
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

# The pixels.


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


# Bad input: one clear message, whatever is wrong.


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


# Kernels of one pixel, and of three dimensions.


def test_kernels_of_one_pixel_are_one_picture():
    weight = torch.randn(6, 9, 1, 1)
    assert same(kernel_grid(weight), feature_grid(weight[None, :, :, 0, 0], upscale=12))
    assert kernel_grid(weight).size == (9 * 12 + 2, 6 * 12 + 2)
    chosen = kernel_grid(weight, filters=[4, 0], channels=[8, 1, 1])
    assert same(chosen, feature_grid(weight[[4, 0]][:, [8, 1, 1], 0, 0][None], upscale=12))


def test_large_matrix_is_as_large_as_its_numbers():
    assert kernel_grid(torch.randn(900, 100, 1, 1), padding=0).size == (100, 900)
    assert kernel_grid(torch.randn(256, 64, 1, 1), padding=0).size == (64 * 3, 256 * 3)


def test_matrix_is_ranked_by_rows_and_says_so(monkeypatch):
    weight = torch.randn(6, 9, 1, 1)
    lines = written(monkeypatch)
    sheet = kernel_grid(weight, sort_by="norm", legend=True)
    assert same(kernel_grid(weight, sort_by="norm"), kernel_grid(weight, filters=ranked(weight, "norm")))
    assert sheet.mode == "RGB"
    words = ["6 x 9 kernels of 1 x 1", "rows: filters, ranked by norm; columns: input channels"]
    assert " ".join(lines[2:]) == " ".join(words)


def test_kernels_of_one_pixel_and_three_channels_are_colours():
    weight = torch.rand(4, 3, 1, 1)
    assert kernel_grid(weight).mode == "RGB"
    assert same(
        kernel_grid(weight, cmap="hot"), feature_grid(weight[None, :, :, 0, 0], upscale=12, cmap="hot")
    )


@pytest.mark.parametrize("options", [{"labels": True}, {"nrow": 2}, {"max_tiles": 3}])
def test_options_of_tiles_raise_on_a_matrix(options):
    with pytest.raises(
        InvalidArgumentError, match=r"`labels`, `nrow` and `max_tiles` have no effect on kernels of"
    ):
        kernel_grid(torch.rand(4, 5, 1, 1), **options)


@pytest.mark.parametrize("inputs", [1, 4])
def test_slices_of_a_3d_kernel_make_a_row(inputs):
    weight = torch.randn(3, inputs, 4, 5, 6)
    tiles = weight[:, 0].flatten(0, 1)
    assert same(kernel_grid(weight), feature_grid(tiles, nrow=4))
    names = [f"{filter_}{'/0' if inputs > 1 else ''}@{depth}" for filter_ in range(3) for depth in range(4)]
    assert same(kernel_grid(weight, labels=True), feature_grid(tiles, nrow=4, labels=names))


def test_slices_of_several_channels_stand_in_one_row():
    weight = torch.randn(2, 5, 3, 4, 4)
    tiles = weight[:, [4, 1]].flatten(0, 2)
    names = [f"{row}/{plane}@{depth}" for row in (0, 1) for plane in (4, 1) for depth in range(3)]
    sheet = kernel_grid(weight, channels=[4, 1], labels=True)
    assert same(sheet, feature_grid(tiles, nrow=6, labels=names))


def test_slices_of_colour_kernels_are_in_colour():
    weight = torch.randn(3, 3, 4, 5, 6)
    sheet = kernel_grid(weight)
    tiles = weight.transpose(1, 2).flatten(0, 1)
    assert sheet.mode == "RGB"
    assert same(sheet, kernel_grid(tiles, nrow=4))
    names = [f"{filter_}/{depth}" for filter_ in range(3) for depth in range(4)]
    assert same(kernel_grid(weight, labels=True), kernel_grid(tiles, nrow=4, labels=names))


def test_columns_of_slices_are_not_chosen():
    with pytest.raises(InvalidArgumentError, match=r"`nrow` has no effect where several channels are drawn"):
        kernel_grid(torch.rand(2, 1, 3, 4, 4), nrow=2)
