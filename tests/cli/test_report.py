"""`torchlens-viz report`: pictures through a model, and one page that shows what becomes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

MODULE = """
import torch
from torch import nn


def preprocess(image):
    import numpy as np
    return torch.from_numpy(np.array(image.resize((24, 16)))).permute(2, 0, 1)[None].float() / 255


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 24 * 16, 3),
    )


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 16, 3))
"""


@pytest.fixture
def report(folder, run):
    (folder / "reported_net.py").write_text(MODULE)
    for place in range(3):
        Path("many/deep").mkdir(parents=True, exist_ok=True)
        Image.open("photo.png").rotate(90 * place, expand=True).save(f"many/deep/{place}.png")
    return lambda *arguments: run("report", *arguments)


def page():
    return Path("out/report.html").read_text("utf-8")


def test_pictures_become_a_page(folder, report):
    code, out, err = report("reported_net:net", "photo.png", "many/deep/1.png", "-o", "out/report.html")
    assert (code, out) == (0, [str(folder / "out" / "report.html")])
    assert err[0].startswith("torchlens-viz: reported_net:net: weights as its factory sets them")
    assert re.findall(r"<h3>Maps of ([^<]*)</h3>", page()) == ["photo.png", "1.png"] * 2
    assert len(re.findall('<article class="channel"', page())) == 9
    assert "torchlens-viz report reported_net:net photo.png many/deep/1.png -o out/report.html" in page()
    assert "<title>reported_net:net</title>" in page()
    told = "Weights: weights as its factory sets them. Preprocessing: that of reported_net:preprocess."
    assert told in page()


def test_layers_channels_and_title_are_chosen(report):
    code, _, _ = report(
        *("reported_net:net", "photo.png", "-o", "out/report.html"),
        *("--layer", "2", "--max-channels", "3", "--title", "mine & yours"),
    )
    assert code == 0
    assert len(re.findall('<article class="channel"', page())) == 3
    assert 'id="0"' not in page()
    assert "<title>mine &amp; yours</title>" in page()


def test_a_folder_of_pictures_is_surveyed(report):
    code, _, _ = report("reported_net:net", "photo.png", "-o", "out/report.html", "--survey", "many")
    assert code == 0
    assert "3 pictures of many" in page()
    assert page().count("What drives it hardest in the data set") == 9


def test_a_survey_from_a_folder_is_read(report, run):
    assert run("survey", "reported_net:net", "many", "-o", "found")[0] == 0
    code, _, _ = report("reported_net:net", "photo.png", "-o", "out/report.html", "--survey", "found")
    assert code == 0
    assert "3 pictures, read from found" in page()
    assert page().count("What drives it hardest in the data set") == 9


def test_strong_channels_are_maximised(report):
    code, _, _ = report(
        "reported_net:net", "photo.png", "-o", "out/report.html", "--maximize", "--layer", "0"
    )
    assert code == 0
    assert len(re.findall("Ascent at 0 ", page())) == 4


def test_pictures_are_put_beside_the_page(folder, report):
    code, out, _ = report(
        "reported_net:net", "photo.png", "-o", "out/report.html", "--assets", "out/pictures"
    )
    assert (code, out) == (0, [str(folder / "out" / "report.html")])
    files = {each.name for each in Path("out/pictures").iterdir()}
    assert any(name.startswith("photo.png-") for name in files)
    assert "data:image" not in page()
    assert all(f"pictures/{name}" in page() for name in files)


def test_two_files_of_one_name_are_told_apart(report):
    Image.open("photo.png").save("many/photo.png")
    code, _, _ = report("reported_net:net", "photo.png", "many/photo.png", "-o", "out/report.html")
    assert code == 0
    names = re.findall(r"<h3>Maps of ([^<]*)</h3>", page())
    assert names == ["photo.png (0)", "many/photo.png (1)"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reported_net:net", "missing.png", "-o", "p.html"], "must name an existing picture file"),
        (["reported_net:net", "photo.png", "-o", "many"], "`--out` must name a file, got the folder 'many'"),
        (["reported_net:dense", "photo.png", "-o", "p.html"], "has no convolution"),
        (["reported_net:net", "photo.png", "-o", "p.html", "--layer", "x"], "no layer is named `x`"),
        (
            ["reported_net:net", "photo.png", "-o", "p.html", "--max-channels", "0"],
            "must be at least 1, got 0",
        ),
        (["reported_net:net", "photo.png", "-o", "p.html", "--survey", "nowhere"], "nowhere"),
        (["reported_net:net", "photo.png"], "--help"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(report, arguments, words):
    code, out, err = report(*arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert words in err[0]
    assert not Path("p.html").exists()


def test_a_survey_without_its_list_of_pictures_is_refused(report, run):
    assert run("survey", "reported_net:net", "many", "-o", "found")[0] == 0
    Path("found/pictures.csv").unlink()
    code, _, err = report("reported_net:net", "photo.png", "-o", "p.html", "--survey", "found")
    assert code == 2
    assert "the list of the pictures that were surveyed" in err[0]
