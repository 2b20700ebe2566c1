"""Colour maps: published colours, an exact white middle, and special entries that look like no value."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.pixels import colours, same
from torchlens_viz import feature_grid, kernel_grid
from torchlens_viz.draw import palette as colormaps
from torchlens_viz.draw.palette import NAMES, SPECIAL_COLOURS, Colormap, colormap
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

DIVERGING = ["seismic", "RdBu_r"]

# What matplotlib publishes, as 8-bit colours at fractions of the map that fall on a level exactly.
ANCHORS = {
    "gray": {0.0: (0, 0, 0), 0.2: (51, 51, 51), 0.4: (102, 102, 102), 0.8: (204, 204, 204), 1.0: (255,) * 3},
    "hot": {0.0: (11, 0, 0), 1.0: (255, 255, 255)},
    "seismic": {0.0: (0, 0, 77), 0.5: (255, 255, 255), 1.0: (128, 0, 0)},
    # ColorBrewer's eleven RdBu colours, but for the middle, which there is (247, 247, 247).
    "viridis": {0.0: (68, 1, 84), 0.2: (65, 68, 135), 0.4: (42, 120, 142), 1.0: (253, 231, 37)},
    "RdBu_r": {
        0.0: (5, 48, 97),
        0.1: (33, 102, 172),
        0.2: (67, 147, 195),
        0.3: (146, 197, 222),
        0.4: (209, 229, 240),
        0.5: (255, 255, 255),
        0.6: (253, 219, 199),
        0.7: (244, 165, 130),
        0.8: (214, 96, 77),
        0.9: (178, 24, 43),
        1.0: (103, 0, 31),
    },
}


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE lightness of 8-bit sRGB colours, by the definition."""
    part = colours / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > (6 / 29) ** 3, 116 * np.cbrt(luminance) - 16, luminance * (29 / 3) ** 3)


@pytest.mark.parametrize("name", NAMES)
def test_every_map_has_251_levels_and_256_entries(name):
    colours = colormap(name)
    assert (colours.name, colours.levels.shape, colours.levels.dtype) == (name, (251, 3), np.uint8)
    assert (colours.palette.shape, colours.palette.dtype) == ((256, 3), np.uint8)
    assert np.array_equal(colours.palette[:251], colours.levels)
    assert (colormaps.PADDING, colormaps.TEXT) == (251, 255)
    assert [colormaps.NAN, colormaps.POSITIVE_INFINITY, colormaps.NEGATIVE_INFINITY] == [252, 253, 254]


@pytest.mark.parametrize(("name", "at"), [(name, at) for name in NAMES for at in ANCHORS[name]])
def test_anchor_colours_are_the_published_ones(name, at):
    assert tuple(colormap(name).levels[round(at * 250)].tolist()) == ANCHORS[name][at]


def test_hot_is_full_red_where_green_begins_and_full_green_where_blue_begins():
    red, green, blue = colormap("hot").levels.astype(int).T
    at = np.linspace(0, 1, 251)
    assert (red[at > 0.365079] == 255).all()
    assert (green[at < 0.365079] == 0).all()
    assert (green[at > 0.746032] == 255).all()
    assert (blue[at < 0.746032] == 0).all()
    halfway = (0.365079 + 0.746032) / 2
    assert green[round(halfway * 250)] == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("name", ["gray", "hot"])
def test_sequential_maps_get_lighter_with_every_level(name):
    assert (np.diff(lightness(colormap(name).levels)) > 0).all()
    assert not colormap(name).diverging


@pytest.mark.parametrize("name", DIVERGING)
def test_diverging_maps_are_white_at_zero_and_nowhere_else(name):
    colours = colormap(name)
    assert colours.diverging
    assert np.flatnonzero((colours.levels == 255).all(1)).tolist() == [125]


@pytest.mark.parametrize("name", DIVERGING)
def test_positive_is_red_and_negative_is_blue(name):
    red, _, blue = colormap(name).levels.astype(int).T
    assert (red[126:] > blue[126:]).all()
    assert (blue[:125] > red[:125]).all()


@pytest.mark.parametrize("name", DIVERGING)
def test_diverging_maps_get_darker_away_from_zero(name):
    light = lightness(colormap(name).levels)
    assert (np.diff(light[125:]) < 0).all()
    assert (np.diff(light[:126]) > 0).all()


def test_the_arms_of_rdbu_match_in_lightness():
    light = lightness(colormap("RdBu_r").levels)
    assert np.abs(light[:125][::-1] - light[126:]).max() < 12


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_looks_like_no_level_no_padding_and_no_text(name):
    colours = colormap(name)
    special = {code: np.array(colour, float) for code, colour in SPECIAL_COLOURS.items()}
    assert len(special) == 3
    for code, colour in special.items():
        assert np.array_equal(colours.palette[code], colour)
        others = np.delete(colours.palette.astype(float), code, axis=0)
        assert np.linalg.norm(others - colour, axis=1).min() > 130, code


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_white_and_text_on_it_black(name):
    colours = colormap(name)
    assert colours.palette[[colours.page, colormaps.TEXT]].tolist() == [[255] * 3, [0] * 3]
    assert colours.page == (125 if colours.diverging else colormaps.PADDING)


def test_the_page_of_a_map_without_white_in_its_middle_is_white_all_the_same():
    gray = np.repeat(np.linspace(0, 200, 251).astype(np.uint8)[:, None], 3, 1)
    colours = Colormap("dark", gray, diverging=True)
    assert colours.page == colormaps.PADDING
    assert colours.palette[colours.page].tolist() == [255] * 3
    pale = np.repeat(np.linspace(245, 247, 251).astype(np.uint8)[:, None], 3, 1)
    assert Colormap("pale", pale, diverging=True).page == 125  # padding in white would not show


