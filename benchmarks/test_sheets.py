"""Saving sheets and folders against torchvision's `save_image` and matplotlib's subplots.

The floor is the compression of the pixels. Both draw tiles of the same size; the note has the bytes of both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import vgg16
from torchvision.utils import save_image

from torchlens_viz import capture, save_feature_grid, save_feature_maps, save_kernel_grid

ROUNDS = 7
SLOW_ROUNDS = 3
FOLDER_ROUNDS = 2  # a rival takes a minute or more for one
DPI = 100
NO_MARGINS = {"left": 0, "bottom": 0, "right": 1, "top": 1, "wspace": 0, "hspace": 0}
FOLDER_SIZE = 224
SUBSET = 16  # filters and channels in a matplotlib figure: all 262,144 tiles would take it an hour
EVERY = 64  # matplotlib's share of VGG16's folder: one map in so many


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    return pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def first_kernels():
    return torch.randn(64, 3, 11, 11, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def deep_kernels():
    return torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def maps():
    maps = torch.randn(1, 64, 224, 224, generator=torch.Generator().manual_seed(0)).relu_()
    return F.avg_pool2d(maps, 9, 1, 4)  # smooth, as feature maps are


@pytest.fixture(scope="module")
def vgg16_blocks():
    """Record VGG16's 13 convolutions, by block: the maps of a block have one size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = vgg16(weights=None).features.eval()
        image = F.interpolate(torch.rand(1, 3, 28, 28), size=224, mode="bicubic")
    names = [name for name, module in features.named_modules() if isinstance(module, nn.Conv2d)]
    blocks = []
    for start, end in ((0, 2), (2, 4), (4, 7), (7, 10), (10, 13)):
        with torch.inference_mode(), capture(features, names[start:end]) as acts:
            features(image)
        blocks.append(acts)
    return blocks


def note(ours: Path, theirs: Path, more: str = "") -> str:
    return f"{_size(ours) / 1e6:.2f} MB against {_size(theirs) / 1e6:.2f} MB" + (f"; {more}" if more else "")


def _size(path: Path) -> int:
    files = path.rglob("*.png") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def save_subplots(plt, tiles, path, *, columns, pixels, **options):
    """Draw tiles (T, H, W) or (T, H, W, 3) as the usual snippet does, `pixels` high and wide each."""
    rows = len(tiles) // columns
    size = (columns * pixels / DPI, rows * pixels / DPI)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=DPI, gridspec_kw=NO_MARGINS)
    for axis, tile in zip(axes.flat, tiles, strict=True):
        axis.imshow(tile, **options)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path)
    plt.close(figure)


def test_save_kernels_64x3x11x11_save_image(versus, first_kernels, tmp_path):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"

    def save_ours():
        save_kernel_grid(first_kernels, ours, upscale=1, padding=2)

    def save_theirs():
        save_image(first_kernels, theirs, normalize=True)

    save_ours()
    save_theirs()
    versus(save_ours, save_theirs, target=">= 5", note=note(ours, theirs), rounds=ROUNDS)


def test_save_kernels_64x3x11x11_subplots(versus, first_kernels, tmp_path, plt):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"

    def save_ours():
        save_kernel_grid(first_kernels, ours, upscale=4)

    def save_theirs():
        scaled = (first_kernels - first_kernels.amin()) / (first_kernels.amax() - first_kernels.amin())
        save_subplots(plt, scaled.permute(0, 2, 3, 1).numpy(), theirs, columns=8, pixels=44)

    save_ours()
    save_theirs()
    versus(save_ours, save_theirs, target=">= 50", note=note(ours, theirs), rounds=SLOW_ROUNDS)


def test_save_kernels_512x512x3x3_save_image(versus, deep_kernels, tmp_path):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"

    def save_ours():
        save_kernel_grid(deep_kernels, ours, channels=range(512), upscale=1, cmap="gray")

    def save_theirs():
        save_image(deep_kernels.view(-1, 1, 3, 3), theirs, nrow=512, padding=1, normalize=True)

    save_ours()
    save_theirs()
    versus(save_ours, save_theirs, target=">= 5", note=note(ours, theirs), rounds=SLOW_ROUNDS)


def test_save_kernels_512x512x3x3_subplots(versus, deep_kernels, tmp_path, plt):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    few = range(SUBSET)

    def save_ours():
        save_kernel_grid(deep_kernels, ours, filters=few, channels=few, upscale=4, cmap="gray")

    def save_theirs():
        tiles = deep_kernels[:SUBSET, :SUBSET].flatten(0, 1)
        limits = {"vmin": tiles.amin().item(), "vmax": tiles.amax().item()}
        save_subplots(plt, tiles.numpy(), theirs, columns=SUBSET, pixels=12, cmap="gray", **limits)

    save_ours()
    save_theirs()
    more = f"both: {SUBSET * SUBSET} of the 262,144 tiles"
    versus(save_ours, save_theirs, target=">= 50", note=note(ours, theirs, more), rounds=SLOW_ROUNDS)


