"""The health of layers in a few figures, and an alarm when a figure says that something went wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, final

import torch
from torch import nn

from torchlens_viz.errors import InvalidArgumentError
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
        dead: How many channels never exceed zero; those with NaN or Inf are not among them.
        dead_fraction: Their share of the channels, 0 to 1.
        nonfinite: How many values are NaN or infinite.
    """

    mean: float
    std: float
    zero_fraction: float
    dead: int
    dead_fraction: float
    nonfinite: int

    @classmethod
    def of(cls, parts: Sequence[ChannelStats]) -> Figures:
        """Read the figures from the statistics of a layer's channels; waits for their device once.

        Args:
            parts: One or more; several where calls of the layer had other numbers of channels.
        """
        each: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(ChannelStats)
            if field.name not in ("bins", "histogram")
        }
        stats = ChannelStats(**each)
        whole = stats.pooled()
        is_dead = (stats.max <= 0) & (stats.nonfinite == 0)
        figures = (whole.mean[0], whole.std[0], whole.zero_fraction[0], is_dead.sum(), whole.nonfinite[0])
        mean, std, zeros, dead, nonfinite = torch.stack([figure.double() for figure in figures]).tolist()
        return cls(
            mean=mean,
            std=std,
            zero_fraction=zeros,
            dead=int(dead),
            dead_fraction=dead / max(stats.channels, 1),
            nonfinite=int(nonfinite),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What an alarm is about.

    Attributes:
        kind: `"nonfinite"`, `"dead"` or `"std"`.
        layer: The layer's name; of several with values that are not finite, the first that ran.
        step: The global step.
        figures: All figures of the layer.
        message: A sentence with layer, step and figure.
    """

    kind: Literal["nonfinite", "dead", "std"]
    layer: str
    step: int
    figures: Figures
    message: str

    def __str__(self) -> str:
        return self.message


def warn(trouble: Trouble) -> None:
    """Warn with the layer and the step: what a monitor does unless `alarm` says otherwise."""
    warnings.warn(trouble.message, MonitorWarning, stacklevel=2)


@final
class Watchman:
    """Tells what went wrong since the last look: each trouble once, and again after it was gone.

    Args:
        max_dead: The greatest share of dead channels in a layer that is no trouble, 0 to 1.
        std_range: (low, high), the standard deviations that are no trouble.

    Raises:
        InvalidArgumentError: A bound is out of range.
    """

    def __init__(self, *, max_dead: float, std_range: tuple[float, float]) -> None:
        if not 0 <= max_dead <= 1:
            raise InvalidArgumentError(f"`max_dead` must be a share from 0 to 1, got {max_dead}")
        low, high = std_range
        if not low <= high:
            raise InvalidArgumentError(f"`std_range` must be (low, high) with low <= high, got {std_range}")
        self._max_dead, self._low, self._high = max_dead, low, high
        self._known: set[tuple[str, str]] = set()

    def look(self, health: Mapping[str, Figures], step: int) -> list[Trouble]:
        """Return the new troubles.

        Args:
            health: The figures of each layer, in the order in which the layers ran.
            step: The global step.
        """
        found = self._spoilt(health, step)
        for layer, figures in health.items():
            if figures.nonfinite:  # what else they say is a consequence
                continue
            share, std = figures.dead_fraction, figures.std
            if self._is_new(("dead", layer), share > self._max_dead):
                message = (
                    f"step {step}: {figures.dead} channels of `{layer}` ({share:.1%}) are dead, at most "
                    f"{self._max_dead:.1%} are expected; is the learning rate too high?"
                )
                found.append(Trouble(kind="dead", layer=layer, step=step, figures=figures, message=message))
            is_outside = not math.isnan(std) and not self._low <= std <= self._high
            if self._is_new(("std", layer), is_outside):
                message = (
                    f"step {step}: the std of `{layer}` is {std:.4g}, outside "
                    f"[{self._low:.4g}, {self._high:.4g}]"
                )
                found.append(Trouble(kind="std", layer=layer, step=step, figures=figures, message=message))
        return found

    def tell(self, alarm: Callable[[Trouble], object], found: Sequence[Trouble]) -> None:
        """Call the alarm for each trouble; where it raises, those after it are news again."""
        for place, trouble in enumerate(found):
            try:
                alarm(trouble)
            except BaseException:
                for untold in found[place + 1 :]:
                    self._known.discard((untold.kind, untold.layer))
                raise

    def _spoilt(self, health: Mapping[str, Figures], step: int) -> list[Trouble]:
        """Return the layer where NaN or Inf came up; those after it have it from there."""
        spoilt = [layer for layer, figures in health.items() if figures.nonfinite]
        if not self._is_new(("nonfinite", ""), bool(spoilt)):
            return []
        first, others = spoilt[0], len(spoilt) - 1
        figures = health[first]
        plural = "values" if figures.nonfinite > 1 else "value"
        message = f"step {step}: `{first}` puts out {figures.nonfinite:,} {plural} that are NaN or infinite"
        if others:
            message += f", and so {'does' if others == 1 else 'do'} {others} more of {len(health)} layers"
        return [Trouble(kind="nonfinite", layer=first, step=step, figures=figures, message=message)]

    def _is_new(self, key: tuple[str, str], is_there: bool) -> bool:
        is_new = is_there and key not in self._known
        if is_there:
            self._known.add(key)
        else:
            self._known.discard(key)
        return is_new


@final
class Remarks:
    """Warns once of failures, of compiled models, and of layers that do not run.

    Args:
        strict: Raise what fails.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._has_failed = self._has_said_eager = self._has_said_missing = False

    @contextmanager
    def attempt(self, step: int | None) -> Iterator[None]:
        """Do what the block says, or else excuse the failure."""
        try:
            yield
        except Exception as error:
            self.excuse(step, error)

    def excuse(self, step: int | None, error: Exception) -> None:
        """Say that a step could not be logged, or with `strict` raise the error."""
        if self._strict:
            raise error
        if not self._has_failed:
            self._has_failed = True
            _say(
                f"step {step} could not be logged, or not in full ({type(error).__name__}: {error}). The "
                "training goes on, and nothing more is said of this; `strict=True` raises instead"
            )

    def eager(self, model: nn.Module) -> None:
        """Say that a compiled model runs eagerly while it is hooked."""
        is_compiled = any(
            "_orig_mod" in module._modules or module._compiled_call_impl is not None
            for module in model.modules()
        )
        if is_compiled and not self._has_said_eager:
            self._has_said_eager = True
            _say(
                "the model is compiled, and hooks do not fire in compiled code: the steps that are logged "
                "run eagerly, the others compiled. With a `probe` and `step`, all training steps run compiled"
            )

    def missing(self, step: int, layers: Sequence[str], advice: str) -> None:
        """Say which layers did not run in a step, unless none is given or a failure explains it."""
        if layers and not self._has_said_missing and not self._has_failed:
            self._has_said_missing = True
            names = ", ".join(f"`{name}`" for name in layers[:4])
            names += f" and {len(layers) - 4} more" if len(layers) > 4 else ""
            _say(
                f"step {step}: {names} did not run, so that maps and health are missing; {advice}. Nothing "
                "more is said of this"
            )


def _say(message: str) -> None:
    warnings.warn(f"Monitor: {message}", MonitorWarning, stacklevel=2)
