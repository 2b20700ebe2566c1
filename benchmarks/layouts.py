"""Whether the channels of layers are found, whatever their layout: 70 networks, held to their definitions.

    python -m benchmarks.layouts [--only NAME ...] [--keep FILE] [--write-docs]

Needs torchvision and timm; downloads nothing: weights are random. Of every network some layers are taken, the
first and the last of each kind that has a definition of its channels: `Conv2d.out_channels`,
`BatchNorm2d.num_features`, `GroupNorm.num_channels`, `LayerNorm.normalized_shape`, `Linear.out_features`.
What `survey`, `feature_grid`, `overlay_grid` and `maximize` make of them is held against plain hooks and
numpy, which take the dimension that has that many, or where several have, the one that the kind says.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.networks import WrongError, kept, made_with, options_of, told, with_block
from torchlens_viz import TorchlensVizError, capture, feature_grid, maximize, overlay_grid, survey

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
MARKS = (
    "<!-- written by benchmarks/layouts.py: begin -->",
    "<!-- written by benchmarks/layouts.py: end -->",
)
FUNCTIONS = ("survey", "feature_grid", "overlay_grid", "maximize")
# Networks of a fixed size say so in their names, but for these; all others get 128 pixels.
SIZES = {
    "inception_v3": 299,
    "vit_b_32": 224,
    "maxvit_t": 224,
    "levit_128s": 224,
    "swin_t": 224,
    "efficientformer_l1": 224,
}
_SHIFTS = (0.05, 0.25, 0.5, 0.75, 0.95)

TIMM = (
    "resnet18", "resnetv2_50", "convnext_atto", "convnextv2_atto", "efficientnet_b0", "mobilenetv3_small_050",
    "mobilenetv4_conv_small", "regnetx_002", "densenet121", "ghostnet_050", "hrnet_w18_small", "repvgg_a0",
    "nf_resnet26", "dla34", "ese_vovnet19b_dw", "skresnet18", "resnest14d", "rexnet_100", "tinynet_e",
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_wee_patch16_reg1_gap_256",
    "swin_tiny_patch4_window7_224", "pvt_v2_b0", "levit_128s", "xcit_nano_12_p16_224", "mixer_s32_224",
    "resmlp_12_224", "gmlp_ti16_224", "poolformer_s12", "mobilevit_xxs", "mobilevitv2_050",
    "coatnet_nano_rw_224", "hiera_tiny_224", "mambaout_femto", "caformer_s18", "fastvit_t8",
    "edgenext_xx_small", "efficientformer_l1", "twins_pcpvt_small",
)  # fmt: skip
TORCHVISION = (
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "squeezenet1_0",
    "squeezenet1_1", "densenet121", "googlenet", "inception_v3", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "mnasnet1_0", "regnet_y_400mf",
    "regnet_x_400mf", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "swin_t", "swin_v2_t",
    "vit_b_32", "maxvit_t", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50",
)  # fmt: skip


def defined_channels(module: nn.Module) -> int | None:
    """Return how many channels a module says that it puts out; None where it does not say."""
    match module:
        case nn.Conv2d():
            return module.out_channels
        case nn.Linear():
            return module.out_features
        case nn.BatchNorm2d():
            return module.num_features
        case nn.GroupNorm():
            return module.num_channels
        case nn.LayerNorm():
            return module.normalized_shape[-1]
    return None


@dataclass
class Layer:
    """A layer as plain PyTorch sees it: what it put out, and which of the dimensions counts channels."""

    name: str
    kind: str
    channels: int
    output: torch.Tensor
    dim: int

    @property
    def maps(self) -> torch.Tensor:
        """(N, C, ...) float64."""
        return self.output.movedim(self.dim, 1).double()


@dataclass
class Row:
    """What became of one network.

    Attributes:
        name: The network.
        package: Where it comes from.
        layers: How many layers were taken, and of which kinds.
        right: For each function, how many of them it had right.
        asked: For each function, how many it was asked for.
        reasons: For each function, what was refused or wrong, with a layer for each reason.
    """

    name: str
    package: str
    layers: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        """Whether something was wrong, or failed."""
        return any(each.startswith(("wrong", "failed")) for own in self.reasons.values() for each in own)


def seen(model: nn.Module, batch: torch.Tensor) -> tuple[dict[str, list[Any]], Any]:
    """Return what every module put out in each of its calls."""
    calls: dict[str, list[Any]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, _args, output, name=name: calls.setdefault(name, []).append(kept(output))
        )
        for name, module in model.named_modules()
        if defined_channels(module) is not None
    ]
    try:
        with torch.no_grad():
            return calls, model(batch)
    finally:
        for hook in hooks:
            hook.remove()


def dimension(module: nn.Module, output: torch.Tensor, channels: int) -> int:
    """Return which dimension counts channels: the one that has that many, or that the kind has them in."""
    fitting = [dim for dim in range(1, output.ndim) if output.shape[dim] == channels]
    is_last = isinstance(module, nn.Linear) or type(module) is nn.LayerNorm
    usual = output.ndim - 1 if is_last else 1
    told(fitting, f"{type(module).__name__} of {channels} channels puts out {tuple(output.shape)}")
    return usual if usual in fitting else fitting[0]


def chosen(model: nn.Module, batch: torch.Tensor) -> list[Layer]:
    """Return the first and the last layer of each kind and layout that runs once, a row per image."""
    calls, _ = seen(model, batch)
    found: dict[str, list[Layer]] = {}
    for name, module in model.named_modules():
        channels, outputs = defined_channels(module), calls.get(name, [])
        if channels is None or len(outputs) != 1 or not isinstance(outputs[0], torch.Tensor):
            continue
        output = outputs[0]
        if len(output) != len(batch) or channels < 2:
            continue  # windows or heads folded into the batch
        layer = Layer(name, type(module).__name__, channels, output, dimension(module, output, channels))
        layout = f"{layer.kind} {output.ndim}-D, channels {'first' if layer.dim == 1 else 'last'}"
        found.setdefault(layout, []).append(layer)
    return [layer for own in found.values() for layer in ([own[0], own[-1]] if len(own) > 1 else own)]


def check_survey(model: nn.Module, batch: torch.Tensor, layer: Layer) -> None:
    """Statistics and top of every channel, against numpy in float64."""
    found = survey(model, [batch], layer.name, top_k=len(batch), progress=False)
    maps = layer.maps.flatten(2) if layer.output.ndim > 2 else layer.maps[..., None]
    mean = found.stats[layer.name].mean
    told(len(mean) == layer.channels, f"{len(mean)} channels of {layer.channels}")
    scale = float(maps.abs().max()) or 1.0
    told(np.allclose(mean, maps.mean((0, 2)).numpy(), atol=2e-4 * scale), "means are others")
    top = found.top[layer.name].values.double().numpy()
    expected = np.sort(maps.amax(2).numpy().T, axis=1)[:, ::-1]
    told(np.allclose(top, expected, atol=2e-4 * scale), "the highest values are others")


def check_feature_grid(model: nn.Module, batch: torch.Tensor, layer: Layer) -> None:
    """A tile for each channel, and every pixel, against arithmetic on what hooks saw."""
    with torch.no_grad(), capture(model, layer.name) as acts:
        model(batch)
    maps, options = layer.maps[0], {}
    if maps.ndim == 2:  # tokens: the last ones that fill a square lie in it
        side = isqrt(maps.shape[1])
        maps, options = maps[:, -side * side :].unflatten(1, (side, side)), {"grid": (side, side)}
    maps = maps.reshape(layer.channels, *(maps.shape[1:] or (1, 1)))
    low, high = float(maps.min()), float(maps.max())
    span = (low, high) if high > low else (low, low + 1)
    plain = {"cmap": "gray", "value_range": span, "upscale": 1, "padding": 0, "nrow": layer.channels}
    picture = np.asarray(feature_grid(acts[layer.name], **plain, **options))
    height, width = maps.shape[1:]
    told(
        picture.shape == (height, width * layer.channels, 3),
        f"{layer.channels} tiles of {height} x {width} drawn as {picture.shape}",
    )
    expected = (maps.numpy() - span[0]) / (span[1] - span[0]) * 255
    drawn = picture[..., 0].reshape(height, layer.channels, width).transpose(1, 0, 2)
    told(np.abs(drawn - expected).max() < 1.6, "the pixels are others")


def check_overlay_grid(model: nn.Module, batch: torch.Tensor, layer: Layer) -> None:
    """A map over black is bright where a plain hook saw high values: that of the last channel with such."""
    image = batch[:1]
    size = tuple(batch.shape[2:])
    maps = layer.maps[0]
    options: dict[str, Any] = {"labels": False, "upscale": 1, "interpolation": "nearest", "cmap": "gray"}
    if maps.ndim == 2:
        side = isqrt(maps.shape[1])
        maps, options["grid"] = maps[:, -side * side :].unflatten(1, (side, side)), (side, side)
    over = partial(overlay_grid, model, layer.name, image, **options)
    refuses(lambda: over(channels=[layer.channels]), layer.channels)
    last = max(channel for channel in range(len(maps)) if not channel or float(maps[channel].max()) > 0)
    values = maps[last]
    span = (0.0, max(float(values.max()), 1e-12))
    picture = over(channels=[last], value_range=span, alpha=1.0, invert=torch.zeros_like)
    told(picture.size[0] >= size[1], f"a picture of {picture.size} over an image of {size}")
    bright = np.asarray(picture.convert("L"), dtype=np.float64)
    top, left = (np.array(bright.shape) - size) // 2
    bright = bright[top : top + size[0], left : left + size[1]]
    if min(values.shape) > 3 and values.std() > 0:
        likeness = max(alike(bright, values, down, right) for down in _SHIFTS for right in _SHIFTS)
        told(likeness > 0.8, f"the map is like what is drawn by {likeness:.2f} only")


def alike(bright: np.ndarray[Any, Any], values: torch.Tensor, down: float, right: float) -> float:
    """Return the correlation of a map with what is drawn, a part of the way into the place of each position.

    Where a position stands in its place, padding decides, which other tests hold.
    """
    rows, columns = (
        ((np.arange(count) + shift) * side / count).astype(int).clip(0, side - 1)
        for count, side, shift in zip(values.shape, bright.shape, (down, right), strict=True)
    )
    drawn, expected = bright[np.ix_(rows, columns)].flatten(), values.clamp_min(0).numpy().flatten()
    return 0.0 if drawn.std() == 0 else float(np.corrcoef(drawn, expected)[0, 1])


def check_maximize(model: nn.Module, batch: torch.Tensor, layer: Layer) -> None:
    """The first and the last channel climb to what a plain pass says of the images, and there is no more."""
    channels, size = [0, layer.channels - 1], batch.shape[-1]
    options: dict[str, Any] = {"steps": 3, "size": size, "precision": "float32", "progress": False}
    found = maximize(model, layer.name, channels, **options)
    refuses(lambda: maximize(model, layer.name, [layer.channels], **options), layer.channels)
    calls, _ = seen(model, found.images)
    maps = calls[layer.name][0].movedim(layer.dim, 1).double()
    scores = maps[[0, 1], channels].flatten(1).mean(1) if maps.ndim > 2 else maps[[0, 1], channels]
    scale = max(1e-6, float(maps.abs().max()))
    told(
        np.allclose(found.scores, scores, atol=1e-3 * scale),
        f"scores of {found.scores.tolist()} are {scores.tolist()}",
    )


def refuses(call: Callable[[], object], channels: int) -> None:
    """Raise where a channel too many is taken."""
    try:
        call()
    except TorchlensVizError as error:
        if f"indices from 0 to {channels - 1}, got {channels}" in str(error):
            return
        raise
    told(False, "there is a channel too many")


CHECKS: Mapping[str, Callable[[nn.Module, torch.Tensor, Layer], None]] = {
    "survey": check_survey, "feature_grid": check_feature_grid, "overlay_grid": check_overlay_grid,
    "maximize": check_maximize,
}  # fmt: skip


def build(package: str, name: str) -> nn.Module:
    """Return a network with random weights, the same ones each time."""
    torch.manual_seed(0)
    if package == "timm":
        import timm

        return timm.create_model(name, pretrained=False).eval()
    from torchvision import models

    options = {"weights_backbone": None} if "v3_large" in name or "fcn" in name else {}
    options = options if name not in ("mobilenet_v3_large",) else {}
    return models.get_model(name, weights=None, **options).eval()


def row_of(package: str, name: str) -> Row:
    """Try all functions on some layers of one network."""
    row, begin = Row(name, package), time.perf_counter()
    model = build(package, name)
    side = SIZES.get(name, next((size for size in (224, 256) if name.endswith(f"_{size}")), 128))
    spots = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    batch = nn.functional.interpolate(spots, (side, side), mode="bilinear")
    layers = chosen(model, batch)
    for layer in layers:
        row.layers[layer.kind] = row.layers.get(layer.kind, 0) + 1
    for function, check in CHECKS.items():
        asked = [each for each in layers if each.output.ndim > 2 or function in ("survey", "maximize")]
        row.right[function], row.asked[function], row.reasons[function] = 0, len(asked), []
        for layer in asked:  # what has no positions has no maps to draw
            try:
                check(model, batch, layer)
                row.right[function] += 1
                continue
            except TorchlensVizError as refusal:
                said = f"refused: {refusal}"
            except WrongError as wrong:
                said = f"wrong: {wrong}"
            except Exception as error:  # which a user would see as well
                said = f"failed: {type(error).__name__}: {error}"
                traceback.print_exc()
            row.reasons[function].append(
                f"{said} [`{layer.name}`, {layer.kind}, {tuple(layer.output.shape)}]"
            )
    row.seconds = time.perf_counter() - begin
    return row


def networks() -> Iterator[tuple[str, str]]:
    """Yield the package and the name of every network."""
    yield from (("timm", name) for name in TIMM)
    yield from (("torchvision", name) for name in TORCHVISION)


def render(rows: Sequence[Row]) -> str:
    """Return the table, with the reasons below it."""
    lines = ["| network | layers | " + " | ".join(f"`{each}`" for each in FUNCTIONS) + " |"]
    lines.append("|---" * (2 + len(FUNCTIONS)) + "|")
    numbers: dict[str, int] = {}
    for row in rows:
        cells = []
        for function in FUNCTIONS:
            kinds = [reason.partition(" [`")[0] for reason in row.reasons[function]]
            marks = sorted({numbers.setdefault(kind, len(numbers) + 1) for kind in kinds})
            noted = "".join(f" [{mark}]" for mark in marks)
            cells.append(f"{row.right[function]} of {row.asked[function]}{noted}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in row.layers.items())
        lines.append(f"| {row.package} `{row.name}` | {kinds} | {' | '.join(cells)} |")
    right = [sum(row.right[each] for row in rows) for each in FUNCTIONS]
    asked = [sum(row.asked[each] for row in rows) for each in FUNCTIONS]
    totals = " | ".join(f"{a} of {b}" for a, b in zip(right, asked, strict=True))
    lines.append(f"| all {len(rows)} | | {totals} |")
    notes = [f"{number}. {reason}" for reason, number in numbers.items()]
    return "\n".join([*lines, "", *notes, "", made_with("torchvision", "timm")])


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, arguments)
    known: dict[tuple[str, str], Row] = {}
    if options.keep and options.keep.exists():
        read = [Row(**each) for each in json.loads(options.keep.read_text("utf-8"))]
        known = {(row.package, row.name): row for row in read if not row.is_bad}
    rows: list[Row] = []
    for package, name in networks():
        if options.only and not any(word in name for word in options.only):
            continue
        if (package, name) not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = row_of(package, name)
            known[package, name] = row
            gc.collect()
            print(package, name, f"{row.seconds:.0f} s", row.layers, row.right, row.reasons, flush=True)
            if options.keep:
                told_rows = [asdict(each) for each in known.values()]
                options.keep.write_text(json.dumps(told_rows, indent=1), "utf-8")
        rows.append(known[package, name])
    print(render(rows))
    if options.write_docs:
        PAGE.write_text(with_block(PAGE.read_text("utf-8"), render(rows), MARKS), "utf-8")
    return int(any(row.is_bad for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
