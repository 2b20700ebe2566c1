"""Sprites hold the values they were given, where their blocks say."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchlens_viz.album.album import Album
from torchlens_viz.album.shelf import Shelf
from torchlens_viz.album.sprite import (
    Range,
    Sprite,
    as_bytes,
    coded,
    colours_for,
    fitted,
    gradient,
    photograph,
    robust_range,
    shrunk,
)
from torchlens_viz.draw.palette import NAN, PADDING, POSITIVE_INFINITY


def test_one_outlier_does_not_set_the_limits():
    values = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([200.0])])
    limits = robust_range([values], signed=True)
    expected = np.sort(np.abs(values.numpy()))[round(0.995 * 10_000) - 1]
    assert limits.high == pytest.approx(expected)
    assert limits.low == -limits.high
    assert limits.beyond == pytest.approx((values.abs() > expected).float().mean().item())


def test_limits_of_what_is_never_negative_begin_at_zero():
    limits = robust_range([torch.linspace(0, 10, 1001), torch.tensor([torch.nan, torch.inf])], signed=False)
    assert (limits.low, limits.signed) == (0.0, False)
    assert limits.high == pytest.approx(9.95, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("signed", [True, False])
def test_a_constant_has_limits_that_hold_it(value, signed):
    limits = robust_range([torch.full((5, 5), value)], signed=signed)
    assert limits.low <= value <= limits.high
    assert limits.beyond == 0


def test_where_nearly_all_is_zero_the_largest_value_is_the_limit():
    values = torch.zeros(10_000)
    values[0] = 7.0
    assert robust_range([values], signed=False).high == 7.0
    assert robust_range([values], signed=True).high == 7.0


@pytest.mark.parametrize("values", [[], [torch.tensor([torch.nan])]])
def test_without_a_finite_value_there_are_limits(values):
    assert robust_range(values, signed=True)[:2] == (-1.0, 1.0)


def test_values_become_the_nearest_colours():
    tiles = torch.tensor([[[-2.0, -1.0, 0.0], [1.0, 2.0, 9.0]]])
    codes = coded(tiles, Range(-2.0, 2.0, 0.0, True))
    assert codes.tolist() == [[[0, 63, 125], [188, 250, 250]]]
    assert colours_for(Range(-2.0, 2.0, 0.0, True)).palette[125].tolist() == [255, 255, 255]


def test_what_is_not_finite_has_colours_of_its_own():
    codes = coded(torch.tensor([[[torch.nan, torch.inf, 0.0]]]), Range(-1.0, 1.0, 0.0, True))
    assert codes.tolist() == [[[NAN, POSITIVE_INFINITY, 125]]]


def test_every_tile_stands_where_its_classes_say():
    sprite = Sprite(3)
    first = np.arange(150 * 8 * 8).reshape(150, 8, 8) % 200
    second = np.arange(5 * 2 * 30).reshape(5, 2, 30) % 200
    blocks = [sprite.add(number, each.astype(np.uint8)) for number, each in ((7, first), (8, second))]
    image = Image.open(io.BytesIO(sprite.as_values(colours_for(Range(-1.0, 1.0, 0.0, True)))))
    whole = np.asarray(image)
    assert sprite.size == image.size
    for block, tiles in zip(blocks, (first, second), strict=True):
        for place, tile in enumerate(tiles):
            kind, own, column, row = block.tile(place).split()
            assert (kind, own) == ("t", f"b{block.number}")
            x = int(column[1:]) * (block.width + 1)
            y = block.y + int(row[1:]) * (block.height + 1)
            assert np.array_equal(whole[y : y + block.height, x : x + block.width], tile)
            assert int(row[1:]) < block.rows
            assert int(column[1:]) < block.columns


def test_what_is_between_tiles_is_clear():
    sprite = Sprite(0)
    sprite.add(0, np.zeros((2, 3, 3), np.uint8))
    image = Image.open(io.BytesIO(sprite.as_values(colours_for(Range(-1.0, 1.0, 0.0, True)))))
    assert image.info["transparency"] == PADDING
    assert np.asarray(image.convert("RGBA"))[0, :, 3].tolist() == [255] * 3 + [0] + [255] * 3 + [0]


def test_large_maps_shrink_to_means_of_squares():
    maps = torch.arange(36.0).view(1, 6, 6)
    small, factor = shrunk(maps, 3)
    expected = maps[0].view(3, 2, 3, 2).mean((1, 3))
    assert factor == 2
    assert torch.equal(small[0], expected)
    assert shrunk(maps, 6) == (maps, 1)
    assert shrunk(torch.ones(2, 7, 5), 3)[0].shape == (2, 3, 2)


def test_a_picture_is_fitted_amid_gray():
    tile = fitted(torch.ones(3, 4, 8), 4)
    assert tile.shape == (4, 4, 3)
    assert tile[:, 0, 0].tolist() == [128, 255, 255, 128]
    assert fitted(torch.zeros(3, 0, 4), 2).tolist() == np.full((2, 2, 3), 128).tolist()


def test_addresses_hold_their_pictures():
    picture = as_bytes(torch.rand(3, 8, 8))
    encoded = photograph(picture)
    assert data_uri(encoded).startswith("data:image/webp;base64,UklGR")
    sprite = Sprite(0)
    sprite.add(0, np.zeros((1, 2, 2, 3), np.uint8))
    assert data_uri(sprite.as_colours()).startswith("data:image/png;base64,iVBOR")


def test_without_webp_photographs_are_jpeg(monkeypatch):
    monkeypatch.setattr("torchlens_viz.album.sprite.features.check", lambda name: False)
    encoded = photograph(as_bytes(torch.rand(3, 8, 8)))
    assert data_uri(encoded).startswith("data:image/jpeg;base64,")


def data_uri(picture):
    return Shelf(Path("page.html"), None).address(picture, "name")


def test_a_scale_has_white_in_the_middle():
    colours = gradient(Range(-3.0, 3.0, 0.0, True)).split(",")
    assert (colours[0], colours[5], colours[-1]) == ("#053061", "#ffffff", "#67001f")
    assert gradient(Range(0.0, 3.0, 0.0, False)).split(",")[::10] == ["#000000", "#ffffff"]


def test_sprites_have_numbers_of_their_own():
    album = Album(shelf=Shelf(Path("page.html"), None))
    first, second = album.sprite(), album.sprite()
    view = album.add(second, np.zeros((1, 5, 5), np.uint8), None, "note")
    assert (first.number, second.number, view.block.sprite, view.block.number) == (0, 1, 1, 0)
    assert (view.factor, view.large) == (13, 33)
    for side, large in ((42, 4), (112, 1.5), (168, 1), (336, 0.5)):
        wide = album.add(second, np.zeros((1, 5, side), np.uint8), None, "note")
        assert wide.large == large
