"""What a sheet shows, in which order and in which words: rank, pages, titles, tokens, slices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz import (
    capture,
    feature_grid,
    kernel_grid,
    pair_grid,
    save_feature_grid,
    save_kernel_grid,
)
from torchlens_viz.draw import canvas
from torchlens_viz.draw import text as lettering
from torchlens_viz.draw.palette import Colormap, colormap
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError
from torchlens_viz.files.pictures import as_chw, save_animation

HEADER = 16
FIGURES = {
    "norm": lambda values: np.sqrt((values**2).sum()),
    "mean": np.mean,
    "std": np.std,
    "max": np.max,
}


def colours(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def ranked(values: torch.Tensor, rank: str) -> list[int]:
    """Indices of (K, ...) by a figure of their own, the greatest first, ties in order."""
    rows = np.nan_to_num(values.double().numpy(), nan=0.0, posinf=0.0, neginf=0.0).reshape(len(values), -1)
    figures = [FIGURES[rank](row) for row in rows]
    return sorted(range(len(figures)), key=lambda index: -figures[index])


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.mode == second.mode and np.array_equal(colours(first), colours(second))


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect every line of text that is written on a picture from now on."""
    lines: list[str] = []
    write_line = lettering.write_line

    def noted(image: Image.Image, at: tuple[int, int], text: str, *rest: Any) -> None:
        lines.append(text)
        write_line(image, at, text, *rest)

    monkeypatch.setattr(lettering, "write_line", noted)
    return lines


# Rank.


@pytest.mark.parametrize("rank", FIGURES)
def test_maps_are_shown_in_the_order_of_their_figure(rank):
    maps = torch.randn(9, 5, 4) * torch.rand(9, 1, 1) + torch.randn(9, 1, 1)
    order = ranked(maps, rank)
    assert order != list(range(9))
    assert same(feature_grid(maps, sort_by=rank), feature_grid(maps, channels=order))
    labelled = feature_grid(maps, sort_by=rank, labels=True)
    assert same(labelled, feature_grid(maps, channels=order, labels=True))


@pytest.mark.parametrize("rank", FIGURES)
@pytest.mark.parametrize("inputs", [1, 3, 5])
def test_kernels_are_shown_in_the_order_of_their_figure(rank, inputs):
    weight = torch.randn(7, inputs, 3, 3) * torch.rand(7, 1, 1, 1)
    seen = weight if inputs == 3 else weight[:, :1]
    order = ranked(seen, rank)
    assert same(
        kernel_grid(weight, sort_by=rank, labels=True), kernel_grid(weight, filters=order, labels=True)
    )


@pytest.mark.parametrize("rank", FIGURES)
def test_row_of_several_channels_is_ranked_as_a_whole(rank):
    weight = torch.randn(6, 8, 3, 3) * torch.rand(6, 1, 1, 1)
    order = ranked(weight[:, [1, 7, 2]], rank)
    ordered = kernel_grid(weight, filters=order, channels=[1, 7, 2], labels=True)
    assert same(kernel_grid(weight, channels=[1, 7, 2], sort_by=rank, labels=True), ordered)


def test_ranking_is_among_the_chosen():
    maps = torch.randn(9, 5, 4)
    chosen = [8, 1, 5, 2]
    order = [chosen[place] for place in ranked(maps[chosen], "std")]
    ranked_sheet = feature_grid(maps, channels=chosen, sort_by="std", labels=True)
    assert same(ranked_sheet, feature_grid(maps, channels=order, labels=True))


def test_labels_of_the_caller_go_with_their_tiles():
    maps = torch.tensor([1.0, 3.0, 2.0])[:, None, None].expand(3, 40, 40)
    sheet = feature_grid(maps, sort_by="mean", labels=["low", "high", "middle"])
    assert same(sheet, feature_grid(maps[[1, 2, 0]], labels=["high", "middle", "low"]))


@pytest.mark.parametrize("rank", FIGURES)
def test_equal_figures_keep_their_order(rank):
    maps = torch.ones(40, 2, 2)
    maps[30] = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    order = [30, *(index for index in range(40) if index != 30)]
    assert same(
        feature_grid(maps, sort_by=rank, labels=True), feature_grid(maps, channels=order, labels=True)
    )


