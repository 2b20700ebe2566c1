"""What results show of themselves in a notebook: escaped, small, with pictures, and true."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz import Activations, ChannelStats, RunningStats, capture, explain, maximize, project, survey
from torchlens_viz import notebook as shown
from torchlens_viz.notebook import Markup, Page, escaped, number, profile
from torchlens_viz.progress import tracked

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
MOST = 300_000
VOID = {"img", "br"}


class Reader(HTMLParser):
    """Reads a page: its tags must be closed in order, and are noted with their attributes and text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def net() -> nn.Sequential:
    parts = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    parts(torch.zeros(1, 3, 12, 12))
    return parts.eval()


def statistics(values: torch.Tensor) -> ChannelStats:
    running = RunningStats()
    running.update(values)
    return running.compute()


class Named(nn.Module):
    """A network with a layer of any name, but for dots."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Conv2d(3, 4, 3))

    def forward(self, x):
        return next(self.children())(x).relu().mean((2, 3))


def recorded(model: nn.Module, *layers: str) -> Activations:
    with torch.no_grad(), capture(model, list(layers) or "*") as acts:
        model(torch.randn(2, 3, 12, 12))
    return acts


def results(model: nn.Module, layer: str) -> dict[str, object]:
    images = torch.rand(6, 3, 12, 12)
    return {
        "activations": recorded(model, layer),
        "stats": statistics(images),
        "survey": survey(model, [images], layer, top_k=2, progress=False),
        "maximization": maximize(model, layer, range(4), size=12, steps=3),
        "projection": project(model, layer, images[:1], rule="gradient"),
        "explanation": explain(model, images[:2], method="gradcam", layer=layer),
    }


@pytest.fixture(scope="module")
def of_hostile() -> dict[str, object]:
    return results(Named(HOSTILE).eval(), HOSTILE)


KINDS = ["activations", "stats", "survey", "maximization", "projection", "explanation"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_shows_itself_as_a_page_that_runs_nothing(of_hostile, kind):
    markup = of_hostile[kind]._repr_html_()
    page = Reader(markup)
    assert len(markup.encode()) < MOST
    assert {tag for tag, _ in page.tags} <= {
        *("div", "style", "strong", "table", "tr", "th", "td"),
        *("details", "summary", "img", "svg", "path"),
    }
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {
        *("class", "src", "width", "height", "alt", "role", "aria-label", "d", "stroke", "stroke-width"),
    }
    for tag, attributes in page.tags:
        if tag == "img":
            assert re.match(r"data:image/(png|jpeg);base64,", attributes["src"] or "")
            assert attributes["alt"]
    if kind in ("activations", "survey", "maximization", "projection", "explanation"):
        assert any(HOSTILE in words for words in page.words)  # shown as what it is
    if kind in ("activations", "maximization", "projection", "explanation"):
        assert page.pictures()


def test_activations_are_a_row_each_with_what_the_text_says():
    acts = recorded(net(), "0", "1", "4")
    page = Reader(acts._repr_html_())
    head, *rows = page.rows
    assert head[:3] == ["layer", "shape", "dtype"]
    assert [row[0] for row in rows] == ["0", "1", "4"]
    for row, line in zip(rows, repr(acts).splitlines()[2:], strict=True):
        assert re.split(r"\s{2,}", line.strip()) == row[:7]
    assert rows[0][1] == "(2, 8, 10, 10)"
    assert float(rows[0][4]) == pytest.approx(acts["0"].min().item(), rel=1e-3)
    assert page.pictures()[0].size == (6 * 41 + 1, 40 + 2)  # 10 x 10, enlarged to at least 32
    assert len(page.pictures()) == 2  # what has no maps has no picture


def test_layers_that_did_not_run_are_named():
    model = net()
    with capture(model, ["0", "2"], stop=False) as acts:
        model[0](torch.zeros(1, 3, 12, 12))
    assert Reader(acts._repr_html_()).rows[-1][:2] == ["2", "not called"]


def test_kinds_of_tensors_without_values_are_shown_all_the_same():
    class Odd(nn.Module):
        def forward(self, x):
            return {
                "complex": torch.complex(x, x),
                "empty": x[:0],
                "meta": x.to("meta"),
                "nan": x * torch.nan,
            }

    acts = recorded(nn.Sequential(Odd()), "0")
    page = Reader(acts._repr_html_())
    assert [row[0] for row in page.rows[1:]] == ["0", "", "", ""]
    assert len(page.pictures()) == 1  # NaN can be drawn


def test_statistics_show_each_channel_and_fold_the_rest():
    values = torch.randn(4, 30, 5, 5)
    stats = statistics(values)
    page = Reader(stats._repr_html_())
    channels = [row for row in page.rows if len(row) == 8 and row[0].isdecimal()]
    means = values.double().mean((0, 2, 3)).tolist()
    assert [float(row[1]) for row in channels] == pytest.approx(means, rel=1e-3, abs=1e-4)
    assert len(channels) == 30
    assert "18 more" in page.words
    figures = {row[0]: row for row in page.rows if row[0] == "mean"}
    assert float(figures["mean"][1]) == pytest.approx(min(means), rel=1e-3)
    assert sum(tag == "svg" for tag, _ in page.tags) == 7


def test_a_survey_shows_its_layers_and_what_is_wrong():
    model = net()
    with torch.no_grad():
        model[0].bias[3] = -1e3
    images = torch.rand(30, 3, 12, 12)
    found = survey(model, [images], "1", top_k=2, progress=False)
    page = Reader(found._repr_html_())
    assert page.rows[1][:3] == ["1", "8", str(len(found.dead("1")))]
    assert int(page.rows[1][2]) >= 1
    assert [row[0] for row in page.rows if row[0] == "dead"] == ["dead"]


def test_maximised_images_are_shown_with_their_figures():
    result = maximize(net(), "0", [5, 2], size=12, steps=4)
    page = Reader(result._repr_html_())
    rows = page.rows[1:]
    assert [row[1] for row in rows] == ["5", "2"]
    assert [float(row[2]) for row in rows] == pytest.approx(result.scores.tolist(), rel=1e-3)
    assert [row[3] for row in rows] == [str(rank) for rank in result.ranks.tolist()]
    drawn = np.asarray(page.pictures()[0].convert("RGB")).astype(float) / 255
    assert np.abs(drawn - result.images[0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


# The limit on size.


def test_no_result_is_larger_than_300_kb():
    noise = torch.rand(2, 64, 20, 20)
    stats = statistics(torch.randn(2, 20_000, 2, 2))
    acts = Activations([f"layer{index}" + "<" * 500 for index in range(500)])
    acts._calls = {name: [noise] for name in acts._selected}
    for result in (stats, acts, maximize(nn.Conv2d(3, 99, 3), "", range(99), size=64, steps=1)):
        markup = result._repr_html_()
        page = Reader(markup)
        assert len(markup.encode()) < MOST
        assert any("more" in words for words in page.words)
    assert sum("are not shown" in words for words in Reader(stats._repr_html_()).words) == 1


def test_pictures_are_shrunk_until_there_is_room(monkeypatch):
    monkeypatch.setattr(shown, "_MOST_OF_PICTURES", 12_000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    page = Page("title")
    first = page.picture(noise, "noise")
    assert 0 < len(first) <= 12_000
    assert Reader(first).pictures()[0].size in ((128, 128), (64, 64), (32, 32))
    for _ in range(20):
        last = page.picture(noise, "noise")
    assert last == ""


def test_text_is_shown_whatever_it_holds():
    assert escaped("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#x27;"
    assert escaped("a\x00\ud800\nb") == "a\\x00\\ud800\\nb"
    assert escaped("日本語") == "日本語"
    assert len(escaped("x" * 10_000)) == 161
    escaped("\ud800").encode()


def test_numbers_and_profiles():
    assert (number(3), number(1234567), number(0.12345)) == ("3", "1,234,567", "0.1235")
    assert number(float("nan")) == "nan"
    assert isinstance(number(3), Markup)
    assert profile([], "nothing") == ""
    bars = re.findall(
        r"M([\d.]+) ([\d.]+)V([\d.]+)", profile([1.0, -1.0, float("nan"), 0.0], "four", width=8)
    )
    assert [(float(x), float(zero), float(end)) for x, zero, end in bars] == [
        (1.0, 12.0, 0.0),
        (3.0, 12.0, 24.0),
        (5.0, 12.0, 12.0),
        (7.0, 12.0, 12.0),
    ]
    assert len(re.findall("M", profile([1.0] * 5000, "many"))) == 160


# The bar.


class ZMQInteractiveShell:
    """What IPython calls the shell of a notebook."""


def test_in_a_notebook_the_bar_is_tqdm_s_own_for_notebooks(monkeypatch):
    import tqdm.auto

    made: list[str] = []
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda items, **_: made.append("notebook") or items)
    monkeypatch.setattr(tqdm, "tqdm", lambda items, **_: made.append("terminal") or items)
    assert list(tracked([1, 2], shown=True, total=2, unit="x")) == [1, 2]
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    found = importlib.util.find_spec
    for has_widgets in (True, False):  # without them tqdm's own bar for notebooks is a warning in red
        spec = object() if has_widgets else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, spec=spec: spec if name == "ipywidgets" else found(name)
        )
        assert list(tracked([3], shown=True, total=1, unit="x")) == [3]
    assert made == ["terminal", "notebook", "terminal"]


def test_statistics_of_no_channel_are_shown():
    empty = ChannelStats(**{name: torch.zeros(0) for name in ("mean", "std", "min", "max")}, **{
        name: torch.zeros(0) for name in ("zero_fraction", "nonfinite", "count")
    })  # fmt: skip
    assert "0 channels" in "".join(Reader(empty._repr_html_()).words)
