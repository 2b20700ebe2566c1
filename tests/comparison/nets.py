"""Networks with faults that are known, and what a plain loop over hooks makes of two of them."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torchvision
from torch import nn


def fresh_resnet50() -> nn.Module:
    """A resnet50 in eval mode, always with the same weights."""
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval()


def small() -> nn.Sequential:
    """Two convolutions, a batch normalisation, ReLUs in place and a head."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    )
    net[1].running_mean.normal_()
    return net.eval()


def coarser(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round weights to so many bits, with one step for all of them."""
    step = weight.abs().amax() / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def altered(model: nn.Module, name: str, change) -> nn.Module:
    """Copy a model and change one layer of the copy."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other.get_submodule(name))
    return other


def outputs_by_hooks(model: nn.Module, batch: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """What every module puts out, in the order in which they end, copied in a hook of its own."""
    found: dict[str, list[np.ndarray]] = {}

    def note(name):
        def hook(module, args, output):
            found.setdefault(name, []).append(output.detach().double().numpy().copy())

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(batch.clone())
    for handle in handles:
        handle.remove()
    return found
