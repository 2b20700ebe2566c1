"""What a survey says channels are worth: a column of figures for each way to measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias, final

import torch

from torchlens_viz.atlas.health import figure
from torchlens_viz.dataset.result import Survey

Ranks: TypeAlias = tuple[tuple[str, int], ...]  # the place of a channel, from 0, by each column

_SURE: Final = 2  # standard errors
_NAMED: Final = 6  # channels at either end
_EFFECT: Final = (
    "By how much the mean loss would change if the channel were zero, estimated to first order from "
    "gradients, with the standard error of that over {inputs}. Above zero, the network needs the channel; "
    "below zero, it would do better without it; within two standard errors of zero, the data do not tell. "
    "Channels that can stand in for one another each look worth less than both are together."
)
_SELECTIVITY: Final = (
    "How far the class that drives the channel most stands out from the others: 0 where all drive it alike, "
    "1 where one alone does. A channel that is selective need not matter to the network."
)
_MONOSEMANTICITY: Final = (
    "How alike the inputs that drive the channel are to an encoder, from -1 to 1 (MonoScore). What the "
    "encoder does not tell apart counts as alike."
)


@final
@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure for each channel of a layer.

    Attributes:
        key: What the order and the filter of the page call it: letters only.
        name: The same in words.
        meaning: What the figure is, and what it tells.
        values: (C,) float64, the more the higher it ranks.
        errors: (C,) float64, the standard errors, where there are some.
    """

    key: str
    name: str
    meaning: str
    values: torch.Tensor
    errors: torch.Tensor | None = None

    def order(self) -> list[int]:
        """Return the channels, the highest figure first; those without one come last."""
        values = self.values.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        order: list[int] = values.sort(descending=True, stable=True).indices.tolist()
        return order

    def words(self, channel: int) -> str:
        """Return the figure of a channel with its standard error."""
        value = self.values[channel].item()
        if self.errors is None:
            return figure(value)
        sign = "+" if value > 0 else ""
        return f"{sign}{figure(value)} ± {figure(self.errors[channel].item())}"

    def mark(self, channel: int) -> str:
        """Return under which choice of the filter the channel falls; none without an error to go by."""
        if self.errors is None:
            return ""
        value, reach = self.values[channel].item(), _SURE * self.errors[channel].item()
        if value - reach > 0:
            return f"{self.key}-above"
        if value + reach < 0:
            return f"{self.key}-below"
        return f"{self.key}-unsure" if value == value and reach == reach else ""


CHOICES: Final = {
    "effect-above": "the loss needs",
    "effect-below": "the loss is better without",
    "effect-unsure": "without a sure effect on the loss",
}


def columns_of(survey: Survey, layer: str) -> list[Column]:
    """Return what a survey says its channels are worth; nothing of a layer of which it does not say it."""
    columns = []
    if layer in survey.effects:
        effect, inputs = survey.effects.of(layer), survey.inputs_seen[layer]
        meaning = _EFFECT.format(inputs=f"{inputs:,} input{'s' if inputs != 1 else ''}")
        columns.append(
            Column(
                key="effect",
                name="effect on the loss",
                meaning=meaning,
                values=effect.change,
                errors=effect.error,
            )
        )
    for key, name, meaning, scores in (
        ("selectivity", "class selectivity", _SELECTIVITY, survey.selectivity),
        ("monosemanticity", "monosemanticity", _MONOSEMANTICITY, survey.monosemanticity),
    ):
        if layer in scores:
            columns.append(Column(key=key, name=name, meaning=meaning, values=scores[layer]))
    return columns


class Named(NamedTuple):
    """A channel, its address, and its figure in words."""

    channel: int
    href: str
    words: str


@final
@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The channels of a layer at both ends of a column."""

    name: str
    meaning: str
    highest: tuple[Named, ...]
    lowest: tuple[Named, ...]


@final
class Worth:
    """The columns of a layer, as its entry tells of them.

    Args:
        columns: What `columns_of` found.
        hrefs: The addresses of the channels.
    """

    def __init__(self, columns: Sequence[Column], hrefs: Mapping[int, str]) -> None:
        self.columns = columns
        self._hrefs = hrefs
        self._orders = [column.order() for column in columns]
        self._ranks = [{channel: rank for rank, channel in enumerate(order)} for order in self._orders]

    @property
    def heads(self) -> list[str]:
        """What the columns are called in a table."""
        return [column.name for column in self.columns]

    def cells(self, channel: int) -> list[str]:
        """Return the figures of a channel in a table."""
        return [column.words(channel) for column in self.columns]

    def facts(self, channel: int) -> list[tuple[str, str]]:
        """Return the figures of a channel, by name, each with its rank."""
        total = len(self._hrefs)
        return [
            (column.name, f"{column.words(channel)}, rank {ranks[channel] + 1} of {total}")
            for column, ranks in zip(self.columns, self._ranks, strict=True)
        ]

    def marks(self, channel: int) -> list[str]:
        """Return the choices of the filter under which a channel falls."""
        return [mark for column in self.columns if (mark := column.mark(channel))]

    def ranks(self, channel: int) -> Ranks:
        """Return the place of a channel by each column, from 0."""
        return tuple(
            (column.key, ranks[channel]) for column, ranks in zip(self.columns, self._ranks, strict=True)
        )

    def rankings(self) -> tuple[Ranking, ...]:
        """Return the channels at both ends of each column; of few channels each stands once."""
        return tuple(
            Ranking(
                name=column.name,
                meaning=column.meaning,
                highest=self._named(column, order[:_NAMED]),
                lowest=self._named(column, order[_NAMED:][-_NAMED:][::-1]),
            )
            for column, order in zip(self.columns, self._orders, strict=True)
        )

    def _named(self, column: Column, channels: Sequence[int]) -> tuple[Named, ...]:
        return tuple(Named(each, self._hrefs[each], column.words(each)) for each in channels)
