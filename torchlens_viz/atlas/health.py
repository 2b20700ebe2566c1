"""The health of layers: findings, the worst first, and what each means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Final, final

import torch

from torchlens_viz.dataset.findings import Finding
from torchlens_viz.dataset.result import Survey

_TITLES: Final = {
    "nonfinite": "NaN or Inf",
    "dead": "Dead channels",
    "saturated": "Saturated channels",
    "duplicate": "Near-duplicate channels",
}
_MEANINGS: Final = {
    "nonfinite": (
        "Whatever is computed from these values is NaN as well, and so is the loss. People look for a "
        "division by zero, a logarithm of zero or an overflow in half precision; they lower the learning "
        "rate, clip gradients, and check the data for NaN."
    ),
    "dead": (
        "Such a channel passes nothing on, and behind a ReLU it gets no gradient either, so that training "
        "seldom brings it back. The usual causes are a learning rate that was too high and biases far below "
        "zero; people lower or warm up the rate, use a leaky activation, or prune the channel."
    ),
    "saturated": (
        "At its bound a channel tells inputs apart no longer, and its gradient vanishes. People scale the "
        "inputs, normalise before the activation, or lower the learning rate."
    ),
    "duplicate": (
        "Two channels that say the same cost twice and tell once. A few are usual in wide layers; where "
        "there are many, people prune them, make the layer narrower, or look for weights that were "
        "initialised alike."
    ),
}
_FEW: Final = 100  # inputs, below which what never happened may only be rare
KINDS: Final = tuple(_TITLES)


@final
@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One kind of trouble in one layer.

    Attributes:
        kind: `"nonfinite"`, `"dead"`, `"saturated"` or `"duplicate"`.
        title: The same in words.
        layer: The layer's name.
        what: How much of it there is.
        inputs: How many inputs that rests on.
        meaning: What it means, and what people do about it.
        doubt: What may be wrong with the finding itself; empty where nothing is.
        channels: The channels, increasing.
        severity: As in `Finding`.
    """

    kind: str
    title: str
    layer: str
    what: str
    inputs: int
    meaning: str
    doubt: str
    channels: tuple[int, ...]
    severity: float


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of a layer.

    Attributes:
        layer: The layer's name.
        shape: Of its maps, in words.
        channels: How many it has.
        mean: Of all values.
        std: Of all values.
        zeros: The share of zeros.
        nonfinite: How many values are NaN or infinite.
        counts: Of each kind of trouble, how many channels have it.
        inputs: How many inputs all of that rests on.
        severity: Of the worst finding; 0 without one.
    """

    layer: str
    shape: str
    channels: int
    mean: float
    std: float
    zeros: float
    nonfinite: int
    counts: Mapping[str, int]
    inputs: int
    severity: float


@final
@dataclass(frozen=True, kw_only=True)
class Health:
    """What is wrong, the worst first, and the figures of all layers in that order.

    Attributes:
        troubles: The findings, one for each kind and layer.
        rows: A row per layer.
        marks: For each layer and channel the kinds of trouble it has.
    """

    troubles: tuple[Trouble, ...]
    rows: tuple[Row, ...]
    marks: Mapping[str, Mapping[int, tuple[str, ...]]] = field(repr=False)


def health_of(surveys: Mapping[str, Survey], shapes: Mapping[str, str]) -> Health:
    """Judge layers by what surveys found.

    Args:
        surveys: For each layer the survey that has seen it.
        shapes: For each layer the shape of its maps, in words.
    """
    troubles: list[Trouble] = []
    marks: dict[str, dict[int, tuple[str, ...]]] = {name: {} for name in surveys}
    known = {id(found): found.findings() for found in {id(each): each for each in surveys.values()}.values()}
    rows = []
    for name, found in surveys.items():
        own = [_trouble(kind, name, found, known[id(found)]) for kind in KINDS]
        present = [trouble for trouble in own if trouble is not None]
        troubles += present
        for trouble in present:
            for channel in trouble.channels:
                marks[name][channel] = (*marks[name].get(channel, ()), trouble.kind)
        stats = found.stats[name]
        whole = stats.pooled()
        rows.append(
            Row(
                layer=name,
                shape=shapes[name],
                channels=stats.channels,
                mean=whole.mean.item(),
                std=whole.std.item(),
                zeros=whole.zero_fraction.item(),
                nonfinite=int(whole.nonfinite.sum()),
                counts={trouble.kind: len(trouble.channels) for trouble in present},
                inputs=found.inputs_seen[name],
                severity=max((trouble.severity for trouble in present), default=0.0),
            )
        )
    troubles.sort(key=lambda trouble: -trouble.severity)
    rows.sort(key=lambda row: -row.severity)
    return Health(troubles=tuple(troubles), rows=tuple(rows), marks=marks)


def _trouble(kind: str, layer: str, found: Survey, findings: Sequence[Finding]) -> Trouble | None:
    own = [each for each in findings if each.kind == kind and each.layer == layer]
    if not own:
        return None
    channels = tuple(sorted({channel for each in own for channel in each.channels}))
    inputs, total = found.inputs_seen[layer], found.stats[layer].channels
    what = own[0].meaning
    if kind == "dead":
        what = f"{len(channels)} of {total} channels are never above zero"
    elif kind == "saturated":
        what = f"{len(channels)} of {total} channels peak at their bound"
    elif kind == "duplicate":
        pairs = "1 pair of channels is" if len(own) == 1 else f"{len(own)} pairs of channels are"
        what = f"{pairs} nearly the same; the most alike: {own[0].meaning}"
    doubt = ""
    if kind in ("dead", "saturated") and inputs < _FEW:
        doubt = (
            f"This rests on {inputs} input{'s' if inputs != 1 else ''}: what they leave off may fire on "
            "others. Survey a few hundred before you act on it."
        )
    return Trouble(
        kind=kind,
        title=_TITLES[kind],
        layer=layer,
        what=what,
        inputs=inputs,
        meaning=_MEANINGS[kind],
        doubt=doubt,
        channels=channels,
        severity=own[0].severity,
    )


def figure(value: float) -> str:
    """Write a number short."""
    if not isfinite(value):
        return "NaN" if value != value else "Inf" if value > 0 else "-Inf"
    return f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """Write a share; what is little is not told as nothing."""
    if not isfinite(share):
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def histogram(maps: Sequence[torch.Tensor], low: float, high: float, *, bins: int = 64) -> list[float]:
    """Return how many values lie in equal parts of a range, as shares of the fullest part."""
    if not high > low:
        return []
    counts = torch.zeros(bins, dtype=torch.float64, device="cpu")
    for each in maps:
        values = each[each.isfinite()].float()
        counts += torch.histc(values, bins, low, high).double()
    return [] if not counts.max() > 0 else (counts / counts.max()).tolist()
