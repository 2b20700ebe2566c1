"""What a change costs: the same work with two versions of the package, in turn.

    git worktree add ../before COMMIT
    python benchmarks/between.py ../before .                  # all works, or those named after the two

Each version runs in a process of its own, which keeps its models and caches from round to round; the two are
asked one after the other, and who goes first changes. A row gives the median of the ratios after / before,
the range of the middle half, and what the same ratio is between two processes of the version before: the
noise. Only what both versions spell alike is measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from subprocess import PIPE, Popen
from time import perf_counter

ROUNDS = 21
LEAST_SECONDS = 0.05  # of one timing: shorter work is repeated within it


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name."""
    import torch
    import torchvision
    from torch import nn

    from torchlens_viz import (
        Monitor,
        RunningStats,
        capture,
        feature_grid,
        kernel_grid,
        make_grid,
        maximize,
        save_kernel_grid,
        survey,
        testing,
    )

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    small = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(50)]).eval()
    alexnet = torchvision.models.alexnet(weights=None).eval()
    resnet = torchvision.models.resnet18(weights=None).eval()
    pixel, images, batch = torch.rand(1, 1, 2, 2), torch.rand(128, 3, 64, 64), torch.rand(4, 3, 224, 224)
    maps, tiles = torch.randn(1, 128, 56, 56), torch.rand(64, 3, 64, 64)
    wide = torch.randn(16, 128, 56, 56)
    monitor = Monitor(resnet, folder / "runs", probe=images[:8], every=1)
    steps = count()
    stack = ExitStack()
    stack.enter_context(monitor)

    def enter() -> None:
        with capture(small, nn.Conv2d):
            pass

    def record(model: nn.Module, batch: torch.Tensor) -> Callable[[], object]:
        acts = stack.enter_context(capture(model, nn.Conv2d))

        def run() -> ExitStack:
            model(batch)
            acts.clear()
            return stack  # which must live as long

        return run

    def reduced() -> None:
        with capture(resnet, nn.Conv2d, reduce=RunningStats):
            resnet(batch)

    return {
        "capture: enter and leave, 50 layers": enter,
        "capture: 50 calls of tiny layers": record(small, pixel),
        "capture: resnet18, 4 images": record(resnet, batch),
        "capture: the same, reduce=RunningStats": reduced,
        "make_grid: 64 images, normalize": lambda: make_grid(tiles, normalize=True),
        "make_grid: the same, scale_each": lambda: make_grid(tiles, normalize=True, scale_each=True),
        "kernel_grid: alexnet": lambda: kernel_grid(alexnet),
        "save_kernel_grid: alexnet": lambda: save_kernel_grid(alexnet, folder / "kernels.png"),
        "feature_grid: 128 maps of 56 x 56": lambda: feature_grid(maps),
        "RunningStats: 16 x 128 x 56 x 56": lambda: RunningStats().update(wide),
        "assertions: 16 x 128 x 56 x 56": lambda: testing.assert_finite(wide),
        "survey: resnet18, 128 images of 64 x 64": lambda: survey(
            resnet, images.split(16), nn.Conv2d, progress=False
        ),
        "monitor: a step that logs, resnet18": lambda: monitor.step(next(steps)),
        "maximize: 4 channels, 8 steps": lambda: maximize(
            alexnet, "features.6", range(4), size=96, steps=8, progress=False
        ),
    }


def serve() -> None:
    """Answer each line of the input, the name of a work, with the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        known, repeats = works(Path(folder)), {}
        print(*known, sep="\t", flush=True)
        for line in sys.stdin:
            work = known[line.rstrip("\n")]
            if line not in repeats:
                work()
                begin = perf_counter()
                work()
                repeats[line] = max(1, round(LEAST_SECONDS / (perf_counter() - begin)))
            begin = perf_counter()
            for _ in range(repeats[line]):
                work()
            print((perf_counter() - begin) / repeats[line], flush=True)


class Version:
    """A process that imports the package from a folder."""

    def __init__(self, folder: str) -> None:
        start = (
            f"import sys; sys.path[:0] = [{str(Path(folder).resolve())!r}, {str(Path(__file__).parent)!r}]"
        )
        command = [sys.executable, "-c", f"{start}; import between; between.serve()"]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=tempfile.gettempdir())
        self.works = self._answer().split("\t")

    def seconds(self, work: str) -> float:
        """Return how long a work takes, by itself."""
        assert self._process.stdin is not None
        print(work, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().rstrip("\n")
        if not answer:
            raise SystemExit("one of the versions failed; its error stands above")
        return answer


def main(before: str, after: str, *names: str) -> None:
    """Print the table."""
    versions = {"before": Version(before), "again": Version(before), "after": Version(after)}
    print("| work | before, ms | after, ms | after / before | noise |\n|---|--:|--:|--:|--:|")
    for work in [
        work for work in versions["after"].works if not names or any(name in work for name in names)
    ]:
        times: dict[str, list[float]] = {name: [] for name in versions}
        for version in versions.values():
            version.seconds(work)
        for turn in range(ROUNDS):
            for name in sorted(versions, key=[*versions].index, reverse=turn % 2 == 1):
                times[name].append(versions[name].seconds(work))
        figures = [f"{median(times[name]) * 1e3:.3f}" for name in ("before", "after")]
        for name in ("after", "again"):
            ratios = [mine / other for mine, other in zip(times[name], times["before"], strict=True)]
            low, _, high = quantiles(ratios, n=4)
            figures.append(f"{median(ratios):.2f} ({low:.2f} to {high:.2f})")
        print(f"| {work} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
