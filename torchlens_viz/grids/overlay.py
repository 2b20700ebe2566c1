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
from torchlens_viz.draw.blend import Blend, placed_across
from torchlens_viz.draw.canvas import check_size, draw_chosen
from torchlens_viz.draw.curves import legend_of, over_curves, size_of
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.draw.palette import Colormap, Table
from torchlens_viz.draw.planes import Plane, Slices, Slicing
from torchlens_viz.draw.scale import ValueRange
from torchlens_viz.draw.style import Interpolation, SortBy, Style, choose, in_rows, ranking
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.hooks.capture import capture
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.colours import Bands, as_pixels, as_signal, bands_note, inverted
from torchlens_viz.models.images import AXES, as_shown, model_input
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.kernels import image_form
from torchlens_viz.models.layers import Selector, require_module, select_one
from torchlens_viz.models.state import inference, like_parameters, require_values
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field

Backdrop: TypeAlias = Literal["gray", "color"]

_TILE_SIZE: Final = 128
_LUMINANCE: Final = (0.299, 0.587, 0.114)


class OverlayOptions(TypedDict, total=False):
    """The options of `overlay_grid`."""

    channels: int | Sequence[int] | None
    channel_dim: int | None
    grid: tuple[int, int] | None
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
    plane: Plane | None
    slices: Slices
    bands: Bands


