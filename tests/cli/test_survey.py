"""`torchlens-viz survey`: a folder of pictures through a model, and what is written of it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.nets import same_survey
from torchlens_viz import Survey, survey

FOLDER_MODULE = """
import torch
from torch import nn


def preprocess(image):
    import numpy as np
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1)[None].float() / 255


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].weight.data[1] = model[0].weight.data[0]
    model[0].bias.data[1] = model[0].bias.data[0]
    model[0].bias.data[2] = -100
    return model
"""


CLASSIFIER = """
import torch
from torch import nn

from survey_net import preprocess


def classifier():
    torch.manual_seed(1)
    pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *pooled), preprocess, ["a dog", "a cat", "neither"]
"""
CLIP_MODULE = (
    FOLDER_MODULE.replace("/ 255", "/ 255 * 2 - 1").replace("preprocess", "image_of")
    + """

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 2, 3), nn.ReLU())


def preprocess(image):
    return image_of(image.convert("RGB"))[:, :, None].expand(-1, -1, 4, -1, -1)
"""
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "survey_net.py").write_text(FOLDER_MODULE)
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures / "a.png")
    Image.fromarray(pixels[:10, :8]).convert("CMYK").save(pictures / "b.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(pictures / "c.png")
    Image.fromarray(pixels).convert("P").save(pictures / "deep" / "d.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(pictures / "e.jpg", exif=exif)
    (pictures / "notes.txt").write_text("no picture")
    yield tmp_path
    sys.modules.pop("survey_net", None)


@pytest.fixture
def run(capsys):
    from torchlens_viz.cli.main import main

    def call(*arguments):
        code = main([str(argument) for argument in ("survey", "survey_net:net", *arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def test_the_command_writes_statistics_sheets_and_findings(folder, run):
    code, out, _ = run("pictures", "-o", "out", "--layer", "*", "--batch-size", "2", "--top-k", "3")
    assert code == 0
    names = ("findings.csv", "statistics.csv", "pictures.csv", "statistics.json", "survey.safetensors")
    assert out == [str(folder / "out" / name) for name in (*names, "top/0.png", "top/1.png")]
    found = Survey.load("out/survey.safetensors")
    assert (found.samples_seen, found.dead("1").tolist(), found.duplicates("1")[0].channels) == (
        5,
        [2],
        (0, 1),
    )
    told = json.loads((folder / "out" / "statistics.json").read_text())
    assert told["layers"]["0"]["max"] == found.stats["0"].max.tolist()
    kinds = [line.split(",")[1] for line in (folder / "out" / "findings.csv").read_text().splitlines()]
    assert kinds[:3] == ["kind", "dead", "dead"]
    assert "duplicate" in kinds
    assert "notes.txt" not in (folder / "out" / "pictures.csv").read_text()
    assert not (folder / "out" / "unfinished.safetensors").exists()


def test_a_network_over_clips_sees_pictures_as_clips(folder, run):
    (folder / "survey_net.py").write_text(CLIP_MODULE)
    code, _, err = run("pictures", "-o", "out", "--top-k", "2")
    assert code == 0, err
    found = Survey.load(folder / "out" / "survey.safetensors")
    assert found.input_shape == (3, 4, 12, 12)
    assert found.top["0"].positions.shape == (2, 2, 3)
    sheet = np.asarray(Image.open(folder / "out" / "top" / "0.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 20  # patches in their colours


def test_a_corrupt_picture_is_named_or_skipped_and_listed(folder, run):
    whole = (folder / "pictures" / "a.png").read_bytes()
    (folder / "pictures" / "bad.png").write_bytes(whole[:200])
    code, out, err = run("pictures", "-o", "out", "--layer", "0")
    assert (code, out, len(err)) == (2, [], 1)
    assert "bad.png" in err[0]
    assert "--skip-bad" in err[0]
    code, _, err = run("pictures", "-o", "out", "--layer", "0", "--skip-bad")
    assert code == 0
    assert any("5 pictures surveyed, 1 bad ones skipped" in line for line in err)
    listed = (folder / "out" / "pictures.csv").read_text().splitlines()
    assert next(line for line in listed if "bad.png" in line).startswith("2,pictures/bad.png,")
    assert set(Survey.load("out/survey.safetensors").top["0"].samples[0].tolist()) == {0, 1, 3, 4, 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("empty", "-o", "out"), "there is none in 'empty'"),
        (("nowhere", "-o", "out"), "must name a folder of pictures, got 'nowhere'"),
        (("pictures", "-o", "survey_net.py"), "must name a folder, got the file"),
        (("pictures", "-o", "out", "--batch-size", "0"), "`--batch-size` must be at least 1, got 0"),
        (("pictures", "-o", "out", "--layer", "none"), "no layer is named `none`"),
        (("bad", "-o", "out", "--skip-bad"), "no picture in 'bad' can be read"),
    ],
)
def test_the_command_refuses_what_it_cannot_survey(folder, run, arguments, message):
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "x.png").write_bytes(b"no picture")
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_torchrun_shares_the_folder_among_processes(folder, run):
    options = ["pictures", "--layer", "*", "--batch-size", "1", "--top-k", "2"]
    assert run(*options, "-o", "alone")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "torchlens_viz", "survey", "survey_net:net", *options, "-o", "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    same_survey(Survey.load("out/survey.safetensors"), Survey.load("alone/survey.safetensors"))
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        path.name for path in (folder / "alone").iterdir()
    )


def test_ctrl_c_leaves_what_the_command_goes_on_from(folder, run, monkeypatch):
    import torchlens_viz.cli.survey as command

    read, count = command.read_image, iter(range(100))

    def interrupted(path):
        if next(count) == 3:
            raise KeyboardInterrupt
        return read(path)

    arguments, unfinished = ("pictures", "-o", "out", "--batch-size", "1"), Path("out/unfinished.safetensors")
    monkeypatch.setattr(command, "read_image", interrupted)
    assert run(*arguments)[0] == 130
    assert unfinished.exists()
    monkeypatch.setattr(command, "read_image", read)
    assert run(*arguments)[0] == 0
    assert Survey.load("out/survey.safetensors").samples_seen == 5
    assert not unfinished.exists()


@pytest.fixture
def classes(folder):
    """A function that lays pictures out in folders of these names, two in each."""
    (folder / "survey_classifier.py").write_text(CLASSIFIER)

    def lay_out(*names: str) -> Path:
        rng = np.random.default_rng(1)
        for name in names:
            (folder / "by_class" / name / "deep").mkdir(parents=True)
            for place in ("one.png", "deep/two.png"):
                pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "by_class" / name / place)
        return folder / "by_class"

    yield lay_out
    sys.modules.pop("survey_classifier", None)


def classified(*arguments) -> int:
    from torchlens_viz.cli.main import main

    return main([str(each) for each in ("survey", "survey_classifier:classifier", *arguments)])


@pytest.mark.parametrize(
    ("names", "outputs", "how"),
    [
        (("A_cat", "a-dog"), [1, 0], "by name"),
        (("2", "0"), [0, 2], "by number"),
        (("x", "y", "z"), [0, 1, 2], "in the order of names"),
    ],
)
def test_effects_are_those_of_the_classes_that_the_folders_name(classes, capsys, names, outputs, how):
    place = classes(*names)
    assert classified(place, "-o", "out", "--loss", "cross_entropy", "--layer", "*", "--top-k", "2") == 0
    classifier = sys.modules["survey_classifier"].classifier
    preprocess = sys.modules["survey_net"].preprocess
    out, err = capsys.readouterr()
    assert "classes.csv" in out
    assert f"classes {how}: " in err
    files = sorted(place.rglob("*.png"), key=lambda path: path.parts)
    images = torch.cat([preprocess(Image.open(path)) for path in files])
    labels = torch.tensor(outputs).repeat_interleave(2)
    expected = survey(
        classifier()[0], [(images, labels)], "*", loss="cross_entropy", by_class=True, progress=False
    )
    found = Survey.load("out/survey.safetensors")
    for name, change in expected.effects.items():
        torch.testing.assert_close(found.effects[name], change, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found.selectivity[name], expected.selectivity[name], equal_nan=True)
    with Path("out/statistics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["effect"]))
    told = f"{best['layer']}, channel {best['channel']}: loss +{float(best['effect']):.3g} +- "
    assert told + f"{float(best['effect_error']):.2g} without it" in err
    with Path("out/classes.csv").open(newline="") as file:
        by_class = [row for row in csv.DictReader(file) if row["layer"] == "1"]
    assert [int(row["output"]) for row in by_class] == sorted(outputs)
    own = expected.effects.by_class("1")
    assert [int(row["channel"]) for row in by_class] == own.change.argmax(1).tolist()
    assert {row["inputs"] for row in by_class} == {"2"}
    assert {row["class"] for row in by_class} == {path.name for path in place.iterdir()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a cat", "a bird"), "got 2 for 3 outputs, and there is no output 'a bird'; rename the folders"),
        (("1", "3"), "got 2 for 3 outputs, and there is no output '1', '3'"),
        (("a cat", "a cat/deep/deeper"), "classes by name: 'a cat' is output 1"),
    ],
)
def test_folders_that_fit_no_outputs_are_refused(classes, capsys, names, message):
    place = classes(*names)
    code = classified(place, "-o", "out", "--loss", "cross_entropy")
    assert code == (0 if "classes" in message else 2)
    assert message in capsys.readouterr().err
    assert Path("out").exists() == (code == 0)


def test_a_picture_outside_of_any_class_and_a_network_without_classes_are_refused(classes, capsys):
    place = classes("a cat")
    (place / "a cat" / "one.png").rename(place / "one.png")
    assert classified(place, "-o", "out", "--loss", "cross_entropy") == 2
    assert "one.png' outside of any; move it" in capsys.readouterr().err
    (place / "one.png").unlink()
    from torchlens_viz.cli.main import main

    assert main(["survey", "survey_net:net", str(place), "-o", "out", "--loss", "cross_entropy"]) == 2
    assert (
        "`--loss` needs a network that puts out (N, classes), got (1, 4, 10, 10)" in capsys.readouterr().err
    )
