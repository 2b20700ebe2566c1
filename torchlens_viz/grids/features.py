"""Feature maps as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image

from torchlens_viz.arguments import indices_of
from torchlens_viz.draw.canvas import draw
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.draw.planes import Plane, Slices, planes_of
from torchlens_viz.draw.style import Style, StyleOptions, in_rows, lists_options, ranking
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.hooks.layout import drawn_dim


class FeatureOptions(StyleOptions, total=False):
    """The options of `feature_grid`."""

    sample: int
    channels: int | Sequence[int] | None
    channel_dim: int | None
    grid: tuple[int, int] | None
    plane: Plane | None
    slices: Slices


@lists_options
def feature_grid(
    activation: torch.Tensor,
    *,
    sample: int = 0,
    channels: int | Sequence[int] | None = None,
    channel_dim: int | None = None,
    grid: tuple[int, int] | None = None,
    plane: Plane | None = None,
    slices: Slices = None,
    **options: Unpack[StyleOptions],
) -> Image.Image:
    """Draw the feature maps of one input, one tile per channel.

    Of volumes and clips a slice is drawn, the middle one unless `slices` says otherwise; of several slices
    of several channels, each channel has a row. Maps of signals are strips of colour, one below the other,
    24 pixels high, or with `upscale` as high as a position is wide. Without it, of more than 2048 positions
    each pixel is the value farthest from zero of those in its place.

    Args:
        activation: (N, C, H, W), (N, C, D, H, W) or (N, C, L), as `capture` records it, or (C, H, W); with
            `grid`, the tokens (N, L, C) or (L, C) of a transformer. A tensor of another origin with three
            dimensions is (C, H, W), and one with four is (N, C, H, W), unless `channel_dim` says otherwise.
        sample: Which input of the batch, by index from 0.
        channels: Show only these channels, by index from 0.
        channel_dim: The dimension that counts channels. None is what `capture` found where it handed the
            tensor out, else 1 in (N, C, H, W) and 0 in (C, H, W). Given, 1 makes (N, C, L) of three
            dimensions, and 0 makes (C, L) of two and (C, D, H, W) of four.
        grid: Rows and columns in which the last rows * columns tokens lie. Those before them, such as a class
            token, are left out.
        plane: Of (N, C, D, H, W), the axis across which slices lie: `"depth"`, which is time in clips,
            `"height"` or `"width"`. None is `"depth"`.
        slices: Which slices, by index from 0: one or several, or `"all"`; or `"max"`, the maximum along the
            axis. None is the middle one.
        options: How to draw them, as in `kernel_grid`; `cmap="auto"` is `"RdBu_r"` for a range with both
            signs, else `"gray"`.

    Returns:
        An image of mode "RGB".

    Raises:
        InvalidArgumentError: An index is out of range, the tensor has another shape or no pixels, or an
            option has no effect.
        InvalidTypeError: An argument has another type.

    Example:
        >>> import torch
        >>> feature_grid(torch.rand(1, 6, 40, 40), padding=2).size
        (128, 86)
    """
    drawn = feature_sheet(
        activation,
        sample=sample,
        channels=channels,
        channel_dim=channel_dim,
        grid=grid,
        plane=plane,
        slices=slices,
        **options,
    )
    return drawn.convert("RGB")


def feature_sheet(
    activation: torch.Tensor,
    *,
    sample: int = 0,
    channels: int | Sequence[int] | None = None,
    channel_dim: int | None = None,
    grid: tuple[int, int] | None = None,
    plane: Plane | None = None,
    slices: Slices = None,
    **options: Unpack[StyleOptions],
) -> Image.Image:
    """Draw the same with a palette, as it is kept in files: of mode "L" for gray, else "P"."""
    style = Style.of(options)
    dim = drawn_dim(activation, channel_dim, is_folded=grid is not None)
    maps = maps_of(activation, sample, channel_dim=dim, grid=grid)
    chosen = indices_of(channels, len(maps), "channels")
    shown = maps if channels is None else maps[chosen]
    some = "" if len(chosen) == len(maps) else f"{len(chosen)} of "
    tiles, suffixes, notes, style = planes_of(shown, style, plane, slices)
    each = tiles.shape[1]
    if len(chosen) > 1:  # slices of one channel have the whole sheet
        style = in_rows(style, each, row="channel", several="slices")
    order = ranking(tiles, style.sort_by)
    if order is not None:
        order = [channel * each + place for channel in order for place in range(each)]
    labels = [f"{channel}{suffix}" for channel in chosen for suffix in suffixes]
    size = " x ".join(map(str, maps.shape[1:])) + (" positions" if maps.ndim == 2 else "")
    notes = [f"{some}{len(maps)} maps of {size}", *notes]
    return draw(tiles.flatten(0, 1)[:, None], style, labels=labels, notes=notes, order=order)


def save_feature_grid(
    activation: torch.Tensor, path: str | os.PathLike[str], **options: Unpack[FeatureOptions]
) -> Path:
    """Draw the feature maps of one input into a file.

    Args:
        activation: As in `feature_grid`.
        path: The file; its ending names the format. Missing folders are made, and a file of that name is
            replaced in one step.
        options: As in `feature_grid`.

    Returns:
        The path.

    Raises:
        PictureError: The file cannot be written; nothing is left behind, and what stood there still stands.
    """
    return save_picture(feature_sheet(activation, **options), path)
