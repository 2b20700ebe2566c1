"""`Projection`: its sheet, pixel by pixel, its files, and what it says of itself."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.nets import small_net
from torchlens_viz import Projection, errors, project
from torchlens_viz.files.pictures import read_image
from torchlens_viz.files.tensors import read_npz, write_npz

SIDE = 4


def made(**changes) -> Projection:
    """Two projections of an image of 8 x 8, one of them at its corner."""
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0, 2, 2], images[0, 1, 3, 3] = 2.0, -1.0
    images[1, :, 0, 0] = 4.0
    pixels = torch.arange(64.0).view(8, 8).div(63).expand(3, -1, -1).clone()
    given = Projection(
        layer="relu",
        rule="guided",
        position="max",
        channels=torch.tensor([7, 3]),
        images=images,
        positions=torch.tensor([[2, 2], [0, 0]]),
        regions=((slice(2, 6), slice(2, 6)), (slice(0, 2), slice(0, 4))),
        scores=torch.tensor([1.5, -0.25]),
        pixels=pixels,
    )
    return replace(given, **changes)


def parts_of(picture: Image.Image, place: int, *, padding: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The projection and the patch of a tile in a sheet of one row without text."""
    pixels = np.array(picture)
    start = padding + place * (2 * SIDE + 2 + padding)
    tile = pixels[padding : padding + SIDE, start : start + 2 * SIDE + 2]
    assert (tile[:, SIDE : SIDE + 2] == 255).all()
    return tile[:, :SIDE], tile[:, SIDE + 2 :]


PLAIN = {"labels": False, "legend": False, "title": "", "padding": 1, "upscale": 1, "nrow": 2}


def plain(projection, **options):
    """The sheet without the line of its title."""
    sheet = projection.grid(**{**PLAIN, **options})
    return sheet.crop((0, sheet.height - SIDE - 2, sheet.width, sheet.height))


def test_each_projection_stands_beside_what_it_explains_and_zero_is_gray():
    sheet = plain(made())
    projection, patch = parts_of(sheet, 0)
    assert projection[0, 0].tolist() == [255, 128, 128]
    assert projection[1, 1].tolist() == [128, 64, 128]
    assert (np.delete(projection.reshape(-1, 3), [0, 5], 0) == 128).all()
    expected = made().pixels[0, 2:6, 2:6].mul(255).round().int()
    assert patch[..., 0].tolist() == expected.tolist()
    projection, patch = parts_of(sheet, 1)  # two rows of four, in the middle of gray
    assert (projection[[0, 3]] == 128).all()
    assert (patch[[0, 3]] == 128).all()
    assert (projection[1, 0] == 255).all()
    assert patch[1:3, :, 1].tolist() == [[0, 4, 8, 12], [32, 36, 40, 45]]


def test_all_may_have_one_range():
    projection, _ = parts_of(plain(made(), scale_each=False), 0)
    assert projection[0, 0].tolist() == [191, 128, 128]
    assert projection[1, 1].tolist() == [128, 96, 128]


def test_what_few_pixels_have_does_not_leave_the_rest_faint():
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) - 0.5
    images[0, 1, 20, 20] = 1e6
    one = made(
        images=images, pixels=torch.rand(3, 40, 40), channels=torch.tensor([0]), scores=torch.ones(1),
        positions=torch.zeros(1, 2), regions=((slice(0, 40), slice(0, 40)),),
    )  # fmt: skip
    shown = np.array(one.grid(legend=False, labels=False, upscale=1, padding=0))[-40:, :40].astype(float)
    assert shown.std() > 60


def test_colours_are_those_of_the_picture():
    swap = torch.tensor([[0.0, 0, 2], [0, 2, 0], [2, 0, 0]])  # the model takes blue, green, red
    projection, _ = parts_of(plain(made(colours=swap)), 0)
    assert projection[0, 0].tolist() == [128, 128, 255]


