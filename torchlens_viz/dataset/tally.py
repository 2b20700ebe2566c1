"""What a survey knows of one layer: statistics, top inputs, correlations; batch by batch and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeVar, final, get_args

import torch

from torchlens_viz.arguments import a_name, integer, one_of
from torchlens_viz.errors import InvalidArgumentError, LayerNotCapturedError
from torchlens_viz.hooks.followers import Follower
from torchlens_viz.models.layers import nearest
from torchlens_viz.stats.classes import ClassSums
from torchlens_viz.stats.comoments import Comoments
from torchlens_viz.stats.meaning import Meaning
from torchlens_viz.stats.peaks import Peaks
from torchlens_viz.stats.running import Bins, RunningStats
from torchlens_viz.stats.slopes import Slopes
from torchlens_viz.stats.topk import RunningTop

V = TypeVar("V")


class _Part(NamedTuple):
    """A field of `Tally` that may be None, beside the statistics: what it is, and what brings it."""

    kind: type[Any]
    what: str


_TOPS: Final = ("top", "relevant")
_PARTS: Final = {
    "top": _Part(RunningTop, "top inputs"),
    "relevant": _Part(RunningTop, "a `target`"),
    "alike": _Part(Comoments, "`correlations`"),
    "slopes": _Part(Slopes, "a `loss`"),
    "classes": _Part(ClassSums, "`by_class`"),
    "meaning": _Part(Meaning, "an `encoder`"),
}


class ByLayer(dict[str, V]):
    """A value for each layer that ran, by name."""

    def __getitem__(self, name: str) -> V:
        return super().__getitem__(a_name(name, "layer"))

    def __missing__(self, name: str) -> V:
        raise LayerNotCapturedError(
            f"the survey knows nothing of `{name}`: it was not selected, or did not run; "
            f"{nearest(name, list(self))}"
        )


@final
@dataclass(frozen=True, kw_only=True)
class Tally:
    """What is known of one layer; it never changes, so that a batch counts as a whole or not at all.

    Attributes:
        stats: The statistics of its values.
        top: The inputs with the highest peaks; None where none were asked for.
        relevant: The inputs for whose score it mattered most; None where none was asked for.
        alike: How alike its channels respond; None where that was not asked for, or nothing was seen.
        slopes: What the loss says of its channels; None where no loss was given, or nothing was seen.
        classes: What is known of them class by class; None where that was not asked for, or nothing was seen.
        meaning: How alike the inputs are that drive each; None where no encoder was given, or nothing seen.
        inputs: How many inputs went through the layer.
        most_calls: The most calls that one batch took.
        follower: What comes after the layer, which tells whether a channel that never exceeds zero is off.
        pending: Peaks of later batches with their samples, which `top` does not know yet: to sort in several
            batches at once takes less time than one after the other.
    """

    stats: RunningStats
    top: RunningTop | None
    relevant: RunningTop | None = None
    alike: Comoments | None = None
    slopes: Slopes | None = None
    classes: ClassSums | None = None
    meaning: Meaning | None = None
    inputs: int = 0
    most_calls: int = 0
    follower: Follower = ""
    pending: tuple[tuple[Peaks, torch.Tensor], ...] = ()

    def settled(self) -> Tally:
        """Return the same with nothing pending."""
        if not self.pending or self.top is None:
            return self
        values, positions = (
            torch.cat(parts) for parts in zip(*(peaks for peaks, _ in self.pending), strict=True)
        )
        samples = torch.cat([samples for _, samples in self.pending])
        top = self.top.with_peaks(Peaks(values, positions), samples, in_order=True)
        return replace(self, top=top, pending=())

    def union(self, other: Tally) -> Tally:
        """Return what both know together, on the device of this one.

        Raises:
            InvalidArgumentError: They are of other channels, or of other options.
        """
        if self.pending or other.pending:
            return self.settled().union(other.settled())
        parts: dict[str, Any] = {}
        for name, (_, what) in _PARTS.items():
            ours, theirs = getattr(self, name), getattr(other, name)
            # A top is there before the first input.
            is_told = name in _TOPS or (self.inputs and other.inputs)
            if is_told and (ours is None) != (theirs is None):
                raise InvalidArgumentError(f"both must have been surveyed with {what}, or neither")
            add = RunningTop.union if name in _TOPS else _plus
            parts[name] = add(ours, theirs) if ours is not None and theirs is not None else ours or theirs
        return Tally(
            stats=self.stats.fresh(channel_dim=other.stats.channel_dim).merge(self.stats).merge(other.stats),
            inputs=self.inputs + other.inputs,
            most_calls=max(self.most_calls, other.most_calls),
            follower=self.follower or other.follower,
            **parts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a flat dict of numbers and tensors on the CPU, for `from_dict`."""
        if self.pending:
            return self.settled().to_dict()
        found: dict[str, Any] = {name: getattr(self, name) for name in ("inputs", "most_calls", "follower")}
        parts = {"stats": self.stats.to_dict()}
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                parts[name] = part.to_dict() if name in _TOPS else part._asdict()
        for name, content in parts.items():
            for key, value in content.items():
                found[f"{name}.{key}"] = value.cpu() if isinstance(value, torch.Tensor) else value
        return found

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tally:
        """Return what `to_dict` described."""
        contents: dict[str, dict[str, Any]] = {name: {} for name in ("stats", *_PARTS)}
        for key, value in state.items():
            name, _, field = key.partition(".")
            if field:
                contents[name][field] = value
        stats = contents.pop("stats")
        parts: dict[str, Any] = {
            name: RunningTop.from_dict(content) if name in _TOPS else _PARTS[name].kind(**content)
            for name, content in contents.items()
            if content
        }
        found = cls(
            stats=RunningStats.from_dict(stats),
            inputs=integer(state["inputs"], "inputs", least=0, most=2**62),
            most_calls=integer(state["most_calls"], "most_calls", least=0, most=2**62),
            follower=one_of(state.get("follower", ""), "follower", get_args(Follower)),
            **{"top": None, **parts},
        )
        found._check()
        return found

    def _check(self) -> None:
        """Refuse parts that are not of the same channels, such as an edited file may hold."""
        channels = self.stats.channels
        known = {name: getattr(self, name) for name in _PARTS if getattr(self, name) is not None}
        tops = [known.pop(name) for name in _TOPS if name in known]
        if any(top.channels != channels for top in tops) or (channels is None) != (self.inputs == 0):
            raise InvalidArgumentError(
                f"all parts must be of the same channels, got {channels} in the statistics and "
                f"{[top.channels for top in tops]} in the top inputs"
            )
        wrong = [name for name, part in known.items() if channels is None or not part.fits(channels)]
        if wrong:
            raise InvalidArgumentError(
                f"the sums of `{wrong[0]}` must be float64 of the {channels} channels of the statistics"
            )
        if len({top.k for top in tops}) > 1:
            raise InvalidArgumentError(f"all tops must keep as many inputs, got {[top.k for top in tops]}")


def _plus(ours: Any, theirs: Any) -> Any:
    return ours.plus(theirs)


def empty_tally(*, top_k: int, channel_dim: int | None, bins: Bins, by_relevance: bool = False) -> Tally:
    """Return what is known before the first batch."""
    stats = RunningStats(channel_dim=channel_dim, bins=bins)
    top = RunningTop(top_k) if top_k else None
    return Tally(stats=stats, top=top, relevant=top if by_relevance else None)
