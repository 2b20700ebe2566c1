"""`Maximization`: ranks and z-scores by numpy, the sheet, and what is written and read again."""

from __future__ import annotations

import csv
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from torchlens_viz.ascent.result import _TOLD, Maximization
from torchlens_viz.errors import ArchiveError, InvalidArgumentError
from torchlens_viz.files.tensors import write_npz


def made(channels=(4, 0, 4), depth=3, **options) -> Maximization:
    torch.manual_seed(1)
    count = len(channels)
    own = {
        "layer": "features.2",
        "objective": "channel()",
        "channels": torch.tensor(channels),
        "images": torch.rand(count, depth, 9, 12),
        "scores": torch.linspace(-1, 2, count),
        "history": torch.cat((torch.rand(count, 3), torch.full((count, 2), torch.nan)), dim=1),
        "means": torch.randn(count, 6),
        "status": ("steps", "dead", "threshold", "stalled")[:count],
        "evidence": ("5 steps", "no gradient", 'passed "3"', "x, y")[:count],
    }
    return Maximization(**{**own, **options})


def test_ranks_count_the_channels_that_are_driven_harder():
    result = made()
    means = result.means.numpy()
    expected = [int((row > row[own]).sum()) for row, own in zip(means, (4, 0, 4), strict=True)]
    assert result.ranks.tolist() == expected
    assert made(means=torch.ones(3, 6)).ranks.tolist() == [0, 0, 0]
    assert made(names_channels=False).ranks.tolist() == [-1, -1, -1]


def test_z_scores_are_in_units_of_the_references():
    references = torch.randn(7, 6) * torch.arange(1, 7) + 3
    references[:, 2] = 1.5  # does not vary
    means = torch.randn(3, 6)
    means[0, 2], means[1, 2], means[2, 2] = 1.5, 2.0, 1.0
    result = made(means=means, reference_means=references)
    usual, own = references.double().numpy(), means.double().numpy()
    varies = [0, 1, 3, 4, 5]
    expected = (own - usual.mean(0))[:, varies] / usual.std(0, ddof=1)[varies]
    np.testing.assert_allclose(result.z_means.numpy()[:, varies], expected, rtol=1e-5)
    assert result.z_means[:, 2].tolist() == [0, float("inf"), -float("inf")]
    z = result.z_means.numpy()
    assert result.z_ranks.tolist() == [int((z[i] > z[i, c]).sum()) for i, c in enumerate((4, 0, 4))]


@pytest.mark.parametrize("references", [None, torch.rand(1, 6)])
def test_z_scores_need_two_references(references):
    result = made(reference_means=references)
    with pytest.raises(InvalidArgumentError, match="z-scores need two or more images"):
        _ = result.z_means
    with pytest.raises(InvalidArgumentError, match="z-scores need two or more images"):
        _ = result.z_ranks


def test_the_sheet_shows_every_image_over_the_whole_range():
    result = made()
    plain = result.grid(labels=False, title=None, padding=0, upscale=1, nrow=3)
    expected = (torch.cat(list(result.images), dim=2).permute(1, 2, 0) * 255).round()
    difference = np.asarray(plain).astype(int) - expected.numpy().astype(int)
    assert plain.size == (36, 9)
    assert np.abs(difference).max() <= 1


def test_the_sheet_has_titles_unless_told_otherwise():
    result = made()
    labelled, bare = result.grid(upscale=6), result.grid(labels=False, title=None, upscale=6)
    assert labelled.mode == "RGB"
    assert labelled.height > bare.height
    other = made(scores=torch.tensor([7.0, 8.0, 9.0])).grid(upscale=6)
    assert np.asarray(other).tobytes() != np.asarray(labelled).tobytes()  # the score stands in the title
    assert result._repr_png_()[:4] == b"\x89PNG"


@pytest.mark.parametrize("depth", [1, 4])
def test_images_of_other_than_three_channels_are_drawn_in_gray(depth):
    result = made(depth=depth)
    sheet = np.asarray(
        result.grid(labels=False, title=None, padding=0, upscale=1, nrow=3).convert("RGB")
    ).astype(int)
    assert (sheet[..., 0] == sheet[..., 1]).all()
    expected = torch.cat(list(result.images.mean(1)), dim=1) * 255
    assert np.abs(sheet[..., 0] - expected.numpy()).max() <= 2


def test_images_without_limits_are_drawn_over_the_limits_and_clipped(tmp_path):
    result = made(
        images=torch.tensor([-50.0, 127.5, 400.0]).view(3, 1, 1, 1).expand(3, 3, 9, 12), limits=(0.0, 255.0)
    )
    result.save(tmp_path)
    shown = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("4", "0", "4-2")]
    assert [each.min() for each in shown] == [0, 128, 255]
    assert [each.max() for each in shown] == [0, 128, 255]


