"""`ChannelStats`: what the values of each channel were."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch

from torchlens_viz.stats.channels import Moments, pooled


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ChannelStats:
    """What the values of each channel were, over everything that was seen.

    All but `count` and `nonfinite` speak of the finite values alone; they are NaN for a channel without any.

    Attributes:
        mean: (C,) float64.
        std: (C,) float64, of the population: the mean squared distance from the mean, under the root.
        min: (C,) float64.
        max: (C,) float64.
        zero_fraction: (C,) float64, the share of values that are exactly zero, 0 to 1.
        nonfinite: (C,) int64, how many values were NaN or infinite.
        count: (C,) int64, how many values were seen, these included.
        bins: The E edges of the histogram, increasing, or None.
        histogram: (C, E + 1) int64, or None. Column i counts `bins[i - 1] <= value < bins[i]`; the first
            column counts what is below all edges, the last one what is at or above the last.
    """

    mean: torch.Tensor
    std: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor
    zero_fraction: torch.Tensor
    nonfinite: torch.Tensor
    count: torch.Tensor
    bins: tuple[float, ...] | None = None
    histogram: torch.Tensor | None = None

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.count)

    def dead(self, eps: float = 0.0) -> torch.Tensor:
        """Return the channels whose maximum never exceeded `eps`: (D,) int64, increasing."""
        return (self.max <= eps).nonzero().flatten()

    def pooled(self) -> ChannelStats:
        """Return the statistics of all channels taken together, as those of one channel."""
        finite = self.count - self.nonfinite
        moments = Moments(
            total=self.count,
            finite=finite,
            zeros=(self.zero_fraction.nan_to_num(0) * finite).round().long(),
            low=self.min.nan_to_num(torch.inf),
            high=self.max.nan_to_num(-torch.inf),
            mean=self.mean.nan_to_num(0),
            squares=self.std.nan_to_num(0).square() * finite,
            histogram=self.histogram,
        )
        return stats_of(pooled(moments), self.bins)

    def to(self, device: torch.device | str) -> ChannelStats:
        """Return the same statistics on another device."""
        parts: dict[str, Any] = self.to_dict()
        parts = {n: part.to(device) for n, part in parts.items() if isinstance(part, torch.Tensor)}
        return replace(self, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, tensors as they are: `ChannelStats(**stats.to_dict())` is the same."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        names = ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")
        spans = [f"{name} {_span(getattr(self, name))}" for name in names if self.channels]
        return f"ChannelStats({', '.join([f'{self.channels} channels', *spans])})"


def stats_of(moments: Moments, bins: tuple[float, ...] | None) -> ChannelStats:
    """Return moments as statistics, in new tensors."""
    is_empty, count = moments.finite == 0, moments.finite.clamp(min=1)

    def known(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(is_empty, torch.nan)

    return ChannelStats(
        mean=known(moments.mean),
        std=known((moments.squares / count).sqrt()),
        min=known(moments.low),
        max=known(moments.high),
        zero_fraction=known(moments.zeros.double() / count),
        nonfinite=moments.total - moments.finite,
        count=moments.total.clone(),
        bins=bins,
        histogram=None if moments.histogram is None else moments.histogram.clone(),
    )


def _span(values: torch.Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
