"""Inputs: one image as the batch that a model takes, and a model's input as the picture it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError


def as_batch(image: torch.Tensor | Image.Image) -> torch.Tensor:
    """Return one image as (1, C, H, W); a picture as RGB values in [0, 1].

    Raises:
        InvalidArgumentError: The tensor is no image, or more than one.
        InvalidTypeError: It is neither a tensor nor a picture.
    """
    if isinstance(image, Image.Image):
        picture = torch.from_numpy(np.array(image.convert("RGB")))
        image = picture.movedim(2, 0).float() / 255
    if not isinstance(image, torch.Tensor):
        raise InvalidTypeError(f"`image` must be a tensor or a picture, got {type(image).__name__}")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1 or batch.numel() == 0:
        raise InvalidArgumentError(
            f"`image` must be one image (1, C, H, W) or (C, H, W), got shape {tuple(image.shape)}"
        )
    return batch


def as_pixels(
    batch: torch.Tensor,
    image: torch.Tensor | Image.Image,
    *,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return a model's input as the picture that a person would see.

    What `preprocess` did to the colours is undone: where it makes black and white of a black and a white
    picture, these are black and white here. If that cannot be told, the range of the values is spread over
    [0, 1], unless they lie in it. Resizing and cropping stay.

    Args:
        batch: (1, C, H, W), the input.
        image: What it was made from.
        preprocess: What made it.
        invert: Makes of `batch` pixels in [0, 1], in place of all that.

    Returns:
        (3, H, W) float32 on the CPU in [0, 1]. Of images with other than 1 or 3 channels, their mean.
    """
    pixels = batch.detach()
    if invert is not None:
        pixels = as_batch(invert(pixels))
        if pixels.shape[2:] != batch.shape[2:]:
            raise InvalidArgumentError(
                f"`invert` must keep the height and width of {tuple(batch.shape)}, got {tuple(pixels.shape)}"
            )
    pixels = pixels.cpu().float() / (255 if pixels.dtype == torch.uint8 else 1)
    probes = None if preprocess is None or invert is not None else _black_and_white(image, preprocess, batch)
    if probes is not None:
        black, white = probes
        pixels = (pixels - black) / (white - black)
    pixels = pixels[0].nan_to_num(0.0, 1.0, 0.0)
    if probes is None and invert is None and (pixels.min() < 0 or pixels.max() > 1):
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low)
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return pixels.clamp(0, 1)


def colours_as_in(
    preprocess: Callable[[Image.Image], torch.Tensor],
) -> tuple[tuple[int, int], Callable[[torch.Tensor], torch.Tensor]]:
    """Return what preprocessing does to colours, as a function that gradients pass through.

    Args:
        preprocess: Makes of a picture (1, C, H, W). Whatever it does to sizes is left out.

    Returns:
        The height and width that it makes of a square picture of 256 pixels a side, and a function from
        images (N, C, H, W) in [0, 1] to what the model takes.

    Raises:
        InvalidArgumentError: What it does to a colour is not one straight line per channel.
    """
    made = [as_batch(preprocess(Image.new("RGB", (256, 256), (level,) * 3))) for level in (0, 128, 255)]
    black, gray, white = (each.detach().cpu().float().flatten(2).median(dim=2).values for each in made)
    if not torch.allclose(gray, black + (white - black) * (128 / 255), atol=1e-3) or black.equal(white):
        raise InvalidArgumentError(
            "the preprocessing must scale every colour channel along a straight line, which this one does "
            "not; call `maximize` from Python with a differentiable `preprocess`"
        )
    width, offset = (white - black)[..., None, None], black[..., None, None]

    def apply(images: torch.Tensor) -> torch.Tensor:
        return images * width.to(images.device) + offset.to(images.device)

    height, breadth = made[0].shape[2:]
    return (height, breadth), apply


def _black_and_white(
    image: torch.Tensor | Image.Image, preprocess: Callable[[Any], torch.Tensor], batch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what preprocessing makes of black and of white, (1, C, 1, 1) each, or None."""
    made = []
    for is_white in (False, True):
        try:
            with torch.random.fork_rng(devices=[]):
                output = as_batch(preprocess(_plain(image, is_white=is_white)))
        except Exception:  # it may well be made for other pictures than these
            return None
        if output.shape[1] != batch.shape[1]:
            return None
        # The median, because a border may have been added.
        middle = output.detach().cpu().float().flatten(2).median(dim=2).values
        made.append(middle[..., None, None])
    black, white = made
    return (black, white) if bool((white - black > 1e-6).all()) else None


def _plain(image: torch.Tensor | Image.Image, *, is_white: bool) -> torch.Tensor | Image.Image:
    if isinstance(image, Image.Image):
        mode = image.mode if image.mode in ("L", "RGB") else "RGB"
        return Image.new(mode, image.size, "white" if is_white else "black")
    if image.is_floating_point() and (image.min() < 0 or image.max() > 1):
        raise InvalidArgumentError("values beyond [0, 1] have no known white")
    return torch.full_like(image, (1 if image.is_floating_point() else 255) if is_white else 0)
