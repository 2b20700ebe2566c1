"""Command lines that nobody meant, and what must come of them."""

from __future__ import annotations

import contextlib
import io
import os
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.hostile import Hangs, raw, selfish
from torchlens_viz.cli.main import main

MODULE = """
from torch import nn

from tests.hostile import make_net

net = make_net()
head = nn.Sequential(*make_net(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def preprocess(image):
    import numpy as np, torch
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1) / 255


def fails():
    raise ZeroDivisionError("on purpose")


number = 3
"""
COMMANDS = {
    "kernels": ["kernels", "tiny:net", "-o", "k.png"],
    "maps": ["maps", "tiny:net", "photo.png", "-o", "maps"],
    "maximize": [
        *["maximize", "tiny:net", "--layer", "3", "--channels", "0", "--size", "10", "--steps", "1"],
        *["--device", "cpu", "-o", "found"],
    ],
    "survey": ["survey", "tiny:net", "pictures", "--device", "cpu", "-o", "surveyed"],
    "project": [
        *["project", "tiny:net", "photo.png", "--layer", "3", "--channels", "0-1", "--device", "cpu"],
        *["-o", "projected"],
    ],
    "explain": ["explain", "tiny:head", "photo.png", "--target", "1", "--device", "cpu", "-o", "explained"],
}
WORDS = [
    "", "-", "--", "---", "x", "X", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e999", "9" * 30,
    "9" * 5000, str(2**31), str(2**63), str(2**64), "-9" + "9" * 30, "\udcff", "\ud800", "a\0b",
    "a" * 300, "a" * 5000, "0-1", "0-99999999", "0-" + "9" * 5000, "1-0", "٣", "²", ",", "0,,1", "*",
    "[", "..", ".", "/dev/null", "/dev/zero", "/dev/null/x", "/proc/x", "pipe", "pipe.png", "pipe.pth",
    "loop", "loop/x", "loop.png", "loop.pth", "~", "folder.png", "photo.png", "pictures", "cut.png",
    "text.png", "self.pth", "cut.pth", "none", "DEFAULT", "cuda:99", "cuda", "meta", "cpu:1", "tiny",
    "tiny:", ":net", "tiny:fails", "tiny:number", "tiny:net.weight", "no:net", "resnet", "alex net",
    "tiny:net:net", "gray", "mean", "norm", "bicubic", "1 2", "e", "\n", "x\ny", "%s", "{}",
]  # fmt: skip
OPTIONS = {
    "kernels": "layer filters channels",
    "maps": "layer grid channels channel-dim",
    "maximize": (
        "layer channels size steps lr threshold objective transforms parametrization method seed precision "
        "batch-size channel-dim device"
    ),
    "survey": "layer batch-size top-k channels skip-bad channel-dim device",
    "project": "layer channels rule position batch-size channel-dim device",
    "explain": "layer target method grid samples noise seed cmap channel-dim device",
}
_DRAWING = (
    "cmap scale-each value-range nrow padding upscale interpolation labels legend title sort-by "
    "max-tiles page"
)


def make_folder(folder: Path) -> None:
    """Write what the commands need, and much that they do not."""
    (folder / "tiny.py").write_text(MODULE)
    (folder / "pictures").mkdir()
    (folder / "folder.png").mkdir()
    for place in ("photo.png", "pictures/a.png", "pictures/b.png"):
        Image.new("RGB", (20, 16), (9, 99, 199)).save(folder / place)
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:50])
    (folder / "text.png").write_text("no picture")
    (folder / "cut.pth").write_bytes(b"PK\x03\x04")
    torch.save(selfish(), folder / "self.pth")
    for ending in ("", ".png", ".pth"):
        os.mkfifo(folder / f"pipe{ending}")
        (folder / f"loop{ending}").symlink_to(f"loop{ending}")


def command_line(chance: random.Random) -> list[str]:
    """Return a command with one or two words that nobody means."""
    command = chance.choice(sorted(COMMANDS))
    words = [*COMMANDS[command]]
    options = [*OPTIONS[command].split(), "weights"]
    if command in ("kernels", "maps"):
        options += _DRAWING.split()
    for _ in range(chance.choice([1, 1, 2])):
        if chance.random() < 0.4:
            words[chance.randrange(len(words))] = chance.choice(WORDS)
            continue
        option, form = f"--{chance.choice(options)}", chance.random()
        given = [chance.choice(WORDS)] * (2 if option in ("--grid", "--value-range") else 1)
        words += [f"{option}={given[0]}"] if form < 0.3 else [option, *given] if form < 0.95 else [option]
    return words


def try_command(words: list[str]) -> str | None:
    """Run a command line in this process; what is wrong with how it ends, if anything is."""
    out, told = io.StringIO(), io.StringIO()
    code: list[Any] = []

    def run() -> None:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            try:
                code.append(main(words))
            except SystemExit as end:  # --help and --version
                code.append(end.code)

    wrong = raw(run)
    if wrong is not None:
        return wrong
    text = told.getvalue()
    if Hangs.__name__ in text:
        return text
    if code[0] not in (0, 2):
        return f"the code is {code[0]}"
    if code[0] == 2 and (text.count("\n") != 1 or not text.startswith("torchlens-viz: error: ")):
        return f"not one line: {text[:200]!r}"
    return None
