"""Image parametrisations: the numbers that gradient ascent changes, and the images they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch

from torchlens_viz.arguments import integer, number, pair, real
from torchlens_viz.ascent.optimizer import Smoothing
from torchlens_viz.errors import InvalidArgumentError

Size: TypeAlias = tuple[int, ...]  # (L,), (H, W) or (D, H, W)
ParametrizationName: TypeAlias = Literal["pixels", "fourier", "maco"]

_BLUR_EVERY: Final = 4
_BOLDER: Final = 5.0  # how much stronger the noise of the second start is, and that of the third again
_BOLDEST: Final = 25.0  # louder noise finds no more: most pixels, or their sigmoids, are at their limits
_GREATEST: Final = 1e30  # float32 holds its products with weights and widths


@dataclass(frozen=True, kw_only=True)
class Parametrization(ABC):
    """What stands for an image while it is optimised.

    Attributes:
        low: The smallest value a pixel can have; None for no limit.
        high: The largest.
    """

    low: float | None = 0.0
    high: float | None = 1.0

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise InvalidArgumentError("`low` and `high` must be given both or neither")
        if self.low is not None and self.high is not None:
            low, high = real(self.low, "low"), real(self.high, "high")
            if not -_GREATEST < low < high < _GREATEST or np.float32(low) == np.float32(high):
                raise InvalidArgumentError(
                    f"`low` must be below `high` and both finite, got {self.low} and {self.high}"
                )
            self._set(low=low, high=high)

    def _set(self, **values: Any) -> None:
        """Write down what was given as the floats it stands for."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def start(
        self,
        channels: int,
        size: Size,
        generator: torch.Generator,
        image: torch.Tensor | None,
        attempt: int = 0,
    ) -> torch.Tensor:
        """Return what one image begins as.

        Args:
            channels: C.
            size: (L,), (H, W) or (D, H, W).
            generator: The stream of random numbers, on the CPU.
            image: (C, *size) to begin from; None begins from noise.
            attempt: How many starts were in vain: the noise is another one, and louder after the first two.

        Returns:
            Its parameters, float32 on the CPU.
        """

    @abstractmethod
    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the images (N, C, *size) that N sets of parameters stand for."""

    def confine_(self, parameters: torch.Tensor) -> None:  # noqa: B027  (most have nothing to do)
        """Bring parameters back, in place, to where they stand for images within the limits."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The rate that suits gradients of unit root mean square, per step."""

    @property
    def smoothing(self) -> Smoothing | None:
        """What smooths the parameters between steps; None where nothing does."""
        return None

    @property
    def middle(self) -> float:
        """The value half way between the limits; 0 without limits."""
        return 0.0 if self.low is None or self.high is None else (self.low + self.high) / 2

    @property
    def width(self) -> float:
        """The distance of the limits; 1 without limits."""
        return 1.0 if self.low is None or self.high is None else self.high - self.low


@dataclass(frozen=True, kw_only=True)
class Pixels(Parametrization):
    """The pixels themselves, clipped to the limits after every step.

    Attributes:
        sd: Standard deviation of the noise to begin from, about the middle, as a share of the width. The
            first step takes 0.05; noise above that would leave its own pattern in the image.
        uniform: Begin from noise that is uniform between these two, the same for every channel, as
            `numpy.random.seed(seed); numpy.random.random((1, *size, C))` gives it.
        decay: The share of the distance to mid-gray that is taken back at every step, from 0 to below 1.
        blur: Standard deviation in pixels of a Gaussian blur after every `blur_every` steps; 0 is none.
        blur_every: See `blur`; None is 4.
    """

    sd: float = 0.02
    uniform: tuple[float, float] | None = None
    decay: float = 0.0
    blur: float = 0.0
    blur_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        every = None if self.blur_every is None else integer(self.blur_every, "blur_every")
        self._set(
            blur_every=every,
            **{name: in_float32(getattr(self, name), name) for name in ("sd", "decay", "blur")},
        )
        if self.uniform is not None:
            self._set(uniform=tuple(in_float32(end, "uniform") for end in pair(self.uniform, "uniform")))
        if not 0 <= self.decay < 1 or not 0 <= self.blur <= 100 or (every is not None and every < 1):
            raise InvalidArgumentError(
                "`decay` must be from 0 to below 1, `blur` from 0 to 100 and `blur_every` at least 1, got "
                f"{self.decay}, {self.blur} and {every}"
            )
        if every is not None and not self.blur:
            raise InvalidArgumentError("`blur_every` has no effect without `blur`; give the blur in pixels")

    @property
    def smoothing(self) -> Smoothing | None:
        """Decay and blur."""
        if not self.decay and not self.blur:
            return None
        every = self.blur_every or _BLUR_EVERY
        return Smoothing(decay=self.decay, blur=self.blur, every=every, middle=self.middle)

    @property
    def learning_rate(self) -> float:
        """One twentieth of the range."""
        return 0.05 * self.width

    def start(
        self,
        channels: int,
        size: Size,
        generator: torch.Generator,
        image: torch.Tensor | None,
        attempt: int = 0,
    ) -> torch.Tensor:
        """Return the image itself, or noise."""
        if image is not None:
            return image.clone()
        if self.uniform is not None:
            low, high = self.uniform
            uniform = np.random.RandomState(generator.initial_seed() % 2**32).random_sample((*size, channels))
            return torch.from_numpy(uniform * (high - low) + low).float().movedim(-1, 0).contiguous()
        noise = torch.randn(channels, *size, generator=generator, dtype=torch.float32, device="cpu")
        pixels = self.middle + min(self.sd * bolder(attempt), 1.0) * self.width * noise
        self.confine_(pixels)
        return pixels

    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the parameters: they are the pixels."""
        return parameters

    def confine_(self, parameters: torch.Tensor) -> None:
        """Clip to the limits."""
        if self.low is not None:
            parameters.clamp_(self.low, self.high)


def in_float32(value: float, name: str) -> float:
    """Return a number that images can be computed with."""
    return number(value, name, least=-_GREATEST, most=_GREATEST)


def bolder(attempt: int) -> float:
    """Return how many times as strong the noise of an attempt is as that of the first."""
    return min(_BOLDER**attempt, _BOLDEST)
