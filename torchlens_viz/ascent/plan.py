"""Climbs: what is asked of a gradient ascent, how it goes about it, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

import torch

from torchlens_viz.ascent.method import Method
from torchlens_viz.ascent.parametrization import Parametrization, Size
from torchlens_viz.ascent.transforms import Transforms

Status: TypeAlias = Literal["threshold", "steps", "stalled", "dead", "nonfinite"]


class Request(NamedTuple):
    """One image to be made.

    Attributes:
        place: Where it stands in the result.
        channel: What it is to maximise.
        copy: How many images of the same channel come before it.
    """

    place: int
    channel: int
    copy: int


class Climb(NamedTuple):
    """One image that was made; tensors are on the CPU.

    Attributes:
        request: What it was made for.
        image: (C, H, W) float32, or (C, L) or (C, D, H, W).
        score: The objective, in true float32.
        means: (C_layer,) the mean of every channel of the layer.
        history: (steps,) the objective before each step, as the optimiser saw it; NaN after the last.
        status: Why it ended.
        evidence: What the status rests on, in words.
        frames: (F, C, ...) uint8, the image on its way, over the range of its values; None if not asked for.
    """

    request: Request
    image: torch.Tensor
    score: float
    means: torch.Tensor
    history: torch.Tensor
    status: Status
    evidence: str
    frames: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to climb; `torchlens_viz.maximize` explains the options."""

    parametrization: Parametrization
    transforms: Transforms
    size: Size
    image_channels: int
    start: torch.Tensor | None
    references: torch.Tensor | None
    reference_means: torch.Tensor | None
    steps: int
    rate: float
    threshold: float | None
    seed: int
    method: Method
    begun: Mapping[int, torch.Tensor] = field(default_factory=dict)  # by place, what came of a first phase

    def phases(self) -> tuple[Plan, Plan]:
        """Return how to climb with an image of which copies make the whole, and how to go on from these."""
        steps = self.steps * 3 // 4
        size = tuple(-(-side // self.method.copies) for side in self.size)
        first = replace(self, size=size, steps=steps, threshold=None, references=None, reference_means=None)
        return first, replace(self, steps=self.steps - steps)

    @property
    def starts(self) -> int:
        """From how many starts to try where there is no gradient; the last is a reference image, if any."""
        return self.method.starts + (self.references is not None)

    @property
    def attempts(self) -> int:
        """How often to try: from all starts, and once more without the transforms if there are any."""
        return self.starts * (2 if self.transforms != Transforms() else 1)

    def start_of(self, attempt: int) -> int:
        """Return which of the starts an attempt begins from, both from 0."""
        return attempt % self.starts

    def is_still(self, attempt: int) -> bool:
        """Tell whether an attempt, from 0, is one without the transforms."""
        return attempt >= self.starts

    def is_narrow(self, attempt: int) -> bool:
        """Tell whether an attempt, from 0, pulls on one unit of a map only: the last one from noise."""
        last = self.method.starts - 1
        return last > 0 and self.start_of(attempt) == last


def verdict(
    plan: Plan, history: torch.Tensor, *, attempt: int, is_dead: bool, over: bool, stopped: bool
) -> tuple[Status, str]:
    """Return why a climb ended, and what that rests on.

    Args:
        plan: How it climbed.
        history: (steps,) the objective before each step; NaN after the last.
        attempt: Which of its attempts this was, from 0.
        is_dead: Whether there never was a gradient.
        over: Whether the objective passed the threshold.
        stopped: Whether something else stopped it before its last step.
    """
    numbers = history[~history.isnan()]
    if is_dead and not plan.method.wakes:
        return "dead", "no gradient at the start"
    from_all = f" from {plan.starts} starts" if plan.starts > 1 else ""
    if is_dead:
        real = "" if plan.references is None else ", one of them the reference image that drives it hardest"
        still = ", under the transforms and without them" if plan.is_still(attempt) else ""
        return (
            "dead",
            f"no gradient{from_all or ' at the start'}{real}{still}, with and after redirected ReLUs",
        )
    status, evidence = _end(plan, numbers, over=over, stopped=stopped)
    if plan.is_still(attempt):
        evidence += f"; without the transforms, since under them no gradient lasted{from_all}"
    return status, evidence


def _end(plan: Plan, numbers: torch.Tensor, *, over: bool, stopped: bool) -> tuple[Status, str]:
    steps = len(numbers)
    if over:
        return "threshold", f"passed {plan.threshold:g} at step {steps}"
    if stopped:
        return "nonfinite", f"score or gradient not finite after {steps} steps"
    quarter = steps // 4
    if quarter:
        before, last = numbers[:-quarter].max().item(), numbers[-quarter:].max().item()
        if last <= before:
            return (
                "stalled",
                f"{last:.4g} at best in the last {quarter} of {steps} steps, {before:.4g} before",
            )
    return "steps", f"{steps} steps"


def axes_letters(axes: int) -> str:
    """Return a letter for each spatial axis of an image, as shapes of tensors are checked by."""
    return {1: "L", 2: "HW", 3: "DHW"}[axes]


def as_frame(image: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return an image as uint8 on the CPU, over the range that its pixels can have, or have."""
    low, high = plan.method.limits(plan.parametrization) or range_of(image)
    return ((image.detach() - low) * (255 / (high - low))).clamp(0, 255).round().to("cpu", torch.uint8)


def range_of(images: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest finite value, which differ."""
    finite = images.detach()[images.detach().isfinite()]
    if not len(finite):
        return 0.0, 1.0
    low, high = (float(end) for end in finite.aminmax())
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def stream(seed: int, request: Request, attempt: int, purpose: str) -> int:
    """Return the seed of one stream of random numbers, which depends on nothing that happens elsewhere."""
    key = f"{seed}/{request.channel}/{request.copy}/{attempt}/{purpose}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
