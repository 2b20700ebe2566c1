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
        decorrelate: Mix the channels as the colours of natural images are mixed. None does so for images of 3
            channels, the only ones for which it is defined.
    """

    decorrelate: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decorrelate is not None:
            flag(self.decorrelate, "decorrelate")

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(sd=in_float32(self.sd, "sd"), decay=in_float32(self.decay, "decay"))

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
            return noise.mul(self.sd * bolder(attempt))
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
    """Return the matrix (3, 3) that mixes colours as those of natural images are mixed."""
    root = torch.tensor(_COLOUR_ROOT, dtype=torch.float32, device=like.device)
    return torch.div(root, torch.linalg.vector_norm(root, dim=0).max())
