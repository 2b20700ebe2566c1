"""Sheets: the kernels of a layer, or its feature maps, as one picture."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import nn

from torchlens_viz.canvas import Interpolation, Style, draw
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.kernels import kernels_of
from torchlens_viz.layers import Selector
from torchlens_viz.pictures import save_picture


class StyleOptions(TypedDict, total=False):
    """The drawing options that every sheet takes; `kernel_grid` explains them."""

    normalize: bool
    scale_each: bool
    value_range: Sequence[float] | None
    cmap: str
    nrow: int | None
    padding: int
    upscale: int | None
    interpolation: Interpolation
    labels: bool | Sequence[str]
    legend: bool
    max_tiles: int | None


class KernelOptions(StyleOptions, total=False):
    """The options of `kernel_grid`."""

    filters: int | Sequence[int] | None
    channels: int | Sequence[int] | None


class FeatureOptions(StyleOptions, total=False):
    """The options of `feature_grid`."""

    sample: int
    channels: int | Sequence[int] | None


def kernel_grid(
    model_or_weight: nn.Module | torch.Tensor,
    layer: Selector | None = None,
    *,
    filters: int | Sequence[int] | None = None,
    channels: int | Sequence[int] | None = None,
    normalize: bool = True,
    scale_each: bool = False,
    value_range: Sequence[float] | None = None,
    cmap: str = "auto",
    nrow: int | None = None,
    padding: int = 1,
    upscale: int | None = None,
    interpolation: Interpolation = "nearest",
    labels: bool | Sequence[str] = False,
    legend: bool = False,
    max_tiles: int | None = None,
) -> Image.Image:
    """Draw the kernels of a convolution, one tile per filter.

    Kernels with three input channels are drawn in colour. Of others, input channel 0 is shown unless
    `channels` says otherwise; several channels make one row per filter and one column per channel.

    Args:
        model_or_weight: A model, or kernels (O, I, kH, kW).
        layer: Which layer of the model, by a selector that finds exactly one; None is the first convolution.
        filters: Show only these filters, by index from 0.
        channels: Show these input channels, by index from 0, each as a tile of its own.
        normalize: Spread the range of values over the colours: one range for the whole sheet. With False,
            values are taken to lie in [0, 1] ([-1, 1] in a diverging map; uint8 in [0, 255]) and clipped.
        scale_each: Give each tile its own range.
        value_range: The range (low, high) to show; values beyond are clipped.
        cmap: `"gray"`, `"hot"`, `"seismic"` or `"RdBu_r"`. The last two show a range symmetric about zero,
            with zero white and positive values red. `"auto"` is colour for kernels with three input channels,
            else `"RdBu_r"` for a range with both signs, else `"gray"`. A named map draws the channels of a
            colour kernel as separate tiles.
        nrow: Tiles per row, that is, the number of columns; None is near-square, wider than high.
        padding: Pixels between tiles and around the sheet.
        upscale: Enlarge each tile by this whole factor; None brings its longer side to at least 32 pixels.
        interpolation: `"nearest"` repeats pixels; `"bilinear"` and `"bicubic"` smooth within each tile.
        labels: Write filter (and channel) numbers above the tiles, or these strings, one per tile.
        legend: Write limits, layer and choice of channels below the sheet.
        max_tiles: Draw no more tiles than this, and say below the sheet how many there are.

    Returns:
        An image of mode "RGB" for colour kernels, "L" for gray, else "P". NaN is magenta, +Inf green and -Inf
        cyan; they change no other pixel.

    Raises:
        LayerNotFoundError: The model has no such layer, or no convolution.
        InvalidArgumentError: An index is out of range, a tensor has another shape, an option has no effect.
        InvalidTypeError: An argument has another type.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 11), nn.ReLU(), nn.Conv2d(64, 16, 3))
        >>> kernel_grid(net).mode, kernel_grid(net, "2", channels=range(8)).mode
        ('RGB', 'P')
    """
    style = Style(
        normalize=normalize,
        scale_each=scale_each,
        value_range=value_range,
        cmap=cmap,
        nrow=nrow,
        padding=padding,
        upscale=upscale,
        interpolation=interpolation,
        labels=labels,
        legend=legend,
        max_tiles=max_tiles,
    )
    weight, name = kernels_of(model_or_weight, layer)
    outputs, inputs = weight.shape[:2]
    chosen = indices_of(filters, outputs, "filters")
    layer_note = f"{name}: " if name else ""
    layer_note += f"{outputs} x {inputs} kernels of {weight.shape[2]} x {weight.shape[3]}"
    if inputs == 3 and channels is None and cmap == "auto":
        labels_ = [str(index) for index in chosen]
        return draw(weight[chosen], style, labels=labels_, notes=[layer_note])
    planes = indices_of(channels, inputs, "channels")
    if channels is None and inputs != 3:
        planes = planes[:1]
    if len(planes) > 1:
        if nrow is not None:
            raise InvalidArgumentError(
                "`nrow` has no effect where several channels are drawn: each filter has a row; leave it out"
            )
        style = replace(style, nrow=len(planes))
    tiles = weight[chosen][:, planes].flatten(0, 1)[:, None]
    labels_ = [str(index) if inputs == 1 else f"{index}/{plane}" for index in chosen for plane in planes]
    notes = [layer_note, *([_channel_note(planes, inputs)] if inputs > 1 else [])]
    return draw(tiles, style, labels=labels_, notes=notes)


def save_kernel_grid(
    model_or_weight: nn.Module | torch.Tensor,
    path: str | os.PathLike[str],
    layer: Selector | None = None,
    **options: Unpack[KernelOptions],
) -> Path:
    """Draw the kernels of a convolution into a file.

    Args:
        model_or_weight: A model, or kernels (O, I, kH, kW).
        path: The file; its ending names the format. Missing folders are made, and a file of that name is
            replaced in one step.
        layer: Which layer of the model; None is the first convolution.
        options: As in `kernel_grid`.

    Returns:
        The path.

    Raises:
        PictureError: The file cannot be written; nothing is left behind, and what stood there still stands.
    """
    return save_picture(kernel_grid(model_or_weight, layer, **options), path)


def feature_grid(
    activation: torch.Tensor,
    *,
    sample: int = 0,
    channels: int | Sequence[int] | None = None,
    normalize: bool = True,
    scale_each: bool = False,
    value_range: Sequence[float] | None = None,
    cmap: str = "auto",
    nrow: int | None = None,
    padding: int = 1,
    upscale: int | None = None,
    interpolation: Interpolation = "nearest",
    labels: bool | Sequence[str] = False,
    legend: bool = False,
    max_tiles: int | None = None,
) -> Image.Image:
    """Draw the feature maps of one input, one tile per channel.

    Args:
        activation: (N, C, H, W), as `capture` records it, or (C, H, W).
        sample: Which input of the batch, by index from 0.
        channels: Show only these channels, by index from 0.
        normalize: As in `kernel_grid`, like all options that follow.
        scale_each: A range for each map.
        value_range: The range (low, high) to show.
        cmap: `"auto"` is `"RdBu_r"` for a range with both signs, else `"gray"`.
        nrow: Maps per row.
        padding: Pixels between maps.
        upscale: Whole factor of enlargement; None brings the longer side to at least 32 pixels.
        interpolation: How to enlarge.
        labels: Write channel numbers, or these strings.
        legend: Write limits and shape below.
        max_tiles: Draw no more maps than this.

    Returns:
        An image of mode "L" for gray, else "P".

    Raises:
        InvalidArgumentError: An index is out of range, the tensor has another shape or no pixels, or an
            option has no effect.
        InvalidTypeError: An argument has another type.

    Example:
        >>> import torch
        >>> feature_grid(torch.rand(1, 6, 40, 40), padding=2).size
        (128, 86)
    """
    style = Style(
        normalize=normalize,
        scale_each=scale_each,
        value_range=value_range,
        cmap=cmap,
        nrow=nrow,
        padding=padding,
        upscale=upscale,
        interpolation=interpolation,
        labels=labels,
        legend=legend,
        max_tiles=max_tiles,
    )
    maps = maps_of(activation, sample)
    chosen = indices_of(channels, len(maps), "channels")
    tiles = maps if channels is None else maps[chosen]
    notes = [f"{len(maps)} maps of {maps.shape[1]} x {maps.shape[2]}"]
    return draw(tiles[:, None], style, labels=[str(index) for index in chosen], notes=notes)


def save_feature_grid(
    activation: torch.Tensor, path: str | os.PathLike[str], **options: Unpack[FeatureOptions]
) -> Path:
    """Draw the feature maps of one input into a file.

    Args:
        activation: (N, C, H, W) or (C, H, W).
        path: The file; its ending names the format. Missing folders are made, and a file of that name is
            replaced in one step.
        options: As in `feature_grid`.

    Returns:
        The path.

    Raises:
        PictureError: The file cannot be written; nothing is left behind, and what stood there still stands.
    """
    return save_picture(feature_grid(activation, **options), path)


def maps_of(activation: torch.Tensor, sample: int) -> torch.Tensor:
    """Return the maps (C, H, W) of one input of a batch, checked to be drawable."""
    if not isinstance(activation, torch.Tensor):
        raise InvalidTypeError(
            f"`activation` must be a tensor (N, C, H, W) or (C, H, W), got {type(activation).__name__}; of a "
            "layer that puts out several tensors, choose one"
        )
    if activation.ndim not in (3, 4) or activation.numel() == 0:
        raise InvalidArgumentError(
            "`activation` must be (N, C, H, W) or (C, H, W) with at least one pixel, got shape "
            f"{tuple(activation.shape)}"
        )
    if activation.is_meta or activation.is_complex():
        raise InvalidTypeError(
            f"`activation` must have real numbers to draw, got {activation.dtype} on {activation.device}"
        )
    batch = activation.detach()
    if batch.is_quantized:
        batch = batch.dequantize()
    if batch.ndim == 3:
        batch = batch[None]
    index = _as_index(sample)
    if index is None:
        raise InvalidTypeError(f"`sample` must be an int, got {sample!r}")
    if not 0 <= index < len(batch):
        raise InvalidArgumentError(
            f"`sample` must be an index from 0 to {len(batch) - 1}, got {index} "
            f"(shape {tuple(activation.shape)})"
        )
    return batch[index]


def indices_of(chosen: int | Sequence[int] | None, count: int, name: str) -> list[int]:
    """Return the indices that an option named `name` chooses from `count` things; None is all of them."""
    if chosen is None:
        return list(range(count))
    single = _as_index(chosen)
    try:
        given = list(chosen) if single is None else [single]  # type: ignore[arg-type]
    except TypeError:
        given = [chosen]  # type: ignore[list-item]
    indices = [index for index in map(_as_index, given) if index is not None]
    if len(indices) < len(given):
        raise InvalidTypeError(f"`{name}` must be an int or a list of ints, got {chosen!r}")
    if not indices:
        raise InvalidArgumentError(f"`{name}` must choose at least one, got an empty list")
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise InvalidArgumentError(f"`{name}` must be indices from 0 to {count - 1}, got {wrong[0]}")
    return indices


def _as_index(value: object) -> int | None:
    """Return an integer of any kind as an int, and None for all else: a bool is a mask, not an index."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.dtype(np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _channel_note(planes: Sequence[int], inputs: int) -> str:
    if len(planes) == 1:
        return f"input channel {planes[0]} of {inputs}"
    return f"rows: filters; columns: {len(planes)} of {inputs} input channels"
