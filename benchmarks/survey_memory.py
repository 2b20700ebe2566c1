"""Peak memory of a survey over 100 to 10,000 images, each in a process of its own, as a plot.

With `effects` the survey estimates them, by class too, and the MonoScore.

python benchmarks/survey_memory.py --out docs/images/survey_memory.png
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from torchlens_viz import survey

COUNTS = (100, 300, 1000, 3000, 10_000)


def peak_mib(images: int, way: str) -> float:
    """Survey random images that are made batch by batch; return the process's peak in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3)
    ).eval()

    def batches():
        for start in range(0, images, 50):
            yield torch.rand(min(50, images - start), 3, 32, 32)

    if way == "survey":
        survey(net, batches(), nn.Conv2d, progress=False)
    elif way == "effects":
        labelled = ((batch, torch.arange(len(batch)) % 10) for batch in batches())
        survey(
            net,
            labelled,
            nn.Conv2d,
            loss=lambda output, batch: output.square().mean((1, 2, 3)),
            by_class=True,
            encoder=lambda images: images.flatten(2).mean(2),
            progress=False,
        )
    else:
        kept: list[torch.Tensor] = []
        for place in (0, 3):
            net[place].register_forward_hook(lambda _, __, y: kept.append(y.clone()))
        with torch.inference_mode():
            for batch in batches():
                net(batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/survey_memory.png"))
    parser.add_argument("--one", nargs=2, metavar=("IMAGES", "WAY"), help="measure in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(peak_mib(int(arguments.one[0]), arguments.one[1]))
        return

    def measured(count: int, way: str) -> float:
        command = [sys.executable, __file__, "--one", str(count), way]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ours, effects, kept = (
        [measured(count, way) for count in COUNTS] for way in ("survey", "effects", "keep")
    )
    for row in zip(COUNTS, ours, effects, kept, strict=True):
        print("{:>6} images: survey {:.0f} MiB, with effects {:.0f}, keeping everything {:.0f}".format(*row))

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=110, layout="constrained")
    axes.plot(COUNTS, ours, "o-", label="survey: statistics and top 9")
    axes.plot(COUNTS, effects, "^-", label="and effects, by class too")
    axes.plot(COUNTS, kept, "s--", color="gray", label="keeping every activation")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="images",
        ylabel="peak memory of the process, MiB",
        title="Two convolutions, 32 x 32 pixels",
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
