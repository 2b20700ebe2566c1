"""Filters that are nearly the same: their weights point the same way, or their channels respond alike."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from torchlens_viz.dataset.tally import Comoments, correlation
from torchlens_viz.errors import InvalidArgumentError, MissingDependencyError
from torchlens_viz.models.kernels import has_kernels, kernels_of
from torchlens_viz.models.layers import Selector, select_one
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.topk import Top

_FIGURES: Final = ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")


class Duplicate(NamedTuple):
    """Two channels that are nearly the same.

    Attributes:
        channels: The two of them, the smaller index first.
        cosine: Of their kernels, -1 to 1; NaN where there are none, or one is zero.
        correlation: Of their peaks over the inputs, -1 to 1; NaN where it was not gathered, or one never
            varies.
    """

    channels: tuple[int, int]
    cosine: float
    correlation: float

    @property
    def likeness(self) -> float:
        """The larger of the two figures that are known."""
        return max(figure for figure in (self.cosine, self.correlation, -1.0) if not isnan(figure))


def kernel_cosine(model: nn.Module, layer: Selector) -> torch.Tensor | None:
    """Return the cosine between the kernels of every two filters, (O, O) float64; None without kernels."""
    found = select_one(model, layer)
    if not has_kernels(found.module):
        return None
    flat: torch.Tensor = kernels_of(model, found.name).weight.detach().flatten(1).double().cpu()
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / length
    cosine: torch.Tensor = unit @ unit.T
    return cosine.clamp(-1, 1)


def near_duplicates(
    cosine: torch.Tensor | None, alike: Comoments | None, *, threshold: float
) -> list[Duplicate]:
    """List the pairs of channels of which one figure reaches a threshold, the most alike first.

    Args:
        cosine: (C, C), from `kernel_cosine`.
        alike: What the channels' peaks were over the inputs.
        threshold: What the cosine or the correlation must reach, above 0 and at most 1.

    Raises:
        InvalidArgumentError: The threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise InvalidArgumentError(f"`threshold` must be above 0 and at most 1, got {threshold}")
    responses = None if alike is None else correlation(alike).cpu()
    known = [figures for figures in (cosine, responses) if figures is not None]
    if not known:
        return []
    unknown = torch.full_like(known[0], torch.nan)
    cosines = unknown if cosine is None else cosine
    responses = unknown if responses is None else responses
    # Two equal vectors may have a cosine one rounding error below 1.
    reached = (cosines >= threshold - 1e-9) | (responses >= threshold - 1e-9)
    first, second = reached.triu(1).nonzero(as_tuple=True)
    pairs = [
        Duplicate((one, other), cosines[one, other].item(), responses[one, other].item())
        for one, other in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.likeness, pair.channels))


def lists_of(stats: ChannelStats, top: Top | None) -> dict[str, Any]:
    """Return what is known of one layer as lists, one entry per channel."""
    found: dict[str, Any] = {figure: getattr(stats, figure).tolist() for figure in _FIGURES}
    if stats.histogram is not None:
        found |= {"bins": list(stats.bins or ()), "histogram": stats.histogram.tolist()}
    if top is not None:
        found["top"] = {part: getattr(top, part).tolist() for part in ("values", "samples", "positions")}
    return found


def rows_of(stats: Mapping[str, ChannelStats], top: Mapping[str, Top]) -> list[dict[str, Any]]:
    """Return a row per channel: layer, channel, its statistics, its highest peak and the input's index."""
    rows: list[dict[str, Any]] = []
    for name, each in stats.items():
        columns = {figure: getattr(each, figure).tolist() for figure in _FIGURES}
        best = top.get(name)
        for channel in range(each.channels):
            row = {"layer": name, "channel": channel}
            row |= {figure: values[channel] for figure, values in columns.items()}
            if best is not None and best.values.shape[1]:
                row["top_value"] = best.values[channel, 0].item()
                row["top_sample"] = int(best.samples[channel, 0])
            rows.append(row)
    return rows


def frame_of(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a pandas DataFrame.

    Raises:
        MissingDependencyError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError(
            "`to_frame` needs pandas, which is not installed; run `python -m pip install pandas`, or use "
            "`rows()` or `to_dict()`"
        ) from error
    return pd.DataFrame(rows)
