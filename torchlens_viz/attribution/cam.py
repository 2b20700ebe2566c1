"""Class activation maps: what becomes of a layer's maps and of the gradients there, one map per image.

Maps are written (N, C, h, w), and may have any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from torchlens_viz.arguments import wide
from torchlens_viz.attribution.goal import Goal
from torchlens_viz.attribution.twin import Maps, Twin

_ROWS: Final = 32  # of a batch, with one channel at zero in each

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradcam(values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Weigh each channel by the mean of its gradient, and keep what is positive of the sum: (N, h, w).

    Args:
        values: (N, C, h, w), what the layer puts out.
        gradients: (N, C, h, w), those of the score.

    Source:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
        ICCV 2017.
    """
    return (gradients.mean(_positions(values), keepdim=True) * values).sum(1).relu()


def gradcam_plus_plus(values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Weigh each channel by its positive gradients, those the more that stand alone: (N, h, w).

    A position's share is g^2 / (2 g^2 + s g^3), with g its gradient and s the sum of the channel, which is
    1 / (2 + s g). Sums below zero, where that has a pole, count as zero.

    Source:
        Chattopadhay et al., "Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep
        Convolutional Networks", WACV 2018.
    """
    positive = gradients.relu()
    shares = 1 / (2 + values.sum(_positions(values), keepdim=True).relu() * positive)
    return ((positive * shares).sum(_positions(values), keepdim=True) * values).sum(1).relu()


def hirescam(values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Weigh each position by its own gradient, and keep what is positive of the sum: (N, h, w).

    Source:
        Draelos & Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural
        networks", 2020.
    """
    return (gradients * values).sum(1).relu()


def layercam(values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Weigh each position by its own gradient where that is positive: (N, h, w).

    Source:
        Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP
        2021.
    """
    return (gradients.relu() * values).sum(1).relu()


def eigencam(values: torch.Tensor) -> torch.Tensor:
    """Return the first principal component of the maps, where it is positive: (N, h, w).

    Positions are the observations and channels the variables, centred. A component has no sign of its own:
    it gets the one with which it grows with the mean of all channels. Maps with NaN or Inf have none: NaN.

    Source:
        Muhammad & Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", IJCNN 2020.
    """
    flat = wide(values).flatten(2).transpose(1, 2)  # (N, positions, C)
    is_finite = flat.isfinite().flatten(1).all(1).view(-1, 1, 1)
    flat = flat.where(is_finite, 0)
    centred = flat - flat.mean(1, keepdim=True)
    left, strengths, _ = torch.linalg.svd(centred, full_matrices=False)
    component = left[:, :, 0] * strengths[:, :1]
    along = (component * centred.mean(2)).sum(1, keepdim=True)
    signed = torch.where(along < 0, -component, component).where(is_finite[:, 0], torch.nan)
    return signed.relu().float().view(len(values), *values.shape[2:]).to(values.device)


def ablationcam(
    twin: Twin, batch: torch.Tensor, maps: Maps, goal: Goal, scores: torch.Tensor
) -> torch.Tensor:
    """Weigh each channel by the share of the score that is lost without it: (N, h, w).

    The loss is divided by the size of the score, so that a channel that speaks for the target counts as such
    where the score is negative too.

    Args:
        twin: The network.
        batch: (N, C, H, W), what it takes.
        maps: What the layer puts out.
        goal: What is scored.
        scores: (N,), the scores of the batch.

    Source:
        Desai & Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
        Localization", WACV 2020.
    """
    channels = range(maps.values.shape[1])
    each = max(1, _ROWS // len(batch))
    parts = [channels[first : first + each] for first in range(0, len(channels), each)]
    without = torch.cat([twin.ablated(batch, maps, part, goal, scores) for part in parts])  # (C, N)
    size = torch.where(scores == 0, 1.0, scores.abs())
    weights = ((scores - without) / size).T
    return (weights.view(*weights.shape, *[1] * (maps.values.ndim - 2)) * maps.values).sum(1).relu()


BY_GRADIENT: Final[dict[str, Combine]] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
}


def fused(heatmaps: list[torch.Tensor]) -> torch.Tensor:
    """Return the heatmaps (N, ...) of several layers as one: the maximum of each divided by its own.

    A single one stays as it is.
    """
    if len(heatmaps) == 1:
        return heatmaps[0]
    shares = []
    for each in heatmaps:
        most = each.amax(tuple(range(1, each.ndim)), keepdim=True)
        shares.append(each / torch.where(most > 0, most, 1.0))
    return torch.stack(shares).amax(0)


def _positions(values: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions of (N, C, ...) along which positions lie."""
    return tuple(range(2, values.ndim))
