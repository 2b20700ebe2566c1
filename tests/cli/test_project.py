"""`torchlens-viz project`: what it writes, and what it says of bad input."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

import pytest

from torchlens_viz import Projection

NET = """
from torch import nn
import torch


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 20, 3), nn.SiLU(), nn.Conv2d(20, 4, 3))


def trainable():
    return net().train()
"""


@pytest.fixture(autouse=True)
def _network(folder):
    Path("plain_net.py").write_text(NET)
    yield
    __import__("sys").modules.pop("plain_net", None)


def test_units_of_several_layers_are_written_with_a_sheet_and_a_table(run, folder):
    code, out, err = run(
        *("project", "plain_net:net", "photo.png", "--layer", "0", "--layer", "2"),
        *("--channels", "3,0-1", "--rule", "guided", "--position", "2,5", "-o", "made"),
    )
    assert code == 0, err
    assert out == [str(folder / "made" / layer / "grid.png") for layer in ("0", "2")]
    assert {path.name for path in Path("made/2").iterdir()} == {
        *("0.png", "1.png", "3.png", "grid.png", "scores.csv", "projection.npz")
    }
    found = Projection.load("made/2")
    assert found.rule == "guided"
    assert found.channels.tolist() == [3, 0, 1]
    assert found.positions.tolist() == [[2, 5]] * 3
    assert found.images.shape[1] == 3
    rows = list(csv.DictReader(StringIO(Path("made/2/scores.csv").read_text())))
    assert [row["channel"] for row in rows] == ["3", "0", "1"]
    assert (rows[0]["top"], rows[0]["right"]) == ("2", "10")


def test_the_strongest_sixteen_by_the_deconvnet_are_the_default(run):
    code, _, err = run("project", "plain_net:trainable", "photo.png", "--layer", "2", "-o", "made")
    assert code == 0, err
    found = Projection.load("made/2")
    assert (found.rule, found.position) == ("deconvnet", "max")
    assert len(found.channels) == 16
    assert (found.scores[:-1] >= found.scores[1:]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "4"], 'says what passes a ReLU, .* `3` (SiLU) applies silu; pass `rule="gradient"`'),
        (["--layer", "9"], "no layer is named `9`"),
        (["--layer", "0", "--channels", "6"], "`channels` must be indices from 0 to 5, got 6"),
        (["--layer", "0", "--rule", "lrp"], '`rule` must be "deconvnet", "guided" or "gradient"'),
        (["--layer", "0", "--position", "1"], "must be max, all, or ROW,COLUMN such as 3,4, got '1'"),
        (["--layer", "0", "--position", "999,0"], "`position` must lie in the map of `0`"),
        (["--layer", "0", "--device", "nowhere"], "`--device` must be a device"),
        ([], "the following arguments are required: --layer"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, options, message):
    code, out, err = run("project", "plain_net:net", "photo.png", "-o", "made", *options)
    assert code == 2
    assert out == []
    assert len(err) == 1
    for part in message.split(".*"):
        assert part.strip() in err[0]
    assert not Path("made").exists()


def test_a_file_in_place_of_the_folder_and_a_picture_that_is_none_are_refused(run):
    code, _, err = run("project", "plain_net:net", "photo.png", "--layer", "0", "-o", "notes.txt")
    assert code == 2
    assert "`--out` must name a folder, got the file" in err[0]
    code, _, err = run("project", "plain_net:net", "cut.png", "--layer", "0", "-o", "made")
    assert code == 2
    assert "cut.png" in err[0]


def test_a_folder_whose_name_is_too_long_is_refused(run):
    code, _, err = run("project", "plain_net:net", "photo.png", "--layer", "0", "-o", "a" * 300)
    assert code == 2
    assert "File name too long" in err[0]
