"""Image parametrisations: the numbers that gradient ascent changes, and the images they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, pi
from typing import Final, Literal, TypeAlias

import numpy as np
import torch

from torchlens_viz.ascent.optimizer import Smoothing
from torchlens_viz.errors import InvalidArgumentError

Size: TypeAlias = tuple[int, int]
ParametrizationName: TypeAlias = Literal["pixels", "fourier", "maco"]

# Square root of the covariance of the colours of natural images, rows for red, green and blue, as measured
# for "Feature Visualization" (Olah et al., Distill 2017); to be divided by its largest column norm.
_COLOUR_ROOT: Final = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
_BLUR_EVERY: Final = 4
_BOLDER: Final = 5.0  # how much stronger the noise of the second start is, and that of the third again
_BOLDEST: Final = 25.0  # louder noise finds no more: most pixels, or their sigmoids, are at their limits
_NEAR_LIMIT: Final = 1e-3  # a sigmoid never reaches its limits, and its slope is gone long before


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
        if self.low is not None and self.high is not None and not -inf < self.low < self.high < inf:
            raise InvalidArgumentError(
                f"`low` must be below `high` and both finite, got {self.low} and {self.high}"
            )

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
            size: (H, W).
            generator: The stream of random numbers, on the CPU.
            image: (C, H, W) to begin from; None begins from noise.
            attempt: How many starts were in vain: the noise is another one, and louder after the first two.

        Returns:
            Its parameters, float32 on the CPU.
        """

    @abstractmethod
    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the images (N, C, H, W) that N sets of parameters stand for."""

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
            `numpy.random.seed(seed); numpy.random.random((1, H, W, C))` gives it.
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
        every = self.blur_every
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
            uniform = np.random.RandomState(generator.initial_seed()).random_sample((*size, channels))
            return torch.from_numpy(uniform * (high - low) + low).float().permute(2, 0, 1).contiguous()
        noise = torch.randn(channels, *size, generator=generator, dtype=torch.float32, device="cpu")
        pixels = self.middle + min(self.sd * _bolder(attempt), 1.0) * self.width * noise
        self.confine_(pixels)
        return pixels

    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the parameters: they are the pixels."""
        return parameters

    def confine_(self, parameters: torch.Tensor) -> None:
        """Clip to the limits."""
        if self.low is not None:
            parameters.clamp_(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class _Spectrum(Parametrization):
    """What the parametrisations by spatial frequency share: colours and limits.

    Attributes:
        decorrelate: Mix the channels as the colours of natural images are mixed. None does so for images of 3
            channels, the only ones for which it is defined.
    """

    decorrelate: bool | None = None

    def _to_pixels(self, colours: torch.Tensor) -> torch.Tensor:
        if self._mixes(colours.shape[-3]):
            colours = _mixed(_colour_root(colours), colours)
        if self.low is None or self.high is None:
            return colours
        return self.low + self.width * torch.sigmoid(colours)

    def _from_pixels(self, image: torch.Tensor) -> torch.Tensor:
        colours = image
        if self.low is not None:
            colours = ((image - self.low) / self.width).clamp(_NEAR_LIMIT, 1 - _NEAR_LIMIT).logit()
        if self._mixes(len(image)):
            colours = _mixed(torch.linalg.inv(_colour_root(colours)), colours)
        return colours

    def _mixes(self, channels: int) -> bool:
        if self.decorrelate and channels != 3:
            raise InvalidArgumentError(
                f"`decorrelate` must be False for images of other than 3 channels, got {channels}: the "
                "colours of natural images are known for red, green and blue only"
            )
        return channels == 3 if self.decorrelate is None else self.decorrelate


@dataclass(frozen=True, kw_only=True)
class Fourier(_Spectrum):
    """Fourier coefficients, scaled so that all spatial frequencies change at the pace natural images have.

    Attributes:
        sd: Standard deviation of the coefficients to begin from.
        decay: The power of the frequency by which coefficients are divided.

    Source:
        Olah, Mordvintsev & Schubert, "Feature Visualization", Distill 2017.
    """

    sd: float = 0.01
    decay: float = 1.0

    @property
    def learning_rate(self) -> float:
        """One fifth, in the unit of the coefficients."""
        return 0.2

    def start(
        self,
        channels: int,
        size: Size,
        generator: torch.Generator,
        image: torch.Tensor | None,
        attempt: int = 0,
    ) -> torch.Tensor:
        """Return the coefficients (C, H, W // 2 + 1, 2) of the image, or of faint noise."""
        if image is None:
            shape = (channels, size[0], size[1] // 2 + 1, 2)
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return noise.mul(self.sd * _bolder(attempt))
        spectrum = torch.fft.rfft2(self._from_pixels(image), norm="ortho")
        return torch.view_as_real(spectrum / self._scale(size, image.device))

    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the images: inverse transform, colours, sigmoid."""
        spectrum = torch.view_as_complex(parameters.contiguous()) * self._scale(size, parameters.device)
        return self._to_pixels(torch.fft.irfft2(spectrum, s=size, norm="ortho"))

    def _scale(self, size: Size, device: torch.device) -> torch.Tensor:
        return torch.pow(_frequencies(size, device), -self.decay) / 4


@dataclass(frozen=True, kw_only=True)
class FixedSpectrum(_Spectrum):
    """The phases of a spectrum whose magnitudes stay those of natural images: one over the frequency.

    Attributes:
        contrast: Standard deviation of the colours before the sigmoid.

    Source:
        Fel et al., "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained
        Optimization", NeurIPS 2023. The magnitudes here follow the closed form 1/f instead of a mean over
        ImageNet.
    """

    contrast: float = 2.0

    @property
    def learning_rate(self) -> float:
        """One fifth of a radian or so per step."""
        return 0.2

    def start(
        self,
        channels: int,
        size: Size,
        generator: torch.Generator,
        image: torch.Tensor | None,
        attempt: int = 0,
    ) -> torch.Tensor:
        """Return the phases (C, H, W // 2 + 1) of the image, or random ones."""
        if image is None:
            shape = (channels, size[0], size[1] // 2 + 1)
            turns = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return turns.sub(0.5).mul(2 * pi)
        return torch.angle(torch.fft.rfft2(self._from_pixels(image), norm="ortho"))

    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the images: inverse transform, fixed contrast, colours, sigmoid."""
        magnitude = 1 / _frequencies(size, parameters.device)
        magnitude[0, 0] = 0.0  # the mean is not a pattern
        waves = torch.polar(magnitude.expand_as(parameters), _odd(parameters, size))
        colours = torch.fft.irfft2(waves, s=size, norm="ortho")
        deviation = colours.std((-3, -2, -1), keepdim=True).clamp_min(1e-12)
        return self._to_pixels(colours * (self.contrast / deviation))


def _bolder(attempt: int) -> float:
    return min(_BOLDER**attempt, _BOLDEST)


def parametrization_of(chosen: ParametrizationName | Parametrization) -> Parametrization:
    """Return the parametrisation of that name with its defaults, or the one that was given."""
    if isinstance(chosen, Parametrization):
        return chosen
    kinds: dict[str, type[Parametrization]] = {"pixels": Pixels, "fourier": Fourier, "maco": FixedSpectrum}
    if chosen not in kinds:
        raise InvalidArgumentError(
            f"`parametrization` must be one of {', '.join(map(repr, kinds))} or a Parametrization, "
            f"got {chosen!r}"
        )
    return kinds[chosen]()


def _frequencies(size: Size, device: torch.device) -> torch.Tensor:
    """Return the frequency of every coefficient, (H, W // 2 + 1); for the mean, the lowest other one."""
    rows = torch.fft.fftfreq(size[0], device=device)[:, None]
    columns = torch.fft.rfftfreq(size[1], device=device)[None]
    return torch.hypot(rows, columns).clamp_min(1.0 / max(size))


def _odd(phases: torch.Tensor, size: Size) -> torch.Tensor:
    """Make phases (..., H, W // 2 + 1) opposite where both halves of a wave are in the spectrum of an image.

    That is so in the first column and, of an even width, in the last. Phases that disagree there cancel.
    """
    both = torch.tensor([0] if size[1] % 2 else [0, size[1] // 2], device=phases.device)
    here = phases.index_select(-1, both)
    opposite = here.flip(-2).roll(1, -2)
    return phases.index_copy(-1, both, (here - opposite) / 2)


def _mixed(matrix: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Multiply the channels of (..., C, H, W) by a matrix (C, C)."""
    return (matrix @ colours.flatten(-2)).view_as(colours)


def _colour_root(like: torch.Tensor) -> torch.Tensor:
    root = torch.tensor(_COLOUR_ROOT, dtype=torch.float32, device=like.device)
    return torch.div(root, torch.linalg.vector_norm(root, dim=0).max())
