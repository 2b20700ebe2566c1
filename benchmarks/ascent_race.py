"""Score against wall clock: gradient ascent by this library, by lucent at its defaults and by a plain loop.

    python benchmarks/ascent_race.py [--seeds 3] [--channels 8]

On the trained demo network, for channels of `features.6`: the median score over channels and seeds after each
budget of steps, all images scored by the same function (the mean of the channel's map in float32 on the image
as it is), and how long each takes to reach lucent's final score.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import nn

from torchlens_viz import Normalized as Scaled
from torchlens_viz import maximize
from torchlens_viz.models.demo_net import load_demo_net, normalize

LAYER = "features.6"
SIZE = 128  # lucent's default
STEPS = (2, 4, 8, 16, 32, 64, 80, 96, 128, 256, 512)
TILES = Scaled(tiles=2)
MORE_STEPS = (*STEPS, 1024, 1900)  # of ours, as many as fit the time of the plain loop


class Normalized(nn.Module):
    """The demo network with its normalisation inside, since lucent's own is ImageNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = load_demo_net()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(normalize(images))


def score(model: Normalized, images: torch.Tensor, channels: list[int]) -> list[float]:
    with torch.no_grad():
        maps = model.net.features[: int(LAYER.split(".")[1]) + 1](normalize(images.float()))
    return maps[torch.arange(len(channels)), channels].mean((1, 2)).tolist()


def by_lucent(model: Normalized, channels: list[int], seed: int) -> dict[int, tuple[float, list[float]]]:
    """Return, per number of steps, the seconds for all channels and the scores."""
    from lucent.optvis import param, render

    torch.manual_seed(seed)
    seconds, images = 0.0, []
    for channel in channels:
        start = perf_counter()
        made = render.render_vis(
            model,
            f"net_{LAYER.replace('.', '_')}:{channel}",
            lambda: param.image(SIZE),
            thresholds=STEPS,
            preprocess=False,
            fixed_image_size=SIZE,
            progress=False,
            show_image=False,
        )
        seconds += perf_counter() - start
        images.append(torch.stack([torch.from_numpy(image[0]).permute(2, 0, 1) for image in made]))
    by_step = torch.stack(images, dim=1)
    return {
        steps: (seconds * steps / STEPS[-1], score(model, own, channels))
        for steps, own in zip(STEPS, by_step, strict=True)
    }


def by_plain_loop(model: Normalized, channels: list[int], seed: int) -> dict[int, tuple[float, list[float]]]:
    """Return the same for a loop as it is usually written: one channel, one image, the whole network."""
    torch.manual_seed(seed)
    kept: dict[str, torch.Tensor] = {}
    layer = model.get_submodule(f"net.{LAYER}")
    handle = layer.register_forward_hook(lambda module, args, output: kept.update(output=output))
    found: dict[int, list[float]] = {steps: [] for steps in STEPS}
    seconds = 0.0
    for channel in channels:
        image = (0.5 + 0.05 * torch.randn(1, 3, SIZE, SIZE)).requires_grad_()
        optimizer = torch.optim.Adam([image], lr=0.05)
        for step in range(1, STEPS[-1] + 1):
            start = perf_counter()
            optimizer.zero_grad()
            model(image)
            (-kept["output"][0, channel].mean()).backward()
            optimizer.step()
            with torch.no_grad():
                image.clamp_(0, 1)
            seconds += perf_counter() - start
            if step in STEPS:
                found[step] += score(model, image.detach(), [channel])
    handle.remove()
    return {steps: (seconds * steps / STEPS[-1], scores) for steps, scores in found.items()}


def ours(
    budgets: tuple[int, ...] = STEPS, **options: object
) -> Callable[..., dict[int, tuple[float, list[float]]]]:
    def run(model: Normalized, channels: list[int], seed: int) -> dict[int, tuple[float, list[float]]]:
        found = {}
        for steps in budgets:
            start = perf_counter()
            result = maximize(model, f"net.{LAYER}", channels, size=SIZE, steps=steps, seed=seed, **options)
            found[steps] = perf_counter() - start, score(model, result.images, channels)
        return found

    return run


RUNNERS = {
    "lucent": by_lucent,
    "plain loop": by_plain_loop,
    "ours, pixels": ours(MORE_STEPS),
    "ours, fourier, robust": ours(parametrization="fourier", transforms="robust"),
    "ours, fourier": ours(parametrization="fourier"),
    "ours, pixels, tiles": ours(MORE_STEPS, method=TILES),
    "ours, fourier, tiles": ours(MORE_STEPS, parametrization="fourier", method=TILES),
    "ours, fourier, robust, tiles": ours(
        MORE_STEPS, parametrization="fourier", transforms="robust", method=TILES
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--without", action="append", default=[])
    arguments = parser.parse_args()
    model, channels = Normalized().eval(), list(range(arguments.channels))
    maximize(model, f"net.{LAYER}", channels, size=SIZE, steps=2)  # warm-up
    table: dict[str, dict[int, tuple[float, float]]] = {}
    for name, run in RUNNERS.items():
        if name in arguments.without:
            continue
        runs = [run(model, channels, seed) for seed in range(arguments.seeds)]
        table[name] = {
            steps: (
                median(each[steps][0] for each in runs),
                median(value for each in runs for value in each[steps][1]),
            )
            for steps in runs[0]
        }
    print("| steps |" + "".join(f" {name} |" for name in table))
    print("|--:|" + "--:|" * len(table))
    for steps in MORE_STEPS:
        cells = (
            f" {row[steps][1]:.2f} after {row[steps][0]:.2f} s |" if steps in row else " |"
            for row in table.values()
        )
        print(f"| {steps} |" + "".join(cells))
    if "lucent" not in table:
        return
    last_seconds, last_score = table["lucent"][STEPS[-1]]
    print(f"\nlucent's final score, {last_score:.2f} after {last_seconds:.2f} s, is reached by")
    for name, row in table.items():
        reached = [seconds for seconds, value in row.values() if value >= last_score]
        if reached and name != "lucent":
            print(f"  {name:24} after {reached[0]:.3f} s, {last_seconds / reached[0]:.0f} times sooner")


if __name__ == "__main__":
    main()
