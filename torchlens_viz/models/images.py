"""Images: what a picture or a tensor is as a batch of one, and what preprocessing makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from torchlens_viz.arguments import check_dense, function
from torchlens_viz.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    PictureError,
    calling,
    one_line,
    reason_of,
)
from torchlens_viz.files.pictures import as_rgb, upright
from torchlens_viz.models.keeping import same_random_numbers

# What an input is called and shaped like, by how many spatial axes it has.
_NOUNS: Final = {1: "signal", 2: "image", 3: "volume or clip"}
AXES: Final = {1: "C, L", 2: "C, H, W", 3: "C, D, H, W"}

_MOST_SIDES: Final = 250  # at 256 pixels for the shorter side, 16 million pixels
_WHITES: Final = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}
_MOST_OF_FLOATS: Final = 16  # from 0 to more than that seem to be bytes, where more than a few are above 1
_FEW: Final = 0.1
_ROUNDING: Final = 0.02


def as_batch(image: object, axes: int = 2) -> torch.Tensor:
    """Return a tensor (1, C, H, W) or (C, H, W) as (1, C, H, W).

    Args:
        image: The tensor.
        axes: How many spatial axes it has: 1 is (1, C, L) or (C, L), 3 is (1, C, D, H, W) or (C, D, H, W).

    Raises:
        InvalidArgumentError: The tensor is no image, or more than one.
        InvalidTypeError: It is no tensor.
    """
    if not isinstance(image, torch.Tensor):
        raise InvalidTypeError(f"`image` must be a tensor or a picture, got {type(image).__name__}")
    check_dense(image, "`image`")
    if image.is_meta or image.is_quantized:
        remedy = "load its values first" if image.is_meta else "pass `.dequantize()`"
        raise InvalidTypeError(
            f"`image` must hold plain values, got {image.dtype} on {image.device}; {remedy}"
        )
    batch = image[None] if image.ndim == axes + 1 else image
    if batch.ndim != axes + 2 or len(batch) != 1 or batch.numel() == 0:
        raise InvalidArgumentError(
            f"`image` must be one {_NOUNS[axes]} (1, {AXES[axes]}) or ({AXES[axes]}), got shape "
            f"{tuple(image.shape)}"
        )
    return batch


def image_batch(
    image: torch.Tensor | Image.Image, channels: int | None = None, axes: int = 2
) -> torch.Tensor:
    """Return one image as (1, C, H, W), pixels in [0, 1].

    Args:
        image: A picture of any mode, which is read as `torchlens_viz.files.pictures.read_image` says; or a
            tensor as `as_batch` takes it, of which uint8 counts from 0 to 255 and all else is taken as it is.
        channels: How many the model takes: of a picture, 1 makes gray, and anything else is RGB.
        axes: How many spatial axes the model takes.

    Raises:
        InvalidArgumentError: The tensor is no image, or more than one; or a picture is not what such a model
            takes.
        InvalidTypeError: It is neither a tensor nor a picture.
    """
    if isinstance(image, Image.Image):
        if axes != 2:
            raise InvalidArgumentError(
                f"`image` must be a tensor (1, {AXES[axes]}) or ({AXES[axes]}) for this network, got a "
                "picture; pass `preprocess`, which makes one of it"
            )
        picture = _in_colours(image)
        pixels = torch.from_numpy(np.array(picture.convert("L") if channels == 1 else picture))
        return (pixels[None, None] if channels == 1 else pixels.movedim(2, 0)[None]).float() / 255
    return in_floats(as_batch(image, axes))


def in_floats(images: torch.Tensor) -> torch.Tensor:
    """Return images as floats: of uint8 and uint16 over their range, of Booleans 0 and 1, else themselves.

    Raises:
        InvalidTypeError: They are other integers, of which nothing says what white is.
    """
    if images.dtype in _WHITES:
        return images.float() / _WHITES[images.dtype]
    if not images.is_floating_point() and not images.is_complex():
        raise InvalidTypeError(
            f"`image` must hold floats, or uint8 or uint16 over their whole range, got {images.dtype}, of "
            "which nothing says what white is; pass `image.float()`, scaled as the model takes it"
        )
    return images


def as_shown(image: object, channels: int | None, axes: int = 2) -> Any:
    """Return a picture as preprocessing is to get it, and a tensor as it is.

    A warning says so of a tensor that seems to count to 255 or 65535.

    Args:
        image: A picture of any mode, or a tensor.
        channels: How many the model takes: 1 leaves gray pictures gray, and 4 those of four channels as they
            are. Else pictures are 8-bit RGB, upright and on white, as `read_image` reads them.
        axes: How many spatial axes the model takes.

    Raises:
        InvalidTypeError: It is neither.
    """
    _require_image(image)
    if isinstance(image, torch.Tensor):
        if axes == 2:
            _say_what_is_taken(image)
        return image
    assert isinstance(image, Image.Image)
    if channels == len(image.getbands()) == 4:
        return upright(image)
    is_gray = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    return _in_colours(image).convert("L") if channels == 1 and is_gray else _in_colours(image)


def _in_colours(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB; one that was opened, and never looked at, may turn out to be damaged.

    Raises:
        PictureError: Its pixels cannot be read.
    """
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise PictureError(
            f"the pixels of the picture cannot be read ({reason_of(error)}); open it again, or mend its file"
        ) from error
    return as_rgb(picture)


def _require_image(image: object) -> None:
    if not isinstance(image, torch.Tensor | Image.Image):
        raise InvalidTypeError(
            f"`image` must be a tensor or a picture, got {type(image).__name__}; {made_an_image(image)}"
        )


