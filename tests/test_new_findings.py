"""What is wrong with the layers of a survey, the worst first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlens_viz import Survey, survey


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
