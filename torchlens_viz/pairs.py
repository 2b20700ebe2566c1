"""Pairs: every kernel beside the map it makes of one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, sqrt
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from torchlens_viz.activations import capture
from torchlens_viz.canvas import Style, draw, in_colour
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.kernels import kernels_of
from torchlens_viz.layers import Selector
from torchlens_viz.modes import inference
from torchlens_viz.sheets import indices_of, maps_of

_MAP_SIZE: Final = 96
_WHITE: Final = 255
_FRAME: Final = 192


def pair_grid(
    model: nn.Module,
    layer: Selector | None,
    image: torch.Tensor | Image.Image,
    *,
    channels: int | Sequence[int] | None = None,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    scale_each: bool = False,
    nrow: int | None = None,
    labels: bool | Sequence[str] = True,
    max_tiles: int | None = None,
) -> Image.Image:
    """Draw the kernels of a convolution, each with the feature map it makes of an image to its right.

    The model runs once, in eval mode and without gradients, as far as the layer; its flags are restored.

    Args:
        model: A model that takes one image batch.
        layer: Which layer, by a selector that finds exactly one; None is the first convolution.
        image: A tensor (1, C, H, W) or (C, H, W), or a picture.
        channels: Show only these output channels of the layer, by index from 0.
        preprocess: Makes of `image` what the model takes, (1, C, H, W) or (C, H, W). Without it, a tensor is
            taken as it is and a picture as RGB values in [0, 1].
        scale_each: Give each kernel and each map its own range, instead of one range for all kernels and one
            for all maps.
        nrow: Pairs per row; None is near-square.
        labels: Write channel numbers above the pairs, or these strings.
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
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    weight, name = kernels_of(model, layer)
    chosen = indices_of(channels, len(weight), "channels")
    labels_ = [str(index) for index in chosen]
    sheet = Style(normalize=False, nrow=nrow, padding=6, upscale=1, labels=labels, max_tiles=max_tiles)
    chosen = chosen[:max_tiles]
    batch = _as_batch(image if preprocess is None else preprocess(image))
    first = next((each for each in model.parameters() if each.is_floating_point()), weight)
    batch = batch.to(first.device, first.dtype if batch.is_floating_point() else None)
    with inference(model), capture(model, name, stop=True) as acts:
        model(batch)
    maps = maps_of(acts[name], sample=0)
    if len(maps) != len(weight):
        raise InvalidArgumentError(f"`{name}` has {len(weight)} kernels and puts out {len(maps)} maps")
    kernels = weight[chosen] if weight.shape[1] == 3 else weight[chosen][:, :1]
    style = Style(scale_each=scale_each)
    map_tiles = in_colour(maps[chosen][:, None], style, upscale=ceil(_MAP_SIZE / max(maps.shape[1:])))
    height = map_tiles.shape[2]
    kernel_tiles = in_colour(kernels, style, upscale=max(1, height // max(kernels.shape[2:])))
    if nrow is None:  # a pair is about twice as wide as high
        sheet = replace(sheet, nrow=ceil(sqrt(len(chosen) / 2)))
    return draw(_side_by_side(kernel_tiles, map_tiles), sheet, labels=labels_, notes=())


def _side_by_side(kernels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Frame kernels and maps, put white around the lower ones up to the others' height, and white between."""
    height = max(kernels.shape[2], maps.shape[2]) + 2
    parts = []
    for tiles in (kernels, maps):
        tiles = F.pad(tiles, (1, 1, 1, 1), value=_FRAME)  # zero is white on white
        missing = height - tiles.shape[2]
        parts.append(F.pad(tiles, (0, 2, missing // 2, missing - missing // 2), value=_WHITE))
    return torch.cat(parts, dim=3)[..., :-2]


def _as_batch(image: torch.Tensor | Image.Image) -> torch.Tensor:
    if isinstance(image, Image.Image):
        picture = torch.from_numpy(np.array(image.convert("RGB")))
        image = picture.movedim(2, 0).float() / 255
    if not isinstance(image, torch.Tensor):
        raise InvalidTypeError(f"`image` must be a tensor or a picture, got {type(image).__name__}")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1 or batch.numel() == 0:
        raise InvalidArgumentError(
            f"`image` must be one image (1, C, H, W) or (C, H, W), got shape {tuple(image.shape)}"
        )
    return batch
