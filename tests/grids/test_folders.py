"""Folders of feature maps, file by file, against a plain numpy drawing; names, failures, progress."""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.nets import passed_on, recorded
from tests.pixels import CYAN, GREEN, MAGENTA, colours, drawn_maps, names_in, read, robust_ends, spread
from torchlens_viz import capture, feature_grid, kernel_grid, save_feature_maps, save_kernel_sheets
from torchlens_viz.draw import canvas
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, PictureError
from torchlens_viz.grids import folders

# The contract in numpy: one file at a time, in colours, without the library's scaling or layout.


def test_the_comparison_can_fail(tmp_path):
    maps = spread(1, 2, 4, 4)
    path = save_feature_maps(passed_on(maps), tmp_path)[0]
    assert np.array_equal(read(path), drawn_maps(maps[0])[0])
    assert not np.array_equal(read(path), drawn_maps(maps[0])[1])
    assert not np.array_equal(read(path), drawn_maps(maps[0], cmap="gray")[0])


# Feature maps.


def test_every_map_of_every_layer_is_a_file_in_order(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    acts = recorded(model, [0, 1, 2], torch.randn(2, 3, 9, 7))
    paths = save_feature_maps(acts, str(tmp_path / "new" / "maps"))
    expected = [
        f"{layer}/{index}.png" for layer, count in (("0", 4), ("1", 4), ("2", 2)) for index in range(count)
    ]
    assert paths == [tmp_path / "new" / "maps" / name for name in expected]
    assert names_in(tmp_path / "new" / "maps") == sorted(expected)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
@pytest.mark.parametrize("shape", [(1, 5, 6, 4), (1, 3, 40, 33), (1, 4, 1, 1), (1, 1, 2, 9)])
def test_maps_of_a_layer_share_one_range(tmp_path, shape, signed):
    maps = spread(*shape, signed=signed)
    paths = save_feature_maps(passed_on(maps), tmp_path)
    for path, expected in zip(paths, drawn_maps(maps[0]), strict=True):
        assert np.array_equal(read(path), expected), path.name


def test_each_layer_has_its_own_range(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.large(self.small(x) * 8)

    maps = spread(1, 2, 5, 5)
    small, _, large, _ = save_feature_maps(recorded(Scaled(), ["small", "large"], maps), tmp_path)
    assert np.array_equal(read(small), drawn_maps(maps[0])[0])
    assert np.array_equal(read(large), read(small))


def test_each_map_has_its_own_range_where_asked(tmp_path):
    maps = spread(1, 3, 5, 5)
    maps[:, :, 0, 0], maps[:, :, 0, 1] = -1.0, 1.0
    maps *= torch.tensor([1.0, 4.0, 0.5]).view(3, 1, 1)
    paths = save_feature_maps(passed_on(maps), tmp_path, scale_each=True)
    ranges = [(plane.min().item(), plane.max().item()) for plane in maps[0]]
    for path, expected in zip(paths, drawn_maps(maps[0], ranges=ranges), strict=True):
        assert np.array_equal(read(path), expected), path.name


@pytest.mark.parametrize(
    ("value_range", "cmap"), [((-0.5, 0.25), None), ((0, 2), "hot"), ([-3, -2], "viridis")]
)
def test_value_range_is_that_of_every_map(tmp_path, value_range, cmap):
    maps = spread(1, 3, 5, 5)
    options = {"cmap": cmap} if cmap else {}
    paths = save_feature_maps(passed_on(maps), tmp_path, value_range=value_range, **options)
    for path, expected in zip(paths, drawn_maps(maps[0], ranges=[value_range] * 3, cmap=cmap), strict=True):
        assert np.array_equal(read(path), expected), path.name


def test_what_is_not_finite_is_seen_and_changes_no_other_pixel(tmp_path):
    maps = spread(1, 4, 6, 6)
    before = [read(path) for path in save_feature_maps(passed_on(maps), tmp_path / "finite")]
    maps[0, 1, 2, 3], maps[0, 2, 1, 1], maps[0, 2, 5, 0] = math.nan, math.inf, -math.inf
    after = [read(path) for path in save_feature_maps(passed_on(maps), tmp_path / "other")]
    for seen, expected in zip(after, drawn_maps(maps[0]), strict=True):
        assert np.array_equal(seen, expected)
    assert tuple(after[1][12, 18]) == MAGENTA
    assert [tuple(after[2][row, column]) for row, column in ((6, 6), (30, 0))] == [GREEN, CYAN]
    assert np.array_equal(after[0], before[0])
    assert np.array_equal(after[3], before[3])


def test_constant_maps_are_drawn_as_such(tmp_path):
    for value, gray in ((0.0, 0), (2.5, 128)):
        (path,) = save_feature_maps(passed_on(torch.full((1, 1, 3, 3), value)), tmp_path)
        assert set(read(path).ravel().tolist()) == {gray}


def test_sample_and_channels_choose(tmp_path):
    maps = spread(2, 6, 4, 4)
    paths = save_feature_maps(passed_on(maps), tmp_path, sample=1, channels=[4, 0])
    assert [path.name for path in paths] == ["4.png", "0.png"]
    whole = list(drawn_maps(maps[1]))  # the range is the layer's, whichever maps are written
    for path, expected in zip(paths, [whole[4], whole[0]], strict=True):
        assert np.array_equal(read(path), expected)


def test_layer_that_ran_several_times_has_a_folder_per_call(tmp_path):
    model = nn.Sequential(nn.ReLU())
    first, second = spread(1, 2, 4, 4), -spread(1, 2, 4, 4)
    paths = save_feature_maps(recorded(model, "0", first, second), tmp_path)
    assert names_in(tmp_path) == ["0-call0/0.png", "0-call0/1.png", "0-call1/0.png", "0-call1/1.png"]
    for path, expected in zip(
        paths, [*drawn_maps(first[0].relu()), *drawn_maps(second[0].relu())], strict=True
    ):
        assert np.array_equal(read(path), expected)


def test_call_of_one_layer_does_not_take_the_place_of_a_layer_of_that_name(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("r", nn.ReLU())
            self.add_module("r-call0", nn.Identity())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("r-call0")(self.r(self.r(x)) - 1)

    maps = spread(1, 1, 4, 4)
    paths = save_feature_maps(recorded(Twice(), ["r", "r-call0"], maps), tmp_path)
    assert len(set(paths)) == 3
    assert names_in(tmp_path) == ["r-call0-2/0.png", "r-call0/0.png", "r-call1/0.png"]
    expected = [drawn_maps(maps[0].relu()), drawn_maps(maps[0].relu()), drawn_maps(maps[0].relu() - 1)]
    for path, (picture,) in zip(paths, expected, strict=True):
        assert np.array_equal(read(path), picture)


def test_model_itself_has_a_folder_too(tmp_path):
    layer = nn.Conv2d(3, 1, 3)
    acts = recorded(layer, "", torch.rand(1, 3, 6, 6))
    assert save_feature_maps(acts, tmp_path) == [tmp_path / "model" / "0.png"]
    assert save_kernel_sheets(layer, tmp_path, channels=2) == [tmp_path / "model" / "2.png"]


@pytest.mark.parametrize("options", [{}, {"scale_each": True}, {"cmap": "gray"}, {"normalize": False}])
def test_layer_larger_than_the_largest_sheet_is_drawn_in_parts(tmp_path, monkeypatch, options):
    maps = spread(1, 7, 6, 6)
    maps[0, 3] = maps[0, 3].abs() / 4
    maps[0, 5, 2, 2] = math.nan
    whole = [read(path) for path in save_feature_maps(passed_on(maps), tmp_path / "whole", **options)]
    monkeypatch.setattr(canvas, "_MOST_PIXELS", 2 * 36 * 36)
    parts = [read(path) for path in save_feature_maps(passed_on(maps), tmp_path / "parts", **options)]
    assert all(np.array_equal(*pair) for pair in zip(whole, parts, strict=True))


def test_activations_are_not_changed(tmp_path):
    acts = passed_on(spread(1, 3, 4, 4))
    before = acts["seen"].clone()
    save_feature_maps(acts, tmp_path, interpolation="bicubic")
    assert torch.equal(acts["seen"], before)


# Tokens.


class Patches(nn.Module):
    """Maps, and the tokens that a transformer makes of them after two others."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.tokens, self.head = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.maps(x).flatten(2).transpose(1, 2)
        return self.head(self.tokens(torch.cat([9 * tokens[:, :2], tokens], 1))[:, 0])


@pytest.mark.parametrize("sample", [0, 1])
def test_tokens_are_drawn_as_feature_grid_draws_them_and_maps_as_they_are(tmp_path, sample):
    maps = spread(2, 4, 3, 5)
    acts = recorded(Patches(), ["maps", "tokens"], maps)
    paths = save_feature_maps(acts, tmp_path, grid=(3, 5), sample=sample, channels=[3, 0])
    assert names_in(tmp_path) == ["maps/0.png", "maps/3.png", "tokens/0.png", "tokens/3.png"]
    low, high = maps[sample].aminmax()
    for path, channel in zip(paths, [3, 0, 3, 0], strict=True):
        ends = {"value_range": (low.item(), high.item()), "padding": 0}
        for expected in (
            feature_grid(acts["tokens"], grid=(3, 5), sample=sample, channels=channel, **ends),
            feature_grid(maps, sample=sample, channels=channel, **ends),
        ):
            assert np.array_equal(read(path), np.array(expected.convert("RGB"))), path


def test_grid_of_another_form_is_another_picture(tmp_path):
    acts = recorded(Patches(), "tokens", spread(1, 4, 3, 5))
    path = save_feature_maps(acts, tmp_path / "a", grid=(3, 5))[0]
    other = save_feature_maps(acts, tmp_path / "b", grid=(5, 3))[0]
    assert read(path).shape != read(other).shape


@pytest.mark.parametrize(
    ("layers", "grid", "error", "message"),
    [
        (
            "maps",
            (3, 5),
            InvalidArgumentError,
            r"`grid` has no effect where no layer put out tokens \(N, L, C\)",
        ),
        (
            "tokens",
            (6, 3),
            InvalidArgumentError,
            r"as many places as `tokens` has tokens .* got 6 x 3 \(shape",
        ),
        ("tokens", 3, InvalidTypeError, r"`grid` must be \(rows, columns\), got 3"),
        (
            ["tokens", "head"],
            (1, 1),
            InvalidArgumentError,
            r"`head` put out no maps \(N, C, H, W\) and no tokens \(N, L, C\); select other layers",
        ),
    ],
)
def test_grids_that_do_not_fit_raise_before_anything_is_written(tmp_path, layers, grid, error, message):
    acts = recorded(Patches(), layers, spread(2, 4, 3, 5))
    with pytest.raises(error, match=message):
        save_feature_maps(acts, tmp_path / "maps", grid=grid)
    assert list(tmp_path.iterdir()) == []


# Names.


HOSTILE = [
    "a/b",
    "a b",
    "a_b",
    "A_B",
    "/up",
    "con",
    "größe",
    "中",
    "x" * 300,
    "line\nbreak",
    "*?[0]",
    "-rf",
]


def test_hostile_names_stay_inside_the_folder_and_apart(tmp_path):
    model = nn.ModuleDict({name: nn.Conv2d(1, 1, 1 + index) for index, name in enumerate(HOSTILE)})
    top = tmp_path / "top"
    paths = save_kernel_sheets(model, top, layers=nn.Conv2d)
    assert len(set(paths)) == len(HOSTILE)
    assert [path.name for path in tmp_path.iterdir()] == ["top"]
    assert len({path.parent.name.lower() for path in paths}) == len(HOSTILE)
    for index, path in enumerate(paths):
        assert path.parent.parent == top
        assert path.parent.name.isascii()
        size = 1 + index
        with Image.open(path) as image:
            assert image.size[0] == (12 + 2 if size == 1 else size * math.ceil(32 / size) + 2)
    assert paths[2].parent.name == "a_b"  # what is safe already keeps its form


def test_hostile_names_of_activations_stay_apart_too(tmp_path):
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in HOSTILE:
                self.add_module(name, nn.Identity())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for place, part in enumerate(self.children()):
                part(x[..., : place + 1])
            return x

    acts = recorded(Each(), nn.Identity, spread(1, 1, 2, 32))
    paths = save_feature_maps(acts, tmp_path / "top", upscale=1)
    assert [read(path).shape for path in paths] == [(2, place + 1, 3) for place in range(len(HOSTILE))]
    assert [path.name for path in tmp_path.iterdir()] == ["top"]


# What else lies in the folder.


def test_existing_folder_is_never_emptied(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes.txt").write_text("mine")
    (tmp_path / "0" / "0.png").write_bytes(b"old")
    (tmp_path / "0" / "99.png").write_bytes(b"kept")
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    for _ in range(2):
        save_kernel_sheets(model, tmp_path)
        save_feature_maps(recorded(model, "0", torch.rand(1, 3, 5, 5)), tmp_path)
    assert names_in(tmp_path) == ["0/0.png", "0/1.png", "0/2.png", "0/99.png", "0/notes.txt"]
    assert (tmp_path / "0" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "0" / "99.png").read_bytes() == b"kept"
    assert read(tmp_path / "0" / "0.png").shape == (33, 33, 3)


# Errors.


class Mixed(nn.Module):
    """A layer that puts out maps before one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat = nn.Conv2d(3, 2, 3), nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(self.conv(x))


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        (["conv", "flat"], {}, InvalidArgumentError, r"`flat` put out no maps \(N, C, H, W\); select other"),
        ("conv", {"sample": 2}, InvalidArgumentError, r"`sample` must be an index from 0 to 1, got 2"),
        (
            "conv",
            {"channels": [0, 2]},
            InvalidArgumentError,
            r"`channels` must be indices from 0 to 1, got 2",
        ),
        ("conv", {"cmap": "jett"}, InvalidArgumentError, r"`cmap` must be .*got 'jett'"),
        ("conv", {"value_range": (2, 1)}, InvalidArgumentError, r"`value_range` must be \(low, high\)"),
        (
            "conv",
            {"scale_each": True, "normalize": False},
            InvalidArgumentError,
            r"`scale_each` has no effect",
        ),
        ("conv", {"upscale": 0}, InvalidArgumentError, r"`upscale` must be at least 1, got 0"),
        ("conv", {"sample": "0"}, InvalidTypeError, r"`sample` must be an int, got '0'"),
    ],
)
def test_wrong_maps_raise_before_anything_is_written(tmp_path, layers, options, error, message):
    acts = recorded(Mixed(), layers, torch.rand(2, 3, 6, 6))
    with pytest.raises(error, match=message):
        save_feature_maps(acts, tmp_path / "maps", **options)
    assert list(tmp_path.iterdir()) == []


def test_activations_without_a_layer_raise(tmp_path):
    with capture(Mixed(), "conv") as acts:
        pass
    with pytest.raises(InvalidArgumentError, match=r"`acts` must hold activations; run the model inside"):
        save_feature_maps(acts, tmp_path)


def test_failing_write_raises_and_earlier_files_stay_whole(tmp_path, monkeypatch):
    maps = spread(1, 200, 4, 4)
    original, lock, written = folders.save_picture, threading.Lock(), []

    def until_full(image: Image.Image, path: Path) -> Path:
        with lock:
            if len(written) >= 20:
                raise PictureError("cannot write: no space left on device")
            written.append(path)
        return original(image, path)

    monkeypatch.setattr(folders, "save_picture", until_full)
    with pytest.raises(PictureError, match=r"no space left on device"):
        save_feature_maps(passed_on(maps), tmp_path)
    assert sorted(tmp_path.rglob("*.png")) == sorted(written)
    expected = drawn_maps(maps[0])
    for path in written:
        assert np.array_equal(read(path), expected[int(path.stem)]), path.name


@pytest.mark.parametrize("place", [0, 5, 11])
def test_file_that_cannot_be_replaced_raises_wherever_it_stands(tmp_path, place):
    (tmp_path / "seen" / f"{place}.png").mkdir(parents=True)
    with pytest.raises(PictureError, match=rf"must name a file, got the folder .*{place}\.png"):
        save_feature_maps(passed_on(spread(1, 12, 4, 4)), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_file_in_place_of_the_folder_raises(tmp_path):
    (tmp_path / "seen").write_text("mine")
    with pytest.raises(PictureError, match=r"cannot write .*0\.png"):
        save_feature_maps(passed_on(spread(1, 2, 4, 4)), tmp_path)
    assert (tmp_path / "seen").read_text() == "mine"


# Progress.


def test_nothing_is_printed_unless_asked(tmp_path, capfd):
    save_feature_maps(passed_on(spread(1, 2, 4, 4)), tmp_path)
    save_kernel_sheets(nn.Conv2d(3, 2, 3), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_bar_counts_the_files_on_stderr(tmp_path, capfd):
    pytest.importorskip("tqdm")
    save_feature_maps(passed_on(spread(1, 5, 4, 4)), tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err
    save_kernel_sheets(nn.Conv2d(3, 2, 3), tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert (out, "3/3" in err) == ("", True)


def test_bar_without_tqdm_says_what_to_install_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(
        MissingDependencyError, match=r"`progress=True` needs tqdm.*torchlens_viz\[progress\]"
    ):
        save_feature_maps(passed_on(spread(1, 2, 4, 4)), tmp_path / "maps", progress=True)
    assert list(tmp_path.iterdir()) == []


# Threads.


def test_many_files_are_the_same_with_one_thread_and_with_many(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 150, 3), nn.ReLU(), nn.Conv2d(150, 100, 3))
    acts = recorded(model, [0, 1, 2], torch.randn(1, 3, 12, 12))
    contents = []
    for threads in (1, 16):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        folder = tmp_path / str(threads)
        paths = save_feature_maps(acts, folder)
        assert len(set(paths)) == 400
        contents.append([path.read_bytes() for path in paths])
        assert len(names_in(folder)) == 400
    assert contents[0] == contents[1]


def test_pictures_wait_for_slow_files_in_bounded_number(tmp_path, monkeypatch):
    original, lock, counts = folders.save_picture, threading.Lock(), {"drawn": 0, "saved": 0, "most": 0}
    take = folders._Shared._take

    def counted_take(self: Any, place: int) -> Image.Image:
        with lock:
            counts["drawn"] += 1
            counts["most"] = max(counts["most"], counts["drawn"] - counts["saved"])
        return take(self, place)

    def counted_save(image: Image.Image, path: Path) -> Path:
        done = original(image, path)
        with lock:
            counts["saved"] += 1
        return done

    monkeypatch.setattr(folders._Shared, "_take", counted_take)
    monkeypatch.setattr(folders, "save_picture", counted_save)
    assert len(save_feature_maps(passed_on(spread(1, 300, 4, 4)), tmp_path)) == 300
    assert counts["saved"] == counts["drawn"] == 300
    assert counts["most"] <= 65


# Robust limits.


def test_robust_limits_are_those_of_the_layer(tmp_path):
    values = torch.randn(1, 4, 20, 20)
    values[0, 1, 3, 3] = 200.0
    acts = recorded(nn.Sequential(nn.Identity()), nn.Identity, values)
    paths = save_feature_maps(acts, tmp_path / "maps", value_range="robust")
    ends = robust_ends(values.numpy())
    for channel, path in enumerate(paths):
        alone = feature_grid(values, channels=channel, value_range=ends, padding=0)
        assert np.array_equal(read(path), colours(alone)), channel
    weight = nn.Conv2d(2, 40, 3)
    with torch.no_grad():
        weight.weight[5, 1, 1, 1] = 200.0
    ends = robust_ends(weight.weight.detach().numpy())
    for plane, path in enumerate(save_kernel_sheets(weight, tmp_path / "kernels", value_range="robust")):
        assert np.array_equal(read(path), colours(kernel_grid(weight, channels=plane, value_range=ends)))
