"""How cost grows with layers, channels, pixels, images and more: seconds by size, and the exponent."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import nn

from benchmarks.side.timing import Clock, Setting, Work, reason
from torchlens_viz import (
    RunningStats,
    ablate,
    capture,
    compare,
    explain,
    make_grid,
    maximize,
    project,
    save_feature_maps,
    survey,
)

ROUNDS = 5
BLOCK = 0.002  # seconds: what is shorter runs several times in a row
ALLOWED = 0.2  # that the exponent may exceed that of the work by, since caches fill up on the way


@dataclass
class Family:
    """Work of several sizes: `build` returns what does it, or a context that gives that and cleans up."""

    name: str
    what: str
    of: str  # what is counted
    sizes: Sequence[int]
    build: Callable[[int, Setting], Any]


@dataclass
class Growth:
    """What was found of a family.

    Attributes:
        sizes: How many there were of what is counted.
        seconds: The median of each.
        exponent: That of a power of the size, fitted to all points by least squares.
        last: The same of the upper half of the points, where what does not grow weighs least.
    """

    name: str
    what: str
    of: str
    device: str
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def exponent(self) -> float:
        return slope(self.sizes, self.seconds)

    @property
    def last(self) -> float:
        half = len(self.sizes) // 2
        return slope(self.sizes[half:], self.seconds[half:])

    @property
    def is_too_fast(self) -> bool:
        """Whether cost grows faster than the work, which is in proportion to the size in every family."""
        return not self.error and self.last > 1 + ALLOWED

    def as_dict(self) -> dict[str, Any]:
        fitted = {} if self.error else {"exponent": self.exponent, "last": self.last}
        return asdict(self) | fitted | {"grows_faster_than_its_work": self.is_too_fast}


class Processor(Clock):
    """A clock of processor time on a CPU: it tells how much work was done, whatever else runs meanwhile."""

    def now(self) -> float:
        return process_time()


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent of the power of the size that fits the seconds best, in logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    middle, height = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True))
    return over / sum((a - middle) ** 2 for a in x)


def measure_growth(family: Family, setting: Setting, clock: Clock) -> Growth:
    """Measure one family, one size after the other; what goes wrong stands in the result.

    On one thread, as a second one that waits for the first counts as busy, and as from some size on only
    there is work for both.
    """
    sizes = list(family.sizes[:-1] if setting.is_quick else family.sizes)
    found = Growth(family.name, family.what, family.of, setting.device.type)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in sizes:
            torch.manual_seed(setting.seed)
            with _opened(family.build(size, setting)) as work:
                clock.seconds(work)  # the warm-up
                often = max(1, round(BLOCK / max(clock.seconds(work), 1e-7)))
                for _ in range(3 if setting.is_quick else ROUNDS):
                    times[size].append(clock.seconds(work, often))
    except Exception as error:
        found.error = reason(error)
        return found
    finally:
        torch.set_num_threads(threads)
    found.sizes, found.seconds = sizes, [median(times[size]) for size in sizes]
    return found


@contextmanager
def _opened(built: Any) -> Iterator[Work]:
    if isinstance(built, AbstractContextManager):
        with built as work:
            yield work
    else:
        yield built


def _chain(layers: int, channels: int = 1) -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(channels, channels, 1) for _ in range(layers))).eval()


def _net(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    ).eval()


def _surveyed(model: nn.Module, batches: Sequence[torch.Tensor]) -> Work:
    return lambda: survey(model, batches, nn.Conv2d, progress=False)


def by_layers(layers: int, setting: Setting) -> Work:
    model, batch = _chain(layers).to(setting.device), torch.randn(1, 1, 4, 4, device=setting.device)

    def work() -> None:
        with capture(model, nn.Conv2d):
            model(batch)

    return torch.no_grad()(work)


def survey_by_layers(layers: int, setting: Setting) -> Work:
    batch = torch.randn(2, 1, 4, 4, device=setting.device)
    return _surveyed(_chain(layers).to(setting.device), [batch])


def by_calls(calls: int, setting: Setting) -> Work:
    layer, batch = nn.Conv2d(1, 1, 1).to(setting.device), torch.randn(1, 1, 4, 4, device=setting.device)
    model = nn.Sequential(*[layer] * calls).eval()

    def work() -> None:
        with capture(model, "0") as acts:
            model(batch)
        acts.calls("0")

    return torch.no_grad()(work)


def by_channels(channels: int, setting: Setting) -> Work:
    """Only one in, so that the work of the layer grows as that of looking at it does."""
    model = nn.Sequential(nn.Conv2d(1, channels, 3)).eval().to(setting.device)
    return _surveyed(model, [torch.randn(16, 1, 16, 16, device=setting.device)])


def by_pixels(pixels: int, setting: Setting) -> Work:
    side, device = math.isqrt(pixels), setting.device
    model, image = _net().to(device), torch.rand(1, 3, side, side, device=device)
    return lambda: explain(model, image, 3, method="gradcam", layer="2")


def maximize_by_pixels(pixels: int, setting: Setting) -> Work:
    model, side = _net().to(setting.device), math.isqrt(pixels)
    return lambda: maximize(model, "2", range(4), size=side, steps=4, parametrization="fourier")


def maximize_by_channels(channels: int, setting: Setting) -> Work:
    model = _net(channels=64).to(setting.device)
    return lambda: maximize(model, "2", [n % 64 for n in range(channels)], size=24, steps=4)


def project_by_channels(channels: int, setting: Setting) -> Work:
    model, image = _net(channels=64).to(setting.device), torch.rand(1, 3, 64, 64, device=setting.device)
    return lambda: project(model, "2", image, range(channels))


def ablate_by_channels(channels: int, setting: Setting) -> Work:
    model, device = _net(channels=64).to(setting.device), setting.device
    batch = (torch.rand(4, 3, 32, 32, device=device), torch.tensor([0, 1, 2, 3], device=device))
    return lambda: ablate(model, [batch], "0", range(channels), loss="cross_entropy")


def by_batch(inputs: int, setting: Setting) -> Work:
    model, batch = _net().to(setting.device), torch.rand(inputs, 3, 32, 32, device=setting.device)

    def work() -> None:
        with capture(model, nn.Conv2d, reduce=RunningStats):
            model(batch)

    return torch.inference_mode()(work)


def compare_by_batch(inputs: int, setting: Setting) -> Work:
    model, batch = _net().to(setting.device), torch.rand(inputs, 3, 32, 32, device=setting.device)
    return lambda: compare(model, model, batch)


def by_images(images: int, setting: Setting) -> Work:
    data = torch.rand(images, 3, 32, 32, device=setting.device)
    return _surveyed(_net().to(setting.device), data.split(16))


def by_ranks(ranks: int, setting: Setting) -> Work:
    """Bring together what so many processes have found."""
    model = _net(channels=64).to(setting.device)
    parts = [
        survey(
            model,
            [torch.rand(16, 3, 8, 8, device=setting.device)],
            nn.Conv2d,
            indices=range(16 * rank, 16 * (rank + 1)),
            progress=False,
        )
        for rank in range(ranks)
    ]
    return lambda: reduce(lambda both, part: both.merge(part), parts)


def by_tiles(tiles: int, setting: Setting) -> Work:
    batch = torch.randn(tiles, 1, 14, 14, device=setting.device)
    return lambda: make_grid(batch, nrow=32, normalize=True, scale_each=True)


@contextmanager
def by_files(files: int, setting: Setting) -> Iterator[Work]:
    model, image = nn.Sequential(nn.Conv2d(3, files, 3)).eval(), torch.rand(1, 3, 16, 16)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with capture(model, "0") as acts:
            model(image)
        yield lambda: save_feature_maps(acts, Path(folder), progress=False)


FAMILIES = [
    Family("growth_layers", "`capture`, one call", "layers", (50, 100, 200, 400, 800), by_layers),
    Family("growth_survey", "`survey` of one batch", "layers", (25, 50, 100, 200, 400), survey_by_layers),
    Family(
        "growth_calls",
        "`capture` of a layer that runs again and again",
        "calls",
        (64, 128, 256, 512, 1024),
        by_calls,
    ),
    Family("growth_channels", "`survey` of a layer", "channels", (256, 512, 1024, 2048, 4096), by_channels),
    Family(
        "growth_pixels", "`explain`, gradcam", "pixels", (64**2, 128**2, 192**2, 256**2, 384**2), by_pixels
    ),
    Family(
        "growth_fourier",
        "`maximize`, Fourier",
        "pixels",
        (32**2, 64**2, 96**2, 128**2, 192**2),
        maximize_by_pixels,
    ),
    Family("growth_ascents", "`maximize`", "images", (8, 16, 32, 64, 128), maximize_by_channels),
    Family("growth_projected", "`project`", "channels", (4, 8, 16, 32, 64), project_by_channels),
    Family("growth_ablated", "`ablate`", "channels", (4, 8, 16, 32, 64), ablate_by_channels),
    Family("growth_batch", "`capture(reduce=RunningStats)`", "inputs", (8, 16, 32, 64, 128), by_batch),
    Family("growth_compared", "`compare`", "inputs", (8, 16, 32, 64, 128), compare_by_batch),
    Family("growth_images", "`survey` of a data set", "images", (128, 256, 512, 1024, 2048), by_images),
    Family("growth_ranks", "`Survey.merge` of what processes found", "ranks", (4, 8, 16, 32, 64), by_ranks),
    Family("growth_tiles", "`make_grid`, `scale_each`", "tiles", (256, 512, 1024, 2048, 4096), by_tiles),
    Family("growth_files", "`save_feature_maps`", "files", (32, 64, 128, 256, 512), by_files),
]


def plot(found: Sequence[Growth], path: Path) -> None:
    """Draw a small plot for each family: its points, and a line along which cost grows as its work."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = 4
    rows = -(-len(found) // columns)
    with mpl.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(rows, columns, figsize=(11, 2.3 * rows), squeeze=False)
        for axis in axes.flat[len(found) :]:
            axis.set_axis_off()
        for axis, growth in zip(axes.flat, found, strict=False):
            milliseconds = [1e3 * seconds for seconds in growth.seconds]
            sizes, end = growth.sizes, milliseconds[-1]
            axis.loglog(sizes, [end * size / sizes[-1] for size in sizes], color="0.75", linewidth=1)
            axis.loglog(sizes, milliseconds, marker="o", markersize=3, linewidth=1, color="tab:blue")
            axis.set_title(f"{growth.what.replace('`', '')}: {growth.exponent:.2f}", fontsize=8)
            axis.set_xlabel(growth.of)
            axis.set_ylabel("ms")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            axis.minorticks_off()
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
