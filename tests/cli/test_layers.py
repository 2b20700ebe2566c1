"""`torchlens-viz layers` prints what `layers` returns."""

from __future__ import annotations

import json

import torch

from torchlens_viz import layers
from torchlens_viz.files.pictures import read_image
from torchlens_viz.zoo.load import load_model


def test_without_a_picture_it_prints_the_table_and_loads_no_weights(folder, run, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", None)
    code, out, err = run("layers", "squeezenet1_1")
    assert (code, err) == (0, [])
    table = layers(load_model("squeezenet1_1", weights="none").model)
    assert out == str(table).splitlines()
    assert not any(row.time_share for row in table)


def test_with_a_picture_time_is_measured_on_what_the_model_makes_of_it(folder, run):
    code, out, err = run("layers", "alexnet", "photo.png", "--json", "--layer", "features.*", "--no-blocks")
    assert (code, err) == (0, [])
    found = json.loads("\n".join(out))
    prepared = load_model("alexnet", weights="none").preprocess(read_image("photo.png"))
    assert found["input_shapes"] == [list(prepared.shape)]
    assert found["rows"][0]["name"] == "features.0"
    assert found["rows"][0]["overwritten_by"] == "features.1"
    assert found["rows"][0]["time_share"] > 0


def test_a_network_that_looks_at_values_is_built_with_some(folder, run):
    (folder / "tiny_looks.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 2, 3)\n    def forward(self, x):\n"
        "        return self.conv(x) if float(x.sum()) == 0 else None\n"
    )
    code, out, err = run("layers", "tiny_looks:Net")
    assert (code, err) == (0, [])
    assert out[2].split()[:2] == ["conv", "Conv2d"]
