"""What somebody else's exception says is quoted in one short line of printable text, whatever it is."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

import torchlens_viz as tv
from torchlens_viz.errors import (
    InvalidArgumentError,
    ModelLoadError,
    in_one_line,
    kind_of,
    message_of,
    one_line,
    reason_of,
)
from torchlens_viz.zoo.loaded import OwnPreprocess

IMAGE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


class MuteError(RuntimeError):
    """Its message cannot be made."""

    def __str__(self):
        raise ValueError("no message")


class UnreadableError(Exception):
    """Neither can the reason of the system."""

    strerror = 5

    def __str__(self):
        return "plain"


class Unnamed(type):
    """Its classes have no name to ask for."""

    def __getattribute__(cls, name):
        if name == "__name__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class UnnamedError(ValueError, metaclass=Unnamed):
    pass


class LeavingError(ValueError):
    def __str__(self):
        raise SystemExit(0)


class NoReasonError(OSError):
    @property
    def strerror(self):
        raise ValueError


class Text(str):
    __slots__ = ()

    def __getitem__(self, place):
        raise ValueError(place)


class OddTextError(ValueError):
    def __str__(self):
        return Text("odd. Text")


LONG = type("L" * 1000 + "\n", (ValueError,), {})
SAID = [
    (UnnamedError("a"), "a", "UnnamedError: a"),
    (LeavingError(), "LeavingError", "LeavingError"),
    (NoReasonError("a"), "a", "NoReasonError: a"),
    (OddTextError(), "odd. Text", "OddTextError: odd"),
    (LONG(), "L" * 76 + " ...", "L" * 76 + " ..."),
    (ValueError("a\nb\t c. And more"), "a b c. And more", "ValueError: a"),
    (ValueError("first. Second"), "first. Second", "ValueError: first"),
    (ValueError(), "ValueError", "ValueError"),
    (MuteError(), "MuteError", "MuteError"),
    (UnreadableError(), "5", "UnreadableError: plain"),
    (ValueError("\x1b[2Jred\x00"), "\\x1b[2Jred\\x00", "ValueError: \\x1b[2Jred\\x00"),
    (ValueError("\udcff"), "\\udcff", "ValueError: \\udcff"),
    (
        FileNotFoundError(2, "No such file", "x"),
        "No such file",
        "FileNotFoundError: [Errno 2] No such file: 'x'",
    ),
]


@pytest.mark.parametrize(("error", "reason", "line"), SAID, ids=[kind_of(case[0]) for case in SAID])
def test_an_exception_is_told_in_one_line(error, reason, line):
    assert (reason_of(error), one_line(error)) == (reason, line)


def test_a_long_message_is_cut():
    error = ValueError("é" * 100_000)
    assert reason_of(error) == "é" * 496 + " ..."
    assert one_line(error) == "ValueError: " + "é" * 496
    assert message_of(error) == "é" * 100_000
    assert in_one_line("x " * 10, 12) == "x x x x  ..."


class Raising(nn.Module):
    """A network, or a function of a picture, that raises."""

    def __init__(self, error):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.error = error

    def forward(self, images):
        self.conv(images)
        raise self.error


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (MuteError(), r"\bMuteError\b"),
        (UnnamedError("a"), r"\ba\b"),
        (LONG("a"), r"\ba\b"),
        (RuntimeError("x" * 100_000), r"x{496} ?\.*"),
        (RuntimeError("\x1b[31mno\x07"), r"\\x1b\[31mno\\x07"),
        (ValueError("a\n\n"), r"\ba\b"),
    ],
)
@pytest.mark.parametrize(
    "act",
    [
        lambda net: tv.maximize(net, net[1], size=8, steps=1),
        lambda net: tv.explain(net, IMAGE, 0),
        lambda net: tv.project(net, net[1], IMAGE),
        lambda net: tv.receptive_field(net, net[1], (1, 3, 8, 8)),
        lambda net: tv.overlay_grid(net, net[1], IMAGE),
        lambda net: OwnPreprocess("own", lambda _: net(IMAGE[None]))(Image.new("RGB", (8, 8))),
    ],
    ids=["maximize", "explain", "project", "receptive_field", "overlay_grid", "preprocess"],
)
def test_what_a_model_raises_is_quoted_in_one_short_printable_line(act, error, quoted):
    net = nn.Sequential(Raising(error), nn.Conv2d(2, 2, 3))
    with pytest.raises((InvalidArgumentError, ModelLoadError), match=quoted) as caught:
        act(net)
    message = str(caught.value)
    assert len(message) < 1500
    assert message.isprintable()