@pytest.mark.parametrize("rank", FIGURES)
def test_numbers_that_are_not_finite_count_as_zero_in_a_rank(rank):
    maps = torch.rand(5, 4, 4) * torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])[:, None, None]
    maps[0, 0, 0], maps[1, 1, 1], maps[2, 2, 2] = math.nan, math.inf, -math.inf
    maps[3] = math.nan
    order = ranked(maps, rank)
    assert order[-1] == 3
    assert same(feature_grid(maps, sort_by=rank), feature_grid(maps, channels=order))


def test_ranks_of_other_types_are_those_of_their_values():
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.bool):
        maps = (torch.rand(6, 4, 4) * 9).to(dtype)
        assert same(feature_grid(maps, sort_by="mean"), feature_grid(maps, channels=ranked(maps, "mean")))


@pytest.mark.parametrize("rank", ["Norm", "", "median", 1])
def test_unknown_rank_raises(rank):
    with pytest.raises(
        InvalidArgumentError, match=r"`sort_by` must be one of norm, mean, std, max, or None, got "
    ):
        feature_grid(torch.rand(2, 3, 3), sort_by=rank)


# Pages.


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


@pytest.mark.parametrize("rank", [None, "mean"])
@pytest.mark.parametrize("size", [1, 3, 4, 6, 12])
def test_every_tile_is_on_exactly_one_page(size, rank):
    values = torch.arange(12.0).flip(0)[:, None, None].expand(12, 32, 32)
    seen = []
    for page in range(math.ceil(12 / size)):
        options = {"max_tiles": size, "page": page, "value_range": (0, 250), "padding": 0, "nrow": 1}
        pixels = np.array(feature_grid(values, sort_by=rank, cmap="viridis", **options))
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
    assert above == 24
    pixels = colours(titled)
    assert np.array_equal(pixels[above:, : plain.width], colours(plain))
    background = pixels[0, 0]
    assert (pixels[:above] != background).any()
    assert not (pixels[above:, plain.width :] != background).any()


def test_title_of_colour_kernels_and_of_gray_maps_keeps_the_mode():
    assert kernel_grid(torch.rand(4, 3, 5, 5), title="RGB").mode == "RGB"
    assert feature_grid(torch.rand(4, 5, 5), title="gray").mode == "L"


def test_long_title_is_shortened_and_one_of_several_lines_becomes_one(monkeypatch):
    maps = torch.rand(4, 5, 5)
    assert feature_grid(maps, title="long " * 500).width <= 640
    assert same(feature_grid(maps, title="two\nlines"), feature_grid(maps, title="two lines"))
    lines = written(monkeypatch)
    kernel_grid(nn.ModuleDict({"in\ntwo": nn.Conv2d(3, 2, 3)}), legend=True)
    assert "in two: 2 x 3 kernels of 3 x 3" in lines


def test_no_title_draws_nothing_and_no_string_raises():
    maps = torch.rand(4, 5, 5)
    assert same(feature_grid(maps, title=""), feature_grid(maps))
    with pytest.raises(InvalidTypeError, match=r"`title` must be a string or None, got 5"):
        feature_grid(maps, title=5)


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
    assert sheet.mode == "P"
    assert lines[2:] == ["6 x 9 kernels of 1 x 1", "rows: filters, ranked by norm; columns: input channels"]


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
    names = [f"{filter_}/{0 if inputs > 1 else ''}@{depth}" for filter_ in range(3) for depth in range(4)]
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


# Tokens.


