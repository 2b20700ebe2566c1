"""Claims of grids, sheets and statistics: no network runs."""

from __future__ import annotations

import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.utils import make_grid as torchvision_grid
from torchvision.utils import save_image

from benchmarks.side.limits import Limit, moved
from benchmarks.side.timing import Claim, Pair, Setting
from torchlens_viz import (
    RunningStats,
    capture,
    feature_grid,
    make_grid,
    save_feature_grid,
    save_feature_maps,
    save_kernel_grid,
)

MAPS = (64, 1, 224, 224)
DPI = 100
NO_MARGINS = {"left": 0, "bottom": 0, "right": 1, "top": 1, "wspace": 0, "hspace": 0}
EACH = {"normalize": True, "scale_each": True}
LARGE = 2**22  # bytes: an allocation of that size gets new pages each time


def grids(*shape: int, **options: bool) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        batch = torch.randn(shape, device=setting.device)
        grid = make_grid(batch, **options)
        if setting.device.type == "cpu" and not torch.equal(grid, torchvision_grid(batch, **options)):
            raise AssertionError("the grids differ")
        return Pair(
            lambda: make_grid(batch, **options),
            lambda: torchvision_grid(batch, **options),
            limit=moved(batch.nbytes + grid.nbytes, is_fresh=grid.nbytes > LARGE),
            gap="the limit is one read and one write, of three planes where the batch has one; a range takes "
            "two reads before, and normalising a copy of the batch"
            if shape == MAPS
            else "a grid this small is a dozen calls of torch, each of one to three microseconds",
        )

    return build


def sheets(*shape: int) -> Callable[[Setting], object]:
    @contextmanager
    def build(setting: Setting) -> Iterator[Pair]:
        kernels = torch.randn(shape, device=setting.device)
        is_colour = shape[1] == 3
        flat, columns = (kernels, 8) if is_colour else (kernels.view(-1, 1, *shape[2:]), shape[1])
        how = {"upscale": 1, "padding": 2} if is_colour else {"upscale": 1, "cmap": "gray"}
        if not is_colour:
            how["channels"] = range(shape[1])
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs, least = (Path(folder) / f"{name}.png" for name in ("ours", "theirs", "least"))

            def save_ours() -> None:
                save_kernel_grid(kernels, ours, **how)

            def save_theirs() -> None:
                save_image(flat, theirs, nrow=columns, padding=2 if is_colour else 1, normalize=True)

            save_ours()
            save_theirs()
            with Image.open(ours) as image:
                pixels = np.asarray(image).tobytes()
            sizes = [path.stat().st_size / 1e3 for path in (ours, theirs)]
            yield Pair(
                save_ours,
                save_theirs,
                limit=Limit(
                    f"{len(pixels) / 1e3:.3g} kB deflated and written",
                    work=lambda: least.write_bytes(zlib.compress(pixels, 1)),
                ),
                note=f"{sizes[0]:.3g} against {sizes[1]:.3g} kB; the limit is one thread's, zlib's level 1 "
                "on pixels as they are, which a strategy that suits the picture can beat",
                gap="drawing and replacing a file of that name take as long as deflating so little",
            )

    return build


def smooth_maps(channels: int, side: int) -> torch.Tensor:
    """Return maps (1, C, H, W) as a layer has them."""
    return F.avg_pool2d(torch.randn(1, channels, side, side).relu_(), 9, 1, 4)


@contextmanager
def figures(setting: Setting) -> Iterator[Pair]:
    """Save maps as one sheet, against a matplotlib figure of subplots as the usual snippet draws it."""
    from matplotlib import pyplot

    side = 56 if setting.is_quick else 224
    maps = smooth_maps(64, side)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, least = (Path(folder) / f"{name}.png" for name in ("ours", "theirs", "least"))

        def save_theirs() -> None:
            size = (8 * side / DPI, 2 * side / DPI)
            figure, axes = pyplot.subplots(2, 8, figsize=size, dpi=DPI, gridspec_kw=NO_MARGINS)
            for axis, tile in zip(axes.flat, maps[0].numpy(), strict=False):
                axis.imshow(tile, cmap="gray")
                axis.set_xticks([])
                axis.set_yticks([])
            figure.savefig(theirs)
            pyplot.close(figure)

        pixels = feature_grid(maps, cmap="gray", scale_each=True).convert("L").tobytes()
        yield Pair(
            lambda: save_feature_grid(maps, ours, cmap="gray", scale_each=True),
            save_theirs,
            share=1 / 4,
            limit=Limit(
                f"{len(pixels) / 1e6:.3g} MB deflated and written",
                work=lambda: least.write_bytes(zlib.compress(pixels, 1)),
            ),
            note="theirs 16 of the 64 maps and scaled up",
            gap="the limit has neither range nor levels nor layout, and overwrites its file",
        )


