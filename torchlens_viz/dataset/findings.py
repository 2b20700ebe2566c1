"""What is wrong with the layers of a survey, and its figures as lists, rows and a data frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import atanh, isnan, nan
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from torchlens_viz.errors import InvalidArgumentError, needed
from torchlens_viz.models.kernels import has_kernels, kernels_of
from torchlens_viz.models.layers import Selector, select_one
from torchlens_viz.notebook import Page, number, profile
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.comoments import Comoments, correlation
from torchlens_viz.stats.topk import Top

_MOST_PAIRS: Final = 100  # of duplicates in a layer
_FEWEST_INPUTS: Final = 20  # that a correlation rests on
_FEWEST_OF_EQUALS, _EQUAL = 5, 1e-6  # where it is as near to 1 as this
_CONFIDENCE: Final = 0.05  # the chance that a layer has a duplicate by correlation that is none
_FIGURES: Final = ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")


class Duplicate(NamedTuple):
    """Two channels that are nearly the same.

    Attributes:
        channels: The two of them, the smaller index first.
        cosine: Of their kernels, -1 to 1; NaN where there are none, or one is zero.
        correlation: Of their peaks over the inputs, -1 to 1; NaN where it was not gathered, or one never
            varies.
        inputs: Over how many inputs that is; 0 where it was not gathered.
        p_value: How probable a correlation like this would be if the true one were below the threshold, by
            Fisher's transformation; NaN where it is not known. It must be below 0.05 over the number of pairs
            of the layer for the correlation to count.
    """

    channels: tuple[int, int]
    cosine: float
    correlation: float
    inputs: int = 0
    p_value: float = nan

    @property
    def likeness(self) -> float:
        """The larger of the two figures that are known."""
        return max(figure for figure in (self.cosine, self.correlation, -1.0) if not isnan(figure))


class Finding(NamedTuple):
    """Something that is wrong with a layer.

    Attributes:
        severity: How bad it is: 4 and more for NaN and Inf, 3 for dead channels, 2 for saturated ones, 1 for
            duplicates, each with the figure added.
        kind: `"nonfinite"`, `"dead"`, `"saturated"` or `"duplicate"`.
        layer: The layer's name.
        channels: The channels it is about.
        figure: The share of the layer's values or channels; of duplicates, how alike they are.
        meaning: The same in words.
    """

    severity: float
    kind: str
    layer: str
    channels: tuple[int, ...]
    figure: float
    meaning: str


def findings_in(
    layer: str,
    stats: ChannelStats,
    dead: Sequence[int],
    saturated: Sequence[int],
    duplicates: Sequence[Duplicate],
) -> list[Finding]:
    """List what is wrong with one layer.

    Args:
        layer: Its name.
        stats: The statistics of its channels.
        dead: The channels that never fire.
        saturated: The channels that peak at their bound.
        duplicates: The pairs that are nearly the same, the most alike first; 100 of them are listed.
    """
    found: list[Finding] = []
    spoilt = stats.nonfinite.nonzero().flatten().tolist()
    values = int(stats.nonfinite.sum()) / max(1, int(stats.count.sum()))
    for base, kind, channels, share, words in (
        (4, "nonfinite", spoilt, values, f"{values:.1%} of the values are NaN or Inf"),
        (3, "dead", dead, len(dead) / stats.channels, f"{len(dead)} of {stats.channels} never exceed 0"),
        (
            *(2, "saturated", saturated, len(saturated) / stats.channels),
            f"{len(saturated)} of {stats.channels} peak at their bound",
        ),
    ):
        if channels:
            found.append(Finding(base + share, kind, layer, tuple(channels), share, words))
    for pair in duplicates[:_MOST_PAIRS]:
        figures = {"cosine of kernels": pair.cosine, "correlation of peaks": pair.correlation}
        known = [f"{what} {figure:.4f}" for what, figure in figures.items() if not isnan(figure)]
        known += [f"over {pair.inputs:,} inputs"] if pair.inputs else []
        words = f"{pair.channels[0]} and {pair.channels[1]}: {', '.join(known)}"
        found.append(Finding(1 + pair.likeness, "duplicate", layer, pair.channels, pair.likeness, words))
    return found


def saturated_in(
    stats: ChannelStats, best: tuple[torch.Tensor, torch.Tensor], *, least: float
) -> torch.Tensor:
    """Return the channels that peak at the same largest value on several inputs, (S,) int64, increasing.

    Args:
        stats: The statistics of the layer.
        best: The largest peak of each channel and on how many inputs it occurs, (C,) each.
        least: On how many inputs it must.
    """
    highest, count = (part.cpu() for part in best)
    is_dead = (stats.max == 0) & (stats.min == 0)
    return ((count >= least) & (count > 1) & highest.isfinite() & ~is_dead).nonzero().flatten()


def described(
    stats: Mapping[str, ChannelStats], dead: Callable[[str], torch.Tensor], not_called: Sequence[str]
) -> list[str]:
    """Return a line per layer: how many channels it has, and how many of them are dead or spoilt."""
    lines = []
    for name, own in stats.items():
        spoilt = int(own.nonfinite.sum())
        more = f", {spoilt:,} values NaN or Inf" if spoilt else ""
        lines.append(f"  {name or '(the model)'}: {own.channels} channels, {len(dead(name))} dead{more}")
    return [*lines, f"  not called: {', '.join(not_called)}"] if not_called else lines


def show(
    title: str,
    stats: Mapping[str, ChannelStats],
    dead: Callable[[str], torch.Tensor],
    found: Sequence[Finding],
) -> str:
    """Return a survey as HTML: a row per layer, and what is wrong, the worst first."""
    page = Page(title)
    heads = ("layer", "channels", "dead", "NaN or Inf", "mean", "std", "zeros", "mean by channel")

    def rows() -> Iterator[Sequence[str]]:
        for name, own in stats.items():
            whole = own.pooled()
            yield (
                name or "(the model)",
                number(own.channels),
                number(len(dead(name))),
                number(int(own.nonfinite.sum())),
                number(whole.mean.item()),
                number(whole.std.item()),
                f"{whole.zero_fraction.item():.1%}",
                profile(own.mean.tolist(), f"mean of each channel of {name}"),
            )

    page.table(heads, rows(), len(stats))
    page.text("Nothing was found wrong." if not found else "What is wrong, the worst first:")
    if found:
        page.table(
            ("kind", "layer", "what"), ((each.kind, each.layer, each.meaning) for each in found), len(found)
        )
    return str(page)


def kernel_cosine(model: nn.Module, layer: Selector) -> torch.Tensor | None:
    """Return the cosine between the kernels of every two filters, (O, O) float64; None without kernels."""
    found = select_one(model, layer)
    if not has_kernels(found.module):
        return None
    flat: torch.Tensor = kernels_of(model, found.name).weight.detach().flatten(1).cpu().double()
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
    inputs = torch.zeros_like(unknown) if alike is None else alike.inputs.cpu()
    chances = _chances(responses, inputs, threshold)
    channels = len(unknown)
    is_sure = (inputs >= _FEWEST_INPUTS) & (chances < _CONFIDENCE / max(1, channels * (channels - 1) // 2))
    is_sure |= (inputs >= _FEWEST_OF_EQUALS) & (responses >= 1 - _EQUAL)
    # Two equal vectors may have a cosine one rounding error below 1.
    reached = (cosines >= threshold - 1e-9) | ((responses >= threshold - 1e-9) & is_sure)
    first, second = reached.triu(1).nonzero(as_tuple=True)
    pairs = [
        Duplicate(
            (one, other),
            cosines[one, other].item(),
            responses[one, other].item(),
            int(inputs[one, other]),
            chances[one, other].item(),
        )
        for one, other in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.likeness, pair.channels))


def _chances(correlations: torch.Tensor, inputs: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return how probable correlations are where the true ones are just below a threshold: one-sided p."""
    distance = correlations.clamp(max=1 - 1e-12).atanh() - atanh(min(threshold, 1 - 1e-9))
    chances: torch.Tensor = torch.special.ndtr(-distance * (inputs - 3).clamp(min=0).sqrt())
    return chances


