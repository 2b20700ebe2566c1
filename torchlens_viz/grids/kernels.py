"""Sheets: the kernels of a layer, or its feature maps, as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import indices_of
from torchlens_viz.draw.canvas import check_size, draw
from torchlens_viz.draw.style import (
    Style,
    StyleOptions,
    as_matrix,
    in_rows,
    lists_options,
    own_labels,
    ranking,
)
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.models.kernels import kernels_of
from torchlens_viz.models.layers import Selector


class KernelOptions(StyleOptions, total=False):
    """The options of `kernel_grid`."""

    filters: int | Sequence[int] | None
    channels: int | Sequence[int] | None


@lists_options
def kernel_grid(
    model_or_weight: nn.Module | torch.Tensor,
    layer: Selector | None = None,
    *,
    filters: int | Sequence[int] | None = None,
    channels: int | Sequence[int] | None = None,
    **options: Unpack[StyleOptions],
) -> Image.Image:
    """Draw the kernels of a convolution, one tile per filter.

    Kernels with three input channels are drawn in colour. Of others, input channel 0 is shown unless
    `channels` says otherwise; several channels, or the slices of a 3-D kernel, make one row per filter.
    Kernels of a single pixel are drawn as one picture: a row per filter, a column per input channel.

    Args:
        model_or_weight: A model, or kernels (O, I, kH, kW); (O, I, k) and (O, I, kD, kH, kW) too.
        layer: Which layer of the model, by a selector that finds exactly one; None is the first convolution.
        filters: Show only these filters, by index from 0.
        channels: Show these input channels, by index from 0, each as a tile of its own.
        options: How to draw them:

            normalize (True): Spread the range of values over the colours: one range for the whole sheet. With
                False, values are taken to lie in [0, 1] ([-1, 1] in a diverging map; uint8 in [0, 255]).
            scale_each (False): Give each tile its own range.
            value_range (None): The range (low, high) to show; values beyond are clipped. `"robust"` leaves
                out 0.5 % of the values other than zero at either end, so that a few outliers do not make all
                else pale; the legend says how many lie beyond.
            cmap ("auto"): `"gray"`, `"hot"`, `"viridis"`, `"seismic"`, `"RdBu_r"`, a name that matplotlib
                knows where it is installed, or 256 colours, (256, 3) uint8. Diverging maps show a range
                symmetric about zero, with zero white and positive values red in the two of ours. `"auto"` is
                colour for kernels with three input channels, else `"RdBu_r"` for a range with both signs,
                else `"gray"`. A named map draws the channels of a colour kernel as separate tiles.
            nrow (None): Tiles per row, that is, the number of columns; None is near-square, wider than high.
            padding (1): Pixels between tiles and around the sheet.
            upscale (None): Enlarge each tile by this whole factor; None brings its longer side to at least
                32 pixels.
            interpolation ("nearest"): `"nearest"` repeats pixels; `"bilinear"` and `"bicubic"` smooth within
                each tile.
            labels (False): Write filter (and channel) numbers above the tiles, or these strings, one per
                tile.
            legend (False): Write limits, layer and choice of channels below the sheet.
            title (None): A line above the sheet.
            sort_by (None): Show the tiles with the greatest `"norm"`, `"mean"`, `"std"` or `"max"` first.
            max_tiles (None): Draw no more tiles than this, and say below the sheet how many there are. Where
                each filter has a row of several tiles, whole rows are drawn: as many as do not exceed it.
            page (0): With `max_tiles`, which page of tiles to draw, from 0.

    Returns:
        An image of mode "RGB". NaN is magenta, +Inf green and -Inf cyan; they change no other pixel.

    Raises:
        LayerNotFoundError: The model has no such layer, or no convolution.
        InvalidArgumentError: An index is out of range, a tensor has another shape, an option has no effect.
        InvalidTypeError: An argument has another type.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 11), nn.ReLU(), nn.Conv2d(64, 16, 3))
        >>> kernel_grid(net).size, kernel_grid(net, "2", channels=range(8)).size
        ((298, 298), (266, 530))
    """
    return _drawn(model_or_weight, layer, filters=filters, channels=channels, **options).convert("RGB")


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
    return save_picture(_drawn(model_or_weight, layer, **options), path)


def _drawn(
    model_or_weight: nn.Module | torch.Tensor,
    layer: Selector | None = None,
    *,
    filters: int | Sequence[int] | None = None,
    channels: int | Sequence[int] | None = None,
    **options: Unpack[StyleOptions],
) -> Image.Image:
    return kernel_sheet(model_or_weight, layer, Style.of(options), filters=filters, channels=channels).draw()


@dataclass(frozen=True, kw_only=True, eq=False)
class Sheet:
    """All that is decided of a sheet of kernels before anything is drawn.

    Attributes:
        tiles: (T, 1, H, W) values, or (T, 3, H, W) colours.
        style: How to draw them.
        labels: T labels, for when the style asks for labels and does not bring its own.
        notes: Lines for the legend.
        order: The order in which to show the tiles, where it is not their own.
    """

    tiles: torch.Tensor
    style: Style
    labels: Sequence[str]
    notes: Sequence[str]
    order: Sequence[int] | None

    @property
    def pages(self) -> int:
        """How many pages hold all tiles."""
        return ceil(len(self.tiles) / (self.style.max_tiles or len(self.tiles)))

    def check(self) -> None:
        """Refuse what `draw` would refuse for its size or its labels, without looking at any value."""
        check_size(self.tiles.shape, self.style, own_labels(self.style, len(self.tiles)) or self.labels)

    def draw(self, page: int | None = None) -> Image.Image:
        """Draw a page; None is the one that the style names."""
        style = self.style if page is None else replace(self.style, page=page)
        return draw(self.tiles, style, labels=self.labels, notes=self.notes, order=self.order)


def kernel_sheet(
    model_or_weight: nn.Module | torch.Tensor,
    layer: Selector | None,
    style: Style,
    *,
    filters: int | Sequence[int] | None,
    channels: int | Sequence[int] | None,
) -> Sheet:
    """Decide which tiles, labels and notes make the sheet that `kernel_grid` draws; as explained there."""
    weight, name = kernels_of(model_or_weight, layer)
    outputs, inputs = weight.shape[:2]
    chosen = indices_of(filters, outputs, "filters")
    size = " x ".join(map(str, weight.shape[2:]))
    notes = [f"{name + ': ' if name else ''}{outputs} x {inputs} kernels of {size}"]
    rows = [str(index) for index in chosen]
    if inputs == 3 and channels is None and not style.has_own_colours:
        # (O, 3, [D,] H, W) -> a colour tile per filter, or per slice of it
        tiles = weight if filters is None else weight[chosen]
        tiles = tiles.unsqueeze(2) if tiles.ndim == 4 else tiles
        return _in_rows(tiles.transpose(1, 2), style, rows, [""], notes)
    planes = indices_of(channels, inputs, "channels")
    if is_matrix(weight):
        return _as_matrix(_part(weight, chosen, planes).flatten(1), style, notes)
    if channels is None and inputs != 3:
        planes = planes[:1]
    tiles = _part(weight, chosen, planes)
    columns = [str(plane) if inputs > 1 else "" for plane in planes]
    if weight.ndim == 5:
        tiles = tiles.flatten(1, 2)
        columns = [f"{column}@{depth}" for column in columns for depth in range(weight.shape[2])]
        notes.append("number after @: the slice")
    if inputs > 1:
        notes.append(_channel_note(planes, inputs))
    return _in_rows(tiles.unsqueeze(2), style, rows, columns, notes)


def _part(weight: torch.Tensor, filters: Sequence[int], channels: Sequence[int]) -> torch.Tensor:
    """Return some kernels (O, I, ...); none of the others is copied on the way."""
    rows, columns = (torch.tensor(chosen, device="cpu") for chosen in (filters, channels))
    return weight[rows[:, None], columns]


def is_matrix(weight: torch.Tensor) -> bool:
    """Tell whether kernels (O, I, ...) are of a single pixel, and drawn as one picture."""
    return weight.shape[2:].numel() == 1


def _in_rows(
    tiles: torch.Tensor, style: Style, rows: Sequence[str], columns: Sequence[str], notes: Sequence[str]
) -> Sheet:
    """Lay out (O, P, C, H, W): a tile per filter, or where there are several of each, a row per filter."""
    each = tiles.shape[1]
    style = in_rows(style, each)
    order = ranking(tiles, style.sort_by)
    if order is not None:
        order = [filter_ * each + place for filter_ in order for place in range(each)]
    columns = columns if len(columns) == each else [str(place) for place in range(each)]
    # "3/0" is filter 3, input channel 0; "3/0@2" the third slice of that, "3@2" where there is one input.
    labels = [
        f"{row}/{column}".replace("/@", "@") if column else str(row) for row in rows for column in columns
    ]
    return Sheet(tiles=tiles.flatten(0, 1), style=style, labels=labels, notes=notes, order=order)


def _as_matrix(matrix: torch.Tensor, style: Style, notes: Sequence[str]) -> Sheet:
    style = as_matrix(style, *matrix.shape)
    order = ranking(matrix, style.sort_by)
    rows = matrix if order is None else matrix[order]
    note = "rows: filters" + (f", ranked by {style.sort_by}" if order else "") + "; columns: input channels"
    return Sheet(tiles=rows[None, None], style=style, labels=[""], notes=[*notes, note], order=None)


def _channel_note(planes: Sequence[int], inputs: int) -> str:
    if len(planes) == 1:
        return f"input channel {planes[0]} of {inputs}"
    return f"rows: filters; columns: {len(planes)} of {inputs} input channels"
