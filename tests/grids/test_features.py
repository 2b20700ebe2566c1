"""`feature_grid`: which maps a sheet shows, tokens among them, and how it is saved."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.pixels import (
    SIGNED_MAPS,
    STYLES,
    assert_drawn_as_promised,
    colours,
    ramp,
    same,
    style_names,
    written,
)
from torchlens_viz import capture, feature_grid, kernel_grid, save_feature_grid, save_kernel_grid
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError

# The pixels.


@pytest.mark.parametrize("style", STYLES, ids=style_names)
@pytest.mark.parametrize("cmap", ["auto", "gray", "hot", *SIGNED_MAPS])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
def test_feature_sheet_is_drawn_as_promised(style, cmap, signed):
    maps = ramp(7, 1, 5, 9, signed=signed)
    assert_drawn_as_promised(feature_grid(maps[:, 0], cmap=cmap, **style), maps, cmap=cmap, **style)


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


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
    NESTED = torch.nested.nested_tensor([torch.rand(2, 4, 4), torch.rand(2, 4, 5)])


# Bad input: one clear message, whatever is wrong.


@pytest.mark.parametrize("shape", [(), (3,), (3, 3), (2, 0, 3, 3), (0, 1, 3, 3), (3, 4, 0), (1,) * 6])
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


# Files of either kind.


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


def test_legend_says_how_many_of_the_maps_were_chosen(monkeypatch):
    lines = written(monkeypatch)
    feature_grid(torch.rand(96, 5, 7), channels=range(16), legend=True)
    feature_grid(torch.rand(96, 5, 7), legend=True)
    assert [line for line in lines if "maps" in line] == ["16 of 96 maps of 5 x 7", "96 maps of 5 x 7"]
