"""Make the pictures of `docs/gallery.md`; needs torchvision and scikit-image, no download and no GPU.

    python -m pip install "torchlens_viz[demo]" torchvision
    python examples/make_gallery.py --out docs/images/gallery

The demo network is trained. The weights of all others are drawn from a seed, and where first-layer kernels
would be plain noise they are set to a filter bank, as `docs/gallery.md` says of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import cos, nan, pi
from pathlib import Path

import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from torchlens_viz import Fourier, capture, feature_grid, kernel_grid, maximize, pair_grid, project, survey
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.grids.overlay import overlay_grid
from torchlens_viz.models.demo_net import load_demo_net, normalize, preprocess

Pictures = Iterator[tuple[str, Image.Image]]


def demo_net() -> Pictures:
    """Draw the trained demo network: kernels, maps of a photograph, pairs, an overlay."""
    net = load_demo_net()
    cat = Image.fromarray(skimage.data.chelsea())
    with torch.inference_mode(), capture(net, "features.*") as acts:
        net(preprocess(cat))
    maps = acts["features.0"]

    yield "demo_kernels", kernel_grid(net, upscale=4, padding=2, labels=True, legend=True)
    yield (
        "demo_ranked",
        kernel_grid(
            net, "features.6", sort_by="norm", max_tiles=32, nrow=8, padding=4, labels=True, legend=True,
            title="The strongest kernels on input channel 0",
        ),
    )  # fmt: skip
    yield (
        "demo_rows",
        kernel_grid(
            net, "features.3", filters=range(6), channels=range(12), padding=3, labels=True, legend=True
        ),
    )
    yield (
        "demo_maps",
        feature_grid(
            maps, sort_by="std", max_tiles=12, nrow=4, padding=2, labels=True, legend=True, upscale=1
        ),
    )
    yield (
        "demo_maps_robust",
        feature_grid(
            maps, sort_by="std", max_tiles=12, nrow=4, padding=2, labels=True, legend=True, upscale=1,
            value_range="robust",
        ),
    )  # fmt: skip
    yield (
        "demo_scale_each",
        feature_grid(
            maps, sort_by="std", max_tiles=12, nrow=4, padding=2, labels=True, legend=True, upscale=1,
            scale_each=True,
        ),
    )  # fmt: skip
    deep = acts["features.7"]
    yield (
        "demo_deep_maps",
        feature_grid(
            deep, sort_by="max", max_tiles=8, nrow=4, padding=4, labels=True, legend=True, cmap="hot",
            upscale=6, interpolation="bicubic", title="After the ReLU of the deepest layer",
        ),
    )  # fmt: skip
    yield (
        "demo_pairs",
        pair_grid(
            net, "features.0", cat, preprocess=preprocess, scale_each=True, nrow=3, sort_by="picture",
            channels=[49, 50, 31, 45, 24, 5, 7, 62, 1, 16, 14, 0],
        ),
    )  # fmt: skip
    yield (
        "demo_overlay",
        overlay_grid(
            net, "features.1", shapes(), preprocess=preprocess, sort_by="max", max_tiles=6, nrow=3,
            alpha=0.85, legend=True,
        ),
    )  # fmt: skip


def not_finite() -> Pictures:
    """Draw four maps of which two are damaged and one is constant."""
    wave = torch.linspace(0, 2 * pi, 12).sin()
    maps = wave[:, None] * wave * torch.tensor([1.0, 0.5, 1.0, 0.0])[:, None, None]
    maps[1, 4:8, 4:8] = nan
    maps[2, 0], maps[2, -1] = torch.inf, -torch.inf
    yield (
        "not_finite",
        feature_grid(
            maps, nrow=4, upscale=8, padding=4, legend=True, labels=["whole", "NaN", "+Inf, -Inf", "all zero"]
        ),
    )


def alexnet() -> Pictures:
    """Draw the first layer of AlexNet, holding a bank of Gabor filters."""
    net = models.alexnet(weights=None)
    fill_with_gabors(net.features[0])
    yield "alexnet_kernels", kernel_grid(net, upscale=4, padding=2)
    yield (
        "alexnet_signed",
        kernel_grid(net, filters=range(32, 48), channels=1, nrow=8, upscale=4, padding=2, legend=True),
    )


def resnet18() -> Pictures:
    """Draw the first block of ResNet-18 before and after its ReLU."""
    net = models.resnet18(weights=None).eval()
    fill_with_gabors(net.conv1)
    astronaut = Image.fromarray(skimage.data.astronaut()).resize((224, 224))
    with torch.inference_mode(), capture(net, ["layer1.0.bn1", "layer1.0.relu"], stop=True) as acts:
        net(preprocess(astronaut))
    before, after = acts["layer1.0.bn1"], acts.calls("layer1.0.relu")[0]
    yield (
        "resnet18_before_relu",
        feature_grid(before, channels=range(8), upscale=2, nrow=4, padding=2, labels=True, legend=True),
    )
    yield (
        "resnet18_after_relu",
        feature_grid(after, channels=range(8), upscale=2, nrow=4, padding=2, labels=True, legend=True),
    )


def mobilenet_v2() -> Pictures:
    """Draw depthwise and 1 x 1 kernels of MobileNetV2."""
    net = models.mobilenet_v2(weights=None).eval()
    yield (
        "mobilenet_v2_depthwise",
        kernel_grid(
            net, "features.2.conv.1.0", sort_by="norm", max_tiles=36, nrow=12, padding=3, labels=True,
            legend=True,
        ),
    )  # fmt: skip
    yield "mobilenet_v2_matrix", kernel_grid(net, "features.2.conv.2", upscale=5, legend=True)


def vit() -> Pictures:
    """Draw the patch embedding of a vision transformer, and its tokens as maps."""
    net = models.vit_b_16(weights=None).eval()
    fill_with_cosines(net.conv_proj)
    astronaut = Image.fromarray(skimage.data.astronaut()).resize((224, 224))
    with torch.inference_mode(), capture(net, "encoder.layers.encoder_layer_0", stop=True) as acts:
        net(preprocess(astronaut))
    tokens = acts["encoder.layers.encoder_layer_0"]  # (1, 197, 768): a class token and 14 x 14 patches
    yield "vit_kernels", kernel_grid(net, "conv_proj", filters=range(48), nrow=12, upscale=2, padding=2)
    yield (
        "vit_tokens",
        feature_grid(
            tokens, grid=(14, 14), sort_by="std", max_tiles=12, nrow=6, upscale=5, padding=3, labels=True,
            legend=True, scale_each=True,
        ),
    )  # fmt: skip


def fill_with_gabors(layer: nn.Conv2d) -> None:
    """Set kernels (64, 3, k, k) to gray gratings of 8 angles, 3 wavelengths and 2 phases, then 16 colours."""
    size = layer.kernel_size[0]
    ticks = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    window = torch.exp(-2.5 * (x**2 + y**2))
    kernels = []
    for wavelength in (0.6, 0.9, 1.4):
        for turn in range(8):
            along = x * cos(pi * turn / 8) + y * cos(pi * (turn / 8 - 0.5))
            for phase in (0.0, pi / 2):
                grating = window * torch.cos(2 * pi * along / wavelength + phase)
                kernels.append((grating - grating.mean()).expand(3, size, size))
    for hue in range(16):
        colour = torch.tensor([cos(2 * pi * (hue / 16 + third / 3)) for third in range(3)])
        kernels.append(window * colour[:, None, None])
    _replace_weight(layer, torch.stack(kernels))


def fill_with_cosines(layer: nn.Conv2d) -> None:
    """Set kernels (O, 3, k, k) to the cosine basis of a patch, lowest frequencies first, in 3 colour axes."""
    size = layer.kernel_size[0]
    place, frequency = torch.arange(size) + 0.5, torch.arange(size)
    basis = torch.cos(pi * frequency[:, None] * place / size)  # (frequency, place)
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    pairs = sorted(((v, u) for v in range(size) for u in range(size)), key=lambda pair: (sum(pair), pair))
    waves = [basis[v][:, None] * basis[u] for v, u in pairs]
    kernels = torch.stack([axis[:, None, None] * wave for wave in waves for axis in axes])
    _replace_weight(layer, kernels[: layer.out_channels])


def maximized() -> Pictures:
    """Find the images that drive eight channels of each layer of the demo network hardest."""
    for layer, channels in (("features.1", (1, 14, 16, 30, 31, 33, 50, 62)),
                            ("features.4", (5, 8, 9, 23, 37, 49, 69, 77)),
                            ("features.7", (16, 26, 60, 74, 99, 108, 111, 127))):  # fmt: skip
        result = maximize(
            load_demo_net(), layer, channels, size=96, steps=64, lr=0.1, preprocess=normalize,
            parametrization="fourier", transforms="robust",
        )  # fmt: skip
        yield f"demo_maximized_{layer.rpartition('.')[2]}", result.grid(nrow=8)


def signals() -> Pictures:
    """Show what drives a bank of wavelets over signals: by ascent, and in noise with bursts in it."""
    net = nn.Sequential(nn.Conv1d(1, 4, 65, padding=32, bias=False), nn.ReLU()).eval()
    ticks = torch.linspace(-1, 1, 65)
    window = torch.exp(-6 * ticks**2)
    waves = [window * torch.cos(2 * pi * frequency * ticks) for frequency in (1.5, 3.0, 6.0, 12.0)]
    _replace_weight(net[0], torch.stack(waves)[:, None])
    result = maximize(
        net, "1", size=(256,), steps=48, lr=0.06, parametrization=Fourier(low=-1, high=1), transforms="robust"
    )
    yield "signal_maximized", result.grid(nrow=2, upscale=1, title="1")
    recorded = 0.1 * torch.randn(60, 1, 512)
    for signal in recorded:
        start, step = torch.randint(0, 400, (1,)).item(), 0.2 + 1.2 * torch.rand(1)
        signal[0, start : start + 100] += torch.hann_window(100) * torch.sin(step * torch.arange(100))
    found = survey(net, recorded.split(20), "1", top_k=4, progress=False)
    yield "signal_patches", found.grid("1", recorded, tile=128, title="1")


def clips() -> Pictures:
    """Show what drives kernels over clips that see gratings move, to the right, down, left and up."""
    net = nn.Sequential(nn.Conv3d(1, 4, (5, 11, 11), bias=False), nn.ReLU()).eval()
    t, y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in (5, 11, 11)), indexing="ij")
    window = torch.exp(-2 * (x**2 + y**2) - t**2 / 2)
    ways = ((1, 0), (0, 1), (-1, 0), (0, -1))
    moving = [window * torch.cos(2 * pi * (right * x + down * y - 0.5 * t)) for right, down in ways]
    moving = [each - window * each.sum() / window.sum() for each in moving]
    _replace_weight(net[0], torch.stack(moving)[:, None])
    result = maximize(
        net, "1", size=(9, 40, 40), steps=32, lr=0.03, parametrization="fourier", transforms="gentle"
    )
    yield "clip_maximized", result.grid(nrow=2, upscale=2, padding=4, title="1")


def projected() -> Pictures:
    """Go back from the strongest channels of the demo network's deepest layer to a photograph."""
    cat = Image.fromarray(skimage.data.chelsea())
    for rule in ("deconvnet", "guided", "gradient"):
        found = project(load_demo_net(), "features.7", cat, rule=rule, preprocess=preprocess)
        yield f"demo_projected_{rule}", found.grid(max_tiles=4, nrow=4)


