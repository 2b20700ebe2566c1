"""Objectives as an algebra: each a number per image, and what sums, products and weights of them are.

The terms themselves are in `objectives`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch

from torchlens_viz.arguments import real, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, calling

_GREATEST: Final = 1e38


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What an objective sees of one step.

    Attributes:
        images: (N, C, ...) float32, the images as they are, before transforms and preprocessing.
        channels: (N,) int64, the channel that each image is to maximise.
        target: The name of the layer that was asked for.
        activations: By layer name, what the layer put out, with channels in dimension 1.
    """

    images: torch.Tensor
    channels: torch.Tensor
    target: str
    activations: Mapping[str, torch.Tensor]

    def activation(self, layer: str | None = None) -> torch.Tensor:
        """Return what a layer put out, (N, C, ...); None is the layer that was asked for."""
        return self.activations[self.target if layer is None else layer]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A number per image, to be made large.

    Attributes:
        function: `Scene` -> (N,).
        text: How it is written.
        layers: The layers it looks at; None among them is the layer that was asked for.
        is_linear: Whether it is an affine function of the layer's output, and of nothing else.
        uses_target: Whether it looks at the channel that is being maximised.
        couples: Whether the score of an image depends on the others of the batch.
    """

    function: Callable[[Scene], torch.Tensor]
    text: str
    layers: frozenset[str | None] = frozenset()
    is_linear: bool = False
    uses_target: bool = False
    couples: bool = False

    def __call__(self, scene: Scene) -> torch.Tensor:
        """Return the score of every image, (N,) float32."""
        with calling("objective(scene)", f"give one number per image, ({len(scene.channels)},), of a Scene"):
            scores = self.function(scene)
        if not isinstance(scores, torch.Tensor) or scores.shape != scene.channels.shape:
            given = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise InvalidArgumentError(
                f"the objective {self.text} must give one number per image, ({len(scene.channels)},), "
                f"got {given}"
            )
        return scores.float()

    def __repr__(self) -> str:
        return self.text

    def __add__(self, other: Objective | float) -> Objective:
        return _combined(operator.add, self, _as_objective(other), "+", is_linear=True)

    def __sub__(self, other: Objective | float) -> Objective:
        return _combined(operator.sub, self, _as_objective(other), "-", is_linear=True)

    def __mul__(self, other: Objective | float) -> Objective:
        constant = not isinstance(other, Objective)
        return _combined(operator.mul, self, _as_objective(other), "*", is_linear=constant)

    def __radd__(self, other: float) -> Objective:
        return _as_objective(other) + self

    def __rsub__(self, other: float) -> Objective:
        return _as_objective(other) - self

    def __rmul__(self, other: float) -> Objective:
        return _combined(operator.mul, _as_objective(other), self, "*", is_linear=True)

    def __truediv__(self, other: float) -> Objective:
        return self * (1 / other)

    def __neg__(self) -> Objective:
        return -1.0 * self


def _as_objective(value: Objective | float) -> Objective:
    if isinstance(value, Objective):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(f"an objective combines with objectives and numbers, got {shown(value)}")
    number = real(value, "weight")
    if not abs(number) < _GREATEST:
        raise InvalidArgumentError(f"a number of an objective must be finite in float32, got {shown(value)}")
    return Objective(
        function=lambda scene: torch.full(scene.channels.shape, number, device=scene.channels.device),
        text=f"{number:g}",
        is_linear=True,
    )


def _combined(
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    left: Objective,
    right: Objective,
    sign: str,
    *,
    is_linear: bool,
) -> Objective:
    texts = [left.text, right.text]
    for place, text in enumerate(texts):
        if (" + " in text or " - " in text) and (sign == "*" or (sign == "-" and place == 1)):
            texts[place] = f"({text})"
    return Objective(
        function=lambda scene: join(left(scene), right(scene)),
        text=f" {sign} ".join(texts),
        layers=left.layers | right.layers,
        is_linear=is_linear and left.is_linear and right.is_linear,
        uses_target=left.uses_target or right.uses_target,
        couples=left.couples or right.couples,
    )
