"""Folders of kernel sheets, file by file, against a plain numpy drawing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import passed_on, recorded
from tests.pixels import drawn, drawn_maps, names_in, read, spread
from torchlens_viz import kernel_grid, save_feature_maps, save_kernel_sheets
from torchlens_viz.draw import canvas
from torchlens_viz.draw.palette import colormap
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError

# Kernels.


def sheet_of(weight: torch.Tensor, plane: int, columns: int, ends: tuple[float, float]) -> np.ndarray:
    """Draw the sheet of one input channel: tiles of one pixel's padding, in the range of the layer."""
    columns = min(columns, len(weight))
    colours = colormap("RdBu_r" if ends[0] < 0 < ends[1] else "gray")
    tiles = weight[:, plane].double().numpy()
    factor = math.ceil(32 / max(tiles.shape[1:]))
    height, width = (size * factor + 1 for size in tiles.shape[1:])
    rows = math.ceil(len(tiles) / columns)
    sheet = np.empty((rows * height + 1, columns * width + 1, 3), np.uint8)
    sheet[...] = 255
    for index, tile in enumerate(tiles):
        top, left = index // columns * height + 1, index % columns * width + 1
        sheet[top - 1 : top + height, left - 1 : left + width] = colours.background  # the line around it
        sheet[top : top + height - 1, left : left + width - 1] = drawn(tile, *ends, colours, factor)
    return sheet


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (5, 4, 2, 5), (2, 1, 7, 7)])
def test_sheets_of_a_layer_share_one_range(tmp_path, shape, signed):
    weight = spread(*shape, signed=signed)
    weight[:, -1] *= 0.5
    model = nn.Sequential(nn.Conv2d(shape[1], shape[0], shape[2:]))
    model[0].weight = nn.Parameter(weight)
    paths = save_kernel_sheets(model, tmp_path)
    assert paths == [tmp_path / "0" / f"{plane}.png" for plane in range(shape[1])]
    ends = (weight.min().item(), weight.max().item())
    for plane, path in enumerate(paths):
        expected = sheet_of(weight, plane, math.ceil(math.sqrt(shape[0])), ends)
        assert np.array_equal(read(path), expected), path.name


@pytest.mark.parametrize("options", [{"scale_each": True}, {"value_range": (-2, 3)}, {"normalize": False}])
def test_other_scaling_is_that_of_the_sheet(tmp_path, options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    for plane, path in enumerate(save_kernel_sheets(model, tmp_path, **options)):
        assert np.array_equal(
            read(path), np.array(kernel_grid(model, channels=plane, **options).convert("RGB"))
        )


def test_kernels_that_are_not_finite_are_seen(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    weight = spread(4, 2, 3, 3)
    weight[1, 0, 1, 1], weight[2, 1, 0, 2] = math.nan, math.inf
    model[0].weight = nn.Parameter(weight)
    for plane, path in enumerate(save_kernel_sheets(model, tmp_path)):
        assert np.array_equal(read(path), sheet_of(weight, plane, 2, (-1.0, 1.0)))


def test_every_convolution_is_drawn_unless_layers_are_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 2), nn.Linear(2, 2))
    model.append(nn.Conv1d(2, 2, 5))
    save_kernel_sheets(model, tmp_path / "all")
    assert names_in(tmp_path / "all") == [
        "0/0.png",
        "0/1.png",
        "2/0.png",
        "2/1.png",
        "2/2.png",
        "4/0.png",
        "4/1.png",
    ]
    save_kernel_sheets(model, tmp_path / "one", "2", channels=[2, 0])
    assert names_in(tmp_path / "one") == ["2/0.png", "2/2.png"]


def test_kernels_of_one_pixel_go_into_one_matrix(tmp_path):
    weight = spread(5, 7, 1, 1)
    model = nn.Sequential(nn.Conv2d(7, 5, 1))
    model[0].weight = nn.Parameter(weight)
    (path,) = save_kernel_sheets(model, tmp_path, labels=True, nrow=3, max_tiles=2)
    assert path == tmp_path / "0" / "matrix.png"
    pixels = read(path)
    assert np.array_equal(
        pixels[1:-1, 1:-1], drawn(weight[:, :, 0, 0].numpy(), -1, 1, colormap("RdBu_r"), 12)
    )