def test_save_feature_sheet_64x224x224(versus, maps, tmp_path):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"

    def save_ours():
        save_feature_grid(maps, ours, cmap="gray", scale_each=True)

    def save_theirs():
        save_image(maps[0][:, None], theirs, normalize=True, scale_each=True)

    save_ours()
    save_theirs()
    versus(save_ours, save_theirs, target=">= 8, smaller", note=note(ours, theirs), rounds=ROUNDS)
    assert ours.stat().st_size < theirs.stat().st_size


def test_save_feature_sheet_64x224x224_subplots(versus, maps, tmp_path, plt):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"

    def save_ours():
        save_feature_grid(maps, ours, cmap="gray", scale_each=True)

    def save_theirs():
        save_subplots(plt, maps[0].numpy(), theirs, columns=8, pixels=224, cmap="gray")

    save_ours()
    save_theirs()
    versus(save_ours, save_theirs, target=">= 50", note=note(ours, theirs), rounds=SLOW_ROUNDS)


def save_our_folder(blocks, directory, *, every, cmap):
    for acts in blocks:
        first = acts[next(iter(acts))]
        factor = FOLDER_SIZE // first.shape[-1]
        save_feature_maps(
            acts,
            directory,
            channels=range(0, first.shape[1], every),
            cmap=cmap,
            upscale=factor,
            interpolation="nearest" if factor == 1 else "bicubic",
        )


def save_their_folder(blocks, directory, save, *, every):
    """Enlarge the maps of a layer in one call and save each of them by `save(map, path, low, high)`."""
    for acts in blocks:
        for name, maps in acts.items():
            (directory / name).mkdir(parents=True, exist_ok=True)
            low, high = maps.amin().item(), maps.amax().item()
            enlarged = maps[:, ::every]
            if maps.shape[-1] != FOLDER_SIZE:
                enlarged = F.interpolate(enlarged, size=(FOLDER_SIZE, FOLDER_SIZE), mode="bicubic")
            for index, tile in enumerate(enlarged[0]):
                save(tile, directory / name / f"{index * every}.png", low, high)


def compare_folders(versus, blocks, tmp_path, save, *, every, cmap, target, more):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    def save_ours():
        save_our_folder(blocks, ours, every=every, cmap=cmap)

    def save_theirs():
        save_their_folder(blocks, theirs, save, every=every)

    save_ours()
    save_their_folder(blocks[-1:], theirs, save, every=every)
    written = {path.relative_to(theirs) for path in theirs.rglob("*.png")}
    assert written <= {path.relative_to(ours) for path in ours.rglob("*.png")}
    count = len(list(ours.rglob("*.png")))
    sizes = sum((ours / path).stat().st_size for path in written), _size(theirs)
    text = f"{count} files {more}; block 5: {sizes[0] / 1e6:.2f} MB against {sizes[1] / 1e6:.2f} MB"
    versus(save_ours, save_theirs, target=target, note=text, rounds=FOLDER_ROUNDS)


def test_save_vgg16_folder_save_image(versus, vgg16_blocks, tmp_path):
    def save(tile, path, low, high):
        save_image(tile, path, normalize=True, value_range=(low, high))

    compare_folders(
        versus, vgg16_blocks, tmp_path, save, every=1, cmap="gray", target=">= 5", more="of 224 x 224"
    )


@pytest.mark.parametrize("how", ["imsave", "subplots"])
def test_save_vgg16_folder_matplotlib(versus, vgg16_blocks, tmp_path, plt, how):
    def imsave(tile, path, low, high):
        plt.imsave(path, tile.numpy(), vmin=low, vmax=high, cmap="hot")

    def subplots(tile, path, low, high):
        size = (FOLDER_SIZE / DPI, FOLDER_SIZE / DPI)
        figure, axis = plt.subplots(figsize=size, dpi=DPI, gridspec_kw=NO_MARGINS)
        axis.imshow(tile.numpy(), vmin=low, vmax=high, cmap="hot", interpolation="bicubic")
        axis.set_xticks([])
        axis.set_yticks([])
        figure.savefig(path)
        plt.close(figure)

    save, target = {"imsave": (imsave, "-"), "subplots": (subplots, ">= 50")}[how]
    more = f"of 224 x 224 (both: one in {EVERY} of the 4,224)"
    compare_folders(versus, vgg16_blocks, tmp_path, save, every=EVERY, cmap="hot", target=target, more=more)
