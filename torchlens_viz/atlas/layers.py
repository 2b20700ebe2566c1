"""The pictures of a layer: its kernels and maps as sprites, and where each channel stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Final, final

import numpy as np
import torch
from torch import nn

from torchlens_viz.album.album import Album, View
from torchlens_viz.album.sprite import (
    Pixels,
    Range,
    coded,
    colours_for,
    robust_range,
    shrunk,
)
from torchlens_viz.atlas.evidence import LayerEvidence
from torchlens_viz.atlas.health import figure
from torchlens_viz.draw.palette import PADDING
from torchlens_viz.errors import TorchlensVizError
from torchlens_viz.models.kernels import has_kernels, kernels_of
from torchlens_viz.models.layers import select_one

_MOSAIC: Final = 24  # about as many pixels as the kernels of a filter take together, each way
_FEWEST: Final = 3  # kernels each way
ACROSS: Final = 8  # channels of a strip
_SMALL: Final = 4  # pixels a side, at least, of a channel in a strip


@final
@dataclass(frozen=True, kw_only=True)
class LayerPictures:
    """The pictures of a layer.

    Attributes:
        kernels: The kernels of each shown channel; None where the layer has none.
        maps: The map of each shown channel, a view per image.
        shrink: For each image, how many positions of the layer a pixel of its maps stands for, each way.
        limits: What the colours of the maps stand for.
        strips: The other channels, small, so many in a strip: each with its maps, and below them its kernel.
    """

    kernels: View | None
    maps: tuple[View, ...]
    shrink: tuple[int, ...]
    limits: Range
    strips: View | None


def draw_layer(
    album: Album,
    model: nn.Module,
    evidence: LayerEvidence,
    channels: Sequence[int],
    rest: Sequence[int],
    *,
    side: int,
    small: tuple[int, int],
) -> LayerPictures:
    """Draw the kernels and maps of the channels of a layer into sprites.

    Args:
        album: Where the sprites go.
        model: The network.
        evidence: What the layer makes of the images.
        channels: The channels to show, in the order in which they are shown.
        rest: Those that are shown small.
        side: The longest side of a map in pixels; larger ones are shrunk by a whole factor.
        small: The same for those that are shown small, and of how many images their maps are shown.
    """
    whole = _weight(model, evidence)
    weight = None if whole is None else whole[list(channels)]
    in_colour = weight is not None and weight.shape[1] == 3 and weight.ndim == 4
    kernels: View | None = None
    if weight is not None and in_colour:
        sprite = album.sprite()
        limits = robust_range([weight], signed=bool((weight < 0).any()))
        placed = ((weight - limits.low) / (limits.high - limits.low)).clamp(0, 1).nan_to_num(0.0)
        pixels: Pixels = (placed * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        about = f"in colour: a tile per filter, values from {figure(limits.low)} to {figure(limits.high)}"
        kernels = album.add(sprite, pixels, None, f"{about}, and gray is zero" if limits.signed else about)
        album.close(sprite, sprite.as_colours(), f"{evidence.name}-kernels")
    maps = [each[list(channels)] for each in evidence.maps]
    has_signs = any(bool((each < 0).any()) for each in maps)
    is_signed = has_signs and any(bool((each > 0).any()) for each in maps)
    is_signed |= weight is not None and not in_colour and bool((weight < 0).any())
    limits = robust_range(maps, signed=is_signed)
    sprite = album.sprite()
    if weight is not None and not in_colour:
        of_kernels = robust_range([weight], signed=is_signed)
        tiles, note = _mosaics(weight, of_kernels)
        kernels = album.add(sprite, tiles, of_kernels, note)
    views, factors = [], []
    for each in maps:
        reduced, factor = shrunk(each, side)
        height, width = each.shape[1:]
        about = f"maps of {height} × {width}"
        if factor > 1:
            about += f", drawn at {reduced.shape[1]} × {reduced.shape[2]}: the means of squares of {factor}"
        views.append(album.add(sprite, coded(reduced, limits), limits, about))
        factors.append(factor)
    strips = None
    if rest:
        others = [each[list(rest)] for each in evidence.maps[: small[1]]]
        own = None if kernels is None else kernels.limits
        shown = None if whole is None or own is None else (whole[list(rest)], own)
        tiles, note = _strips(others, limits, shown, small[0])
        strips = album.add_strips(sprite, tiles, limits, note, parts=ACROSS)
    album.close(sprite, sprite.as_values(colours_for(limits)), f"{evidence.name}-maps")
    return LayerPictures(
        kernels=kernels, maps=tuple(views), shrink=tuple(factors), limits=limits, strips=strips
    )


def _strips(
    maps: Sequence[torch.Tensor], limits: Range, kernels: tuple[torch.Tensor, Range] | None, side: int
) -> tuple[Pixels, str]:
    """Draw channels small, eight in a strip: (S, h, w), and what of each is shown.

    Args:
        maps: (K, h, w) of each image.
        limits: What the colours of maps stand for.
        kernels: (K, I, h, w), and what their colours stand for.
        side: The longest side of what is shown of a channel.
    """
    bands = [coded(shrunk(each, side)[0], limits) for each in maps]
    shown = "its map" if len(bands) == 1 else f"its maps of the first {len(bands)} images"
    if kernels is not None:
        bands.append(_mosaics(*kernels, most=side)[0])
        shown += f", and below {'it' if len(maps) == 1 else 'them'} the largest of its kernels"
    count = -(-len(bands[0]) // ACROSS) * ACROSS
    pitch = max(_SMALL, *(band.shape[2] for band in bands)) + 1
    whole = np.full((count, sum(band.shape[1] + 1 for band in bands), pitch), PADDING, np.uint8)
    top = 0
    for band in bands:
        channels, height, width = band.shape
        whole[:channels, top : top + height, :width] = band
        top += height + 1
    strips = whole.reshape(-1, ACROSS, top, pitch).transpose(0, 2, 1, 3).reshape(-1, top, ACROSS * pitch)
    return strips, shown


def _weight(model: nn.Module, evidence: LayerEvidence) -> torch.Tensor | None:
    """Return the kernels of a layer (O, I, kH, kW), one for each of its channels; None where it has none."""
    try:
        if not has_kernels(select_one(model, evidence.name).module):
            return None
        weight = kernels_of(model, evidence.name).weight.float().cpu()
    except TorchlensVizError:
        return None
    if weight.ndim == 5:
        weight = weight.flatten(1, 2)
    return weight if len(weight) == evidence.channels and weight.ndim == 4 else None


def _mosaics(weight: torch.Tensor, limits: Range, *, most: int | None = None) -> tuple[Pixels, str]:
    """Draw of each filter (O, I, h, w) the kernels with the largest weights, the largest first.

    Args:
        weight: The kernels.
        limits: What the colours stand for.
        most: The pixels that a filter may take, each way, unless a kernel is larger.
    """
    outputs, inputs, height, width = weight.shape
    gap = 0 if height * width == 1 else 1
    longest = max(height, width) + gap
    each_way = max(_FEWEST, _MOSAIC // longest) if most is None else max(1, (most + gap) // longest)
    each_way = min(each_way, isqrt(inputs - 1) + 1)
    shown = min(inputs, each_way * each_way)
    note = f"{'the one kernel' if inputs == 1 else f'all {inputs} kernels'} of {height} × {width}"
    if shown < inputs:
        sizes = torch.linalg.vector_norm(weight.nan_to_num(0.0, 0.0, 0.0).flatten(2), dim=2)
        best = sizes.topk(shown, dim=1).indices
        weight = weight.gather(1, best[:, :, None, None].expand(-1, -1, height, width))
        note = f"the {shown} largest of {inputs} kernels of {height} × {width}, the largest first"
    codes = torch.from_numpy(coded(weight.flatten(0, 1), limits)).view(outputs, shown, height, width)
    rows = ceil(shown / each_way)
    size = (outputs, rows * (height + gap) - gap, each_way * (width + gap) - gap)
    whole = torch.full(size, PADDING, device="cpu")
    for place in range(shown):
        row, column = divmod(place, each_way)
        y, x = row * (height + gap), column * (width + gap)
        whole[:, y : y + height, x : x + width] = codes[:, place]
    return whole.to(torch.uint8).numpy(), f"a tile per filter: {note}"
