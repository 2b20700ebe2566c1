"""Exact ablation of 64 channels of resnet18 against a plain loop over hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from torchlens_viz import ablate

CHANNELS, SHARE = 64, 8  # the loop does an eighth of them, and its time is scaled up


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    return model.cuda() if torch.cuda.is_available() else model


def by_loop(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layer: str, channels: range
) -> list[float]:
    images, labels = batch
    losses = []
    for channel in (None, *channels):

        def without(module, args, output, channel=channel):
            if channel is None:
                return None
            output = output.clone()
            output[:, channel] = 0
            return output

        handle = model.get_submodule(layer).register_forward_hook(without)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(images).double(), labels).item())
        handle.remove()
    return [loss - losses[0] for loss in losses[1:]]


@pytest.mark.parametrize("layer", ["layer2.1", "layer3.0", "layer3.1", "layer4.0.conv1"])
@pytest.mark.parametrize("inputs", [1, 4])
def test_64_channels_against_a_loop_over_hooks(model, layer, inputs, versus):
    device = next(model.parameters()).device
    images = torch.randn(inputs, 3, 224, 224, device=device)
    batch = (images, torch.randint(1000, (inputs,), device=device))
    found = ablate(model, [batch], layer, range(CHANNELS), loss="cross_entropy")
    expected = torch.tensor(by_loop(model, batch, layer, range(4)), dtype=torch.float64)
    assert (found.loss_change[:4] - expected).abs().max() < 1e-6 * found.loss  # float32's own rounding
    versus(
        lambda: ablate(model, [batch], layer, range(CHANNELS), loss="cross_entropy"),
        lambda: by_loop(model, batch, layer, range(CHANNELS // SHARE)),
        target=">= 5",
        rounds=3,
        share=(1 + CHANNELS // SHARE) / (1 + CHANNELS),
        note=f"{inputs} images, float32",
    )
