"""Every channel of every convolution of VGG16: how long `maximize` takes, layer by layer.

    python benchmarks/every_channel.py [--steps 50] [--size 224] [--first N] [--compile]

4,224 channels, seeded random weights. Prints a table; `--first` takes only so many channels of each layer.
"""

from __future__ import annotations

import argparse
from collections import Counter
from time import perf_counter

import torch
from torch import nn
from torchvision.models import vgg16

from torchlens_viz import Normalized, maximize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--first", type=int)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = vgg16(weights=None).eval().to(device)
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    options = {"size": arguments.size, "method": Normalized(compile=arguments.compile)}
    maximize(net, convolutions[-1], [0], steps=2, **options)  # warm-up
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print("| layer | channels | seconds | ms per channel and step | median score | status |")
    print("|---|--:|--:|--:|--:|---|")
    total, count = 0.0, 0
    for name in convolutions:
        channels = range(net.get_submodule(name).out_channels)[: arguments.first]
        start = perf_counter()
        found = maximize(net, name, channels, steps=arguments.steps, **options)
        seconds = perf_counter() - start
        total, count = total + seconds, count + len(channels)
        each = seconds / len(channels) / arguments.steps * 1e3
        status = ", ".join(f"{number} {kind}" for kind, number in Counter(found.status).most_common())
        score = found.scores.median().item()
        print(
            f"| `{name}` | {len(channels)} | {seconds:.2f} | {each:.3f} | {score:.4g} | {status} |",
            flush=True,
        )
    print(f"| all | {count} | {total:.1f} | {total / count / arguments.steps * 1e3:.3f} | | |")


if __name__ == "__main__":
    main()
