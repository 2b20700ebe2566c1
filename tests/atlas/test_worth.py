"""What the page says of the worth of channels, and of another network beside this one."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import torchlens_viz as tv
from tests.atlas import pages
from tests.atlas.pages import IMAGE, Text, entry_of
from torchlens_viz.atlas.worth import CHOICES, Column

LABELLED = torch.rand(12, 3, 24, 32, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2] * 4)


def test_effects_are_shown_with_error_and_rank(written):
    net = pages.classifier()
    found = tv.survey(net, [LABELLED], "0", loss="cross_entropy", progress=False)
    change, error = found.effects.of("0")
    page = written(net, IMAGE, survey=found, max_channels=4)
    order = change.argsort(descending=True, stable=True).tolist()
    for rank, channel in enumerate(order):
        own = re.search(rf'<(?:article class="channel"|tr) id="0:{channel}"[^>]*>', page)[0]
        assert f'data-effect="{rank}"' in own
    channel = int(re.search(r'<article class="channel" id="0:(\d)"', page)[1])
    told = re.search(r"effect on the loss <b>(\S+) ± (\S+), rank (\d) of 6", entry_of(page, f"0:{channel}"))
    value, deviation = (float(each.replace("−", "-")) for each in told.groups()[:2])
    assert value == pytest.approx(change[channel].item(), rel=6e-3)
    assert deviation == pytest.approx(error[channel].item(), rel=6e-3)
    assert int(told[3]) == order.index(channel) + 1
    highest = re.search(r"<p>Highest: (.*?)</p>", page)[1]
    assert re.findall(r'<a href="#0:(\d)">', highest) == [str(each) for each in order]
    assert "over 12 inputs. Above zero, the network needs the channel" in Text(page).text
    assert "data-effect" not in re.search(r'id="3:0"[^>]*>', page)[0]  # the survey has not seen that layer


def test_scores_of_interpretability_are_shown_and_ordered(written):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    found = tv.survey(net.eval(), [LABELLED], "1", by_class=True, encoder="output", progress=False)
    page = written(net, IMAGE, layers="1", survey=found)
    for name, scores in (
        ("selectivity", found.selectivity["1"]),
        ("monosemanticity", found.monosemanticity["1"]),
    ):
        order = scores.nan_to_num(-2.0).argsort(descending=True, stable=True).tolist()
        for rank, channel in enumerate(order):
            assert (
                f'data-{name}="{rank}"'
                in re.search(rf'<article class="channel" id="1:{channel}"[^>]*>', page)[0]
            )
            told = re.search(rf"{name} <b>(\S+), rank (\d) of 6", entry_of(page, f"1:{channel}"))
            value = float(told[1].replace("−", "-"))
            assert value == pytest.approx(scores[channel].item(), rel=6e-3, nan_ok=True)
            assert int(told[2]) == rank + 1
    assert "A channel that is selective need not matter to the network." in Text(page).text


def test_effects_are_judged_by_their_errors():
    values = torch.tensor([1.0, -1.0, 0.5, torch.nan, 1.0], dtype=torch.float64)
    errors = torch.tensor([0.4, 0.4, 0.3, 0.1, torch.nan], dtype=torch.float64)
    column = Column(key="effect", name="effect", meaning="", values=values, errors=errors)
    marks = [column.mark(channel) for channel in range(5)]
    assert marks == ["effect-above", "effect-below", "effect-unsure", "", ""]
    assert column.order() == [0, 4, 2, 1, 3]
    assert set(marks) - {""} == set(CHOICES)


def test_without_effects_nothing_is_said_of_them(written):
    page = written(pages.classifier(), IMAGE)
    assert "effect" not in Text(page).text
    assert 'id="page:order"' not in page


def test_a_comparison_names_the_first_layer_that_differs(written):
    net, other = pages.classifier(), pages.classifier()
    other[3].weight.data[2] += 0.5
    page = written(net, IMAGE, comparison=tv.compare(net, other, [LABELLED[0]]))
    text = Text(page).text
    assert "9 layers compared on 12 inputs: 6 beyond the tolerance, the first is 3." in text
    rows = re.findall(r'<tr><th scope="row">(?:<a href="#\d">)?([^<]+).*?<td[^>]*>([a-z ]*)</td></tr>', page)
    marks = dict(rows[-9:]) if len(rows) > 9 else dict(rows)
    assert {layer: mark for layer, mark in marks.items() if mark} == {
        "3": "first beyond", **dict.fromkeys(["4", "5", "6", "7", "(output)"], "beyond"),
    }  # fmt: skip
    assert '<figure class="contrast"><img src="data:image/png' in page


def test_a_comparison_without_a_difference_says_so(written):
    net = pages.classifier()
    page = written(net, IMAGE, comparison=tv.compare(net, pages.classifier(), [LABELLED[0]]))
    assert "9 layers compared on 12 inputs: none is beyond the tolerance." in Text(page).text
    assert "first beyond" not in page
