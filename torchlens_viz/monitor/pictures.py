"""The pictures of a monitor: the kernels of a layer and its maps, on a scale that stays the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Final, NamedTuple, final

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from torchlens_viz.arguments import a_name, limits, number, shown
from torchlens_viz.draw.scale import robust_range
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.grids.features import feature_sheet
from torchlens_viz.grids.kernels import kernel_sheet
from torchlens_viz.models.kernels import kernels_of
from torchlens_viz.models.layers import nearest

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
    limits, title = (scale.low, scale.high), _title(tag, scale)
    if inputs == 3:  # colours have no scale below them that would say it
        title += f", {beyond(shown, scale):.1%} beyond"
    if not is_matrix:
        style = Style(value_range=limits, max_tiles=max_tiles, legend=True, title=title)
        return kernel_sheet(weight, None, style, filters=None, channels=None).draw()
    if (rows, columns) != (outputs, inputs):
        title += f"; the first {rows} x {columns}"
    style = Style(value_range=limits, legend=True, title=title)
    return kernel_sheet(weight, None, style, filters=range(rows), channels=range(columns)).draw()


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
    title = _title(tag, scale)
    if factor > 1:
        title += f"; averaged {factor} x {factor}"
    return feature_sheet(
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
    style = Style(nrow=len(shown), padding=2)
    return kernel_sheet(shown, None, style, filters=None, channels=None).draw()


def _floating(values: torch.Tensor) -> torch.Tensor:
    shown = values.detach().cpu()
    return shown if shown.dtype == torch.float64 else shown.float()


def _title(tag: str, scale: Scale) -> str:
    return f"{tag}: {scale.origin}"


class Scale(NamedTuple):
    """The values of the first and the last colour, and the words for where they come from."""

    low: float
    high: float
    origin: str


@final
class Scales:
    """Remembers the scale of every tag, so that pictures of different steps can be compared.

    Args:
        given: (low, high) by tag, or by a glob of tags; the first that matches counts.
        headroom: A scale that is not given reaches this many times as far from zero as the values of the
            first picture, but for the outermost 0.5 % at either end, since the values of a new network mostly
            grow.
        tags: The tags that there are.

    Raises:
        InvalidArgumentError: A range is no range, it matches no tag, or `headroom` is below 1.
        InvalidTypeError: They are no mapping of tags to numbers.
    """

    def __init__(
        self, given: Mapping[str, Sequence[float]] | None, *, headroom: float, tags: Iterable[str]
    ) -> None:
        self._headroom = number(headroom, "headroom", least=1)
        self._of: dict[str, Scale] = {}
        tags = list(tags)
        if given is not None and not isinstance(given, Mapping):
            raise InvalidTypeError(
                "`scales` must be a mapping of tags to (low, high), as `Monitor.scales` is, got "
                f"{shown(given)}"
            )
        for glob, ends in (given or {}).items():
            glob = a_name(glob, "scales")
            matching = [tag for tag in tags if tag == glob or fnmatchcase(tag, glob)]
            if not matching:
                raise InvalidArgumentError(f"`scales` must name tags, got `{glob}`; {nearest(glob, tags)}")
            low, high = limits(ends, "scales")
            if not (isfinite(low) and isfinite(high) and low < high):
                raise InvalidArgumentError(
                    f"`scales` must hold (low, high) with low < high, got {shown(ends)} for `{glob}`"
                )
            for tag in matching:
                self._of.setdefault(tag, Scale(low, high, "scale given"))

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) by tag, of all tags whose scale is known by now."""
        return {tag: (scale.low, scale.high) for tag, scale in self._of.items()}

    def of(self, tag: str, values: torch.Tensor, step: int, *, signed: bool) -> Scale:
        """Return the scale of a tag.

        Args:
            tag: The tag of the picture.
            values: What the picture shows, floating point, at least one value. Others are left out.
            step: The global step.
            signed: Put zero in the middle, even where no value is negative.
        """
        if tag in self._of:
            return self._of[tag]
        low, high, _ = (
            float(part) if isinstance(part, torch.Tensor) else part
            for part in robust_range(values.detach().reshape(1, -1))
        )
        far = max(abs(low), abs(high)) * self._headroom
        is_range = 0 < far < float("inf") and bool(values.isfinite().any())
        if not is_range:  # nothing to go by yet: a later picture decides
            return Scale(-1.0 if signed else 0.0, 1.0, "scale not known yet")
        scale = Scale(-far if signed or low < 0 else 0.0, far, f"scale of step {step}")
        self._of[tag] = scale
        return scale


def beyond(values: torch.Tensor, scale: Scale) -> float:
    """Return the share of the finite values that lie beyond a scale, 0 to 1."""
    is_finite = values.isfinite()
    outside = ((values < scale.low) | (values > scale.high)) & is_finite
    return (outside.sum() / is_finite.sum().clamp(min=1)).item()
