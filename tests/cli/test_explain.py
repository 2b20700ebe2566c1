"""`torchlens-viz explain`: pictures through a model, and what is written of them."""

from __future__ import annotations

import csv

import pytest
import torch
from PIL import Image

from torchlens_viz.cli.explain import _index
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.zoo.loaded import LoadedModel

MODULE = """
import torch
from torch import nn


def preprocess(image):
    import numpy as np
    return torch.from_numpy(np.array(image.resize((24, 16)))).permute(2, 0, 1)[None].float() / 255


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 16, 3)
    )


def maps():
    return nn.Conv2d(3, 4, 3)
"""


@pytest.fixture
def explain(folder, run):
    (folder / "explained_net.py").write_text(MODULE)
    Image.open("photo.png").rotate(90).save("other.png")
    return lambda *arguments: run("explain", *arguments)


def test_every_picture_becomes_a_sheet_and_a_row(folder, explain):
    code, out, err = explain("explained_net:net", "photo.png", "other.png", "-o", "out", "--target", "2")
    assert code == 0
    assert out == [str(folder / "out" / name) for name in ("photo.png", "other.png", "scores.csv")]
    assert err[0].startswith("torchlens-viz: explained_net:net: weights as its factory sets them")
    assert "layercam at 1" in err[1]
    rows = list(csv.reader((folder / "out" / "scores.csv").read_text("utf-8").splitlines()))
    assert rows[0] == ["picture", "target", "score", "kept", "lost", "rank_correlation"]
    assert [row[:2] for row in rows[1:]] == [["photo.png", "target 2"], ["other.png", "target 2"]]
    from explained_net import net, preprocess

    with Image.open("photo.png") as picture:
        assert float(rows[1][2]) == pytest.approx(net()(preprocess(picture))[0, 2].item(), rel=1e-4)
    with Image.open(folder / "out" / "photo.png") as sheet:
        assert sheet.mode == "RGB"


def test_options_reach_the_method(folder, explain):
    arguments = ("explained_net:net", "photo.png", "-o", "out")
    code, _, err = explain(
        *arguments, "--method", "smoothgrad", "--samples", "2", "--noise", "0.1", "--seed", "3"
    )
    assert code == 0
    assert "smoothgrad" in err[1]
    code, _, err = explain(
        *arguments, "--method", "gradcam", "--layer", "0", "--layer", "1", "--cmap", "viridis"
    )
    assert code == 0
    assert "gradcam at 0, 1" in err[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explained_net:net", "photo.png", "--target", "7"], "`target` must be an index from 0 to 2"),
        (["explained_net:net", "photo.png", "--target", "cat"], "bring no names; give its index"),
        (["explained_net:net", "photo.png", "--method", "cam"], '`method` must be "gradcam"'),
        (["explained_net:net", "photo.png", "--layer", "9"], "no layer is named `9`"),
        (["explained_net:net", "photo.png", "missing.png"], "must name an existing picture file"),
        (["explained_net:maps", "photo.png"], "must be a function where the model puts out float32"),
    ],
)
def test_bad_input_ends_in_one_line_and_nothing_is_written(folder, explain, arguments, message):
    code, out, err = explain(*arguments, "-o", "out")
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not (folder / "out").exists()


def test_outputs_are_found_by_name():
    loaded = LoadedModel(
        model=torch.nn.Identity(),
        preprocess=None,
        name="net",
        weights_note="",
        names=("Tabby", "Tiger cat"),
    )
    assert _index(None, loaded) is None
    assert _index("1", loaded) == 1
    assert _index("tiger CAT", loaded) == 1
    with pytest.raises(InvalidArgumentError, match="got 'taby'; did you mean 'tabby'"):
        _index("taby", loaded)
    with pytest.raises(InvalidArgumentError, match="got 'zebra'; give its index"):
        _index("zebra", loaded)
