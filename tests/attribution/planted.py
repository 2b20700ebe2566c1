"""Networks of which it is known where the evidence lies, and images for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

SIDE, SIZE = 48, 8  # of the images, and of the templates in them


class Planted(NamedTuple):
    """A network, an image for it, what to explain, and where in the image that comes from.

    Attributes:
        net: Its layer `maps` is what heatmaps are made of.
        image: (1, 1, 48, 48).
        target: The output to explain.
        region: (48, 48) bool, the true place.
    """

    net: nn.Sequential
    image: torch.Tensor
    target: int
    region: torch.Tensor


def templates() -> torch.Tensor:
    """Two patterns (2, 1, 8, 8) of +-1, which at no shift have a correlation beyond 12 of 64."""
    generator = torch.Generator().manual_seed(137)
    first = torch.rand(SIZE, SIZE, generator=generator).gt(0.5).float() * 2 - 1
    second = torch.rand(SIZE, SIZE, generator=generator).gt(0.5).float() * 2 - 1
    return torch.stack([first, second])[:, None]


class Functional(nn.Module):
    """A ReLU that is no `nn.ReLU`."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.relu(values)


def detector(head: nn.Module, relu: nn.Module | None = None) -> nn.Sequential:
    """Two channels that answer to the two templates, pooled by two, and a head."""
    conv = nn.Conv2d(1, 2, SIZE, padding=SIZE // 2)
    conv.weight.data = templates()
    conv.bias.data.fill_(-0.6 * SIZE**2)  # what else is in the image does not reach it
    net = nn.Sequential()
    layers = {
        "conv": conv,
        "relu": relu or nn.ReLU(inplace=True),
        "maps": nn.MaxPool2d(2),
        "flat": nn.Flatten(2),
    }
    for name, module in {**layers, "head": head}.items():
        net.add_module(name, module)
    return net.eval()


class Mean(nn.Module):
    """Scores (N, 3) of the mean of each channel, by fixed weights."""

    def __init__(self, weights: list[list[float]]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, len(weights), bias=False)
        self.linear.weight.data = torch.tensor(weights)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        return self.linear(flat.mean(2))


class LeftHalf(nn.Module):
    """One score: the first channel in the left half of the image."""

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        maps = flat[:, 0].unflatten(1, (SIDE // 2, SIDE // 2))
        return maps[:, :, : SIDE // 4].sum((1, 2))[:, None]


def scene(*placed: tuple[int, int, int, float]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A noisy image (1, 1, 48, 48) with templates (which, row, column, contrast), and the region of each."""
    image = 0.1 * torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    regions = []
    for which, row, column, contrast in placed:
        box = (slice(row, row + SIZE), slice(column, column + SIZE))
        image[0, 0][box] = contrast * templates()[which, 0]
        region = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        region[box] = True
        regions.append(region)
    return image, regions


def one_occurrence() -> Planted:
    image, (region,) = scene((0, 12, 28, 1.0))
    return Planted(detector(Mean([[1.0, 0.0]])), image, 0, region)


def two_classes(target: int, relu: nn.Module | None = None) -> Planted:
    image, regions = scene((0, 6, 8, 1.0), (1, 30, 26, 1.0))
    return Planted(detector(Mean([[1.0, -0.5], [-0.5, 1.0]]), relu), image, target, regions[target])


def strong_distractor() -> Planted:
    image, (region, _) = scene((0, 30, 6, 1.0), (1, 8, 28, 2.5))
    return Planted(detector(Mean([[1.0, 0.0]])), image, 0, region)


def twice_and_only_left_counts() -> Planted:
    image, (region, _) = scene((0, 20, 6, 1.0), (0, 20, 34, 1.0))
    return Planted(detector(LeftHalf()), image, 0, region)


PLANTED = {
    "one occurrence": one_occurrence,
    "two classes, the first": lambda: two_classes(0),
    "two classes, the second": lambda: two_classes(1),
    "the same, by `torch.relu`": lambda: two_classes(1, Functional()),
    "strong distractor": strong_distractor,
    "twice, left counts": twice_and_only_left_counts,
}


def share_inside(heatmap: torch.Tensor, region: torch.Tensor) -> float:
    """Return the share of a heatmap's mass within a region; 0 where it has none."""
    mass = heatmap.clamp(min=0)
    return float(mass[region].sum() / mass.sum()) if float(mass.sum()) > 0 else 0.0
