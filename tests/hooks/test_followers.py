"""What comes after a layer, and which of its channels are dead for that."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.monitor.training import Recorder
from torchlens_viz import Monitor, survey

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1


def all_below_zero(channels=4, kind=nn.Conv2d):
    """A layer of which channel 0 varies below zero, channel 1 is constant there, and the others fire."""
    layer = kind(3, channels, 1) if kind is nn.Conv2d else kind(3, channels)
    with torch.no_grad():
        layer.weight.abs_()
        layer.bias.zero_()
        layer.weight[0] *= -1
        layer.weight[1] = 0
        layer.bias[1] = -0.5
    return layer


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = all_below_zero(), function

    def forward(self, x):
        return self.function(self.layer(x))


NORMALISED = [
    nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([8, 8]),
    nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4)),
    nn.GELU(), nn.SiLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Hardswish(), nn.PReLU(),
    nn.Softmax(1), nn.LogSoftmax(1),
    lambda x: F.log_softmax(x.flatten(1), 1),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
]  # fmt: skip
RECTIFIED = [
    nn.ReLU(), nn.ReLU(inplace=True), F.relu, lambda x: x.clamp(min=0), nn.ReLU6(), lambda x: x.relu_(),
    nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), nn.Conv2d(4, 2, 1), lambda x: x, lambda x: x + 1,
]  # fmt: skip


def found_by_monitor(net, images):
    board = Recorder()
    Monitor(net, board, layers="layer", probe=images, every=1, alarm=None, strict=True).step(0)
    return board.last("health/layer/dead")


@pytest.mark.parametrize("after", NORMALISED)
def test_below_zero_is_not_dead_where_negative_values_say_as_much(after):
    net = Functional(after).eval()
    assert survey(net, [IMAGES], "layer", progress=False).dead("layer").tolist() == [1]
    assert found_by_monitor(net, IMAGES) == 1


@pytest.mark.parametrize("after", RECTIFIED)
def test_below_zero_is_dead_before_a_rectifier_and_wherever_nothing_is_known(after):
    net = Functional(after).eval()
    assert survey(net, [IMAGES], "layer", progress=False).dead("layer").tolist() == [0, 1]
    assert found_by_monitor(net, IMAGES) == 2


def test_logits_are_not_dead():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), all_below_zero(kind=nn.Linear))
    found = survey(net, [IMAGES[:3], IMAGES[3:]], "*", progress=False)
    assert found.dead("2").tolist() == [1]
    assert [each.channels for each in found.findings() if each.kind == "dead"] == [(1,)]


def test_what_follows_is_kept_in_files_and_when_surveys_are_merged(tmp_path):
    net = Functional(nn.BatchNorm2d(4)).eval()
    whole = survey(net, [IMAGES], "layer", progress=False)
    parts = [survey(net, [IMAGES[part]], "layer", progress=False) for part in (slice(0, 3), slice(3, 6))]
    whole.save(tmp_path / "found.safetensors")
    for found in (type(whole).load(tmp_path / "found.safetensors"), parts[0].merge(parts[1])):
        assert found.dead("layer").tolist() == [1]


def test_a_training_batch_tells_it_too():
    net, board = Functional(nn.BatchNorm2d(4)), Recorder()
    monitor = Monitor(net, board, layers="layer", every=1, alarm=None, strict=True)
    for step in range(2):
        with monitor.watch(step):
            net(IMAGES).square().mean().backward()
    assert board.last("health/layer/dead") == 1
