"""Random transforms that a picture must survive: each image its own, all of them in one resampling call."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import radians
from typing import Final, Literal, TypeAlias

import torch
from torch.nn import functional as F

from torchlens_viz.arguments import pair, real, shown
from torchlens_viz.errors import InvalidArgumentError

TransformsName: TypeAlias = Literal["none", "gentle", "robust"]

_NUMBERS: Final = 3  # that place an image at one step, besides a shift along every axis


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """What happens to each image before the network sees it, with other random numbers at every step.

    All lengths are shares of the image's size along each axis, so that they mean the same at every size.
    Signals have one axis, and volumes a depth or time besides height and width.

    Attributes:
        jitter: Shift along every axis by up to this share, to either side.
        scale: Enlarge along all axes by a factor between these two.
        rotate: Turn by up to this many degrees, to either side: of volumes, the plane of height and width.
            Signals cannot be turned.
        pad: Put this share of gray around the image on every side, and show the whole in the image's size.
            Without it, what lies beyond the border is the image's reflection.
        crop: Show a window of a share between these two of every axis, placed at random.
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

    def numbers(self, steps: int, generator: torch.Generator, axes: int = 2) -> torch.Tensor:
        """Draw all that places one image of so many axes over its steps, (steps, 3 + axes) in [0, 1)."""
        return torch.rand(steps, _NUMBERS + axes, generator=generator, dtype=torch.float32, device="cpu")

    def place(self, images: torch.Tensor, numbers: torch.Tensor, gray: float) -> torch.Tensor:
        """Resample each image where its own random numbers place it.

        Args:
            images: (N, C, H, W), (N, C, L) or (N, C, D, H, W) float32.
            numbers: (N, 3 + axes), from `numbers`.
            gray: The value around padded images.

        Returns:
            The same shape.
        """
        if not self.moves:
            return images
        if images.ndim == 3:  # resampled as images of one row
            return self.place(images[:, :, None], numbers, gray)[:, :, 0]
        grid = F.affine_grid(self._matrices(images, numbers), list(images.shape), align_corners=False)
        if self.pad == 0:
            return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        return F.grid_sample(images - gray, grid, padding_mode="zeros", align_corners=False) + gray

    def _matrices(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return, per image, which part of [-1, 1] the network sees, as matrices (N, 2, 3) or (N, 3, 4)."""
        height, width = images.shape[-2:]
        drawn = 2 * numbers - 1
        angle = drawn[:, 0] * radians(self.rotate)
        low, high = self.scale
        window = self.crop[0] + (self.crop[1] - self.crop[0]) * numbers[:, 2]
        zoom = window * (1 + 2 * self.pad) / (low + (high - low) * numbers[:, 1])
        cosine, sine = zoom * angle.cos(), zoom * angle.sin()
        # Along the columns first, as `affine_grid` has it; a signal's one row stays where it is.
        shift = drawn[:, _NUMBERS:] * (2 * self.jitter + (1 - window)[:, None])
        shift = F.pad(shift, (0, max(0, 2 - shift.shape[1])))
        axes, none = images.ndim - 2, torch.zeros_like(zoom)
        matrix = [
            [cosine, -sine * (height / width), none, shift[:, 0]],
            [sine * (width / height), cosine, none, shift[:, 1]],
            [none, none, zoom, shift[:, -1]],
        ]
        rows = [torch.stack((*row[:axes], row[-1]), dim=1) for row in matrix[:axes]]
        return torch.stack(rows, dim=1)


_PRESETS: Final = {
    "none": Transforms(),
    "gentle": Transforms(jitter=0.02, rotate=1.0),
    "robust": Transforms(jitter=0.05, scale=(0.9, 1.1), rotate=10.0, pad=0.05, noise=0.02),
}


def transforms_of(chosen: TransformsName | Transforms | None, axes: int = 2) -> Transforms:
    """Return the transforms of that name, or those that were given; None is none.

    Args:
        chosen: A name, transforms or None.
        axes: How many spatial axes the images have. Those of a name do not turn signals, which have one.

    Raises:
        InvalidArgumentError: There is no such name, or signals are to be turned.
    """
    if isinstance(chosen, Transforms):
        if axes == 1 and chosen.rotate:
            raise InvalidArgumentError(
                f"`rotate` must be 0 for signals, which have nothing to be turned in, got {chosen.rotate:g}"
            )
        return chosen
    if chosen is not None and not (isinstance(chosen, str) and chosen in _PRESETS):
        raise InvalidArgumentError(
            f"`transforms` must be one of {', '.join(map(repr, _PRESETS))}, Transforms(...) or None, "
            f"got {shown(chosen)}"
        )
    named = _PRESETS[chosen or "none"]
    return replace(named, rotate=0.0) if axes == 1 else named