def overlay_grid(
    model: nn.Module,
    layer: Selector,
    image: torch.Tensor | Image.Image,
    *,
    channels: int | Sequence[int] | None = None,
    channel_dim: int | None = None,
    grid: tuple[int, int] | None = None,
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
    plane: Plane | None = None,
    slices: Slices = None,
    bands: Bands = None,
) -> Image.Image:
    """Draw the maps of a layer over an image, each value over the middle of the region that it comes from.

    Stretching a map to the size of the image would shift it: by up to half a stride, and by more where the
    padding is not that of the kernel. Here the layer's receptive field says where each position stands.
    Of a volume or clip slices are shown, of several a row for each map. Of a signal the curve is drawn, with
    the map as the colour of the page behind it.

    The model runs twice, in eval mode and without gradients, as far as the layer; its flags are restored.

    Args:
        model: A model that takes one image batch, or more, see `inputs`.
        layer: Which layer, by a selector that finds exactly one; it must put out maps with as many spatial
            axes as its input has, or tokens, see `grid`.
        image: A tensor (1, C, H, W) or (C, H, W), or a picture; of a network whose first convolution is 3-D,
            a tensor (1, C, D, H, W) or (C, D, H, W), and of a 1-D one (1, C, L) or (C, L).
        channels: Show only these maps, by index from 0.
        channel_dim: The dimension that counts channels in what the layer puts out; None finds it, as in
            `torchlens_viz.capture`.
        grid: Rows and columns in which the last rows * columns of a transformer's tokens (1, L, C) lie, side
            by side over the image.
        preprocess: Makes of `image` what the model takes, (1, C, H, W) or (C, H, W); where it does not take
            pictures, of the picture as a tensor in [0, 1]. Without it, pixels are in [0, 1]: a picture is
            RGB, or gray where the model takes one channel, and a tensor is taken as it is, but for uint8.
        inputs: What the model takes beside the image, as in `torchlens_viz.maximize`.
        invert: Makes of the model's input, (1, C, H, W), the pixels in [0, 1] to show. Without it, the input
            is shown as `preprocess` cropped and resized it, with its change of colours undone; where that
            cannot be told, with the range of its values spread over [0, 1].
        alpha: How much of the picture the strongest value hides, from 0 to 1; weaker ones hide less, and
            zero nothing.
        backdrop: Show the image in shades of `"gray"`, so that all colour is the map's, or in `"color"`. A
            signal is black.
        cmap: As in `kernel_grid`. `"auto"` is `"RdBu_r"` if there are negative values, else `"hot"` from 0
            on; over a signal, whose page is white, always `"RdBu_r"`.
        scale_each: Give each map its own range, instead of one range for all that are shown.
        value_range: The range (low, high) to show, or `"robust"`, as in `kernel_grid`.
        interpolation: `"bicubic"` or `"bilinear"` between positions, or the value of the `"nearest"` one.
        upscale: Enlarge the image by this whole factor; None brings its longer side to at least 128 pixels,
            and a signal to 512 to 2048 pixels.
        nrow: Maps per row; None is near-square, and of signals one.
        labels: Write channel numbers above the maps, or these strings.
        legend: Write the layer, its receptive field and the limits below.
        sort_by: Show the maps with the greatest `"norm"`, `"mean"`, `"std"` or `"max"` first.
        max_tiles: Draw no more maps than this, and say below how many there are.
        plane: Across which axis of a volume slices lie, as in `feature_grid`.
        slices: Which slices of the input, as in `feature_grid`; `"max"` is the maximum of the map and of the
            input. None is the middle one.
        bands: The channels of the input to show as red, green and blue, or the one to show in gray. None is
            all of 1 or 3, and of other numbers their mean, which a line below says. Of a signal, those to
            draw as curves, any number; None is all.

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
    require_values(model)
    function(preprocess, "preprocess")
    function(invert, "invert")
    one_of(backdrop, "backdrop", get_args(Backdrop))
    sheet = Style(nrow=nrow, upscale=upscale, labels=labels, max_tiles=max_tiles, sort_by=sort_by)
    Style(interpolation=interpolation, scale_each=scale_each, legend=legend)
    model = called_with(model, inputs)
    taken, axes = image_form(model, image)
    image = as_shown(image, taken, axes)
    batch = like_parameters(model_input(image, preprocess, taken, axes), model)
    slicing = Slicing.of(batch.shape[2:], plane, slices)
    if axes == 1 and backdrop != "gray":
        raise InvalidArgumentError("`backdrop` has no effect on a signal, which is black; leave it out")
    name, maps = _maps(model, layer, batch, channel_dim, grid)
    if grid is None:
        field = receptive_field(model, layer, batch.shape, channel_dim=channel_dim)
        if maps.shape[1:] != field.map_shape:
            raise InvalidArgumentError(
                f"`layer` must put out maps (1, {AXES[axes]}), but `{name}` puts out something of shape "
                f"{tuple(maps.shape)} where an image has the map {field.map_shape}; choose a convolution"
            )
        origins, steps, note = field.center((0,) * axes), field.stride, _note(name, field)
    else:
        steps = tuple(side / count for side, count in zip(batch.shape[2:], maps.shape[1:], strict=True))
        origins, note = tuple((step - 1) / 2 for step in steps), f"{name}: tokens, {grid[0]} x {grid[1]}"
    chosen = indices_of(channels, len(maps), "channels")
    maps, suffixes = maps[chosen], [""]
    order = ranking(maps, sort_by)
    if slicing is not None:
        at, suffixes = slicing.axis, slicing.labels()
        maps = placed_across(
            maps, slicing, origin=origins[at], step=steps[at], interpolation=interpolation
        ).flatten(0, 1)
        origins, steps = (slicing.within(each) for each in (origins, steps))
        if len(chosen) > 1:
            sheet = in_rows(sheet, len(suffixes), row="map", several="slices")
        if order is not None:
            order = [each * len(suffixes) + piece for each in order for piece in range(len(suffixes))]
    elif axes == 1:
        sheet = replace(sheet, nrow=nrow or 1)
    choice = choose(sheet, len(maps), order)
    shown = maps[choice.places]
    blend = Blend.of(
        shown if shown.ndim == 3 else shown[:, None],
        alpha=alpha,
        cmap="RdBu_r" if axes == 1 and isinstance(cmap, str) and cmap == "auto" else cmap,
        scale_each=scale_each,
        value_range=value_range,
    )
    lines = [*blend.legend(), note] if legend else []
    if axes == 1:
        signal, drawn = as_signal(batch, invert, bands)
        size = size_of(signal, sheet.upscale)
        check_size((len(maps), 3, *size), replace(sheet, upscale=1))
        lines += [legend_of(signal, drawn)] if legend else []
        tiles = over_curves(
            signal, shown, blend, origin=origins[0], step=steps[0], interpolation=interpolation, size=size
        )
    else:
        pixels = as_pixels(batch, image, preprocess=preprocess, invert=invert, bands=bands)
        lines += bands_note(inverted(batch, invert).shape[1], bands)
        if backdrop == "gray":
            luminance = torch.tensor(_LUMINANCE, device="cpu").view(3, *[1] * axes)
            pixels = (pixels * luminance).sum(0, keepdim=True).expand(3, *pixels.shape[1:])
        if slicing is not None:
            planes = slicing.take(pixels).movedim(1, 0)
            pixels = planes[[place % len(suffixes) for place in choice.places]]
            lines += [slicing.note()] if legend else []
        factor = sheet.upscale or ceil(_TILE_SIZE / max(pixels.shape[-2:]))
        check_size((len(maps), 3, *(factor * side for side in pixels.shape[-2:])), replace(sheet, upscale=1))
        tiles = blend.tiles(
            pixels, shown, origins=origins, steps=steps, interpolation=interpolation, upscale=factor
        )
    labels = [f"{index}{suffix}" for index in chosen for suffix in suffixes]
    return draw_chosen(tiles, choice, sheet, labels=labels, lines=lines)


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
    model: nn.Module,
    layer: Selector,
    batch: torch.Tensor,
    channel_dim: int | None,
    grid: tuple[int, int] | None,
) -> tuple[str, torch.Tensor]:
    """Return the layer's name and its maps (C, ...) of the only image of a batch."""
    chosen = select_one(model, layer)
    name, layout = chosen.name, Layout([chosen], channel_dim)
    own = batch.detach().clone()  # which the model may write to
    with inference(model), capture(model, name, stop=True) as acts, layout.following():
        with shown_to(model, batch):
            model(own)
    output = next(iter(acts.calls(name)), None)
    is_tokens = isinstance(output, torch.Tensor) and output.ndim == 3 and batch.ndim == 4
    if isinstance(output, torch.Tensor) and output.ndim > 2 and len(output) != 1:
        raise InvalidArgumentError(
            f"`layer` must put out one row per image, but `{name}` puts out {len(output)} for one image "
            f"(shape {tuple(output.shape)}): it folds windows into the batch, or counts the batch in another "
            "dimension; choose a layer around it"
        )
    if grid is not None:
        if not isinstance(output, torch.Tensor) or not is_tokens:
            raise InvalidArgumentError(
                f"`grid` has no effect on `{name}`, which puts out no tokens (1, L, C) of an image; leave it "
                "out"
            )
        dim = layout.channel_dim(output, name)
        what = f"what `{name}` puts out"
        return name, maps_of(output, 0, channel_dim=dim, grid=grid, what=what).float()
    if not isinstance(output, torch.Tensor) or output.ndim != batch.ndim:
        what = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise InvalidArgumentError(
            f"`layer` must put out maps (1, {AXES[batch.ndim - 2]}), but `{name}` puts out {what}; "
            + ("say with `grid` how these tokens lie" if is_tokens else "choose a convolution")
        )
    return name, plain(output).movedim(layout.channel_dim(output, name), 1)[0].float()


def _note(name: str, field: ReceptiveField) -> str:
    """Return a line about the layer: where its positions stand in the input."""
    size, stride = (" x ".join(f"{each:.3g}" for each in sides) for sides in (field.size, field.stride))
    about = "" if field.is_exact else "about "
    unit = {1: "samples", 2: "pixels", 3: "voxels"}[len(field.size)]
    return f"{name or 'the model'}: a position sees {about}{size} {unit}, every {stride}"
