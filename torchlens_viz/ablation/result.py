"""`Ablation`: what a network loses with each of some channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch


@final
@dataclass(frozen=True, slots=True, repr=False)
class Ablation:
    """What `ablate` found; every tensor is aligned with `channels`.

    Attributes:
        layer: The layer.
        by: What the channels were replaced by.
        channels: (K,) int64, the channels.
        loss: The mean loss of the network as it is.
        accuracy: The share of inputs whose class it finds, 0 to 1; None where there are no labels.
        loss_change: (K,) float64, by how much the mean loss is larger without the channel.
        loss_error: (K,) float64, the standard error of that, from how it differs between inputs; NaN with one
            input.
        accuracy_change: (K,) float64, by how much the accuracy is larger without it; None where there are no
            labels.
        samples_seen: How many inputs there were.
    """

    layer: str
    by: str
    channels: torch.Tensor
    loss: float
    accuracy: float | None
    loss_change: torch.Tensor
    loss_error: torch.Tensor
    accuracy_change: torch.Tensor | None
    samples_seen: int

    @property
    def order(self) -> torch.Tensor:
        """The places of the channels by what the network loses with them, the most first: (K,) int64."""
        return self.loss_change.sort(descending=True, stable=True).indices

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict of plain numbers per channel, such as a CSV file or pandas takes."""
        hits = self.accuracy_change
        return [
            {
                "layer": self.layer,
                "channel": channel,
                "loss_change": self.loss_change[place].item(),
                "loss_error": self.loss_error[place].item(),
                "accuracy_change": None if hits is None else hits[place].item(),
            }
            for place, channel in enumerate(self.channels.tolist())
        ]

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        lines = [
            f"Ablation of {len(self.channels)} channels of `{self.layer}` by {self.by} over "
            f"{self.samples_seen:,} inputs: loss {self.loss:.6g}{accuracy}"
        ]
        for place in self.order[:10].tolist():
            hits = "" if self.accuracy_change is None else f", accuracy {self.accuracy_change[place]:+.4f}"
            lines.append(
                f"  channel {self.channels[place]}: loss {self.loss_change[place]:+.4g} "
                f"(+- {self.loss_error[place]:.2g}){hits}"
            )
        if len(self.channels) > 10:
            lines.append(f"  and {len(self.channels) - 10} more")
        return "\n".join(lines)