def test_other_than_three_channels_are_drawn_in_gray():
    images = torch.zeros(2, 2, 8, 8)
    images[0, 0, 2, 2] = 1
    sheet, bottom = made(images=images).grid(**PLAIN), made().grid(**PLAIN).height
    assert sheet.height > bottom  # a line below says so, without a legend too
    projection, _ = parts_of(sheet.crop((0, bottom - SIDE - 2, sheet.width, bottom)), 0)
    assert projection[0, 0].tolist() == [255, 255, 255]
    assert (projection.reshape(-1, 3)[1:] == 128).all()


def test_what_is_not_finite_is_seen():
    images = made().images.clone()
    images[0, 1, 3, 3], images[0, 2, 2, 3], images[0, 0, 3, 2] = torch.nan, torch.inf, -torch.inf
    projection, _ = parts_of(plain(made(images=images)), 0)
    assert projection[1, 1].tolist() == [255, 0, 255]
    assert projection[0, 1].tolist() == [0, 255, 0]
    assert projection[1, 0].tolist() == [0, 255, 255]
    assert projection[0, 0].tolist() == [255, 128, 128]


def test_zero_everywhere_is_gray_and_a_unit_that_sees_nothing_too():
    nothing = made(
        images=torch.zeros(2, 3, 8, 8), regions=((slice(0, 4), slice(0, 4)), (slice(3, 3), slice(0, 2)))
    )
    projection, patch = parts_of(plain(nothing), 1)
    assert (projection == 128).all()
    assert (patch == 128).all()


def test_large_parts_are_shrunk_and_small_ones_enlarged():
    assert made().grid(labels=False, legend=False, padding=0, nrow=1).width == 2 * 64 + 2
    small = {**PLAIN, "padding": 0, "nrow": 1}
    assert made().grid(**{**small, "upscale": 3}).width == 2 * 12 + 2
    large = project(small_net(), "0", torch.rand(3, 400, 200), [0], position="all")
    assert large.grid(labels=False, legend=False, padding=0).width == 2 * 80 + 2


def test_titles_labels_pages_and_the_legend_take_room():
    bare, whole = made().grid(labels=False, legend=False), made().grid()
    assert whole.height > bare.height
    assert whole.mode == "RGB"
    first = made().grid(max_tiles=1)
    second = made().grid(max_tiles=1, page=1)
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()
    assert made().grid(labels=["a", "b"]).tobytes() != whole.tobytes()
    assert made().grid(title="other").tobytes() != whole.tobytes()


