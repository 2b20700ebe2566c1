"""Claims of what is found over data: surveys with a loss or a target, ablation, comparison, report."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from benchmarks.side.limits import Limit
from benchmarks.side.timing import Claim, Pair, Setting
from torchlens_viz import RunningStats, ablate, capture, compare, report, survey

EIGHT = "eight operations in float64 for every value, beside a network that is small"
Batch = tuple[torch.Tensor, torch.Tensor]


def resnet18(setting: Setting) -> tuple[nn.Module, int]:
    """Return the network, whose weights need no gradient, and the side of its images."""
    model = models.resnet18(weights=None).eval().requires_grad_(False).to(setting.device)
    return model, 112 if setting.is_quick else 224


def batches(setting: Setting, side: int) -> list[Batch]:
    size, device = (4, 16)[not setting.is_quick], setting.device
    return [
        (torch.randn(size, 3, side, side, device=device), torch.randint(1000, (size,), device=device))
        for _ in range(2)
    ]


def collecting(setting: Setting) -> Pair:
    """Survey, against keeping what every convolution puts out and computing the same by numpy in the end."""
    model, side = resnet18(setting)
    data = torch.rand(16 if setting.is_quick else 48, 3, side, side, device=setting.device).split(16)

    @torch.inference_mode()
    def theirs() -> None:
        kept: dict[str, list[np.ndarray]] = {}
        for batch in data:
            with capture(model, nn.Conv2d) as acts:
                model(batch)
            for name, maps in acts.items():
                kept.setdefault(name, []).append(maps.numpy(force=True))
        for parts in kept.values():
            every = np.concatenate(parts)
            by_channel = every.swapaxes(0, 1).reshape(every.shape[1], -1)
            _ = by_channel.mean(1), by_channel.std(1), by_channel.min(1), by_channel.max(1)
            _ = (by_channel == 0).mean(1)
            flat = every.reshape(*every.shape[:2], -1)
            place, peak = flat.argmax(2), flat.max(2)
            order = np.argsort(-peak, axis=0, kind="stable")[:9]
            _ = np.take_along_axis(place, order, 0)

    @torch.inference_mode()
    def bare() -> None:
        for batch in data:
            model(batch)

    return Pair(
        lambda: survey(model, data, nn.Conv2d, progress=False),
        theirs,
        limit=Limit("the bare loop", work=bare),
        note=f"{len(data) * 16} images",
        gap=EIGHT,
    )


def gathering_against_numpy(setting: Setting) -> Pair:
    model, side = resnet18(setting)
    images = torch.randn(4 if setting.is_quick else 32, 3, side, side, device=setting.device)

    @torch.inference_mode()
    def ours() -> None:
        with capture(model, nn.Conv2d, reduce=RunningStats):
            model(images)

    @torch.inference_mode()
    def theirs() -> None:
        with capture(model, nn.Conv2d) as acts:
            model(images)
        for value in acts.values():
            array = value.numpy(force=True).swapaxes(0, 1).reshape(value.shape[1], -1)
            _ = array.mean(1), array.std(1), array.min(1), array.max(1), (array == 0).mean(1)

    bare = torch.inference_mode()(lambda: model(images))
    return Pair(ours, theirs, limit=Limit("a bare forward pass", work=bare), gap=EIGHT)


def with_loss(setting: Setting) -> Pair:
    """A survey of effects, against the forward and the backward pass that it cannot do without."""
    model, side = resnet18(setting)
    data = batches(setting, side)

    def theirs() -> None:
        for images, labels in data:
            images = images.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(images), labels), images)

    return Pair(
        lambda: survey(model, data, nn.Conv2d, loss="cross_entropy", top_k=0, progress=False),
        theirs,
        limit=Limit("forward and back to the images", is_theirs=True),
    )


def with_target(setting: Setting) -> Pair:
    model, side = resnet18(setting)
    data = batches(setting, side)

    def theirs() -> None:
        for images, _ in data:
            images = images.clone().requires_grad_()
            torch.autograd.grad(model(images)[:, 3].sum(), images)

    return Pair(
        lambda: survey(model, data, nn.Conv2d, target=lambda output, batch: output[:, 3], progress=False),
        theirs,
        limit=Limit("forward and back to the images", is_theirs=True),
        note="with statistics and both tops, of the highest peaks and of those that mattered most",
    )


def losses_by_loop(model: nn.Module, batch: Batch, layer: str, channels: Sequence[int]) -> list[float]:
    """Return the change of the loss without each channel, as a loop over hooks finds it."""
    images, labels = batch
    losses = []
    for channel in (None, *channels):

        def without(_m: object, _i: object, output: torch.Tensor, channel: int | None = channel) -> object:
            if channel is None:
                return None
            output = output.clone()
            output[:, channel] = 0
            return output

        handle = model.get_submodule(layer).register_forward_hook(without)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(images).double(), labels).item())
        handle.remove()
    return [loss - losses[0] for loss in losses[1:]]


def ablating(layer: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        model, side = resnet18(setting)
        channels, few = (16, 4) if setting.is_quick else (64, 4)
        batch = tuple(part[:1] for part in batches(setting, side)[0])
        stages = [model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2]
        blocks = [*model.layer3]
        place = int(layer.rpartition(".")[2]) + 1
        head = nn.Sequential(*stages, *blocks[:place])
        tail = nn.Sequential(*blocks[place:], model.layer4, model.avgpool, nn.Flatten(), model.fc)

        def ours() -> object:
            return ablate(model, [batch], layer, range(channels), loss="cross_entropy")

        expected = torch.tensor(losses_by_loop(model, batch, layer, range(few)), dtype=torch.float64)
        if (ours().loss_change[:few] - expected).abs().max() > 1e-5:
            raise AssertionError("the losses differ")

        @torch.no_grad()
        def least() -> None:
            maps = head(batch[0])
            for part in range(0, channels, 16):
                tail(maps.expand(min(16, channels - part), -1, -1, -1))

        return Pair(
            ours,
            lambda: losses_by_loop(model, batch, layer, range(few)),
            share=(1 + few) / (1 + channels),
            limit=Limit("once as far as the layer, then the rest for each channel", work=least),
            note=f"one image of {side} pixels, {channels} channels, theirs {few} and scaled up",
        )

    return build


def comparing(setting: Setting) -> Pair:
    """Compare a network with its copy, against captures of both and a loop over what they hold."""
    model, side = resnet18(setting)
    images = torch.randn(4 if setting.is_quick else 16, 3, side, side, device=setting.device)
    twin = copy.deepcopy(model)

    @torch.inference_mode()
    def theirs() -> None:
        with capture(model, nn.Module) as ours, capture(twin, nn.Module) as others:
            model(images)
            twin(images)
        for name in ours:
            for mine, other in zip(ours.calls(name), others.calls(name), strict=True):
                torch.allclose(mine, other, rtol=1e-3, atol=1e-5)

    @torch.inference_mode()
    def bare() -> None:
        for network in (model, model, twin):
            network(images)

    return Pair(
        lambda: compare(model, twin, images),
        theirs,
        limit=Limit("three bare forward passes", work=bare),
        gap="what all 68 layers put out is changed at random in one pass, and the errors of every channel "
        "are taken in float64, ten operations for each value",
        note="ours measures in the third what rounding may do, and keeps the errors of every channel; theirs "
        "has a tolerance that is guessed and tells yes or no",
    )


@contextmanager
def reporting(setting: Setting) -> Iterator[Pair]:
    """Write a page, against saving the same maps, a file each, with matplotlib."""
    from matplotlib import pyplot

    model, side = resnet18(setting)
    images = torch.rand(2, 3, side, side, device=setting.device)
    layers, every = ["conv1", "layer1", "layer2"], 16
    with tempfile.TemporaryDirectory() as folder:

        @torch.inference_mode()
        def theirs() -> None:
            with capture(model, layers) as acts:
                model(images)
            for name, values in acts.items():
                for image in values.numpy(force=True):
                    for channel, tile in enumerate(image[::every]):
                        pyplot.imsave(Path(folder) / f"{name}-{channel}.png", tile, cmap="RdBu_r")

        bare = torch.inference_mode()(lambda: model(images))
        yield Pair(
            lambda: report(model, images, Path(folder) / "page.html", layers=layers, projections=0),
            theirs,
            share=1 / every,
            limit=Limit("a bare forward pass", work=bare),
            note=f"2 images, 3 layers; ours with kernels, histograms, health and evidence; theirs the maps "
            f"alone, one in {every} and scaled up",
            gap="a page is pictures and text of every channel, beside which one forward pass is little",
        )


CLAIMS = [
    Claim("stats_collect", "`capture(reduce=RunningStats)`", "all kept, then numpy", gathering_against_numpy),
    Claim("survey_collect", "`survey`, statistics and top 9", "all kept, then numpy", collecting),
    Claim("survey_loss", "`survey(loss=)`, effects of all convolutions", "forward and backward", with_loss),
    Claim("survey_target", "`survey(target=)`, all convolutions", "forward and backward", with_target),
    Claim("ablate", "`ablate`, resnet18 `layer3.1`", "a loop over hooks", ablating("layer3.1")),
    Claim("compare", "`compare`, all layers of resnet18", "two captures, `allclose`", comparing),
    Claim(
        "report",
        "`report`, resnet18",
        "matplotlib `imsave` of the maps",
        reporting,
        "matplotlib",
        on_cuda=False,
    ),
]
