"""The table of networks: what a cell says is so, and the page has a row for every network."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import networks

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    relu = [nn.ReLU(inplace=True) for _ in range(2)]
    body = nn.Sequential(nn.Conv2d(3, 4, 3), relu[0], nn.Conv2d(4, 5, 3, 2), relu[1])
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6))
    return net, preprocess

def preprocess(image):
    picture = image.convert("RGB").resize((32, 32))
    pixels = torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    return (pixels[None] - 0.5) / 0.25
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(FACTORY, "utf-8")
    spec = f"{tmp_path / 'own_net.py'}:build"
    monkeypatch.setattr(networks, "specs", lambda _: [("own", "small", spec)])
    return tmp_path / "rows.json"


def cells(keep) -> dict[str, str]:
    (row,) = json.loads(keep.read_text("utf-8"))
    return row["cells"]


def test_a_network_that_works_is_right_everywhere(own, capsys):
    assert networks.main(["--keep", str(own)]) == 0
    assert cells(own) == dict.fromkeys(networks.COMMANDS, "right")
    assert "| `small` | right | right | right | right | right |" in capsys.readouterr().out


def test_what_is_not_so_is_wrong(own, monkeypatch):
    honest = networks.Network.called

    def called(self, batch):
        output, calls = honest(self, batch)
        calls["0.0"] *= 2
        calls["0.2"] = [2 * calls["0.2"][0][:, :, 1:]]
        return output + 1, calls

    monkeypatch.setattr(networks.Network, "called", called)
    monkeypatch.setattr(networks.Network, "first_weight", lambda self: torch.arange(108.0).view(4, 3, 3, 3))
    assert networks.main(["--keep", str(own)]) == 1
    found = cells(own)
    assert {name: cell.partition(":")[0] for name, cell in found.items()} == dict.fromkeys(found, "wrong")


def test_a_refusal_is_a_reason_and_an_exception_a_failure(own, monkeypatch, capsys):
    def line(words):
        if words[0] == "maps":
            raise ValueError("broken on purpose")
        sys.stderr.write("torchlens-viz: error: not today\n")
        return 2

    monkeypatch.setattr(networks, "command_line", line)
    assert networks.main(["--keep", str(own)]) == 1
    out = capsys.readouterr().out
    assert "| `small` | [1] | [1] | [2] | [1] | [1] |" in out
    assert "1. refused: not today\n2. failed: ValueError: broken on purpose" in out


def test_the_page_tells_of_every_network(tmp_path):
    page = networks.PAGE.read_text("utf-8")
    names = [name for _, name, _ in networks.specs(tmp_path)]
    assert len(names) == len(set(names)) == 78
    rows, _, left_out = page.partition("Not tried in this run:")
    told = [name for name in names if f"| `{name}` |" in rows]
    assert [name for name in names if name not in told and f"`{name}`" not in left_out] == []
    assert "wrong:" not in page
    assert "failed:" not in page
