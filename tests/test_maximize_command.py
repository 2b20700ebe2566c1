"""`torchlens-viz maximize`: what the library finds, a folder per layer; broken runs go on."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchlens_viz import Maximization, maximize
from torchlens_viz.ascent.checkpoint import Resumption
from torchlens_viz.cli.main import main
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.inputs import colours_as_in
from torchlens_viz.models.zoo import load_model

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 4, 3)

    def forward(self, images):
        return self.second(self.relu(self.first(images)))


def preprocess(image):
    values = torch.tensor(list(image.resize((20, 18)).convert("RGB").tobytes())).view(18, 20, 3)
    return (values.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25


def build():
    return Net()


def curved(image):
    return preprocess(image) ** 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "curved.py").write_text(MODULE.replace("/ 255 - 0.5) / 0.25", "/ 255) ** 3"))
    monkeypatch.chdir(tmp_path)
    for name in ("mymodels", "curved"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def normalised(images):
    return (images - 0.5) / 0.25


def expected(layer, channels=None, **options):
    model = load_model("mymodels:build").model
    return maximize(model, layer, channels, size=(18, 20), preprocess=normalised, **options)


def test_it_writes_a_folder_per_layer_with_what_maximize_finds(folder, capsys):
    words = [
        "maximize",
        "mymodels:build",
        "--layer",
        "first",
        "--layer",
        "second",
        "-o",
        "out",
        "--steps",
        "6",
    ]
    assert main([*words, "--channels", "0-2", "--seed", "5", "--precision", "float32"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines() == [str(folder / "out" / name / "grid.png") for name in ("first", "second")]
    for layer in ("first", "second"):
        want = expected(layer, range(3), steps=6, seed=5, precision="float32")
        got = Maximization.load(folder / "out" / layer)
        torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-5)
        assert sorted(path.name for path in (folder / "out" / layer).iterdir()) == [
            "0.png", "1.png", "2.png", "grid.png", "maximization.npz", "scores.csv",
        ]  # fmt: skip
        drawn = np.asarray(read_image(folder / "out" / layer / "1.png"), dtype=np.float64)
        assert np.abs(drawn - 255 * want.images[1].permute(1, 2, 0).double().numpy()).max() <= 0.51
        with (folder / "out" / layer / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["channel"] for row in rows] == ["0", "1", "2"]
        assert [float(row["score"]) for row in rows] == pytest.approx(want.scores.tolist(), rel=1e-4)
    assert f"second: {len(got.status)} " in out.err.replace("3 steps", "3 ").replace("3 stalled", "3 ")


@pytest.mark.parametrize("finished", [0, 2])
def test_a_run_that_was_broken_off_goes_on(folder, capsys, monkeypatch, finished):
    words = [
        "maximize",
        "mymodels:build",
        "--layer",
        "second",
        "-o",
        "out",
        "--steps",
        "6",
        "--batch-size",
        "1",
    ]
    keep, kept = Resumption.keep, []

    def keep_some(self, climb):
        if len(kept) == finished:
            raise KeyboardInterrupt
        kept.append(climb.request.channel)
        keep(self, climb)

    with monkeypatch.context() as broken:
        broken.setattr(Resumption, "keep", keep_some)
        assert main(words) == 130
    assert [path.suffix for path in (folder / "out" / "second").iterdir()] == [""]  # only the unfinished
    assert len(list((folder / "out" / "second" / "unfinished").glob("*.npz"))) == finished
    assert main(words) == 0
    got, whole = Maximization.load(folder / "out" / "second"), expected("second", steps=6)
    assert got.channels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(got.images, whole.images, rtol=0, atol=1e-3)
    assert not (folder / "out" / "second" / "unfinished").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mymodels:build", "--layer", "third"], "no layer is named `third`"),
        (["mymodels:build", "--layer", "first", "--channels", "9"], "indices from 0 to 5, got 9"),
        (["mymodels:build", "--layer", "first", "--transforms", "wild"], "`transforms` must be one of"),
        (["curved:build", "--layer", "first"], "along a straight line"),
        (["mymodels:build"], "required: --layer"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(folder, capsys, words, message):
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    assert main(["maximize", *words, "-o", "out", "--steps", "2"]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert out.err.count("\n") == 1
    assert out.out == ""
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_what_preprocessing_does_to_colours_is_found(folder):
    size, colours = colours_as_in(load_model("mymodels:build").preprocess)
    assert size == (18, 20)
    images = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(colours(images), normalised(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_torchrun_find_what_one_finds(folder):
    words = ["maximize", "mymodels:build", "--layer", "second", "--steps", "5", "--precision", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "torchlens_viz"]
    done = subprocess.run(
        [*run, *words, "-o", "out"], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(folder / "out" / "second" / "grid.png")]
    got = Maximization.load(folder / "out" / "second")
    want = expected("second", steps=5, precision="float32")
    assert got.channels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-4)
