"""The pictures of a monitor: the kernels of a layer and its maps, on a scale that stays the same."""

from __future__ import annotations

from typing import Final

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from torchlens_viz.grids.kernels import feature_grid, kernel_grid
from torchlens_viz.models.kernels import kernels_of
from torchlens_viz.monitor.scales import Scale, Scales, beyond

_LONGEST_SIDE: Final = 32  # of a map; larger ones are averaged, or a log would be nothing but maps
_INPUT_SIDE: Final = 128
_MATRIX_SIDE: Final = 128  # of kernels of a single pixel, which are drawn as one matrix


def kernels(tag: str, module: nn.Module, scales: Scales, step: int, *, max_tiles: int) -> Image.Image:
    """Draw the kernels of a layer: in colour where they have three input channels, else input channel 0.

    Args:
        tag: What the picture is called.
        module: A convolution.
        scales: The scale of each tag.
        step: The global step.
        max_tiles: How many filters to draw. Kernels of a single pixel are drawn as one matrix, its first 128
            rows and columns.
    """
    weight = kernels_of(module).weight
    outputs, inputs = weight.shape[:2]
    is_matrix = weight.shape[2:].numel() == 1 and inputs != 3
    rows, columns = outputs, inputs
    if is_matrix:
        rows, columns = min(outputs, _MATRIX_SIDE), min(inputs, _MATRIX_SIDE)
        shown = weight[:rows, :columns]
    else:  # as many slices of a 3-D kernel as there are stand in a row, and whole rows are drawn
        each = 1 if weight.ndim == 4 else weight.shape[2]
        max_tiles = max(max_tiles, each)
        shown = weight[: max_tiles // each, : 3 if inputs == 3 else 1]
    shown = _floating(shown)
    scale = scales.of(tag, shown, step, signed=True)
    limits, title = (scale.low, scale.high), _title(tag, scale, shown)
    if not is_matrix:
        return kernel_grid(weight, value_range=limits, max_tiles=max_tiles, legend=True, title=title)
    if (rows, columns) != (outputs, inputs):
        title += f"; the first {rows} x {columns}"
    return kernel_grid(
        weight,
        filters=range(rows),
        channels=range(columns),
        value_range=limits,
        legend=True,
        title=title,
    )


def maps(tag: str, values: torch.Tensor, scales: Scales, step: int) -> Image.Image:
    """Draw maps: a row per input, a column per channel.

    Args:
        tag: What the picture is called.
        values: (S, K, H, W).
        scales: The scale of each tag.
        step: The global step.
    """
    shown = _floating(values)
    images, channels, height, width = shown.shape
    factor = -(-max(height, width) // _LONGEST_SIDE)
    if factor > 1:
        # With `ceil_mode` the last window is averaged over what it holds.
        shown = F.avg_pool2d(shown, factor, ceil_mode=True)
    scale = scales.of(tag, shown, step, signed=False)
    title = _title(tag, scale, shown)
    if factor > 1:
        title += f"; averaged {factor} x {factor}"
    return feature_grid(
        shown.flatten(0, 1),
        value_range=(scale.low, scale.high),
        nrow=channels,
        upscale=max(1, round(_LONGEST_SIDE / max(shown.shape[2:]))),
        legend=True,
        title=f"{title}; a row per input" if images > 1 else title,
    )


def inputs(batch: torch.Tensor) -> Image.Image:
    """Draw inputs (N, 1, H, W) or (N, 3, H, W) in a row."""
    shown = batch.detach().cpu().float()
    factor = -(-max(shown.shape[2:]) // _INPUT_SIDE)
    if factor > 1:
        shown = F.avg_pool2d(shown, factor, ceil_mode=True)
    return kernel_grid(shown, nrow=len(shown), padding=2)


def _floating(values: torch.Tensor) -> torch.Tensor:
    shown = values.detach().cpu()
    return shown if shown.dtype == torch.float64 else shown.float()


def _title(tag: str, scale: Scale, values: torch.Tensor) -> str:
    return f"{tag}: {scale.origin}, {beyond(values, scale):.1%} beyond"
