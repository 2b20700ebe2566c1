"""`capture` of every convolution of ResNet-50 against hooks written by hand, which detach and clone."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet50

from torchlens_viz import capture


def test_capture_resnet50_batch_4_against_hand_written_hooks(versus):
    model = resnet50(weights=None).eval()
    batch = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]

    @torch.no_grad()
    def ours():
        with capture(model, nn.Conv2d):
            model(batch)

    @torch.no_grad()
    def by_hand():
        kept = []
        handles = [
            module.register_forward_hook(lambda _m, _i, output: kept.append(output.detach().clone()))
            for module in convolutions
        ]
        try:
            model(batch)
        finally:
            for handle in handles:
                handle.remove()

    versus(ours, by_hand, target=">= 0.98", rounds=15)