def test_filters_beyond_the_first_page_go_to_further_pages(tmp_path):
    weight = spread(7, 2, 4, 4)
    model = nn.Sequential(nn.Conv2d(2, 7, 4))
    model[0].weight = nn.Parameter(weight)
    paths = save_kernel_sheets(model, tmp_path, max_tiles=3, nrow=3)
    pages = ["0", "0-page2", "0-page3", "1", "1-page2", "1-page3"]
    assert [path.stem for path in paths] == pages
    for path, (plane, start) in zip(
        paths, [(plane, start) for plane in (0, 1) for start in (0, 3, 6)], strict=True
    ):
        part = weight[start : start + 3]
        expected = sheet_of(part, plane, len(part), (-1.0, 1.0))
        assert np.array_equal(read(path)[: expected.shape[0], : expected.shape[1]], expected), path.name


def test_slices_of_3d_kernels_are_all_on_some_page(tmp_path):
    paths = save_kernel_sheets(nn.Sequential(nn.Conv3d(1, 4, 3)), tmp_path, max_tiles=6)
    assert [path.name for path in paths] == ["0.png", "0-page2.png"]
    assert all(read(path).shape[0] >= 2 * 34 + 1 for path in paths)


@pytest.mark.parametrize("most", [3, 5, 7, 8, 11, 12])
def test_pages_of_slices_hold_whole_rows(tmp_path, most):
    model = nn.Sequential(nn.Conv3d(2, 4, 3))
    low, high = model[0].weight.detach().aminmax()
    options = {"value_range": (low.item(), high.item()), "padding": 0}
    paths = save_kernel_sheets(model, tmp_path, max_tiles=most, padding=0)
    rows = most // 3
    assert len(paths) == 2 * math.ceil(4 / rows)
    for index, path in enumerate(paths):
        plane, page = divmod(index, math.ceil(4 / rows))
        filters = range(page * rows, min((page + 1) * rows, 4))
        expected = np.array(kernel_grid(model, filters=filters, channels=plane, **options).convert("RGB"))
        assert np.array_equal(read(path)[: len(expected), : expected.shape[1]], expected), path


def test_rows_longer_than_a_page_raise_before_anything_is_written(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv3d(1, 4, 3))
    with pytest.raises(InvalidArgumentError, match=r"`max_tiles` must be at least 3, .* got 2; raise it"):
        save_kernel_sheets(model, tmp_path / "sheets", max_tiles=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("last", "options"),
    [
        (nn.Conv2d(2, 8, 5), {}),
        (nn.Conv2d(2, 8, 5), {"max_tiles": 7}),
        (nn.Conv2d(2, 8, 3), {"nrow": 1, "padding": 60}),
        (nn.Conv3d(2, 4, 3), {"nrow": 1, "max_tiles": 11}),
        (nn.Conv2d(40, 40, 1), {"labels": True, "max_tiles": 1}),
        (nn.Conv2d(4, 4, 1), {"upscale": 30, "max_tiles": 1}),
    ],
)
def test_sheet_that_is_too_large_is_refused_before_anything_is_written(tmp_path, monkeypatch, last, options):
    model = nn.Sequential(nn.Conv2d(1, 1, 2), last)
    monkeypatch.setattr(canvas, "_MOST_PIXELS", 7000)
    with pytest.raises(InvalidArgumentError, match=r"the sheet would have [\d,]+ pixels .* more than 7,000"):
        save_kernel_sheets(model, tmp_path / "sheets", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"max_tiles": 4}, {"filters": [0, 7]}, {"upscale": 1, "nrow": 8}, {"padding": 0, "max_tiles": 6}],
)
def test_sheets_that_are_small_enough_are_all_drawn(tmp_path, monkeypatch, options):
    model = nn.Sequential(nn.Conv2d(1, 8, 2), nn.Conv2d(2, 8, 5), nn.Conv3d(2, 8, 2), nn.Conv2d(20, 20, 1))
    monkeypatch.setattr(canvas, "_MOST_PIXELS", 20 * 20 * 12 * 12 + 1000)
    options = {"nrow": 1, **options} if "max_tiles" not in options else options
    assert all(path.exists() for path in save_kernel_sheets(model, tmp_path, **options))