def made_an_image(value: object) -> str:
    """Say how to make a picture or a tensor of what is neither."""
    if not isinstance(value, np.ndarray):
        return "open it first"
    return (
        "pass `PIL.Image.fromarray(array)` for bytes (H, W) or (H, W, 3) in the order red, green, blue, else "
        "`torch.from_numpy(array)`, (C, H, W)"
    )


def _say_what_is_taken(image: torch.Tensor) -> None:
    """Warn of floats that seem to be bytes, and are taken as they are."""
    is_plain = image.is_floating_point() and image.layout == torch.strided and not image.is_meta
    if not is_plain or image.is_nested or image.ndim not in (3, 4) or image.shape[-3] not in (1, 3, 4):
        return
    low, high = (float(value) for value in image.detach().aminmax()) if image.numel() else (0.0, 0.0)
    is_beyond = low >= 0 and _MOST_OF_FLOATS < high < inf
    if is_beyond and float((image > 1).float().mean()) > _FEW:  # else a few outliers
        warnings.warn(
            f"`image` holds floats from {low:g} to {high:g}, which are taken as they are, while those of "
            "pictures and of uint8 are from 0 to 1; divide them, if that is what the model or its "
            "`preprocess` takes",
            stacklevel=4,
        )


def require_usual_shape(image: Image.Image, name: str) -> None:
    """Refuse a picture so long and thin that preprocessing, which enlarges its shorter side, fills memory.

    Args:
        image: The picture.
        name: What the option is called.

    Raises:
        InvalidArgumentError: One side is more than 250 times as long as the other.
    """
    short, long = sorted(image.size)
    if long > _MOST_SIDES * short:
        raise InvalidArgumentError(
            f"`{name}` must be at most {_MOST_SIDES} times as long as it is wide for a preprocessing, which "
            f"may enlarge it, got {image.width} x {image.height} pixels; crop it"
        )


def model_input(
    image: torch.Tensor | Image.Image,
    preprocess: Callable[[Any], torch.Tensor] | None,
    channels: int | None = None,
    axes: int = 2,
) -> torch.Tensor:
    """Return what a model takes of one image, (1, C, H, W), or of a signal or volume: see `as_batch`.

    Args:
        image: A picture or a tensor.
        preprocess: What makes it of the image, or where it does not take pictures, of the image as a tensor
            in [0, 1]; None is `image_batch`.
        channels: How many the model takes.
        axes: How many spatial axes it takes.

    Raises:
        InvalidArgumentError: The preprocessing fails, or does not make one image.
        InvalidTypeError: The image is neither a tensor nor a picture.
    """
    _require_image(image)
    if function(preprocess, "preprocess") is None:
        return image_batch(image, channels, axes)
    assert preprocess is not None
    if not isinstance(image, Image.Image):
        with calling("preprocess(image)", f"make what the model takes, (1, {AXES[axes]}), of an image"):
            made = prepared(image, preprocess, axes)
        return as_batch(made, axes)
    require_usual_shape(image, "image")
    try:
        return as_batch(preprocess(image.copy()), axes)  # which it may work on
    except Exception as error:  # it may be made for tensors
        try:
            return as_batch(preprocess(image_batch(image, channels)), axes)
        except Exception as other:
            raise InvalidArgumentError(
                f"`preprocess` must make of a picture, or of images in [0, 1], what the model takes, and "
                f"fails for the picture ({one_line(error)}) and for a tensor ({one_line(other)})"
            ) from error


def prepared(images: torch.Tensor, preprocess: Callable[[Any], torch.Tensor], axes: int = 2) -> torch.Tensor:
    """Return what preprocessing makes of images as a tensor (C, H, W) or (N, C, H, W), which it may write to.

    Of bytes it gets what makes it do as with pictures: bytes, or numbers from 0 to 1. Where nothing tells, it
    gets the bytes, and a warning says so.

    Args:
        images: The images.
        preprocess: What the caller gave.
        axes: How many spatial axes they have.
    """
    is_bytes = images.dtype == torch.uint8 and axes == 2 and images.ndim in (3, 4)
    return preprocess(in_floats(images) if is_bytes and _wants_floats(images, preprocess) else images.clone())


def _wants_floats(images: torch.Tensor, preprocess: Callable[[Any], torch.Tensor]) -> bool:
    one = images[:1] if images.ndim == 4 else images

    def made_of(image: Any) -> torch.Tensor | None:
        try:
            with same_random_numbers():
                return as_batch(preprocess(image)).detach().float()
        except Exception:
            return None

    of_bytes, of_floats, pictured = made_of(one.clone()), made_of(in_floats(one)), None
    if of_bytes is None or of_floats is None:
        return of_floats is not None
    if _are_alike(of_bytes, of_floats):
        return False
    if one.shape[-3] in (1, 3):
        pixels = one.flatten(0, -3).movedim(0, 2).cpu().numpy()
        pictured = made_of(Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]))
    if pictured is not None and _are_alike(pictured, of_floats):
        return True
    is_in_bytes = float(of_bytes.abs().max()) > _MOST_OF_FLOATS  # or else it has divided them
    if is_in_bytes and (pictured is None or not _are_alike(pictured, of_bytes)):
        warnings.warn(
            "`preprocess` makes another thing of bytes than of the same from 0 to 1, and gets the bytes as "
            "they are; pass a picture, or `image / 255`, if it is made for those",
            stacklevel=5,
        )
    return False


def _are_alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether images are the same but for rounding to 8 bits and how they were resized."""
    if left.shape != right.shape:
        return False
    reach = max(float(each.max() - each.min()) for each in (left, right))
    return float((left - right).abs().mean()) <= _ROUNDING * reach + 1e-6
