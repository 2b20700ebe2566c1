"""What somebody writes who uses the library and types everything: each public name, with what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, assert_type

import torch
from PIL import Image
from torch import nn

from torchlens_viz import (
    Ablation,
    Activations,
    ChannelStats,
    Classic,
    Comparison,
    Explanation,
    FixedSpectrum,
    FolderWriter,
    Fourier,
    InputOutput,
    Inputs,
    LayerNotFoundError,
    LayerRow,
    LayerTable,
    Maximization,
    Monitor,
    Normalized,
    Pixels,
    Projection,
    RunningStats,
    Survey,
    TorchlensVizError,
    Transforms,
    Trouble,
    ablate,
    capture,
    compare,
    errors,
    explain,
    feature_grid,
    kernel_grid,
    layers,
    make_grid,
    maximize,
    objectives,
    overlay_grid,
    pair_grid,
    project,
    receptive_field,
    report,
    save_feature_grid,
    save_feature_maps,
    save_kernel_grid,
    save_kernel_sheets,
    save_overlay_grid,
    save_pair_grid,
    survey,
    testing,
    top_projections,
)

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def record(net: nn.Module, images: torch.Tensor, folder: Path) -> Activations:
    with capture(net, ["0", nn.ReLU, -1], device="cpu", copy="lazy") as acts:
        net(images)
    assert_type(acts, Activations)
    assert_type(acts.not_called, tuple[str, ...])
    assert_type(acts.save(folder / "acts.safetensors"), Path)
    assert_type(Activations.load(str(folder / "acts.safetensors")), Activations)
    with capture(net, lambda name, module: isinstance(module, nn.Conv2d), io="both") as both:
        net(images)
    first: InputOutput = both["0"]
    if isinstance(first.input, Inputs):
        assert_type(first.input.kwargs, dict[str, Any])
    return acts


def gather(net: nn.Module, images: torch.Tensor) -> ChannelStats:
    with capture(net, nn.Conv2d, reduce=RunningStats(bins="log")) as acts:
        net(images)
    found: ChannelStats = acts["0"]
    assert_type(found.mean, torch.Tensor)
    assert_type(found.histogram, torch.Tensor | None)
    stats = RunningStats(channel_dim=1, bins=[0.0, 1.0])
    stats.update(images)
    assert_type(stats.merge(stats.fresh()), RunningStats)
    assert_type(stats.bins, tuple[float, ...] | None)
    assert_type(stats.channels, int | None)
    return stats.compute()


def check(
    net: nn.Module, acts: Activations, stats: ChannelStats, found: Survey, images: torch.Tensor
) -> None:
    testing.assert_finite(acts, layers="0")
    testing.assert_no_dead_channels(found, max_dead=99)
    testing.assert_mean(stats, -1e3, 1e3, per="layer")
    testing.assert_std(found.stats, 0, 1e3)
    testing.assert_zero_fraction(images, 0.0, 1.0, channel_dim=-1)
    testing.assert_activations_close(acts, acts, rtol=0, atol=0)
    testing.assert_same_activations(net, net, images)


def draw(net: nn.Module, acts: Activations, image: torch.Tensor, folder: Path) -> list[Path]:
    assert_type(kernel_grid(net, "0", cmap="auto", value_range="robust", sort_by="norm"), Image.Image)
    assert_type(feature_grid(acts["0"], labels=True, value_range=(-1.0, 1.0)), Image.Image)
    assert_type(pair_grid(net, None, image, channels=[0, 1]), Image.Image)
    assert_type(overlay_grid(net, "0", image, backdrop="color"), Image.Image)
    assert_type(make_grid([image, image], normalize=True), torch.Tensor)
    assert_type(save_kernel_sheets(net, folder / "kernels"), list[Path])
    with capture(net, nn.Conv2d) as maps:
        net(image.unsqueeze(0))
    assert_type(save_feature_maps(maps, folder / "maps", cmap="viridis"), list[Path])
    return [
        save_kernel_grid(net, folder / "kernels.png", legend=True, max_tiles=2),
        save_feature_grid(acts["0"], folder / "maps.png", upscale=2),
        save_pair_grid(net, "0", image, folder / "pairs.png"),
        save_overlay_grid(net, "0", image, folder / "overlay.png", alpha=0.5),
    ]


def look(net: nn.Module) -> str:
    table = layers(net, input_shape=(1, 3, 16, 16))
    assert_type(table, LayerTable)
    assert_type([row.time_share for row in table], list[float | None])
    assert_type(receptive_field(net, "0", (1, 3, 16, 16)).size, tuple[int, ...])
    first: LayerRow | None = table.marked("first convolution")
    return "" if first is None else first.name


def explained(net: nn.Module, image: torch.Tensor, folder: Path) -> tuple[Explanation, Projection]:
    why = explain(net, image, method="layercam")
    assert_type(why.heatmaps, torch.Tensor)
    assert_type(why.targets, torch.Tensor | None)
    assert_type(why.trust.kept, torch.Tensor)
    assert_type(why.grid(names=["cat", "dog", "bird"]), Image.Image)
    what = project(net, "0", image, [0], rule="guided", position=(2, 2))
    assert_type(what.regions, tuple[tuple[slice, slice], ...])
    assert_type(what.save(folder / "projected"), Path)
    return why, Projection.load(folder / "projected")


def bright(scene: objectives.Scene) -> torch.Tensor:
    return scene.images.mean((1, 2, 3))


def climb(net: nn.Module, folder: Path) -> list[Maximization]:
    term = objectives.channel() + objectives.channel(1, reduce="max") - 0.1 * objectives.total_variation()
    term = term + objectives.neuron(position=(1, 1)) + objectives.direction([1.0, 0.0, 0.0]) - objectives.l2()
    term = term + objectives.deepdream() + objectives.diversity() + objectives.score(bright)
    assert_type(term, objectives.Objective)
    found = maximize(
        net, "3", [0, 0], size=(16, 16), objective=term, steps=2, transforms=Transforms(jitter=0.1)
    )
    assert_type(found.images, torch.Tensor)
    assert_type(found.grid(labels=True), Image.Image)
    assert_type(Maximization.load(found.save(folder / "climb")), Maximization)
    return [
        found,
        maximize(net, "3", 0, size=16, steps=2, method=Classic()),
        maximize(
            net, "3", 0, size=16, steps=2, method=Normalized(restarts=1), parametrization=Pixels(blur=1.0)
        ),
        maximize(net, "3", 0, size=16, steps=2, parametrization=Fourier(decay=1.5), transforms="gentle"),
        maximize(net, "3", 0, size=16, steps=2, parametrization=FixedSpectrum(), objective=bright),
    ]


def study(net: nn.Module, loader: Sequence[Batch], images: torch.Tensor) -> Survey:
    found = survey(net, loader, nn.Conv2d, top_k=2, loss="cross_entropy", progress=False)
    assert_type(found.stats["0"], ChannelStats)
    assert_type(found.top["0"].samples, torch.Tensor)
    assert_type(found.effects["0"], torch.Tensor)
    assert_type(found.dead("0"), torch.Tensor)
    assert_type(found.grid("0", images), Image.Image)
    assert_type(top_projections(found, "0", [0, 1], images), Image.Image)
    worth = ablate(net, loader, "0", [0], loss=lambda output, batch: output.square().mean(1))
    assert_type(worth, Ablation)
    assert_type(worth.accuracy_change, torch.Tensor | None)
    return found


def differ(net: nn.Module, other: nn.Module, images: torch.Tensor) -> str | None:
    found = compare(net, torch.export.export(other, (images,)), images)
    assert_type(found, Comparison)
    assert_type(found["0"].max_abs, float)
    assert_type(found.only_in_a, tuple[str, ...])
    return found.first


def watch(net: nn.Module, images: torch.Tensor, folder: Path) -> list[Trouble]:
    troubles: list[Trouble] = []
    with Monitor(net, FolderWriter(folder), probe=images, every=1, alarm=troubles.append) as monitor:
        monitor.step(0)
    assert_type(monitor.scales, dict[str, tuple[float, float]])
    return troubles


def reason(net: nn.Module) -> str:
    try:
        kernel_grid(net, "nowhere")
    except LayerNotFoundError as error:
        return str(error)
    except (errors.InvalidArgumentError, TorchlensVizError) as error:
        raise SystemExit(str(error)) from error
    return ""


def main(folder: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    images = torch.rand(4, 3, 16, 16)
    loader = [(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([2, 0]))]
    acts, stats = record(net, images, folder), gather(net, images)
    found = study(net, loader, images)
    check(net, acts, stats, found, images)
    draw(net, acts, images[0], folder)
    explained(net, images[0], folder)
    climbs = climb(net, folder)
    assert any(status == "steps" for each in climbs for status in each.status)
    assert look(net) == "0"
    assert differ(net, net, images) is None
    watch(net, images, folder / "log")
    assert "nowhere" in reason(net)
    page = report(
        net, {"first": images[0]}, folder / "page.html", survey=found, source=images, maximized=climbs[0]
    )
    assert_type(page, Path)