def test_map_that_is_too_large_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Identity(), nn.Upsample(scale_factor=8))
    acts = recorded(model, ["0", "1"], spread(1, 3, 5, 5))
    monkeypatch.setattr(canvas, "_MOST_PIXELS", 40 * 40 - 1)
    with pytest.raises(InvalidArgumentError, match=r"the sheet would have 1,600 pixels .* more than 1,599"):
        save_feature_maps(acts, tmp_path / "maps")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(canvas, "_MOST_PIXELS", 40 * 40)
    assert len(save_feature_maps(acts, tmp_path / "maps")) == 6


def test_values_that_are_not_dense_are_refused_before_anything_is_written(tmp_path):
    class Sparse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_sparse()

    acts = recorded(nn.Sequential(nn.Identity(), Sparse()), ["0", "1"], spread(1, 3, 5, 5))
    with pytest.raises(InvalidTypeError, match=r"`1` must be a dense tensor, got .*sparse_coo; .*\.to_dense"):
        save_feature_maps(acts, tmp_path / "maps")
    model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.Conv2d(1, 1, 3, device="meta"))
    with pytest.raises(
        InvalidTypeError, match=r"`1` must hold real numbers to draw, got .* on meta; load its"
    ):
        save_kernel_sheets(model, tmp_path / "sheets")
    assert list(tmp_path.iterdir()) == []


def test_float8_is_drawn_as_its_values(tmp_path):
    maps = spread(1, 2, 4, 4).to(torch.float8_e4m3fn)
    paths = save_feature_maps(passed_on(maps), tmp_path)
    for path, expected in zip(paths, drawn_maps(maps[0].float()), strict=True):
        assert np.array_equal(read(path), expected), path.name


def test_chosen_filters_are_drawn_in_every_layer(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 1))
    for path, options in zip(
        save_kernel_sheets(model, tmp_path, filters=[4, 1], channels=1),
        [{"layer": "0", "channels": 1}, {"layer": "1", "channels": [1]}],
        strict=True,
    ):
        low, high = model.get_submodule(options["layer"]).weight.detach().aminmax()
        sheet = kernel_grid(model, filters=[4, 1], value_range=(low.item(), high.item()), **options)
        assert np.array_equal(read(path), np.array(sheet.convert("RGB")))


# Errors.


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        ("nothing", {}, LayerNotFoundError, r"no layer is named `nothing`"),
        (nn.Module, {}, InvalidArgumentError, r"has no kernels; choose a convolution"),
        (["0", "2"], {}, InvalidArgumentError, r"`2` \(Linear\) has no kernels; choose a convolution"),
        (None, {"channels": 2}, InvalidArgumentError, r"`channels` must be indices from 0 to 1, got 2"),
        (None, {"filters": 4}, InvalidArgumentError, r"`filters` must be indices from 0 to 3, got 4"),
        (
            None,
            {"labels": list("abcde")},
            InvalidArgumentError,
            r"`labels` must be 4 strings, one per tile, got 5",
        ),
        (None, {"max_tiles": "2"}, InvalidTypeError, r"`max_tiles` must be an int, got '2'"),
        (None, {"max_tiles": 0}, InvalidArgumentError, r"`max_tiles` must be at least 1, got 0"),
        (
            None,
            {"max_tiles": 2, "page": 1},
            InvalidArgumentError,
            r"`page` has no effect where every page is",
        ),
        (None, {"title": 3}, InvalidTypeError, r"`title` must be a string or None, got 3"),
        (None, {"value_range": (2, 1)}, InvalidArgumentError, r"`value_range` must be \(low, high\)"),
    ],
)
def test_wrong_kernels_raise_before_anything_is_written(tmp_path, layers, options, error, message):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(2, 2), nn.Conv2d(4, 3, 1))
    with pytest.raises(error, match=message):
        save_kernel_sheets(model, tmp_path / "sheets", layers, **options)
    assert list(tmp_path.iterdir()) == []


def test_model_without_convolutions_raises(tmp_path):
    with pytest.raises(LayerNotFoundError, match=r"the model \(.*\) has no convolution"):
        save_kernel_sheets(nn.Sequential(nn.Linear(2, 2)), tmp_path)
