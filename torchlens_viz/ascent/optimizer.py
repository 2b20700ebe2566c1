"""One step uphill: Adam with a state of its own for every image of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Final, NamedTuple, final

import torch
from torch.nn import functional as F

from torchlens_viz.arguments import has_float64

_BETAS: Final = (0.9, 0.999)
_EPSILON: Final = 1e-8
_KERAS_EPSILON: Final = 1e-7


class Slope(NamedTuple):
    """How steep it is at each image.

    Attributes:
        gradient: (N, ...), of unit root mean square per image where it was normalised, zero where there is
            none.
        peak: (N,) the largest absolute value of the gradient before that.
    """

    gradient: torch.Tensor
    peak: torch.Tensor


def normalised(gradient: torch.Tensor) -> Slope:
    """Scale the gradient of each image to unit root mean square.

    One learning rate then serves every layer, and no gradient is lost in Adam's epsilon: behind many layers
    gradients of 1e-20 are common, whose squares float32 cannot hold.
    """
    peak = _peaks(gradient)
    scaled = gradient / _per_image(peak.where(peak > 0, 1), gradient)
    mean_square = scaled.square().flatten(1).mean(1)
    return Slope(scaled * _per_image(mean_square.where(mean_square > 0, 1).rsqrt(), gradient), peak)


def as_it_is(gradient: torch.Tensor) -> Slope:
    """Leave the gradient in its own scale."""
    return Slope(gradient, _peaks(gradient))


@final
class Adam:
    """Adam's rule (Kingma & Ba, 2015), for images that are at different steps.

    Args:
        rate: The learning rate.
        like_keras: Add epsilon, 1e-7, outside the correction for bias, as Keras does.
    """

    def __init__(self, rate: float, *, like_keras: bool) -> None:
        self._rate = rate
        self._like_keras = like_keras

    def change(
        self, gradient: torch.Tensor, step: torch.Tensor, mean: torch.Tensor, square: torch.Tensor
    ) -> torch.Tensor:
        """Return by how much to change the parameters, uphill.

        Args:
            gradient: (N, ...).
            step: (N,) how many steps each image has made before this one.
            mean: (N, ...) running mean of the gradient; updated in place.
            square: (N, ...) running mean of its square; updated in place.
        """
        first, second = _BETAS
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        count = step + 1
        root = _one_minus_power(second, count).sqrt()
        rate = (self._rate * root / _one_minus_power(first, count)).float()
        epsilon = torch.full_like(root, _KERAS_EPSILON) if self._like_keras else _EPSILON * root
        lower = square.sqrt().add_(_per_image(epsilon.float(), square))
        return torch.div(mean, lower, out=lower).mul_(_per_image(rate, mean))


def _one_minus_power(base: float, count: torch.Tensor) -> torch.Tensor:
    """Return `1 - base ** count`, as exact as the device allows."""
    if has_float64(count.device):
        return 1 - base ** count.double()
    return -torch.expm1(count.float() * log(base))


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Smoothing:
    """What keeps pixels smooth between the steps, after Yosinski et al. (2015): decay and blur.

    Attributes:
        decay: The share of the distance to the middle of the range that is taken back at every step.
        blur: Standard deviation in pixels of a Gaussian blur; 0 is none.
        every: Blur at every so many steps.
        middle: The middle of the range.
    """

    decay: float
    blur: float
    every: int
    middle: float

    def apply_(self, pixels: torch.Tensor, step: torch.Tensor, moving: torch.Tensor) -> None:
        """Smooth those images (N, C, ...) in place that are `moving` (N,), after their `step`-th step."""
        if self.decay:
            share = _per_image(self.decay * moving.float(), pixels)
            pixels.add_(share * (self.middle - pixels))
        if self.blur:
            is_due = _per_image(moving & ((step + 1) % self.every == 0), pixels)
            pixels.copy_(torch.where(is_due, _blurred(pixels, self.blur), pixels))


def _blurred(pixels: torch.Tensor, sd: float) -> torch.Tensor:
    """Blur signals, images or volumes along one axis after the other, reflected at the border."""
    axes = pixels.ndim - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    blurred = pixels.flatten(0, 1)[:, None]
    for axis, size in enumerate(pixels.shape[2:]):
        reach = min(int(3 * sd + 0.5), size - 1)
        places = torch.arange(-reach, reach + 1, device=pixels.device, dtype=torch.float32)
        weights = torch.softmax(-0.5 * (places / sd).square(), dim=0)
        widths = [0] * (2 * axes)
        widths[2 * (axes - axis) - 2 : 2 * (axes - axis)] = reach, reach
        along = [-1 if each == axis else 1 for each in range(axes)]
        blurred = convolve(F.pad(blurred, widths, mode="reflect"), weights.view(1, 1, *along))
    return blurred.view_as(pixels)


def _peaks(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.abs().flatten(1).amax(1)


def _per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
