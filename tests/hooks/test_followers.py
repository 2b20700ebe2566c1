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
    nn.Conv2d(4, 2, 1), nn.Sequential(nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 2)),
    nn.Sequential(nn.Flatten(2), nn.Linear(64, 3)),
    lambda x: (x + 1).relu(), lambda x: torch.relu(x - 0.5), lambda x: torch.cat([x, x], 1),
    lambda x: F.relu(torch.linspace(0, 1, 64).view(8, 8) + F.avg_pool2d(x, 3, 1, 1)),
]  # fmt: skip
RECTIFIED = [
    nn.ReLU(), nn.ReLU(inplace=True), F.relu, lambda x: x.clamp(min=0), nn.ReLU6(), lambda x: x.relu_(),
    nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), lambda x: x,
    lambda x: torch.where(x > 0, x, 0), lambda x: x * (x > 0), lambda x: torch.maximum(x, torch.zeros(())),
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


def test_the_branch_of_a_residual_block_is_not_dead_below_zero():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=3).eval()
    with torch.no_grad():
        net.layer1[0].bn2.weight[0], net.layer1[0].bn2.bias[0] = 0.01, -5.0  # takes from what the sum is
        net.layer1[0].bn1.bias[0] = -5.0  # is off after its ReLU
        net.layer1[0].bn1.weight[0] = 0.01
    found = survey(net, [IMAGES.repeat(1, 1, 8, 8)], "layer1.0.bn?", progress=False)
    assert 0 in found.dead("layer1.0.bn1")
    assert 0 not in found.dead("layer1.0.bn2")
    assert float(found.stats["layer1.0.bn2"].max[0]) < 0


def test_a_leaky_rectifier_that_stays_below_zero_is_not_dead():
    net = nn.Sequential(all_below_zero(), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 1)).eval()
    assert survey(net, [IMAGES], "1", progress=False).dead("1").tolist() == [1]


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
