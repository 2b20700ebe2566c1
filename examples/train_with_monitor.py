"""Train the demo network for about a minute, with a monitor; needs no download and no GPU.

    python -m pip install "torchlens_viz[demo,tensorboard]"
    python examples/train_with_monitor.py --out runs/demo
    tensorboard --logdir runs/demo --samples_per_plugin images=100

With a learning rate that is far too high, the alarm goes off and ends the training:

    python examples/train_with_monitor.py --out runs/broken --lr 4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from train_demo_net import TURNS, cut_patches, load_photographs, split, vary_light

from torchlens_viz import Monitor, Trouble
from torchlens_viz.models.demo_net import DemoNet, normalize

# What a new network puts out is far smaller than what it puts out later. The range that an earlier run ended
# with makes better pictures than the one that this run begins with.
SCALES = {"maps/features.0": (-8, 8), "maps/features.3": (-40, 40), "maps/features.6": (-20, 20)}


class TrainingFailedError(Exception):
    """The alarm went off."""


def stop(trouble: Trouble) -> None:
    """End the training: what an alarm raises comes out of `monitor.step`."""
    raise TrainingFailedError(trouble.message)


def main() -> None:
    """Train, and leave a folder for TensorBoard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of 128 patches (%(default)s)")
    parser.add_argument("--every", type=int, default=50, help="log a step in so many (%(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="greatest learning rate (%(default)s)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    seen, held_out = split(load_photographs())
    model = DemoNet()
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=arguments.lr, total_steps=arguments.steps
    )
    # A patch of each photograph, the right way up, from the strip that is not trained on; four come twice.
    labels = torch.arange(16).remainder(len(held_out)) * TURNS
    probe = normalize(cut_patches(held_out, labels, torch.Generator().manual_seed(1)))

    start = time.perf_counter()
    try:
        with Monitor(
            model,
            arguments.out,
            probe=probe,
            every=arguments.every,
            norms=True,
            alarm=stop,
            scales=SCALES,
            headroom=3,
        ) as monitor:
            for step in range(arguments.steps):
                labels = torch.randint(len(seen) * TURNS, (128,), generator=generator)
                patches = vary_light(cut_patches(seen, labels, generator), generator)
                loss = nn.functional.cross_entropy(model(normalize(patches)), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                monitor.step(step)
                if step % 100 == 0:
                    seconds = time.perf_counter() - start
                    print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    except TrainingFailedError as failure:
        print(f"stopped: {failure}")
    print(f"now run: tensorboard --logdir {arguments.out} --samples_per_plugin images=100")


if __name__ == "__main__":
    main()
