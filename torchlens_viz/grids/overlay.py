"""Overlays: the maps of a layer over the image they were made of, each value where the layer saw it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypedDict, Unpack, get_args

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import function, indices_of, one_of, plain
from torchlens_viz.draw.blend import Blend
from torchlens_viz.draw.canvas import check_size, draw_chosen
from torchlens_viz.draw.palette import Colormap, Table
from torchlens_viz.draw.scale import ValueRange
from torchlens_viz.draw.style import Interpolation, SortBy, Style, choose, ranking
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.hooks.capture import capture
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.models.colours import as_pixels
from torchlens_viz.models.inputs import ModelInputs, called_with, model_input, shown_to
from torchlens_viz.models.kernels import image_channels
from torchlens_viz.models.layers import Selector, require_module, select_one
from torchlens_viz.models.state import inference, like_parameters
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field

Backdrop: TypeAlias = Literal["gray", "color"]

_TILE_SIZE: Final = 128
_LUMINANCE: Final = (0.299, 0.587, 0.114)


class OverlayOptions(TypedDict, total=False):
    """The options of `overlay_grid`."""

    channels: int | Sequence[int] | None
    channel_dim: int | None
    preprocess: Callable[[Any], torch.Tensor] | None
    inputs: ModelInputs
    invert: Callable[[torch.Tensor], torch.Tensor] | None
    alpha: float
    backdrop: Backdrop
    cmap: str | Table | Colormap
    scale_each: bool
    value_range: ValueRange | None
    interpolation: Interpolation
    upscale: int | None
    nrow: int | None
    labels: bool | Sequence[str]
    legend: bool
    sort_by: SortBy | None
    max_tiles: int | None


def overlay_grid(
    model: nn.Module,
    layer: Selector,
    image: torch.Tensor | Image.Image,
    *,
    channels: int | Sequence[int] | None = None,
    channel_dim: int | None = None,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    inputs: ModelInputs = None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    alpha: float = 0.6,
    backdrop: Backdrop = "gray",
    cmap: str | Table | Colormap = "auto",
    scale_each: bool = False,
    value_range: ValueRange | None = None,
    interpolation: Interpolation = "bicubic",
    upscale: int | None = None,
    nrow: int | None = None,
    labels: bool | Sequence[str] = True,
    legend: bool = False,
    sort_by: SortBy | None = None,
    max_tiles: int | None = None,
) -> Image.Image:
    """Draw the maps of a layer over an image, each value over the middle of the region that it comes from.

    Stretching a map to the size of the image would shift it: by up to half a stride, and by more where the
    padding is not that of the kernel. Here the layer's receptive field says where each position stands.
    The model runs twice, in eval mode and without gradients, as far as the layer; its flags are restored.

    Args:
        model: A model that takes one image batch, or more, see `inputs`.
        layer: Which layer, by a selector that finds exactly one; it must put out maps (1, C, H, W).
        image: A tensor (1, C, H, W) or (C, H, W), or a picture.
        channels: Show only these maps, by index from 0.
        channel_dim: The dimension that counts channels in what the layer puts out; None finds it, as in
            `torchlens_viz.capture`.
        preprocess: Makes of `image` what the model takes, (1, C, H, W) or (C, H, W); where it does not take
            pictures, of the picture as a tensor in [0, 1]. Without it, pixels are in [0, 1]: a picture is
            RGB, or gray where the model takes one channel, and a tensor is taken as it is, but for uint8.
        inputs: What the model takes beside the image, as in `torchlens_viz.maximize`.
        invert: Makes of the model's input, (1, C, H, W), the pixels in [0, 1] to show. Without it, the input
            is shown as `preprocess` cropped and resized it, with its change of colours undone; where that
            cannot be told, with the range of its values spread over [0, 1].
        alpha: How much of the picture the strongest value hides, from 0 to 1; weaker ones hide less, and
            zero nothing.
        backdrop: Show the image in shades of `"gray"`, so that all colour is the map's, or in `"color"`.
        cmap: As in `kernel_grid`. `"auto"` is `"RdBu_r"` if there are negative values, else `"hot"` from 0
            on.
        scale_each: Give each map its own range, instead of one range for all that are shown.
        value_range: The range (low, high) to show, or `"robust"`, as in `kernel_grid`.
        interpolation: `"bicubic"` or `"bilinear"` between positions, or the value of the `"nearest"` one.
        upscale: Enlarge the image by this whole factor; None brings its longer side to at least 128 pixels.
        nrow: Maps per row; None is near-square.
        labels: Write channel numbers above the maps, or these strings.
        legend: Write the layer, its receptive field and the limits below.
        sort_by: Show the maps with the greatest `"norm"`, `"mean"`, `"std"` or `"max"` first.
        max_tiles: Draw no more maps than this, and say below how many there are.

    Returns:
        An image of mode "RGB". NaN is magenta, +Inf green and -Inf cyan, as in all sheets.

    Raises:
        LayerNotFoundError: The model has no such layer.
        InvalidArgumentError: The layer does not put out maps, or the image, an index or an option does not
            fit.
        InvalidTypeError: An argument has another type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(inplace=True))
        >>> overlay_grid(net, "1", torch.rand(3, 64, 96), labels=False, upscale=1).size
        (195, 131)
    """
    require_module(model)
    function(preprocess, "preprocess")
    function(invert, "invert")
    one_of(backdrop, "backdrop", get_args(Backdrop))
    sheet = Style(nrow=nrow, upscale=upscale, labels=labels, max_tiles=max_tiles, sort_by=sort_by)
    Style(interpolation=interpolation, scale_each=scale_each, legend=legend)
    model = called_with(model, inputs)
    batch = like_parameters(model_input(image, preprocess, image_channels(model)), model)
    name, maps = _maps(model, layer, batch, channel_dim)
    field = receptive_field(model, layer, batch.shape, channel_dim=channel_dim)
    if maps.shape[1:] != field.map_shape:
        raise InvalidArgumentError(
            f"`layer` must put out maps (1, C, H, W), but `{name}` puts out something of shape "
            f"{tuple(maps.shape)} where an image has the map {field.map_shape}; choose a convolution"
        )
    chosen = indices_of(channels, len(maps), "channels")
    choice = choose(sheet, len(chosen), ranking(maps[chosen], sort_by))
    shown = maps[[chosen[place] for place in choice.places]]
    blend = Blend.of(shown, alpha=alpha, cmap=cmap, scale_each=scale_each, value_range=value_range)
    pixels = as_pixels(batch, image, preprocess=preprocess, invert=invert)
    if backdrop == "gray":
        luminance = torch.tensor(_LUMINANCE, device="cpu")[:, None, None]
        pixels = (pixels * luminance).sum(0, keepdim=True).expand(3, -1, -1)
    factor = upscale or ceil(_TILE_SIZE / max(pixels.shape[1:]))
    check_size((len(chosen), 3, *(factor * side for side in pixels.shape[1:])), replace(sheet, upscale=1))
    tiles = blend.tiles(
        pixels,
        shown,
        origins=field.center((0, 0)),
        steps=field.stride,
        interpolation=interpolation,
        upscale=factor,
    )
    lines = [*blend.legend(), _note(name, field)] if legend else []
    return draw_chosen(tiles, choice, sheet, labels=[str(index) for index in chosen], lines=lines)


def save_overlay_grid(
    model: nn.Module,
    layer: Selector,
    image: torch.Tensor | Image.Image,
    path: str | os.PathLike[str],
    **options: Unpack[OverlayOptions],
) -> Path:
    """Draw the maps of a layer over an image into a file.

    Args:
        model: A model that takes one image batch.
        layer: Which layer.
        image: A tensor (1, C, H, W) or (C, H, W), or a picture.
        path: The file; its ending names the format. Missing folders are made, and a file of that name is
            replaced in one step.
        options: As in `overlay_grid`.

    Returns:
        The path.

    Raises:
        PictureError: The file cannot be written; nothing is left behind, and what stood there still stands.
    """
    return save_picture(overlay_grid(model, layer, image, **options), path)


def _maps(
    model: nn.Module, layer: Selector, batch: torch.Tensor, channel_dim: int | None
) -> tuple[str, torch.Tensor]:
    """Return the layer's name and its maps (C, h, w) of the only image of a batch."""
    chosen = select_one(model, layer)
    name, layout = chosen.name, Layout([chosen], channel_dim)
    with inference(model), capture(model, name, stop=True) as acts, layout.following():
        with shown_to(model, batch):
            model(batch)
    output = next(iter(acts.calls(name)), None)
    if not isinstance(output, torch.Tensor) or output.ndim != 4:
        what = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise InvalidArgumentError(
            f"`layer` must put out maps (1, C, H, W), but `{name}` puts out {what}; choose a convolution"
        )
    return name, plain(output).movedim(layout.channel_dim(output, name), 1)[0].float()


def _note(name: str, field: ReceptiveField) -> str:
    """Return a line about the layer: where its positions stand in the input."""
    height, width = field.size
    stride = " x ".join(f"{step:.3g}" for step in field.stride)
    about = "" if field.is_exact else "about "
    return f"{name or 'the model'}: a position sees {about}{height} x {width} pixels, every {stride}"
