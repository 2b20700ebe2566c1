"""A survey with effects against a forward and a backward pass with gradients of the input alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from torchlens_viz import survey


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(16, 3, 224, 224), torch.randint(1000, (16,))) for _ in range(2)]


def backward(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for images, labels in batches:
        images = images.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(images), labels), images)


@pytest.mark.parametrize("layers", [nn.ReLU, nn.Conv2d])
def test_effects_against_forward_and_backward(model, batches, layers, versus):
    versus(
        lambda: survey(model, batches, layers, loss="cross_entropy", top_k=0, progress=False),
        lambda: backward(model, batches),
        target=">= 0.8",
        rounds=5,
    )