@pytest.mark.parametrize("filmed", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_what_is_saved_is_read_again(tmp_path, filmed, compared):
    result = made(
        frames=tuple((255 * torch.rand(n, 3, 9, 12)).byte() for n in (2, 3, 1)) if filmed else None,
        reference_means=torch.rand(4, 6) if compared else None,
        limits=(-1.0, 2.5),
        names_channels=False,
    )
    assert result.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    again = Maximization.load(tmp_path / "new" / "folder")
    for field in fields(result):
        left, right = getattr(result, field.name), getattr(again, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        elif field.name == "frames" and left is not None:
            assert all(map(torch.equal, left, right))
        else:
            assert left == right, field.name


def test_a_folder_holds_a_picture_per_image_the_sheet_and_a_table(tmp_path):
    result = made()
    (tmp_path / "mine.txt").write_text("stays")
    result.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.png",
        "4-2.png",
        "4.png",
        "grid.png",
        "maximization.npz",
        "mine.txt",
        "scores.csv",
    ]
    for name, image in zip(("4", "0", "4-2"), result.images, strict=True):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert np.abs(picture - (255 * image.permute(1, 2, 0)).numpy()).max() <= 0.5001
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["channel"] for row in rows] == ["4", "0", "4"]
    assert [float(row["score"]) for row in rows] == result.scores.tolist()
    assert [int(row["rank"]) for row in rows] == result.ranks.tolist()
    assert [row["evidence"] for row in rows] == ["5 steps", "no gradient", 'passed "3"']


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-60], lambda data: b"", lambda data: b"PK" + data[9:], None]
)
def test_a_folder_that_cannot_be_read_is_refused(tmp_path, damage):
    made().save(tmp_path)
    path = tmp_path / "maximization.npz"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(ArchiveError, match=r"cannot read .*maximization.npz.*give a folder that"):
        Maximization.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        made().save(tmp_path / "file")


def test_the_ascent_is_saved_as_a_moving_picture(tmp_path):
    frames = tuple((255 * torch.rand(n, 3, 9, 12)).byte() for n in (4, 2, 3))
    path = made(frames=frames).save_animation(tmp_path / "a.webp", 2, fps=5)
    with Image.open(path) as picture:
        assert picture.n_frames == 3
        assert picture.size == (12, 9)


@pytest.mark.parametrize(
    ("frames", "place", "match"),
    [
        (None, 0, "there are no frames; give `maximize` the option `method=Normalized"),
        ((torch.zeros(1, 3, 4, 4).byte(),) * 3, 3, "`place` must be below 3, got 3"),
        ((torch.zeros(1, 3, 4, 4).byte(),) * 3, -4, "`place` must be below 3, got -4"),
    ],
)
def test_animations_need_frames(tmp_path, frames, place, match):
    with pytest.raises(InvalidArgumentError, match=match):
        made(frames=frames).save_animation(tmp_path / "a.webp", place)


def test_it_writes_itself_as_a_table():
    lines = repr(made()).splitlines()
    assert lines[0] == "Maximization of channel() at features.2, images (3, 3, 9, 12)"
    assert lines[3].split() == ["0", "0.5", str(made().ranks[1].item()), "dead"]
    many = made(channels=tuple(i % 6 for i in range(25)), status=("steps",) * 25, evidence=("",) * 25)
    assert repr(many).splitlines()[-1] == "  ... 5 more"
    assert len(repr(many).splitlines()) == 23


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"status": ("x", "steps", "steps")},
            "`status` must be 3 of threshold, steps, stalled, dead, nonfinite",
        ),
        ({"status": ("steps",)}, "`status` must be 3 of"),
        ({"evidence": ("x",)}, "`evidence` must be 3 strings"),
        ({"images": torch.full((3, 3, 9, 12), torch.nan)}, "`images` must be one or more, of finite values"),
        ({"images": torch.rand(3, 3, 9, 12).double()}, r"`images` must be torch.float32 \(K, C, H, W\)"),
        ({"scores": torch.rand(2)}, r"`scores` must be torch.float32 \(K\) with K = 3"),
        ({"channels": torch.tensor([4, 0, 6])}, "`channels` must be from 0 to 5"),
        ({"channels": torch.tensor([4, 0, -1])}, "`channels` must be from 0 to 5"),
        ({"limits": (1.0, 0.0)}, r"`limits` must be \(low, high\) with low < high"),
        ({"limits": (1.0, torch.inf)}, "`limits` must be finite"),
        ({"layer": 3}, "`layer` must be str"),
        ({"is_complete": 1}, "`is_complete` must be bool"),
        (
            {"reference_means": torch.rand(4, 5)},
            r"`reference_means` must be torch.float32 \(R, M\) with R = 4, M = 6",
        ),
        ({"frames": (torch.zeros(2, 3, 9, 12),) * 3}, r"`frames` must be torch.uint8 \(F, C, H, W\)"),
    ],
)
def test_an_edited_folder_is_refused_with_the_reason(tmp_path, change, reason):
    whole = made()
    whole.save(tmp_path)
    told = {name: getattr(whole, name) for name in _TOLD}
    tensors = {name: getattr(whole, name) for name in ("channels", "images", "scores", "history", "means")}
    for name, value in change.items():
        if name == "frames":
            tensors.update({f"frames{place}": each for place, each in enumerate(value)})
        else:
            (told if name in told else tensors)[name] = value
    write_npz(tmp_path / "maximization.npz", tensors, told)
    with pytest.raises(ArchiveError, match=rf"its header is damaged \(.*{reason}.*\); give a folder"):
        Maximization.load(tmp_path)
