"""Words on a sheet: labels, titles, legends and counts, in any script, beside pixels that do not change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from tests.pixels import HEADER, SIGNED_MAPS, WHITE, colours, has_ink, ramp, same, written
from torchlens_viz import feature_grid, kernel_grid
from torchlens_viz.draw import canvas
from torchlens_viz.draw import text as lettering
from torchlens_viz.errors import InvalidTypeError
from torchlens_viz.grids.features import feature_sheet

TEXTS = ("features.0: scale of step 0, 0.0% beyond", "-0.123", "jgyÅÇ _", "ffi AVATAR", "", "  a ", "ó…/")


@pytest.mark.parametrize("size", [lettering.SIZE, lettering.TITLE_SIZE])
@pytest.mark.parametrize(
    ("mode", "fill", "ground"),
    [("P", 3, 0), ("L", 0, 255), ("L", 255, 10), ("RGB", (255, 10, 99), (3, 200, 30))],
)
def test_a_line_is_written_as_pillow_writes_it(mode, fill, ground, size):
    for text in TEXTS:
        for at in ((4, 5), (0, 0), (-3, -2), (190, 8)):  # cut off at an edge, too
            expected = Image.new(mode, (200, 20), ground)
            written, font = lettering._lettered(text, size)
            ImageDraw.Draw(expected).text(at, written, fill=fill, font=font)
            for _ in range(2):  # the second time from memory
                found = Image.new(mode, (200, 20), ground)
                lettering.write_line(found, at, text, fill, size)
                assert np.array_equal(np.asarray(found), np.asarray(expected)), (text, at)


# Labels and legend.


def tile_areas(image: Image.Image, count: int, columns: int, size: int, padding: int, header: int) -> list:
    pixels = colours(image)
    areas = []
    for index in range(count):
        top = padding + header + index // columns * (size + header + padding)
        left = padding + index % columns * (size + padding)
        areas.append(pixels[top : top + size, left : left + size])
    return areas


@pytest.mark.parametrize("labels", [True, ["first", "second", "third", "a very long label indeed", "ü"]])
@pytest.mark.parametrize("cmap", ["gray", "RdBu_r"])
def test_labels_stand_above_their_tiles_and_change_no_pixel_of_them(labels, cmap):
    maps = ramp(5, 180, 180)
    plain = feature_grid(maps, cmap=cmap, padding=2)
    labelled = feature_grid(maps, cmap=cmap, padding=2, labels=labels)
    assert labelled.mode == plain.mode
    assert labelled.size == (plain.width, plain.height + 2 * HEADER)
    for before, after in zip(
        tile_areas(plain, 5, 3, 180, 2, 0), tile_areas(labelled, 5, 3, 180, 2, HEADER), strict=True
    ):
        assert np.array_equal(before, after)
    pixels = colours(labelled)
    for index in range(5):
        top, left = 2 + index // 3 * (180 + HEADER + 2), 2 + index % 3 * 182
        assert has_ink(pixels[top : top + HEADER - 1, left : left + 180], WHITE), index
    gap = pixels[2 : 1 + HEADER, [182, 183, 364, 365, 546, 547]]
    assert not has_ink(gap, WHITE)  # neighbours do not run into each other
    assert not has_ink(pixels[-180 - HEADER :, -182:], WHITE)  # there is no sixth tile


def test_labels_differ_where_their_texts_do():
    maps = ramp(3, 40, 40)
    headers = [colours(feature_grid(maps, labels=labels))[:HEADER] for labels in (["a"] * 3, ["b"] * 3)]
    assert not np.array_equal(*headers)


def test_default_labels_are_the_indices_of_channels_and_filters():
    maps, weight = ramp(9, 40, 40), ramp(6, 4, 40, 40)
    assert is_labelled(feature_grid(maps, channels=[8, 3], labels=True), maps[[8, 3]], ["8", "3"])
    rows = kernel_grid(weight, filters=[5], channels=[3, 0], labels=True)
    assert is_labelled(rows, weight[5, [3, 0]], ["5/3", "5/0"])
    assert is_labelled(kernel_grid(weight, filters=[2, 4], labels=True), weight[[2, 4], 0], ["2/0", "4/0"])
    assert is_labelled(kernel_grid(weight[:, :1], filters=[2, 4], labels=True), weight[[2, 4], 0], ["2", "4"])


def is_labelled(image: Image.Image, maps: torch.Tensor, labels: list[str]) -> bool:
    return np.array_equal(colours(image), colours(feature_grid(maps, labels=labels)))


def test_numbers_of_deep_layers_are_told_apart_on_small_tiles():
    maps = torch.zeros(3, 3, 3)
    labels = ["100/107", "100/117", "110/107"]  # the same where shortened to "10…7" or "1…7"
    cell = max(map(lettering.text_width, labels)) + 6
    pixels = colours(feature_grid(maps, labels=labels, nrow=3))[1 : 1 + HEADER, 1:]
    first, second, third = (pixels[:, at : at + cell] for at in (0, cell, 2 * cell))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert all(has_ink(part, WHITE) for part in (first, second, third))


@pytest.mark.parametrize("upscale", [1, 8])
def test_a_label_wider_than_its_tile_is_whole_and_makes_the_cell_wider(monkeypatch, upscale):
    maps, labels = ramp(6, 11, 11), ["0: 0.123 #8", "0: 0.0456 #10", "", "1", "1: -0.3 #7", "1: 2e-05 #9"]
    lines = written(monkeypatch)
    sheet = feature_grid(maps, labels=labels, nrow=3, upscale=upscale)
    assert lines == labels
    tile, widest = 11 * upscale, max(map(lettering.text_width, labels))
    across = max(tile + 1, widest + 6)
    assert sheet.size == (3 * across + 1, 2 * (tile + HEADER + 1) + 1)
    pixels, plain = colours(sheet), colours(feature_grid(maps, nrow=3, upscale=upscale))
    for index in range(6):
        top, left = 1 + HEADER + index // 3 * (HEADER + tile + 1), 1 + index % 3 * across
        alone = plain[1 + index // 3 * (tile + 1) :, 1 + index % 3 * (tile + 1) :][:tile, :tile]
        assert np.array_equal(pixels[top : top + tile, left : left + tile], alone)
        beside = pixels[top : top + tile, left + tile + 1 : left + across - 1]
        assert not has_ink(beside, WHITE)  # but for the line around the tile


def test_no_cell_is_wider_than_a_label_of_240_pixels(monkeypatch):
    lines = written(monkeypatch)
    sheet = feature_grid(ramp(2, 40, 40), labels=["a", "word " * 40])
    assert sheet.width == 2 * (240 + 6) + 1
    assert lines[0] == "a"
    assert "…" in lines[1]
    assert lettering.text_width(lines[1]) <= 240


def test_label_over_several_lines_stays_in_its_line():
    maps = ramp(2, 40, 40)
    assert is_labelled(feature_grid(maps, labels=["a\nb", "c\td"]), maps, ["a b", "c d"])


@pytest.mark.parametrize("kind", [np.array, tuple])
def test_labels_may_be_any_sequence(kind):
    maps = ramp(2, 40, 40)
    assert is_labelled(feature_grid(maps, labels=kind(["1", "2"])), maps, ["1", "2"])


LEGENDS = [{}, {"scale_each": True}, {"cmap": "hot"}, {"cmap": "RdBu_r"}, {"cmap": "gray"}]


@pytest.mark.parametrize("style", LEGENDS)
def test_legend_stands_below_and_changes_nothing_above(style):
    maps = ramp(5, 40, 40)
    maps[0, 3, 3] = math.nan
    plain, explained = feature_grid(maps, **style), feature_grid(maps, legend=True, **style)
    assert explained.mode == plain.mode
    above = colours(explained)[: plain.height, : plain.width]
    assert np.array_equal(above, colours(plain))
    assert has_ink(colours(explained)[plain.height :], WHITE)
    assert not has_ink(colours(explained)[plain.height :, -1:], WHITE)  # nothing is clipped


@pytest.mark.parametrize("cmap", ["gray", "hot", *SIGNED_MAPS])
def test_legend_shows_every_level_of_the_map_in_order(cmap):
    image = colours(feature_grid(ramp(4, 40, 40), cmap=cmap, legend=True))
    plain = feature_grid(ramp(4, 40, 40), cmap=cmap)
    scale = colours(feature_grid(torch.arange(251.0).reshape(1, 1, 251) - 125, cmap=cmap, padding=0))[0]
    bar = image[plain.height + 4 + 11]  # through the middle of the line of text
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
    assert kernel_grid(model, legend=True).width <= 400


def test_lines_are_broken_between_words_and_none_is_lost(monkeypatch):
    lines = written(monkeypatch)
    title = " ".join(f"word{index}" for index in range(20))
    sheet = feature_grid(ramp(4, 10, 10), title=title)
    assert len(lines) > 1
    assert " ".join(lines) == title
    assert all(lettering.text_width(line, lettering.TITLE_SIZE) <= 392 for line in lines)
    assert sheet.width <= 400
    wide = feature_grid(ramp(4, 900, 900), title=title)
    assert lines[-1] == title  # where there is room
    assert wide.width == 1803


def test_a_text_of_many_lines_ends_with_its_last_words():
    lines = lettering.wrapped("many words " * 100 + "end", 200)
    assert len(lines) == 4
    assert lines[-1].endswith("end")
    assert "…" in lines[-1]
    assert all(lettering.text_width(line) <= 200 for line in lines)
    assert lettering.wrapped("  ", 200) == []


def test_legend_says_how_many_values_lie_beyond_the_limits(monkeypatch):
    maps = torch.linspace(-1, 1, 4 * 1600).reshape(4, 40, 40).clone()
    maps[2, 7, 7] = 200.0
    lines = written(monkeypatch)
    feature_grid(maps, value_range="robust", legend=True)
    low, high, words = lines[0], lines[1], " ".join(lines[2:-1])
    assert (low, high) == ("-0.991", "0.991")  # zero in the middle
    assert words == "limits at 0.5% and 99.5%, 1.0% of the values beyond"
    del lines[:]
    feature_grid(maps, value_range=(-0.5, 0.5), legend=True)
    assert lines == ["-0.5", "0.5", "50.0% of the values beyond", "4 maps of 40 x 40"]
    del lines[:]
    feature_grid(maps, legend=True)
    assert lines == ["-200", "200", "4 maps of 40 x 40"]


# How many are shown.


def test_caption_says_how_many_are_shown_and_why_these(monkeypatch):
    lines = written(monkeypatch)
    maps = torch.rand(20, 40, 40)
    feature_grid(maps, max_tiles=7)
    feature_grid(maps, max_tiles=7, page=1, sort_by="norm")
    feature_grid(maps, max_tiles=7, page=2, sort_by="std")
    assert lines == [
        "7 of 20 shown",
        "8 to 14 of 20 shown, ranked by norm",
        "15 to 20 of 20 shown, ranked by std",
    ]


def test_legend_stands_with_the_count(monkeypatch):
    lines = written(monkeypatch)
    feature_grid(
        torch.rand(20, 40, 40), max_tiles=7, sort_by="max", legend=True, title="Maps", scale_each=True
    )
    assert lines == [
        "Maps",
        "each tile has its own range",
        "7 of 20 shown, ranked by max",
        "20 maps of 40 x 40",
    ]


# Titles.


@pytest.mark.parametrize("legend", [False, True])
@pytest.mark.parametrize("options", [{}, {"cmap": "hot"}, {"cmap": "RdBu_r", "labels": True}])
def test_sheet_under_a_title_is_unchanged(options, legend):
    maps = torch.randn(5, 40, 40)
    maps[1, 2, 3] = math.nan
    plain = feature_grid(maps, legend=legend, **options)
    titled = feature_grid(maps, legend=legend, title="Maps of the first layer", **options)
    assert titled.mode == plain.mode
    above = titled.height - plain.height
    assert above == 36
    pixels = colours(titled)
    assert np.array_equal(pixels[above:, : plain.width], colours(plain))
    assert has_ink(pixels[:above], WHITE)
    assert not has_ink(pixels[above:, plain.width :], WHITE)


def test_a_title_keeps_the_palette_of_what_is_written_to_files():
    assert feature_sheet(torch.rand(4, 5, 5), title="gray").mode == "L"
    assert feature_sheet(torch.randn(4, 5, 5), title="signed").mode == "P"


def test_sheets_are_rgb_in_memory():
    for image in (
        kernel_grid(torch.rand(4, 3, 5, 5)),
        kernel_grid(torch.randn(4, 2, 5, 5)),
        feature_grid(torch.rand(4, 5, 5)),
        feature_grid(torch.randn(4, 5, 5), legend=True),
    ):
        assert image.mode == "RGB"
        assert np.array(image).shape == (image.height, image.width, 3)


def test_long_title_is_shortened_and_one_of_several_lines_becomes_one(monkeypatch):
    maps = torch.rand(4, 5, 5)
    assert feature_grid(maps, title="long " * 500).width <= 400
    assert same(feature_grid(maps, title="two\nlines"), feature_grid(maps, title="two lines"))
    lines = written(monkeypatch)
    kernel_grid(nn.ModuleDict({"in\ntwo": nn.Conv2d(3, 2, 3)}), legend=True)
    assert "in two: 2 x 3 kernels of 3 x 3" in lines


def test_no_title_draws_nothing_and_no_string_raises():
    maps = torch.rand(4, 5, 5)
    assert same(feature_grid(maps, title=""), feature_grid(maps))
    with pytest.raises(InvalidTypeError, match=r"`title` must be a string or None, got 5"):
        feature_grid(maps, title=5)


# Words in other scripts.


WORDS = ["日本語", "العربية", "हिन्दी", "Ελληνικά", "Кириллица", "עברית", "ไทย", "한국어", "😀", "ǘé", "中ü…"]


@pytest.mark.parametrize("word", WORDS)
def test_no_letter_of_another_script_is_lost(word):
    maps = torch.zeros(2, 300, 300)
    whole = colours(feature_grid(maps, labels=[word, word]))
    blank = colours(feature_grid(maps, labels=["", ""]))
    assert (whole != blank).any()
    for place in range(len(word)):
        other = word[:place] + word[place + 1 :]
        assert not np.array_equal(colours(feature_grid(maps, labels=[other, other])), whole), ascii(
            word[place]
        )
    tiles = [slice(1 + HEADER, 301 + HEADER)]
    assert all(np.array_equal(whole[rows], blank[rows]) for rows in tiles)


@pytest.mark.parametrize("word", WORDS)
def test_letters_without_any_font_are_written_as_escapes(word, monkeypatch):
    monkeypatch.setattr(lettering, "_of_system", lambda name, size: None)
    maps = torch.zeros(1, 600, 600)
    own = lettering._pillows(lettering.SIZE)
    spelt = "".join(each if lettering._has(own, each) else ascii(each)[1:-1] for each in word)
    sheet = feature_grid(maps, labels=[word], title=word)
    assert same(sheet, feature_grid(maps, labels=[spelt], title=spelt))
    assert all(lettering._has(own, each) for each in spelt)


def test_letters_that_are_none_are_escaped_too(monkeypatch):
    monkeypatch.setattr(lettering, "_of_system", lambda name, size: None)
    maps = torch.zeros(1, 300, 300)
    assert same(feature_grid(maps, labels=["a\ud800\x00b"]), feature_grid(maps, labels=["a\\ud800\\x00b"]))


def test_marks_above_marks_stay_in_the_line_of_their_label():
    maps = torch.zeros(4, 40, 40)
    plain = colours(feature_grid(maps, labels=["e"] * 4, padding=0))
    marked = colours(feature_grid(maps, labels=["e" + "\u0301" * 9 + "\u0316" * 9] * 4, padding=0))
    for top in (HEADER, 2 * HEADER + 40):
        assert np.array_equal(marked[top : top + 40], plain[top : top + 40])


def test_words_can_be_watched():
    """The lines that these tests compare are those that the modules write."""
    assert canvas.text is lettering
