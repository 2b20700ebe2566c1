"""The health of layers in a few figures, and what an alarm says when a figure is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, final

import torch

from torchlens_viz.arguments import wide
from torchlens_viz.hooks.followers import Follower, dead_channels
from torchlens_viz.stats.channels import ChannelStats


class MonitorWarning(UserWarning):
    """What a monitor has to say while a training runs."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How a layer is, in one forward pass or several.

    Attributes:
        mean: Of all finite values; NaN where there is none.
        std: Of all finite values about that mean; NaN where there is none.
        zero_fraction: The share of finite values that are exactly zero, 0 to 1.
        dead: How many channels never exceed zero, or, before a normalisation, before an activation that is no
            ReLU and as the network's answer, are always the same. Those with NaN or Inf are not among them.
        dead_fraction: Their share of the channels, 0 to 1.
        nonfinite: How many values are NaN or infinite.
        channel_std: The root mean square of the channels' own standard deviations, each about the channel's
            mean: how much of a signal there is, whatever the biases are; NaN where there is no finite value.
    """

    mean: float
    std: float
    zero_fraction: float
    dead: int
    dead_fraction: float
    nonfinite: int
    channel_std: float

    @classmethod
    def of(cls, parts: Sequence[ChannelStats], follower: Follower = "") -> Figures:
        """Read the figures from the statistics of a layer's channels; waits for their device once.

        Args:
            parts: One or more; several where calls of the layer had other numbers of channels.
            follower: What comes after the layer.
        """
        each: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(ChannelStats)
            if field.name not in ("bins", "histogram")
        }
        stats = ChannelStats(**each)
        whole = stats.pooled()
        is_dead = dead_channels(stats, follower) & (stats.nonfinite == 0)
        own = (
            torch.linalg.vector_norm(stats.std[stats.count > stats.nonfinite]) / max(stats.channels, 1) ** 0.5
        )
        figures = (
            whole.mean[0],
            whole.std[0],
            whole.zero_fraction[0],
            is_dead.sum(),
            whole.nonfinite[0],
            own,
        )
        mean, std, zeros, dead, nonfinite, channel_std = torch.stack(
            [wide(each) for each in figures]
        ).tolist()
        return cls(
            mean=mean,
            std=std,
            zero_fraction=zeros,
            dead=int(dead),
            dead_fraction=dead / max(stats.channels, 1),
            nonfinite=int(nonfinite),
            channel_std=channel_std,
        )


Kind: TypeAlias = Literal["nonfinite", "dead", "std", "growth", "weights", "update"]
Cause: TypeAlias = Literal[
    "input", "initialisation", "weights", "bias", "learning rate", "loss", "overflow", "unknown"
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What an alarm is about.

    Attributes:
        kind: `"nonfinite"`: there are NaN or infinite values. `"dead"`: too many channels never exceed zero.
            `"std"`: the std is out of bounds. `"growth"`: it is many times what it was at first.
            `"weights"`: weights and what comes of them are far too small or too large. `"update"`: a step
            changed too much of the parameters.
        layer: The layer's name; of several with values that are not finite, the first that ran, and of
            several with odd weights or updates, the worst.
        step: The global step.
        figures: All figures of the layer.
        cause: Where the trouble comes from, as far as inputs, weights and updates tell: `"input"`, what the
            network is given; `"initialisation"`, the weights at the first look; `"weights"`, those of now;
            `"bias"`; `"learning rate"`; `"loss"`, which left NaN in all weights at once; `"overflow"`, from
            finite inputs and weights; else `"unknown"`.
        message: A sentence with layer, step, figure and cause.
    """

    kind: Kind
    layer: str
    step: int
    figures: Figures
    cause: Cause
    message: str

    def __str__(self) -> str:
        return self.message


def warn(trouble: Trouble) -> None:
    """Warn with the layer and the step: what a monitor does unless `alarm` says otherwise."""
    warnings.warn(trouble.message, MonitorWarning, stacklevel=2)
