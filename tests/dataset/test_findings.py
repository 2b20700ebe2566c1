"""Dead, saturated and duplicate channels are named."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import Given, quiet
from torchlens_viz import Survey, survey
from torchlens_viz.errors import InvalidArgumentError, MissingDependencyError


def test_dead_and_saturated_channels_are_named():
    maps = torch.rand(6, 4, 2, 2) * 0.5
    maps[:, 1] = 0
    maps[2:, 2, 0, 0] = 6
    maps[0, 3], maps[1:, 3] = torch.inf, -1
    found = survey(Given(), maps.split(2), "layer", top_k=2, **quiet)
    assert found.dead("layer").tolist() == [1]
    assert found.dead("layer", eps=1).tolist() == [0, 1]
    assert found.saturated("layer").tolist() == [2]
    assert found.saturated("layer", share=0.9).tolist() == []
    with pytest.raises(InvalidArgumentError, match="`share` must be above 0"):
        found.saturated("layer", share=0)


def test_duplicates_are_found_by_weight_and_by_response():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU())
    net[0].weight.data = torch.tensor([1.0, 2.0, -1.0, 0.5]).view(4, 1, 1, 1)
    images = torch.rand(20, 1, 2, 2)
    found = survey(net, images.split(6), "*", correlations=True, **quiet)
    peaks = images.amax((1, 2, 3)).double().numpy()
    troughs = -images.amin((1, 2, 3)).double().numpy()
    expected = np.corrcoef(np.stack([peaks, 2 * peaks, troughs, 0.5 * peaks]))
    np.testing.assert_allclose(found.correlation["0"].numpy(), expected, atol=1e-10)
    assert [pair.channels for pair in found.duplicates("0")] == [(0, 1), (0, 3), (1, 3)]
    assert found.duplicates("0")[0].cosine == pytest.approx(1)
    assert [pair.channels for pair in found.duplicates("1")] == [(0, 1), (0, 3), (1, 3)]
    assert found.correlation["1"][2].isnan().all()
    plain = survey(net, images.split(6), "*", **quiet)
    assert [pair.channels for pair in plain.duplicates("0")] == [(0, 1), (0, 3), (1, 3)]
    with pytest.raises(InvalidArgumentError, match="`correlations=True`"):
        plain.duplicates("1")


def test_a_frame_needs_pandas(net, monkeypatch):
    found = survey(net, [torch.zeros(1, 3, 9, 9)], "0", **quiet)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        found.to_frame()


def test_correlations_of_a_part_are_not_taken_for_those_of_the_whole(net):
    images = torch.rand(8, 3, 8, 8)
    one = survey(net, [images[:4]], "*", correlations=True, progress=False)
    other = survey(net, [images[4:]], "*", indices=[4, 5, 6, 7], progress=False)
    with pytest.raises(InvalidArgumentError, match="surveyed with `correlations`, or neither"):
        one.merge(other)


def test_two_inputs_make_no_duplicates():
    net = nn.Sequential(nn.Conv2d(3, 6, 3))
    found = survey(net, [torch.rand(2, 3, 8, 8)], "0", correlations=True, progress=False)
    assert found.duplicates("0") == []


def planted() -> nn.Module:
    """Channels 0 and 1 are the same, 2 never fires, 3 is NaN, 4 is bounded at 6, and 5 is as it should be."""
    conv = nn.Conv2d(1, 6, 1)
    weights = [1.0, 1.0, 0.0, torch.nan, 100.0, -1.0]
    conv.weight.data = torch.tensor(weights).view(6, 1, 1, 1)
    conv.bias.data = torch.tensor([0.0, 0, -1, 0, 50, 3])
    return nn.Sequential(conv, nn.ReLU6())


def test_findings_are_listed_the_worst_first(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(32, 1, 3, 3)
    found = survey(planted(), images.split(8), "1", correlations=True, progress=False)
    listed = found.findings()
    assert [(each.kind, each.layer, each.channels) for each in listed[:3]] == [
        ("nonfinite", "1", (3,)),
        ("dead", "1", (2,)),
        ("saturated", "1", (4,)),
    ]
    assert [each.severity for each in listed] == sorted((each.severity for each in listed), reverse=True)
    assert listed[0].figure == pytest.approx(1 / 6)
    assert listed[1].meaning == "1 of 6 never exceed 0"
    assert ("duplicate", (0, 1)) in [(each.kind, each.channels) for each in listed]
    loaded = Survey.load(found.save(tmp_path / "found.safetensors"))
    assert loaded.findings() == listed


def test_what_was_not_gathered_is_not_spoken_of():
    images = torch.rand(32, 1, 3, 3)
    found = survey(planted(), images.split(8), "1", top_k=0, progress=False)
    assert [each.kind for each in found.findings()] == ["nonfinite", "dead"]


def test_a_healthy_layer_has_no_findings():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3)
    found = survey(net, [torch.randn(16, 3, 8, 8)], "", progress=False)
    assert found.findings() == []


def alike(inputs, channels, *, truth):
    """Inputs (N, C, 1, 1) of which every two channels have a true correlation."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(inputs, width, generator=generator) for width in (1, channels))
    return (truth**0.5 * common + (1 - truth) ** 0.5 * own).view(inputs, channels, 1, 1)


@pytest.mark.parametrize("inputs", [4, 5, 8, 20, 100])
def test_a_correlation_above_the_threshold_by_chance_makes_no_duplicates(inputs):
    images = alike(inputs, 30, truth=0.96) + 10
    net = nn.Sequential(nn.ReLU())
    images[:, 7] = images[:, 3] * 2  # the same, and therefore sure
    found = survey(net, [images], "0", correlations=True, progress=False)
    above = (found.correlation["0"].triu(1) > 0.95).sum()
    assert above > 20  # so many would cry wolf
    pairs = found.duplicates("0", threshold=0.98)
    assert [pair.channels for pair in pairs] == ([] if inputs < 5 else [(3, 7)])


def test_a_duplicate_says_on_how_many_inputs_it_rests_and_how_sure_that_is():
    images = alike(50, 2, truth=0.995) + 10
    found = survey(nn.Sequential(nn.Identity()), [images], "0", correlations=True, progress=False)
    (pair,) = found.duplicates("0", threshold=0.9)
    r = np.corrcoef(images.flatten(1).double().T)[0, 1]
    distance = (math.atanh(r) - math.atanh(0.9)) * math.sqrt(47)
    assert pair.inputs == 50
    assert pair.p_value == pytest.approx(math.erfc(distance / math.sqrt(2)) / 2, rel=1e-6)
    assert found.findings()[-1].meaning == f"0 and 1: correlation of peaks {r:.4f}, over 50 inputs"