def test_units_that_did_not_fire_are_said():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU())
    net[0].weight.data[0], net[0].weight.data[1] = 1.0, -1.0
    seen = project(net, "1", torch.rand(1, 6, 6), [0, 1])
    assert (seen.scores > 0).tolist() == [True, False]
    assert seen.grid().height > project(net, "1", torch.rand(1, 6, 6), [0, 0]).grid().height


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, "`labels` must be 2 strings"),
        ({"page": 2, "max_tiles": 1}, "`page` must be below 2"),
        ({"nrow": 0}, "`nrow` must be at least 1"),
        ({"upscale": 9999}, "the sheet would have .* pixels"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(errors.InvalidArgumentError, match=message):
        made().grid(**options)


@pytest.mark.parametrize("position", ["max", "all", (1, 2)])
@pytest.mark.parametrize("colours", [None, torch.eye(3)])
def test_what_is_saved_is_read_again(tmp_path, position, colours):
    before = made(position=position, colours=colours, channels=torch.tensor([7, 7]))
    assert before.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    after = Projection.load(tmp_path / "new" / "folder")
    for field in fields(Projection):
        one, other = getattr(before, field.name), getattr(after, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {
        *("7.png", "7-2.png", "grid.png", "scores.csv", "projection.npz")
    }
    assert np.array_equal(np.array(read_image(folder / "grid.png")), np.array(before.grid()))
    assert read_image(folder / "7.png").size == (2 * 64 + 2, 64)
    rows = list(csv.DictReader(StringIO((folder / "scores.csv").read_text())))
    assert rows[0] == {
        "channel": "7", "score": "1.5", "row": "2", "column": "2",
        "top": "2", "bottom": "6", "left": "2", "right": "6",
    }  # fmt: skip


def test_a_folder_that_holds_nothing_or_what_is_damaged_is_refused(tmp_path):
    with pytest.raises(errors.ArchiveError, match=r"give a folder that `Projection\.save` wrote"):
        Projection.load(tmp_path)
    made().save(tmp_path)
    path = tmp_path / "projection.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(errors.ArchiveError, match=r"give a folder that `Projection\.save` wrote"):
        Projection.load(tmp_path)
    for header in (
        {},
        {"position": 3},
        {"position": "max", "regions": [[1]]},
        {"position": "max", "regions": []},
    ):
        write_npz(path, {"images": made().images}, header)
        with pytest.raises(errors.ArchiveError, match="its header is damaged"):
            Projection.load(tmp_path)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    made().save(tmp_path)
    tensors, told = read_npz(tmp_path / "projection.npz", remedy="")
    for name in ("channels", "images", "positions", "scores"):
        write_npz(tmp_path / "projection.npz", {**tensors, name: tensors[name][:1]}, told)
        with pytest.raises(errors.ArchiveError, match="its header is damaged"):
            Projection.load(tmp_path)
    write_npz(tmp_path / "projection.npz", tensors, told)
    assert len(Projection.load(tmp_path).channels) == 2


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("regions", [[[0, "x"], [0, 4]]] * 2, "`regions` must be an int"),
        ("regions", [[[0, 99], [0, 4]]] * 2, "`regions` must be at most 8"),
        ("regions", [[[3, 2], [0, 4]]] * 2, "`regions` must be at least 3"),
        ("rule", "backwards", '`rule` must be "deconvnet"'),
        ("layer", 3, "`layer` must be a string"),
        ("position", "least", '`position` must be "max" or "all"'),
    ],
)
def test_an_edited_header_is_refused_with_the_reason(tmp_path, name, value, reason):
    made().save(tmp_path)
    tensors, told = read_npz(tmp_path / "projection.npz", remedy="")
    write_npz(tmp_path / "projection.npz", tensors, {**told, name: value})
    with pytest.raises(errors.ArchiveError, match=f"its header is damaged.*{reason}"):
        Projection.load(tmp_path)


def test_edited_tensors_are_refused_with_the_reason(tmp_path):
    made().save(tmp_path)
    tensors, told = read_npz(tmp_path / "projection.npz", remedy="")
    for name in ("channels", "images", "positions", "scores", "pixels"):
        write_npz(tmp_path / "projection.npz", {**tensors, name: tensors[name].double()}, told)
        with pytest.raises(errors.ArchiveError, match=f"`{name}` must be torch"):
            Projection.load(tmp_path)


def test_options_that_are_no_flags_and_folders_that_are_none_are_refused():
    for option in ("scale_each", "legend"):
        with pytest.raises(errors.InvalidTypeError, match=f"`{option}` must be True or False, got 1"):
            made().grid(**{option: 1})
    for act in (made().save, Projection.load):
        with pytest.raises(errors.InvalidTypeError, match="`directory` must be a string or a path"):
            act(3)


def test_it_shows_itself():
    shown = repr(made())
    assert shown.splitlines()[0] == "Projection of relu by guided, images (2, 3, 8, 8)"
    assert "7           1.5  (2, 2)" in shown
    assert made()._repr_png_().startswith(b"\x89PNG")
    many = project(nn.Sequential(nn.Conv2d(1, 30, 1)), "0", torch.rand(1, 4, 4), range(30))
    assert repr(many).splitlines()[-1] == "  ... 10 more"


def test_what_is_done_to_the_patterns_does_not_show_in_the_model():
    net = small_net()
    found = project(net, "0", torch.rand(3, 12, 12))
    weight = net[0].weight.detach().clone()
    found.images.zero_()
    assert torch.equal(net[0].weight, weight)
