"""What the tests of the command line share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchlens_viz.cli.main import main

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        maps = self.relu(self.second(self.relu(self.first(images))))
        return self.head(maps.mean((2, 3)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return self.shared(self.shared(images))


def gray():
    return nn.Conv2d(1, 2, 3)


def four():
    return nn.Conv2d(4, 2, 3)


def folded():
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 2, 3))


def dense():
    return nn.Linear(3, 2)


def hostile():
    net = nn.Sequential()
    net.add_module("/escape", nn.Conv2d(3, 2, 3))
    net.add_module("a/b", nn.Conv2d(2, 2, 3))
    net.add_module("a_b", nn.Conv2d(2, 2, 3))
    return net
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a model, a photograph, and a collection of files that are no good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("tiny_net.py").write_text(MODULE)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:3000])
    Image.fromarray(pixels[:4, :4]).save("tiny.png")
    Path("notes.txt").write_text("not a picture")
    Path("folder.png").mkdir()
    torch.save({"other": torch.zeros(1)}, "other.pth")
    Path("damaged.pth").write_bytes(b"half")
    Path("damaged.safetensors").write_bytes(b"half")
    yield tmp_path
    sys.modules.pop("tiny_net", None)


@pytest.fixture
def run(capsys):
    def call(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call