def folded(tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Lay the last rows * columns of (L, C) tokens out as (C, rows, columns), one by one."""
    maps = np.empty((tokens.shape[1], rows, columns), tokens.dtype)
    start = len(tokens) - rows * columns
    for place in range(rows * columns):
        maps[:, place // columns, place % columns] = tokens[start + place]
    return maps


@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("grid", [(3, 4), [1, 6], (np.int64(5), 2)])
def test_tokens_are_folded_into_maps_without_those_before_them(grid, extra):
    rows, columns = (int(size) for size in grid)
    tokens = torch.randn(2, rows * columns + extra, 6)
    tokens[:, :extra] *= 100  # must not widen the range
    for sample in (0, 1):
        maps = torch.from_numpy(folded(tokens[sample].numpy(), rows, columns))
        assert same(feature_grid(tokens, sample=sample, grid=grid), feature_grid(maps))
    assert same(feature_grid(tokens[1], grid=grid, channels=[5, 0]), feature_grid(maps, channels=[5, 0]))


def test_tokens_of_a_vision_transformer_are_drawn_as_maps(tmp_path):
    models = pytest.importorskip("torchvision.models")
    shape = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    model = models.VisionTransformer(image_size=48, patch_size=16, num_classes=4, **shape).eval()
    with torch.no_grad(), capture(model, "encoder.layers.encoder_layer_1") as acts:
        model(torch.rand(1, 3, 48, 48))
    tokens = acts["encoder.layers.encoder_layer_1"]
    assert tokens.shape == (1, 10, 8)
    expected = feature_grid(torch.from_numpy(folded(tokens[0].numpy(), 3, 3)), interpolation="bicubic")
    assert same(feature_grid(tokens, grid=(3, 3), interpolation="bicubic"), expected)
    path = save_feature_grid(tokens, tmp_path / "tokens.png", grid=(3, 3), interpolation="bicubic")
    with Image.open(path) as image:
        assert same(image, expected)
    assert kernel_grid(model).mode == "RGB"  # its patches


@pytest.mark.parametrize(
    ("tokens", "grid", "error", "message"),
    [
        (
            torch.rand(1, 8, 4),
            (3, 3),
            InvalidArgumentError,
            r"`grid` must have at most .* got 3 x 3 \(shape \(1, 8",
        ),
        (torch.rand(1, 8, 4), (0, 3), InvalidArgumentError, r"`grid` must have at most .* got 0 x 3"),
        (torch.rand(1, 2, 8, 4), (2, 2), InvalidArgumentError, r"`grid` must have at most .*\(1, 2, 8, 4\)"),
        (torch.rand(8), (2, 2), InvalidArgumentError, r"`grid` must have at most .*shape \(8,\)"),
        (torch.rand(1, 8, 4), 3, InvalidTypeError, r"`grid` must be \(rows, columns\), got 3"),
        (
            torch.rand(1, 8, 4),
            (1, 2, 3),
            InvalidTypeError,
            r"`grid` must be \(rows, columns\), got \(1, 2, 3\)",
        ),
        (
            torch.rand(1, 8, 4),
            (2.0, 2),
            InvalidTypeError,
            r"`grid` must be \(rows, columns\), got \(2\.0, 2\)",
        ),
        (torch.rand(8, 4), None, InvalidArgumentError, r"tokens \(N, L, C\) need `grid=\(rows, columns\)`"),
    ],
)
def test_grids_that_do_not_fit_raise(tokens, grid, error, message):
    with pytest.raises(error, match=message):
        feature_grid(tokens, grid=grid)


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


# Words in other scripts.

WORDS = ["日本語", "العربية", "हिन्दी", "Ελληνικά", "Кириллица", "עברית", "ไทย", "한국어", "😀", "ǘé", "中ü…"]


@pytest.mark.parametrize("word", WORDS)
def test_no_letter_of_another_script_is_lost(word):
    maps = torch.zeros(2, 200, 200)
    whole = colours(feature_grid(maps, labels=[word, word]))
    blank = colours(feature_grid(maps, labels=["", ""]))
    assert (whole != blank).any()
    for place in range(len(word)):
        other = word[:place] + word[place + 1 :]
        assert not np.array_equal(colours(feature_grid(maps, labels=[other, other])), whole), ascii(
            word[place]
        )
    tiles = [slice(1 + HEADER, 201 + HEADER)]
    assert all(np.array_equal(whole[rows], blank[rows]) for rows in tiles)


@pytest.mark.parametrize("word", WORDS)
def test_letters_without_any_font_are_written_as_escapes(word, monkeypatch):
    monkeypatch.setattr(lettering, "_of_system", lambda name, size: None)
    maps = torch.zeros(1, 600, 600)
    own = lettering._pillows(12)
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


# Files and arrays.


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("options", [{}, {"cmap": "gray"}, {"cmap": "hot", "labels": True, "title": "中"}])
def test_sheets_are_saved_in_both_formats(tmp_path, suffix, options):
    maps = torch.randn(5, 6, 6)
    path = save_feature_grid(maps, tmp_path / f"maps{suffix}", **options)
    with Image.open(path) as image:
        assert image.format == suffix[1:].upper()
        assert np.array_equal(colours(image), colours(feature_grid(maps, **options)))
    weight = torch.randn(5, 3, 6, 6)
    with Image.open(save_kernel_grid(weight, tmp_path / f"kernels{suffix}", sort_by="std")) as image:
        assert np.array_equal(colours(image), colours(kernel_grid(weight, sort_by="std")))


def moving(count: int = 5) -> list[Image.Image]:
    steps = torch.arange(64.0).reshape(1, 8, 8)
    frames = [feature_grid(steps.roll(shift, 2), cmap="viridis") for shift in range(count - 1)]
    return [*frames, kernel_grid(torch.arange(192.0).reshape(1, 3, 8, 8))]


@pytest.mark.parametrize(("suffix", "duration"), [(".webp", 125), (".gif", 120)])  # GIF counts in 10 ms
@pytest.mark.parametrize("loop", [True, False])
def test_every_frame_of_a_moving_picture_can_be_read_back(tmp_path, suffix, duration, loop):
    frames = moving()
    path = save_animation(frames, tmp_path / f"moving{suffix}", fps=8, loop=loop)
    assert path == tmp_path / f"moving{suffix}"
    with Image.open(path) as image:
        assert image.n_frames == len(frames)
        assert (image.info.get("loop") == 0) == loop
        for index, frame in enumerate(frames):
            image.seek(index)
            image.load()
            assert image.info["duration"] == duration
            assert np.array_equal(colours(image), colours(frame)), index


def test_webp_animation_keeps_every_pixel_of_noise_and_gif_comes_close(tmp_path):
    noise = [Image.fromarray(np.uint8(torch.rand(40, 40, 3).numpy() * 255)) for _ in range(3)]
    for suffix, most in ((".webp", 0.0), (".gif", 24.0)):
        with Image.open(save_animation(noise, tmp_path / f"noise{suffix}")) as image:
            for index, frame in enumerate(noise):
                image.seek(index)
                assert np.abs(colours(image).astype(int) - colours(frame)).mean() <= most


def test_one_frame_makes_a_picture(tmp_path):
    frame = moving()[0]
    for suffix in (".webp", ".gif"):
        with Image.open(save_animation(iter([frame]), tmp_path / f"one{suffix}")) as image:
            assert np.array_equal(colours(image), colours(frame))


FRAME = Image.new("L", (4, 4))


@pytest.mark.parametrize(
    ("frames", "name", "fps", "error", "message"),
    [
        (
            [],
            "a.gif",
            10,
            InvalidArgumentError,
            r"`frames` must be one or more pictures of one size, got sizes \[\]",
        ),
        (
            [FRAME, Image.new("L", (4, 5))],
            "a.gif",
            10,
            InvalidArgumentError,
            r"of one size, got sizes \[\(4, 4\), ",
        ),
        ([FRAME, 3], "a.gif", 10, InvalidTypeError, r"`frames` must be PIL\.Image\.Image objects, got int"),
        ([FRAME], "a.gif", 0, InvalidArgumentError, r"`fps` must be above 0 and at most 1000, got 0"),
        (
            [FRAME],
            "a.gif",
            math.nan,
            InvalidArgumentError,
            r"`fps` must be above 0 and at most 1000, got nan",
        ),
        ([FRAME], "a.gif", 1001, InvalidArgumentError, r"`fps` must be above 0 and at most 1000, got 1001"),
        ([FRAME], "a.png", 10, PictureError, r"`path` must end in \.webp or \.gif, got '.*a\.png'"),
    ],
)
def test_moving_pictures_that_cannot_be_raise_and_write_nothing(tmp_path, frames, name, fps, error, message):
    with pytest.raises(error, match=message):
        save_animation(frames, tmp_path / name, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_arrays_for_tensorboard_are_channels_first():
    maps, weight = torch.rand(3, 4, 5), torch.rand(3, 3, 4, 5)
    for image, channels in (
        (feature_grid(maps), 1),
        (feature_grid(maps - 0.5), 3),
        (kernel_grid(weight), 3),
        (pair_grid(nn.Conv2d(3, 2, 3), None, torch.rand(3, 9, 9)), 3),
    ):
        array = as_chw(image)
        assert (array.dtype, array.shape) == (np.uint8, (channels, image.height, image.width))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        for channel in range(channels):
            assert np.array_equal(array[channel], colours(image)[..., channel])


def test_words_can_be_watched():
    """The lines that these tests compare are those that the modules write."""
    assert canvas.text is lettering
