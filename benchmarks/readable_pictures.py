"""How many maps can be told from a blank tile: with the full range of a sheet, and with robust limits.

`python benchmarks/readable_pictures.py` draws the maps of every convolution, as the command line does, and
of every ReLU, for the demo network and three of torchvision, and counts the tiles whose levels, as displayed,
deviate by less than 4 of 251 from their mean. torchvision's weights are those in its cache, or else random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import skimage.data
import torch
import torchvision
from PIL import Image
from torch import nn

from torchlens_viz.grids.features import feature_sheet
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.demo_net import load_demo_net
from torchlens_viz.models.demo_net import preprocess as demo_preprocess

LEAST = 4.0
NAMES = ("alexnet", "resnet18", "mobilenet_v2")
PICTURES = ("chelsea", "astronaut", "coffee")


def networks() -> Iterator[tuple[str, nn.Module, object]]:
    yield "demo network", load_demo_net(), demo_preprocess
    for name in NAMES:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        path = torch.hub.get_dir() + "/checkpoints/" + weights.url.rpartition("/")[2]
        torch.manual_seed(0)
        network = torchvision.models.get_model(name, weights=None)
        try:
            network.load_state_dict(torch.load(path, weights_only=True))
            kind = "trained"
        except OSError:
            kind = "random"
        yield f"{name} ({kind})", network, weights.transforms()


def of(kinds: tuple[type[nn.Module], ...]) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: isinstance(module, kinds)


def pale(maps: torch.Tensor, value_range: str | None) -> tuple[int, int]:
    """Count the tiles of a sheet that look blank, and those whose map is not constant."""
    drawn = np.array(feature_sheet(maps, value_range=value_range, padding=0, upscale=1, nrow=1))
    tiles = drawn.reshape(maps.shape[1], -1).astype(float)
    varies = (maps[0].flatten(1).amax(1) > maps[0].flatten(1).amin(1)).numpy()
    return int((tiles.std(1) < LEAST)[varies].sum()), int(varies.sum())


def main() -> None:
    print(f"{'network':24} {'layers':12} {'maps':>7} {'full':>7} {'robust':>7}   share that looks blank")
    for name, network, preprocess in networks():
        network.eval()
        for kinds, what in (((nn.Conv2d,), "convolution"), ((nn.ReLU, nn.ReLU6), "ReLU")):
            counts = dict.fromkeys((None, "robust"), 0)
            total = 0
            for picture in PICTURES:
                image = preprocess(Image.fromarray(getattr(skimage.data, picture)()))
                with torch.inference_mode(), capture(network, of(kinds)) as acts:
                    network(image if image.ndim == 4 else image[None])
                for layer in acts:
                    for maps in acts.calls(layer):
                        if maps.ndim == 4 and maps[0, 0].numel() > 1:
                            for value_range in counts:
                                found, varying = pale(maps, value_range)
                                counts[value_range] += found
                            total += varying
            full, robust = (counts[each] / total for each in counts)
            print(f"{name:24} {what:12} {total:7,} {full:7.1%} {robust:7.1%}")


if __name__ == "__main__":
    main()
