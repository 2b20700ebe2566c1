"""`Record`: what a survey gathered of every layer; merged, saved and read again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias, final, get_args

import torch
from torch import nn

from torchlens_viz.ablation.result import Ablation
from torchlens_viz.arguments import one_of
from torchlens_viz.dataset.checkpoint import read_survey, write_ledger
from torchlens_viz.dataset.tally import ByLayer, Tally
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.classes import selectivity
from torchlens_viz.stats.comoments import correlation, rank_correlation
from torchlens_viz.stats.slopes import Effect, effect
from torchlens_viz.stats.topk import Top

By: TypeAlias = Literal["activation", "relevance"]


class ClassMeans(NamedTuple):
    """How active each channel is for each class.

    Attributes:
        classes: (K,) int64, the labels, increasing.
        inputs: (K,) float64, how many inputs each had.
        means: (K, C) float64, the mean over these inputs of the channel's mean over its positions.
    """

    classes: torch.Tensor
    inputs: torch.Tensor
    means: torch.Tensor


class ClassEffect(NamedTuple):
    """The estimated change of the mean loss over the inputs of each class where a channel is replaced.

    Attributes:
        classes: (K,) int64, the labels, increasing.
        inputs: (K,) float64, how many inputs each had.
        change: (K, C) float64.
        error: (K, C) float64, the standard error over the inputs of the class; NaN with one.
    """

    classes: torch.Tensor
    inputs: torch.Tensor
    change: torch.Tensor
    error: torch.Tensor


@final
class Effects(ByLayer[torch.Tensor]):
    """For each layer the estimated change of the mean loss where a channel is zero, (C,) float64.

    Args:
        tallies: What is known of the layers that ran; those without gradients are left out.
    """

    def __init__(self, tallies: Mapping[str, Tally]) -> None:
        self._known = {name: tally for name, tally in tallies.items() if tally.slopes is not None}
        super().__init__({name: self.of(name).change for name in self._known})

    def of(self, layer: str, by: Literal["zero", "mean"] = "zero") -> Effect:
        """Return the estimated change where each channel is replaced, with its standard error.

        Args:
            layer: The layer's name.
            by: What stands in its place: zero, or the channel's mean over all positions of all inputs.

        Raises:
            InvalidArgumentError: The survey was made without a `loss`.
        """
        tally = self._tally(layer, by)
        assert tally.slopes is not None
        return effect(tally.slopes, tally.stats.compute().mean, by)

    def by_class(self, layer: str, by: Literal["zero", "mean"] = "zero") -> ClassEffect:
        """Return the same class by class: the change of the mean loss over the inputs of each.

        Args:
            layer: The layer's name.
            by: As in `of`; the channel's mean is over the inputs of all classes.

        Raises:
            InvalidArgumentError: The survey was made without a `loss`, or without `by_class`.
        """
        tally = self._tally(layer, by)
        slopes = None if tally.classes is None else tally.classes.slopes()
        if tally.classes is None or slopes is None:
            raise InvalidArgumentError("effects by class need labels; make the survey with `by_class=True`")
        found = effect(slopes, tally.stats.compute().mean, by)
        return ClassEffect(tally.classes.classes.cpu(), tally.classes.inputs.cpu(), *found)

    def _tally(self, layer: str, by: str) -> Tally:
        one_of(by, "by", ("zero", "mean"))
        if not self._known:
            raise InvalidArgumentError("effects need gradients; make the survey with a `loss`")
        return ByLayer(self._known)[layer]

    def trust(self, exact: Ablation) -> float:
        """Return how far the estimates put channels in the right order: Spearman's rank correlation, -1 to 1.

        Args:
            exact: What `ablate` measured of some channels of a layer, by zero or by the mean, on the same
                data or a part of it.

        Raises:
            InvalidArgumentError: It is of a layer that was not surveyed, by something else, or of fewer than
                three channels.
        """
        if exact.by not in ("zero", "mean") or len(exact.channels) < 3:
            raise InvalidArgumentError(
                '`exact` must be of three channels or more by "zero" or "mean", got '
                f'{len(exact.channels)} by "{exact.by}"'
            )
        change = self.of(exact.layer, "mean" if exact.by == "mean" else "zero").change
        return rank_correlation(change[exact.channels], exact.loss_change)


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
        self.not_called: tuple[str, ...] = tuple(
            name for name, tally in self._tallies.items() if tally.inputs == 0
        )

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
    def effects(self) -> Effects:
        """The change of the mean loss where a channel is zero, estimated, (C,); if a `loss` was given."""
        return Effects(self._seen())

    @cached_property
    def class_means(self) -> ByLayer[ClassMeans]:
        """How active each channel is for each class, with `by_class`."""
        known = {name: tally.classes for name, tally in self._seen().items()}
        return ByLayer(
            {
                name: ClassMeans(sums.classes.cpu(), sums.inputs.cpu(), sums.means())
                for name, sums in known.items()
                if sums is not None
            }
        )

    @cached_property
    def selectivity(self) -> ByLayer[torch.Tensor]:
        """The class selectivity index of each channel, (C,) float64 from 0 to 1, with `by_class`.

        With `u` the largest of the mean activities of the classes and `v` the mean of the others, it is `(u -
        v) / (u + v)`: 0 where all classes drive the channel alike, and 1 where one alone does (Morcos,
        Barrett, Rabinowitz and Botvinick 2018, arXiv:1803.06959). It is made for activity that is never
        negative, as after a ReLU: NaN for a channel with a class whose mean is negative, for one that is
        never active, and for fewer than two classes.
        """
        return ByLayer({name: selectivity(each.means) for name, each in self.class_means.items()})

    @cached_property
    def monosemanticity(self) -> ByLayer[torch.Tensor]:
        """The MonoScore of each channel, (C,) float64 from -1 to 1, with an `encoder`.

        It is the mean cosine similarity of the embeddings of every two inputs, each pair weighed by the
        product of the channel's activities, which are first scaled so that the least is 0 and the largest 1:
        near 1 where the inputs that drive a channel are alike to the encoder (Pach et al. 2025,
        arXiv:2504.02821). NaN for a channel that never changes.
        """
        known = {name: tally.meaning for name, tally in self._seen().items()}
        return ByLayer({name: sums.score() for name, sums in known.items() if sums is not None})

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

    def _worth(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return what is known of the worth and the meaning of each channel, (C,), by layer and name."""
        found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self._seen()}
        for name in self.effects:
            found[name]["effect"], found[name]["effect_error"] = self.effects.of(name)
        for figure in ("selectivity", "monosemanticity"):
            for name, values in getattr(self, figure).items():
                found[name][figure] = values
        return found

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
