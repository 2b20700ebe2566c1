"""Pairs: every kernel beside the map it makes of one image."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, isnan, sqrt
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, get_args

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from torchlens_viz.arguments import flag, function, indices_of, one_of
from torchlens_viz.draw.canvas import check_size, draw_chosen, in_colour
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.draw.style import Style, choose
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.images import as_shown, model_input
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.kernels import image_channels, kernels_of
from torchlens_viz.models.layers import Selector, require_module
from torchlens_viz.models.state import inference, like_parameters

PairOrder: TypeAlias = Literal["picture", "edges", "color", "channel"]

_MEANING: Final = (
    "picture, edges: how closely the map follows the picture, and its edges, 1 exactly and 0 not at all; "
    "colour: the share of the kernel that tells colours apart"
)
_MAP_SIZE: Final = 96
_WHITE: Final = 255
_FRAME: Final = 192
_LUMINANCE: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


class PairOptions(TypedDict, total=False):
    """The options of `pair_grid`."""

    channels: int | Sequence[int] | None
    preprocess: Callable[[Any], torch.Tensor] | None
    inputs: ModelInputs
    scale_each: bool
    sort_by: PairOrder | None
    nrow: int | None
    labels: bool | Sequence[str]
    max_tiles: int | None


def pair_grid(
    model: nn.Module,
    layer: Selector | None,
    image: torch.Tensor | Image.Image,
    *,
    channels: int | Sequence[int] | None = None,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    inputs: ModelInputs = None,
    scale_each: bool = False,
    sort_by: PairOrder | None = None,
    nrow: int | None = None,
    labels: bool | Sequence[str] = True,
    max_tiles: int | None = None,
) -> Image.Image:
    """Draw the kernels of a convolution, each with the feature map it makes of an image to its right.

    Which kernels keep the picture, and which only its edges? `torchlens_viz.grids.pairs` has the numbers, by
    which the pairs are sorted and labelled: how clearly the picture is still there, how much its edges are,
    and the kernel's share of colour.

    The model runs once, in eval mode and without gradients, as far as the layer; its flags are restored.

    Args:
        model: A model that takes one image batch.
        layer: Which layer, by a selector that finds exactly one; None is the first convolution.
        image: A tensor (1, C, H, W) or (C, H, W), or a picture.
        channels: Show only these output channels of the layer, by index from 0.
        preprocess: Makes of `image` what the model takes, as in `overlay_grid`.
        inputs: What the model takes beside the image, as in `torchlens_viz.maximize`.
        scale_each: Give each kernel and each map its own range, instead of one range for all kernels and one
            for all maps.
        sort_by: Which pairs come first: those that keep the `"picture"`, its `"edges"`, those with most
            `"color"`, or `"channel"` for the order of the channels. None is `"picture"`, or the order of
            `channels` where these are given.
        nrow: Pairs per row; None is near-square.
        labels: Write channel numbers and what the kernels keep above the pairs, or these strings.
        max_tiles: Draw no more pairs than this, and say below how many there are.

    Returns:
        An image of mode "RGB". Kernels with three input channels are in colour, of others input channel 0 is
        shown; maps have zero white and positive values red where both signs occur, else they are gray.

    Raises:
        LayerNotFoundError: The model has no such layer, or no convolution.
        InvalidArgumentError: The image or an index does not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(inplace=True))
        >>> pair_grid(net, "0", torch.rand(3, 36, 36), labels=False).size
        (412, 214)
    """
    require_module(model)
    function(preprocess, "preprocess")
    if sort_by is not None:
        one_of(sort_by, "sort_by", get_args(PairOrder))
    weight, name = kernels_of(model, layer)
    if weight.ndim != 4:
        raise InvalidArgumentError(f"`{name}` must have kernels (O, I, kH, kW), got {tuple(weight.shape)}")
    chosen = indices_of(channels, len(weight), "channels")
    scale_each = flag(scale_each, "scale_each")
    sheet = Style(normalize=False, nrow=nrow, padding=6, upscale=1, labels=labels, max_tiles=max_tiles)
    model = called_with(model, inputs)
    taken = image_channels(model)
    image = as_shown(image, taken)
    batch = model_input(image, preprocess, taken)
    maps = _maps(model, name, batch, weight)
    patterns = measure_patterns(weight[chosen], maps[chosen], batch[0])
    order = _order(patterns, sort_by or ("picture" if channels is None else "channel"))
    choice = choose(sheet, len(chosen), order)
    if nrow is None:  # a pair is about twice as wide as high
        sheet = replace(sheet, nrow=ceil(sqrt(len(choice.places) / 2)))
    shown = [chosen[place] for place in choice.places]
    factor = ceil(_MAP_SIZE / max(maps.shape[1:]))  # before any is drawn: at least this much
    check_size((len(shown), 3, *(factor * side for side in maps.shape[1:])), replace(sheet, max_tiles=None))
    pairs = _drawn(weight[shown], maps[shown], Style(scale_each=scale_each))
    words = [_MEANING] if labels is True else []
    return draw_chosen(pairs, choice, sheet, labels=_captions(chosen, patterns), lines=words)


def save_pair_grid(
    model: nn.Module,
    layer: Selector | None,
    image: torch.Tensor | Image.Image,
    path: str | os.PathLike[str],
    **options: Unpack[PairOptions],
) -> Path:
    """Draw the kernels of a convolution beside the maps they make of an image into a file.

    Args:
        model: A model that takes one image batch.
        layer: Which layer; None is the first convolution.
        image: A tensor (1, C, H, W) or (C, H, W), or a picture.
        path: The file; its ending names the format. Missing folders are made, and a file of that name is
            replaced in one step.
        options: As in `pair_grid`.

    Returns:
        The path.

    Raises:
        PictureError: The file cannot be written; nothing is left behind, and what stood there still stands.
    """
    return save_picture(pair_grid(model, layer, image, **options), path)


def _maps(model: nn.Module, name: str, batch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch = like_parameters(batch, model)
    with inference(model), capture(model, name, stop=True) as acts, shown_to(model, batch):
        model(batch.clone())  # which it may write to
    maps = maps_of(acts[name], sample=0)
    if len(maps) != len(weight):
        raise InvalidArgumentError(f"`{name}` has {len(weight)} kernels and puts out {len(maps)} maps")
    return maps


def _order(patterns: Patterns, sort_by: PairOrder) -> list[int]:
    if sort_by == "channel":
        return list(range(len(patterns.picture)))
    figures = getattr(patterns, sort_by).nan_to_num(0)
    order: list[int] = figures.sort(descending=True, stable=True).indices.tolist()
    return order


def _captions(chosen: Sequence[int], patterns: Patterns) -> list[str]:
    rows = zip(chosen, *(figure.tolist() for figure in patterns), strict=True)
    return [
        f"{index}: picture {picture:.2f}\nedges {edges:.2f}"
        + ("" if isnan(colour) else f", colour {colour:.2f}")
        for index, picture, edges, colour in rows
    ]


def _drawn(kernels: torch.Tensor, maps: torch.Tensor, style: Style) -> torch.Tensor:
    kernels = kernels if kernels.shape[1] == 3 else kernels[:, :1]
    map_tiles = in_colour(maps[:, None], style, upscale=ceil(_MAP_SIZE / max(maps.shape[1:])))
    height = map_tiles.shape[2]
    kernel_tiles = in_colour(kernels, style, upscale=max(1, height // max(kernels.shape[2:])))
    return _side_by_side(kernel_tiles, map_tiles)


def _side_by_side(kernels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Frame kernels and maps, put white around the lower ones up to the others' height, and white between."""
    height = max(kernels.shape[2], maps.shape[2]) + 2
    parts = []
    for tiles in (kernels, maps):
        tiles = F.pad(tiles, (1, 1, 1, 1), value=_FRAME)  # zero is white on white
        missing = height - tiles.shape[2]
        parts.append(F.pad(tiles, (0, 2, missing // 2, missing - missing // 2), value=_WHITE))
    return torch.cat(parts, dim=3)[..., :-2]


class Patterns(NamedTuple):
    """Three numbers for each of K pairs of a kernel and its map, float32 on the CPU.

    `picture` (K,) in [0, 1]: how clearly the picture is still there, as the absolute correlation of the map
    with the luminance of the input. `edges` (K,) in [-1, 1]: how much only its outlines are, as the
    correlation of the map's distance from its mean with the strength of the edges in the luminance.
    `color` (K,) in [0, 1]: the share of the kernel's energy in differences between the input's three
    channels; NaN for kernels with other than three. A constant map correlates with nothing: 0.
    """

    picture: torch.Tensor
    edges: torch.Tensor
    color: torch.Tensor


def measure_patterns(kernels: torch.Tensor, maps: torch.Tensor, image: torch.Tensor) -> Patterns:
    """Measure what each kernel of a layer keeps of an image.

    Args:
        kernels: (K, I, kH, kW).
        maps: (K, H, W), what the kernels make of the image.
        image: The network's input (C, H', W'); luminance is taken from three channels, of others their mean.

    Returns:
        The numbers, aligned with the kernels.

    Raises:
        InvalidArgumentError: The numbers of kernels and maps differ.

    Example:
        >>> import torch
        >>> image = torch.rand(3, 32, 32)
        >>> gray, red = torch.full((3, 1, 1), 1 / 3), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
        >>> kernels = torch.stack([gray, red])
        >>> maps = torch.nn.functional.conv2d(image[None], kernels)[0]
        >>> [round(share, 2) for share in measure_patterns(kernels, maps, image).color.tolist()]
        [0.0, 0.67]
    """
    if len(kernels) != len(maps):
        raise InvalidArgumentError(
            f"each kernel needs its map, got {len(kernels)} kernels and {len(maps)} maps"
        )
    kernels, maps, image = (value.detach().cpu().double().nan_to_num() for value in (kernels, maps, image))
    luminance = _luminance(image)
    # As large as the maps, with antialiasing: a map has one value where the input has many.
    seen = F.interpolate(luminance[None, None], maps.shape[1:], mode="bilinear", antialias=True)[0, 0]
    values = maps.flatten(1)
    return Patterns(
        picture=_correlation(values, seen.flatten()).abs().float(),
        edges=_correlation((values - values.mean(1, keepdim=True)).abs(), _edges(seen).flatten()).float(),
        color=_colour_share(kernels).float(),
    )


def _luminance(image: torch.Tensor) -> torch.Tensor:
    if len(image) != 3:
        return image.mean(0)
    return (torch.tensor(_LUMINANCE, dtype=image.dtype, device=image.device)[:, None, None] * image).sum(0)


def _edges(plane: torch.Tensor) -> torch.Tensor:
    """Return the strength of the edges in (H, W), by the Sobel operator."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=plane.dtype, device=plane.device)
    padded = F.pad(plane[None, None], (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(padded, torch.stack([sobel, sobel.T])[:, None])[0]
    return slopes.square().sum(0).sqrt()


def _correlation(rows: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of each row (K, P) with a reference (P,)."""
    rows = rows - rows.mean(1, keepdim=True)
    reference = reference - reference.mean()
    spread = rows.norm(dim=1) * reference.norm()
    return torch.where(spread > 0, rows @ reference / spread, 0).clamp(-1, 1)


def _colour_share(kernels: torch.Tensor) -> torch.Tensor:
    if kernels.shape[1] != 3:
        return torch.full((len(kernels),), torch.nan, dtype=kernels.dtype, device=kernels.device)
    energy = kernels.square().sum((1, 2, 3))
    gray = kernels.mean(1).square().sum((1, 2)) * 3
    return torch.where(energy > 0, 1 - gray / energy, 0).clamp(0, 1)
