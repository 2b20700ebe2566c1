"""How good the images of `maximize` are: against real patches, among other channels, and under disturbances.

    python benchmarks/ascent_quality.py

On the trained demo network, for every channel of each convolution after its ReLU: the share of images that
beat the best of all patches of the photographs in scikit-image, the rank of the channel among all on its own
image, and the share of the score that is kept under shifts, turns, noise and bfloat16 that the ascent did not
see.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import skimage.data
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from torchlens_viz import maximize
from torchlens_viz.models.demo_net import DEMO_PHOTOGRAPHS, load_demo_net, normalize

LAYERS = ("features.1", "features.4", "features.7")
SIZE = 64
STRIDE = 16
WAYS = {
    "pixels": {},
    "pixels, robust": {"transforms": "robust"},
    "fourier": {"parametrization": "fourier"},
    "fourier, robust": {"parametrization": "fourier", "transforms": "robust"},
}


def photographs() -> Iterator[torch.Tensor]:
    for name in DEMO_PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(skimage.data, name)()).float() / 255
        yield pixels[None].expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@torch.no_grad()
def best_of_patches(part: torch.nn.Module) -> torch.Tensor:
    """Return the largest mean that any patch gives each channel, (C,)."""
    best = []
    for photograph in photographs():
        patches = (
            photograph.unfold(1, SIZE, STRIDE).unfold(2, SIZE, STRIDE).permute(1, 2, 0, 3, 4).flatten(0, 1)
        )
        best += [means_of(part, chunk).amax(0) for chunk in patches.split(256)]
    return torch.stack(best).amax(0)


@torch.no_grad()
def means_of(part: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return part(normalize(images)).flatten(2).mean(2)


def turned(images: torch.Tensor, degrees: float) -> torch.Tensor:
    return TF.rotate(images, degrees, InterpolationMode.BILINEAR, fill=[0.5])


def bfloat16(part: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return means_of(part, images.bfloat16().float())


def disturbances(part: torch.nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    noise = torch.Generator().manual_seed(1)
    return {
        "shift 5 px": lambda x: means_of(part, torch.roll(x, (5, -5), (2, 3))),
        "turn 5°": lambda x: means_of(part, turned(x, 5)),
        "turn 15°": lambda x: means_of(part, turned(x, 15)),
        "noise 0.1": lambda x: means_of(part, (x + 0.1 * torch.randn(x.shape, generator=noise)).clamp(0, 1)),
        "bfloat16": lambda x: bfloat16(part, x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=128)
    steps = parser.parse_args().steps
    net = load_demo_net()
    names = ["beats patches", "rank 0", "median rank", *disturbances(net)]
    print("| layer | way | dead | " + " | ".join(names) + " |")
    print("|---|---|" + "--:|" * (len(names) + 1))
    for layer in LAYERS:
        part = net.features[: int(layer.split(".")[1]) + 1]
        best = best_of_patches(part)
        for way, options in WAYS.items():
            found = maximize(net, layer, size=SIZE, steps=steps, preprocess=normalize, **options)
            live = torch.tensor([status != "dead" for status in found.status]) & (found.scores > 0)
            own = found.channels[live, None]
            images, scores, ranks = found.images[live], found.scores[live], found.ranks[live]
            kept = [
                (disturb(images).gather(1, own)[:, 0] / scores).median().item()
                for disturb in disturbances(part).values()
            ]
            beaten = (scores > best[live]).float().mean().item()
            figures = [
                f"{int((~live).sum())}",
                f"{beaten:.1%}",
                f"{(ranks == 0).float().mean():.0%}",
                f"{int(ranks.median())}",
                *(f"{share:.0%}" for share in kept),
            ]
            print(f"| `{layer}` | {way} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