def lists_of(
    stats: ChannelStats, top: Top | None, relevant: Top | None, worth: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return what is known of one layer as lists, one entry per channel."""
    found: dict[str, Any] = {figure: getattr(stats, figure).tolist() for figure in _FIGURES}
    found |= {figure: values.tolist() for figure, values in worth.items()}
    if stats.histogram is not None:
        found |= {"bins": list(stats.bins or ()), "histogram": stats.histogram.tolist()}
    for name, each in (("top", top), ("top_by_relevance", relevant)):
        if each is not None:
            found[name] = {part: getattr(each, part).tolist() for part in ("values", "samples", "positions")}
    return found


def layers_of(
    stats: Mapping[str, ChannelStats],
    top: Mapping[str, Top],
    inputs: Mapping[str, int],
    relevant: Mapping[str, Top],
    worth: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, Any]:
    """Return what is known of every layer as lists, and how many inputs went through it."""
    return {
        name: {"inputs_seen": inputs[name], **lists_of(each, top.get(name), relevant.get(name), worth[name])}
        for name, each in stats.items()
    }


def rows_of(
    stats: Mapping[str, ChannelStats],
    top: Mapping[str, Top],
    worth: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[dict[str, Any]]:
    """Return a row per channel: layer, channel, its statistics, its highest peak and the input's index."""
    rows: list[dict[str, Any]] = []
    for name, each in stats.items():
        columns = {figure: getattr(each, figure).tolist() for figure in _FIGURES}
        columns |= {figure: values.tolist() for figure, values in worth[name].items()}
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
    pandas = needed("pandas", "`to_frame` needs pandas", otherwise="or use `rows()` or `to_dict()`")
    return pandas.DataFrame(rows)
