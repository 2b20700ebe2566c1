"""Images made of waves: `Fourier`, with the colours of natural images, and `FixedSpectrum`, phases alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Final

import torch

from torchlens_viz.arguments import flag
from torchlens_viz.ascent.parametrization import Parametrization, Size, bolder, in_float32
from torchlens_viz.errors import InvalidArgumentError

# Square root of the covariance of the colours of natural images, rows for red, green and blue, as measured
# for "Feature Visualization" (Olah et al., Distill 2017); to be divided by its largest column norm.
_COLOUR_ROOT: Final = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
_NEAR_LIMIT: Final = 1e-3  # a sigmoid never reaches its limits, and its slope is gone long before


@dataclass(frozen=True, kw_only=True)
class _Spectrum(Parametrization):
    """What the parametrisations by spatial frequency share: colours and limits.

    Attributes:
        decorrelate: Mix the channels as the colours of natural images are mixed. None does so for images and
            volumes of 3 channels, the only ones for which it is defined.
    """

    decorrelate: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decorrelate is not None:
            self._set(decorrelate=flag(self.decorrelate, "decorrelate"))

    def _to_pixels(self, colours: torch.Tensor, axes: int) -> torch.Tensor:
        if self._mixes(colours.shape[-axes - 1], axes):
            colours = _mixed(_colour_root(colours), colours, axes)
        if self.low is None or self.high is None:
            return colours
        return self.low + self.width * torch.sigmoid(colours)

    def _from_pixels(self, image: torch.Tensor) -> torch.Tensor:
        colours, axes = image, image.ndim - 1
        if self.low is not None:
            colours = ((image - self.low) / self.width).clamp(_NEAR_LIMIT, 1 - _NEAR_LIMIT).logit()
        if self._mixes(len(image), axes):
            colours = _mixed(torch.linalg.inv(_colour_root(colours)), colours, axes)
        return colours

    def _mixes(self, channels: int, axes: int) -> bool:
        if self.decorrelate and (channels != 3 or axes == 1):
            what = "signals" if axes == 1 else f"images of other than 3 channels, got {channels}"
            raise InvalidArgumentError(
                f"`decorrelate` must be False for {what}: the colours of natural images are known for red, "
                "green and blue only"
            )
        return channels == 3 and axes > 1 if self.decorrelate is None else self.decorrelate


@dataclass(frozen=True, kw_only=True)
class Fourier(_Spectrum):
    """Fourier coefficients, scaled so that all spatial frequencies change at the pace natural images have.

    These have as much energy in every octave of frequencies as in the next one, since they look the same at
    every scale. There are as many coefficients in an octave as the frequency to the power of the number of
    axes says, and so their magnitudes are divided by the root of that: 1/f in images, 1/sqrt(f), pink noise,
    in signals, and 1/f**1.5 in volumes.

    Attributes:
        sd: Standard deviation of the coefficients to begin from.
        decay: The power of the frequency by which coefficients are divided; None is half the number of axes.

    Source:
        Olah, Mordvintsev & Schubert, "Feature Visualization", Distill 2017.
    """

    sd: float = 0.01
    decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(sd=in_float32(self.sd, "sd"))
        if self.decay is not None:
            self._set(decay=in_float32(self.decay, "decay"))

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
            shape = (channels, *_halved(size), 2)
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return noise.mul(self.sd * bolder(attempt))
        spectrum = torch.fft.rfftn(self._from_pixels(image), dim=_dims(size), norm="ortho")
        return torch.view_as_real(spectrum / self._scale(size, image.device))

    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the images: inverse transform, colours, sigmoid."""
        spectrum = torch.view_as_complex(parameters.contiguous()) * self._scale(size, parameters.device)
        waves = torch.fft.irfftn(spectrum, s=size, dim=_dims(size), norm="ortho")
        return self._to_pixels(waves, len(size))

    def _scale(self, size: Size, device: torch.device) -> torch.Tensor:
        decay = len(size) / 2 if self.decay is None else self.decay
        return torch.pow(_frequencies(size, device), -decay) / 4


@dataclass(frozen=True, kw_only=True)
class FixedSpectrum(_Spectrum):
    """The phases of a spectrum whose magnitudes stay those of natural images: one over the frequency.

    In signals and volumes they are such as `Fourier` explains.

    Attributes:
        contrast: Standard deviation of the colours before the sigmoid.

    Source:
        Fel et al., "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained
        Optimization", NeurIPS 2023. The magnitudes here follow the closed form 1/f instead of a mean over
        ImageNet.
    """

    contrast: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(contrast=in_float32(self.contrast, "contrast"))

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
            shape = (channels, *_halved(size))
            turns = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return turns.sub(0.5).mul(2 * pi)
        return torch.angle(torch.fft.rfftn(self._from_pixels(image), dim=_dims(size), norm="ortho"))

    def decode(self, parameters: torch.Tensor, size: Size) -> torch.Tensor:
        """Return the images: inverse transform, fixed contrast, colours, sigmoid."""
        magnitude = torch.pow(_frequencies(size, parameters.device), -len(size) / 2)
        magnitude[(0,) * len(size)] = 0.0  # the mean is not a pattern
        spectrum = torch.polar(magnitude.expand_as(parameters), _odd(parameters, size))
        waves = torch.fft.irfftn(spectrum, s=size, dim=_dims(size), norm="ortho")
        deviation = waves.std((-len(size) - 1, *_dims(size)), keepdim=True).clamp_min(1e-12)
        return self._to_pixels(waves * (self.contrast / deviation), len(size))


def _dims(size: Size) -> tuple[int, ...]:
    """Return the dimensions of a tensor in which the axes of its images lie: the last ones."""
    return tuple(range(-len(size), 0))


def _halved(size: Size) -> Size:
    """Return how many coefficients real images of that size have along each axis."""
    return (*size[:-1], size[-1] // 2 + 1)


def _frequencies(size: Size, device: torch.device) -> torch.Tensor:
    """Return the frequency of every coefficient, (H, W // 2 + 1); for the mean, the lowest other one."""
    frequencies: torch.Tensor = torch.fft.rfftfreq(size[-1], device=device)
    for axis, length in enumerate(size[-2::-1], start=1):
        along: torch.Tensor = torch.fft.fftfreq(length, device=device)
        frequencies = torch.hypot(along.view(-1, *[1] * axis), frequencies)
    return frequencies.clamp_min(1.0 / max(size))


def _odd(phases: torch.Tensor, size: Size) -> torch.Tensor:
    """Make phases (..., H, W // 2 + 1) opposite where both halves of a wave are in the spectrum of an image.

    That is so in the first column and, of an even width, in the last. Phases that disagree there cancel.
    """
    both = torch.tensor([0] if size[-1] % 2 else [0, size[-1] // 2], device=phases.device)
    here = opposite = phases.index_select(-1, both)
    for dim in _dims(size)[:-1]:
        opposite = opposite.flip(dim).roll(1, dim)
    return phases.index_copy(-1, both, (here - opposite) / 2)


def _mixed(matrix: torch.Tensor, colours: torch.Tensor, axes: int) -> torch.Tensor:
    """Multiply the channels of (..., C, H, W), or with as many other axes, by a matrix (C, C)."""
    return (matrix @ colours.flatten(-axes)).view_as(colours)


def _colour_root(like: torch.Tensor) -> torch.Tensor:
    """Return the matrix (3, 3) that mixes colours as those of natural images are mixed."""
    root = torch.tensor(_COLOUR_ROOT, dtype=torch.float32, device=like.device)
    return torch.div(root, torch.linalg.vector_norm(root, dim=0).max())
