"""The demo draws a trained network on a real photograph, with no download."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from torchlens_viz.cli import demo
from torchlens_viz.cli.demo import run_demo
from torchlens_viz.cli.parser import parser
from torchlens_viz.errors import MissingDependencyError, PictureError
from torchlens_viz.files.pictures import read_image
from torchlens_viz.grids.features import feature_grid
from torchlens_viz.grids.kernels import kernel_grid
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.demo_net import load_demo_net, preprocess

NAMES = [
    "report.html",
    "kernels.png",
    "maps/features.0.png",
    "maps/features.3.png",
    "maps/features.6.png",
    "kernels_beside_maps.png",
    "maximized/features.0.png",
    "maximized/features.3.png",
    "maximized/features.6.png",
    "projected/features.0.png",
    "projected/features.3.png",
    "projected/features.6.png",
    "explained.png",
]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("the demo must not open a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_the_demo_writes_every_picture_and_prints_where(tmp_path, capsys, offline):
    paths = run_demo(image=None, out=tmp_path / "out")
    assert paths == [tmp_path / "out" / name for name in NAMES]
    for path in paths[1:]:
        picture = read_image(path)
        assert 256 <= max(picture.size) <= 4000
        assert np.asarray(picture).std() > 5
    assert capsys.readouterr().out.splitlines() == [
        *(str(path) for path in paths),
        "",
        "Now your own model and picture:",
        "  torchlens-viz report resnet18 photo.jpg -o report.html",
    ]
    page = paths[0].read_text("utf-8")
    assert len(page) < 3_000_000
    assert page.count('<article class="channel"') == 64 + 96 + 128
    assert page.count("Ascent at features.") == 24
    assert page.count("What drives it hardest in the data set") == 72
    assert "over 48 inputs" in page
    assert '<th scope="row">chelsea, upright</th>' in page
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(paths)


@pytest.mark.slow
def test_the_pictures_are_those_of_the_network_and_a_large_photograph_at_screen_size(tmp_path):
    photograph = Image.linear_gradient("L").resize((3000, 2250))
    photograph.save(tmp_path / "photo.png")
    paths = dict(zip(NAMES, run_demo(image=tmp_path / "photo.png", out=tmp_path), strict=True))
    assert all(max(read_image(path).size) <= 4000 for name, path in paths.items() if name != "report.html")
    photograph = photograph.convert("RGB")
    photograph.thumbnail((512, 512))
    network = load_demo_net()
    with torch.inference_mode(), capture(network, "features.3") as acts:
        network(preprocess(photograph))
    expected = {
        "kernels.png": kernel_grid(network, "features.0", upscale=6, value_range="robust"),
        "maps/features.3.png": feature_grid(
            acts["features.3"],
            upscale=-(-96 // max(acts["features.3"].shape[-2:])),
            value_range="robust",
            legend=True,
        ),
    }
    for name, sheet in expected.items():
        assert np.array_equal(np.asarray(read_image(paths[name])), np.asarray(sheet.convert("RGB"))), name


def test_the_next_command_that_is_printed_can_be_parsed():
    program, *words = demo._NEXT_COMMAND.split()
    arguments = parser().parse_args(words)
    assert program == "torchlens-viz"
    assert (arguments.command, arguments.model) == ("report", "resnet18")


@pytest.mark.parametrize("size", [(30, 400), (400, 30), (5000, 100)])
def test_a_photograph_too_small_for_the_network_is_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "small.png")
    with pytest.raises(
        PictureError, match=rf"at least 31 pixels a side .*small\.png' with {size[0]} x {size[1]}"
    ):
        run_demo(image=tmp_path / "small.png", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_scikit_image_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(
        MissingDependencyError, match=r'python -m pip install "torchlens_viz\[demo\]".*--image'
    ):
        run_demo(image=None, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
