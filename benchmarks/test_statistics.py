"""Statistics of all convolutions against the bare forward pass, and against keeping everything for numpy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

from torchlens_viz import RunningStats, capture

BATCH = 32


@pytest.fixture(scope="module", params=["contiguous", "channels_last"])
def network(request) -> tuple[nn.Module, torch.Tensor]:
    layout = torch.channels_last if request.param == "channels_last" else torch.contiguous_format
    model = models.resnet18(weights=None).eval().to(memory_format=layout)
    return model, torch.randn(BATCH, 3, 224, 224).to(memory_format=layout)


def forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model(images)


def gather(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode(), capture(model, nn.Conv2d, reduce=RunningStats):
        model(images)


def test_statistics_against_the_bare_forward_pass(network, versus):
    versus(lambda: gather(*network), lambda: forward(*network), target=">= 0.85", rounds=7)


def test_statistics_against_collecting_everything(network, versus):
    def collect() -> None:
        with torch.inference_mode(), capture(network[0], nn.Conv2d) as acts:
            network[0](network[1])
        for value in acts.values():
            array = value.numpy().swapaxes(0, 1).reshape(value.shape[1], -1)
            _ = array.mean(1), array.std(1), array.min(1), array.max(1), (array == 0).mean(1)

    versus(lambda: gather(*network), collect, target=">= 1", rounds=3)