def folders(save: Callable[[torch.Tensor, Path], object]) -> Callable[[Setting], object]:
    """Save every map in a file of its own, against a loop."""

    @contextmanager
    def build(setting: Setting) -> Iterator[Pair]:
        channels, every, side = (64, 4, 56) if setting.is_quick else (256, 8, 224)
        model = nn.Sequential(OrderedDict(layer=nn.Identity()))
        maps = smooth_maps(channels, side)
        with capture(model, "layer") as acts:
            model(maps)
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs, least = (Path(folder) / name for name in ("ours", "theirs", "least"))
            theirs.mkdir()
            least.mkdir()

            def save_theirs() -> None:
                for channel, tile in enumerate(maps[0, ::every]):
                    save(tile, theirs / f"{channel}.png")

            tile = feature_grid(maps[:, :1], cmap="gray").convert("L").tobytes()

            def save_least() -> None:
                for channel in range(channels):
                    (least / f"{channel}.png").write_bytes(zlib.compress(tile, 1))

            yield Pair(
                lambda: save_feature_maps(acts, ours, cmap="gray", progress=False),
                save_theirs,
                share=1 / every,
                limit=Limit(f"{channels} files deflated and created, one by one", work=save_least),
                note=f"{channels} files of {side} x {side}, theirs one in {every} and scaled up; ours by "
                "several threads",
                gap="each file is written beside the one it replaces and takes its name, so that none is "
                "ever half there; to overwrite costs less",
            )

    return build


def by_save_image(tile: torch.Tensor, path: Path) -> None:
    save_image(tile, path, normalize=True)


def by_imsave(tile: torch.Tensor, path: Path) -> None:
    from matplotlib import pyplot

    pyplot.imsave(path, tile.numpy(), cmap="gray")


def running_stats(setting: Setting) -> Pair:
    values = torch.randn(8 if setting.is_quick else 32, 64, 56, 56, device=setting.device).relu_()
    stats = RunningStats()

    def ours() -> object:
        stats.reset()
        stats.update(values)
        return stats.compute()

    def theirs() -> object:
        """Take the same figures of each channel, in the same precision, as they are usually written."""
        by_channel = values.transpose(0, 1).flatten(1).double()
        spread, mean = torch.std_mean(by_channel, 1)
        return mean, spread, by_channel.amin(1), by_channel.amax(1), (by_channel == 0).double().mean(1)

    mean = torch.as_tensor(ours().mean).cpu().double()
    if not torch.allclose(mean, theirs()[0].cpu(), rtol=1e-5):
        raise AssertionError("the means differ")
    gap = (
        "the limit is one read; eight operations in float64 for each value take longer ([speed.md](speed.md))"
    )
    return Pair(ours, theirs, limit=moved(values.nbytes), gap=gap)


CLAIMS = [
    Claim(
        "grid_small",
        "`make_grid`, 512 x 1 x 14 x 14, `scale_each`",
        "torchvision",
        grids(512, 1, 14, 14, **EACH),
    ),
    Claim(
        "grid_kernels",
        "`make_grid`, 4096 x 1 x 3 x 3, `scale_each`",
        "torchvision",
        grids(4096, 1, 3, 3, **EACH),
    ),
    Claim(
        "grid_colour",
        "`make_grid`, 64 x 3 x 11 x 11, `scale_each`",
        "torchvision",
        grids(64, 3, 11, 11, **EACH),
    ),
    Claim("grid_large", "`make_grid`, 64 x 1 x 224 x 224, `scale_each`", "torchvision", grids(*MAPS, **EACH)),
    Claim(
        "grid_normalize",
        "`make_grid`, 64 x 1 x 224 x 224, `normalize`",
        "torchvision",
        grids(*MAPS, normalize=True),
    ),
    Claim("grid_plain", "`make_grid`, 64 x 1 x 224 x 224", "torchvision", grids(*MAPS)),
    Claim(
        "sheet_colour",
        "`save_kernel_grid`, 64 kernels 3 x 11 x 11",
        "`save_image`",
        sheets(64, 3, 11, 11),
        on_cuda=False,
    ),
    Claim(
        "sheet_deep",
        "`save_kernel_grid`, 128 x 128 kernels 3 x 3",
        "`save_image`",
        sheets(128, 128, 3, 3),
        on_cuda=False,
    ),
    Claim(
        "sheet_matplotlib",
        "`save_feature_grid`, 64 maps, `scale_each`",
        "matplotlib subplots, `savefig`",
        figures,
        "matplotlib",
        on_cuda=False,
    ),
    Claim(
        "folder_save_image",
        "`save_feature_maps`, a file each",
        "`save_image`",
        folders(by_save_image),
        on_cuda=False,
    ),
    Claim(
        "folder_imsave",
        "`save_feature_maps`, a file each",
        "matplotlib `imsave`",
        folders(by_imsave),
        "matplotlib",
        on_cuda=False,
    ),
    Claim("running_stats", "`RunningStats`, 64 channels of 56 x 56", "plain torch in float64", running_stats),
]