def shapes() -> Image.Image:
    """Paint a picture with a disc, a square and stripes."""
    y, x = torch.meshgrid(torch.arange(160.0), torch.arange(240.0), indexing="ij")
    picture = torch.full((160, 240, 3), 0.75)
    picture[(x - 60) ** 2 + (y - 80) ** 2 < 40**2] = torch.tensor([0.85, 0.35, 0.15])
    picture[(x - 120).abs() + (y - 80).abs() < 30] = torch.tensor([0.15, 0.3, 0.7])
    stripes = (x > 160) & (x < 224) & (y > 32) & (y < 128)
    picture[stripes & (x % 12 < 6)] = 0.1
    return Image.fromarray((picture * 255).byte().numpy())


def _replace_weight(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, kernels: Tensor) -> None:
    assert kernels.shape == layer.weight.shape
    with torch.no_grad():
        norms = kernels.flatten(1).norm(dim=1).view(-1, *[1] * (kernels.ndim - 1))
        layer.weight.copy_(kernels / norms)
        if layer.bias is not None:
            layer.bias.zero_()


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/images/gallery"), help="the folder to write to"
    )
    out = parser.parse_args().out
    total = 0
    for draw in (
        *(demo_net, maximized, projected, signals, clips),
        *(not_finite, alexnet, resnet18, mobilenet_v2, vit),
    ):
        torch.manual_seed(0)
        for name, picture in draw():
            path = save_picture(picture, out / f"{name}.png", optimize=True)
            total += path.stat().st_size
            print(f"{path}  {picture.width} x {picture.height}  {path.stat().st_size / 1e3:.0f} kB")
    print(f"{total / 1e3:.0f} kB in all")


if __name__ == "__main__":
    main()
