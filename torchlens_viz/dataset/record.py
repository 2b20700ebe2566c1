"""`Record`: what a survey gathered of every layer; merged, saved and read again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import nn

from torchlens_viz.arguments import one_of
from torchlens_viz.dataset.checkpoint import read_survey, write_ledger
from torchlens_viz.dataset.tally import ByLayer, Tally
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.comoments import correlation
from torchlens_viz.stats.topk import Top

By: TypeAlias = Literal["activation", "relevance"]


class Record:
    """What was gathered of every layer, in figures.

    Args:
        tallies: What is known of each layer, by name.
        about: What is known of the survey as a whole.
        model: The model; None where it came from a file.
    """

    def __init__(
        self, tallies: Mapping[str, Tally], about: Mapping[str, Any], model: nn.Module | None
    ) -> None:
        self._tallies = {name: tally.settled() for name, tally in tallies.items()}
        self._model = model
        self.samples_seen: int = about["samples_seen"]
        self.top_k: int = about["top_k"]
        self.is_complete: bool = about["is_complete"]
        shape = about["input_shape"]
        self.input_shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
        self.not_called = tuple(name for name, tally in self._tallies.items() if tally.inputs == 0)

    @cached_property
    def stats(self) -> ByLayer[ChannelStats]:
        """The statistics of each layer that ran, over all values; `torchlens_viz.testing` takes them too."""
        return ByLayer({name: tally.stats.compute().to("cpu") for name, tally in self._seen().items()})

    @cached_property
    def top(self) -> ByLayer[Top]:
        """The inputs that drive each channel hardest, for each layer that ran."""
        tops = {name: tally.top for name, tally in self._seen().items()}
        return ByLayer({name: top.compute() for name, top in tops.items() if top is not None})

    @cached_property
    def top_by_relevance(self) -> ByLayer[Top]:
        """The inputs for whose score each channel mattered most, for each layer that ran, with `target`.

        `values` are activation times gradient, summed over the map, and `positions` where the largest part
        of it stands.
        """
        tops = {name: tally.relevant for name, tally in self._seen().items()}
        return ByLayer({name: top.compute() for name, top in tops.items() if top is not None})

    @cached_property
    def inputs_seen(self) -> ByLayer[int]:
        """How many inputs went through each layer; fewer than `samples_seen` where it did not always run."""
        return ByLayer({name: tally.inputs for name, tally in self._seen().items()})

    @cached_property
    def correlation(self) -> ByLayer[torch.Tensor]:
        """The correlation of every two channels' peaks over the inputs, (C, C), where it was asked for."""
        alike = {name: tally.alike for name, tally in self._seen().items()}
        return ByLayer({name: correlation(sums).cpu() for name, sums in alike.items() if sums is not None})

    def merge(self, other: Self) -> Self:
        """Return what both surveys found together, for data that was surveyed in parts.

        Args:
            other: A survey of the same layers with the same options over inputs with other indices.

        Raises:
            InvalidArgumentError: It is of other layers or options.
            InvalidTypeError: It is no survey.
        """
        if not isinstance(other, Record):
            raise InvalidTypeError(f"`other` must be a Survey, got {type(other).__name__}")
        if list(self._tallies) != list(other._tallies) or self.top_k != other.top_k:
            raise InvalidArgumentError(
                "`other` must be a survey of the same layers with the same `top_k`, got "
                f"{list(other._tallies)} with {other.top_k} for {list(self._tallies)} with {self.top_k}"
            )
        about = {
            **self._about(),
            "samples_seen": self.samples_seen + other.samples_seen,
            "is_complete": self.is_complete and other.is_complete,
            "input_shape": self.input_shape if self.input_shape == other.input_shape else None,
        }
        tallies = {name: tally.union(other._tallies[name]) for name, tally in self._tallies.items()}
        return type(self)(tallies, about, self._model or other._model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the survey to a safetensors file, which holds no code; the model is not in it.

        Raises:
            ArchiveError: The file cannot be written.
            MissingDependencyError: safetensors is not installed.
        """
        return write_ledger(path, self._tallies, self._about())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The model, for patches and duplicates.

        Raises:
            ArchiveError: The file is missing, damaged, or holds something else.
        """
        tallies, about = read_survey(path)
        return cls(tallies, about, model)

    def _about(self) -> dict[str, Any]:
        shape = None if self.input_shape is None else list(self.input_shape)
        names = ("samples_seen", "top_k", "is_complete")
        return {**{name: getattr(self, name) for name in names}, "input_shape": shape}

    def _seen(self) -> dict[str, Tally]:
        return {name: tally for name, tally in self._tallies.items() if tally.inputs}

    def _tally(self, layer: str) -> Tally:
        return ByLayer(self._seen())[layer]

    def _top(self, layer: str, by: By) -> Top:
        one_of(by, "by", get_args(By))
        self._tally(layer)
        tops = self.top if by == "activation" else self.top_by_relevance
        if layer not in tops:
            what = ("", "`top_k` of 1 or more") if by == "activation" else (" by relevance", "a `target`")
            raise InvalidArgumentError(f"there are no top inputs{what[0]}; make the survey with {what[1]}")
        return tops[layer]
