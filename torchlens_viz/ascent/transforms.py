"""Random transforms that a picture must survive: each image its own, all of them in one resampling call."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import radians
from typing import Final, Literal, TypeAlias

import torch
from torch.nn import functional as F

from torchlens_viz.arguments import pair, real, shown
from torchlens_viz.errors import InvalidArgumentError

TransformsName: TypeAlias = Literal["none", "gentle", "robust"]

NUMBERS: Final = 5
"""How many random numbers place an image at one step."""


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """What happens to each image before the network sees it, with other random numbers at every step.

    All lengths are shares of the image's height and width, so that they mean the same at every size.

    Attributes:
        jitter: Shift by up to this share, to either side.
        scale: Enlarge by a factor between these two.
        rotate: Turn by up to this many degrees, to either side.
        pad: Put this share of gray around the image on every side, and show the whole in the image's size.
            Without it, what lies beyond the border is the image's reflection.
        crop: Show a window of a share between these two of the height and width, placed at random.
        noise: Standard deviation of noise added to the pixels, as a share of the width of their range.
    """

    jitter: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    rotate: float = 0.0
    pad: float = 0.0
    crop: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("jitter", 1.0), ("rotate", 180.0), ("pad", 1.0), ("noise", 1.0)):
            value = real(getattr(self, name), name)
            if not 0 <= value <= most:
                raise InvalidArgumentError(f"`{name}` must be from 0 to {most:g}, got {value}")
            object.__setattr__(self, name, value)  # the float that a fraction stands for
        for name, most in (("scale", 10.0), ("crop", 1.0)):
            low, high = pair(getattr(self, name), name)
            if not 0.1 <= low <= high <= most:
                raise InvalidArgumentError(
                    f"`{name}` must be (low, high) with 0.1 <= low <= high <= {most:g}, got {(low, high)}"
                )
            object.__setattr__(self, name, (low, high))

    @property
    def moves(self) -> bool:
        """Whether pixels change their places."""
        still = Transforms(noise=self.noise)
        return any(getattr(self, field.name) != getattr(still, field.name) for field in fields(self))

    def numbers(self, steps: int, generator: torch.Generator) -> torch.Tensor:
        """Draw all that places one image over its steps, (steps, NUMBERS) uniform in [0, 1)."""
        return torch.rand(steps, NUMBERS, generator=generator, dtype=torch.float32, device="cpu")

    def place(self, images: torch.Tensor, numbers: torch.Tensor, gray: float) -> torch.Tensor:
        """Resample each image where its own random numbers place it.

        Args:
            images: (N, C, H, W) float32.
            numbers: (N, NUMBERS), from `numbers`.
            gray: The value around padded images.

        Returns:
            (N, C, H, W).
        """
        if not self.moves:
            return images
        grid = F.affine_grid(self._matrices(images, numbers), list(images.shape), align_corners=False)
        if self.pad == 0:
            return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        return F.grid_sample(images - gray, grid, padding_mode="zeros", align_corners=False) + gray

    def _matrices(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return, per image, which part of [-1, 1] the network sees, as matrices (N, 2, 3)."""
        height, width = images.shape[2:]
        drawn = 2 * numbers - 1
        angle = drawn[:, 0] * radians(self.rotate)
        low, high = self.scale
        window = self.crop[0] + (self.crop[1] - self.crop[0]) * numbers[:, 2]
        zoom = window * (1 + 2 * self.pad) / (low + (high - low) * numbers[:, 1])
        cosine, sine = zoom * angle.cos(), zoom * angle.sin()
        shift = drawn[:, 3:5] * (2 * self.jitter + (1 - window)[:, None])
        rows = torch.stack((cosine, -sine * (height / width), shift[:, 0]), dim=1)
        columns = torch.stack((sine * (width / height), cosine, shift[:, 1]), dim=1)
        return torch.stack((rows, columns), dim=1)


_PRESETS: Final = {
    "none": Transforms(),
    "gentle": Transforms(jitter=0.02, rotate=1.0),
    "robust": Transforms(jitter=0.05, scale=(0.9, 1.1), rotate=10.0, pad=0.05, noise=0.02),
}


def transforms_of(chosen: TransformsName | Transforms | None) -> Transforms:
    """Return the transforms of that name, or those that were given; None is none."""
    if isinstance(chosen, Transforms):
        return chosen
    if chosen is not None and not (isinstance(chosen, str) and chosen in _PRESETS):
        raise InvalidArgumentError(
            f"`transforms` must be one of {', '.join(map(repr, _PRESETS))}, Transforms(...) or None, "
            f"got {shown(chosen)}"
        )
    return _PRESETS[chosen or "none"]