@pytest.mark.parametrize("name", DIVERGING)
def test_padding_of_diverging_maps_looks_like_no_level(name):
    colours = colormap(name)
    distance = np.linalg.norm(colours.levels.astype(float) - colours.palette[colormaps.PADDING], axis=1)
    assert distance.min() > 60


def test_levels_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        colormap("gray").levels[0] = 1


def test_unknown_names_are_answered_with_the_known_ones(monkeypatch):
    with pytest.raises(InvalidArgumentError, match=r"gray, hot, viridis, seismic, RdBu_r.*got \'grey2\'"):
        colormap("grey2")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        InvalidArgumentError, match=r"got \'jet\'; matplotlib, which is not installed, has more"
    ):
        colormap("jet")


def test_names_that_matplotlib_knows_are_taken_from_it():
    matplotlib = pytest.importorskip("matplotlib")
    for name, diverging in (("magma", False), ("coolwarm", True), ("RdBu", True), ("coolwarm_r", True)):
        colours = colormap(name)
        expected = matplotlib.colormaps[name](np.linspace(0, 1, 251))[:, :3] * 255
        assert np.abs(colours.levels - expected).max() <= 0.5
        assert colours.diverging is diverging
    with pytest.raises(InvalidArgumentError, match="got 'magna'; did you mean magma"):
        colormap("magna")


@pytest.mark.parametrize("name", ["gray", "hot", "seismic", "viridis"])
def test_our_own_maps_are_matplotlibs_within_one_of_its_256_steps(name):
    matplotlib = pytest.importorskip("matplotlib")
    theirs = matplotlib.colormaps[name]
    step = np.abs(np.diff(theirs(np.arange(256))[:, :3] * 255, axis=0)).max()
    expected = theirs(np.linspace(0, 1, 251))[:, :3] * 255
    assert np.abs(colormap(name).levels - expected).max() <= step


def test_a_table_of_colours_is_a_map_without_a_middle():
    table = np.stack([np.arange(256), np.zeros(256), 255 - np.arange(256)], 1).astype(np.uint8)
    colours = colormap(table)
    assert not colours.diverging
    assert colours.levels[[0, 250]].tolist() == [[0, 0, 255], [255, 0, 0]]
    assert (np.diff(colours.levels[:, 0].astype(int)) >= 1).all()
    assert colormap(colours) is colours


@pytest.mark.parametrize("table", [np.zeros((255, 3), np.uint8), np.zeros((256, 3)), np.zeros(256, np.uint8)])
def test_tables_of_another_shape_or_type_are_refused(table):
    with pytest.raises(InvalidArgumentError, match=r"`cmap` must be \(256, 3\) uint8 where it is an array"):
        colormap(table)


@pytest.mark.parametrize("name", [None, 3, ["gray"]])
def test_what_is_neither_name_nor_table_raises_type_error(name):
    with pytest.raises(
        InvalidTypeError, match=f"name of a colour map or an array.*got {type(name).__name__}"
    ):
        colormap(name)


# Colour maps of the caller.


def test_table_of_colours_is_used_from_its_first_to_its_last():
    table = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 7)], 1).astype(np.uint8)
    maps = torch.arange(251.0).reshape(1, 1, 251)
    pixels = colours(feature_grid(maps, cmap=table, padding=0, upscale=1))[0]
    expected = table[np.rint(np.linspace(0, 255, 251)).astype(int)]
    assert np.array_equal(pixels, expected)
    assert np.array_equal(pixels[[0, -1]], table[[0, -1]])
    signed = colours(feature_grid(maps - 100, cmap=table, padding=0, upscale=1))[0]
    assert np.array_equal(signed, expected)  # a table has no middle


def test_colormap_object_is_used_as_it_is():
    maps = torch.randn(3, 5, 5)
    assert same(feature_grid(maps, cmap=colormap("seismic")), feature_grid(maps, cmap="seismic"))
    levels = np.repeat(np.arange(251, dtype=np.uint8)[:, None], 3, 1)
    own = Colormap("mine", levels, diverging=True)
    image = feature_grid(torch.tensor([[[-4.0, 0.0, 1.0]]]), cmap=own, padding=0, upscale=1)
    assert colours(image)[0, :, 0].tolist() == [0, 125, 156]


@pytest.mark.parametrize("name", ["magma", "coolwarm", "gray_r"])
def test_any_map_of_matplotlib_is_known_where_it_is_installed(name):
    matplotlib = pytest.importorskip("matplotlib")
    maps = torch.arange(251.0).reshape(1, 1, 251) - (125 if name == "coolwarm" else 0)
    pixels = colours(feature_grid(maps, cmap=name, padding=0, upscale=1))[0]
    expected = np.rint(matplotlib.colormaps[name](np.linspace(0, 1, 251))[:, :3] * 255)
    assert np.array_equal(pixels, expected)


def test_map_of_a_colour_kernel_draws_its_channels_apart():
    weight = torch.rand(2, 3, 4, 4)
    table = np.zeros((256, 3), np.uint8)
    assert same(kernel_grid(weight, cmap=table), feature_grid(weight.flatten(0, 1), cmap=table, nrow=3))


@pytest.mark.parametrize(
    "table", [np.zeros((255, 3), np.uint8), np.zeros((256, 3)), np.zeros((256, 4), np.uint8)]
)
def test_tables_of_another_shape_raise(table):
    with pytest.raises(
        InvalidArgumentError, match=r"`cmap` must be \(256, 3\) uint8 where it is an array, got "
    ):
        feature_grid(torch.rand(2, 3, 3), cmap=table)
