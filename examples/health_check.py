"""Survey the convolutions of three torchvision architectures with seeded weights, and print their health.

    python examples/health_check.py

No download is needed: the weights are those that the networks are trained from, and the images are crops of
the photographs that scikit-image ships, so that the table says how healthy each initialisation is.
"""

from __future__ import annotations

import skimage.data
import torch
from torch import nn
from torchvision import models

from torchlens_viz import Survey, survey

NETWORKS = ("resnet18", "squeezenet1_1", "mobilenet_v3_small")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def crops(each: int = 8, size: int = 128) -> torch.Tensor:
    """Return random crops of the photographs, (N, 3, size, size) with zero mean."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in PHOTOGRAPHS:
        picture = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255
        for _ in range(each):
            top, left = (
                int(torch.randint(extent - size, (), generator=generator)) for extent in picture.shape[1:]
            )
            found.append(picture[:, top : top + size, left : left + size])
    return (torch.stack(found) - 0.45) / 0.225


def row(name: str, found: Survey) -> str:
    """Return a line of the table."""
    layers = list(found.stats)
    stds = [found.stats[layer].pooled().std.item() for layer in layers]
    channels = sum(stats.channels for stats in found.stats.values())
    dead = sum(len(found.dead(layer)) for layer in layers)
    twice = sum(len(found.duplicates(layer, threshold=0.999)) for layer in layers)
    spoilt = sum(int(stats.nonfinite.sum()) for stats in found.stats.values())
    cells = (name, len(layers), f"{channels:,}", dead, twice, spoilt, f"{stds[0]:.3g}", f"{stds[-1]:.3g}")
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table."""
    images = crops()
    print(
        "| network | convolutions | channels | dead | near-duplicates | NaN or Inf | first std | last std |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        torch.manual_seed(0)
        network = models.get_model(name, weights=None)
        found = survey(network, images.split(8), nn.Conv2d, correlations=True, progress=False)
        print(row(name, found))


if __name__ == "__main__":
    main()
