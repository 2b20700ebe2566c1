"""Inputs: which part of a batch a model takes, and one image as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import check_dense, function, shown
from torchlens_viz.errors import (
    CaptureMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    ModelFailedError,
    PictureError,
    TorchlensVizError,
    calling,
    is_out_of_memory,
    one_line,
    reason_of,
)
from torchlens_viz.files.pictures import as_rgb, upright
from torchlens_viz.models.layers import unwrap
from torchlens_viz.nested import tensors

InputOf: TypeAlias = str | int | Callable[[Any], Any] | None

# What an input is called and shaped like, by how many spatial axes it has.
_NOUNS: Final = {1: "signal", 2: "image", 3: "volume or clip"}
AXES: Final = {1: "C, L", 2: "C, H, W", 3: "C, D, H, W"}

_MOST_SIDES: Final = 250  # at 256 pixels for the shorter side, 16 million pixels
_USUAL_KEYS: Final = ("pixel_values", "image", "images", "img", "input", "inputs", "x")


def input_of(batch: Any, rule: InputOf) -> Any:
    """Return the part of a batch that a model takes.

    Args:
        batch: A tensor; a tuple or list, of which the first is taken; or a mapping, of which the value under
            the first of the keys `pixel_values`, `image`, `images`, `img`, `input`, `inputs`, `x` is taken.
        rule: In place of that, a key, a place, or a function of the batch.

    Raises:
        InvalidArgumentError: There is no such part.
        InvalidTypeError: It is no tensor.
    """
    found = part_of(batch, rule)
    if isinstance(found, torch.Tensor) or (callable(rule) and next(tensors(found), None) is not None):
        return found
    raise InvalidTypeError(
        f"`loader` must yield tensors, tuples that begin with one, or mappings with one, got a "
        f"{_told(batch)}; say with `input_of` which part is the input"
    )


def part_of(batch: Any, rule: InputOf, name: str = "input_of") -> Any:
    """Do as `input_of` with what may hold something else than tensors, such as an item of a dataset.

    Args:
        batch: The batch or item.
        rule: As for `input_of`.
        name: What that option is called.
    """
    if callable(rule):
        with calling(f"{name}(batch)", "return a part of what the loader or data set yields"):
            return rule(batch)
    if rule is not None:
        if not isinstance(rule, str | int):
            raise InvalidTypeError(f"`{name}` must be a key, a place or a function, got {shown(rule)}")
        try:
            return batch[rule]
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"`{name}` must be a part of every batch, got {shown(rule)} for a {_told(batch)}"
            ) from error
    if isinstance(batch, Mapping):
        key = next((key for key in _USUAL_KEYS if key in batch), None)
        if key is None:
            raise InvalidArgumentError(
                f"`input_of` must say which part of a batch is the input, got a {_told(batch)}; pass one of "
                "its keys"
            )
        return batch[key]
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def images_in(given: Any) -> torch.Tensor | list[torch.Tensor]:
    """Return the images among what a model is called with: a batch (N, ...), or a list of N images (C, H, W).

    Of a mapping that is what stands under the first of the keys that `input_of` looks for. Else, as of a
    tuple, it is the first of at least three dimensions, or the first where there is none.
    """
    parts = list(given) if isinstance(given, tuple) else [given]
    if isinstance(given, Mapping):
        parts = [*(given[key] for key in _USUAL_KEYS if key in given), *given.values()]
    for part in parts:
        if isinstance(part, list) and part and all(_is_one_image(each) for each in part):
            return part
        for tensor in tensors(part):
            if tensor.ndim >= 3:
                return tensor
    return next(tensors(parts))


def _is_one_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3


def _told(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    return f"{type(batch).__name__}"


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
    batch = as_batch(image, axes)
    return batch.float() / 255 if batch.dtype == torch.uint8 else batch


def as_shown(image: object, channels: int | None) -> Any:
    """Return a picture as preprocessing is to get it, and anything else as it is.

    Args:
        image: A picture of any mode.
        channels: How many the model takes: 1 leaves gray pictures gray, and 4 those of four channels as they
            are. Else pictures are 8-bit RGB, upright and on white, as `read_image` reads them.
    """
    if not isinstance(image, Image.Image):
        return image
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


@contextmanager
def shown_to(
    model: nn.Module,
    given: Any,
    name: str = "image",
    remedy: str = "what it takes beside images goes into `inputs`",
) -> Iterator[None]:
    """Say of whatever a model raises within the block that it did not take such an input.

    Args:
        model: The model that runs.
        given: What it is given: tensors, by themselves or within others.
        name: What the option is called that it was made of.
        remedy: What to do about it.

    Raises:
        CaptureMemoryError: There is not memory enough.
        ModelFailedError: It failed.
    """
    try:
        yield
    except TorchlensVizError:
        raise
    except Exception as error:
        first = next(tensors(given), None)
        what = type(given).__name__ if first is None else f"{first.dtype} of shape {tuple(first.shape)}"
        kind = type(unwrap(model)).__name__
        if is_out_of_memory(error):
            raise CaptureMemoryError(
                f"`{name}` is more than there is memory for: {kind} fails for {what} ({reason_of(error)}); "
                "make it smaller, or take a larger device"
            ) from error
        raise ModelFailedError(
            f"`{name}` must be what the model takes: {kind} fails for {what} ({one_line(error)}); {remedy}"
        ) from error


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
    if function(preprocess, "preprocess") is None:
        return image_batch(image, channels, axes)
    assert preprocess is not None
    if not isinstance(image, Image.Image):
        with calling("preprocess(image)", f"make what the model takes, (1, {AXES[axes]}), of an image"):
            made = preprocess(image)
        return as_batch(made, axes)
    require_usual_shape(image, "image")
    try:
        return as_batch(preprocess(image), axes)
    except Exception as error:  # it may be made for tensors
        try:
            return as_batch(preprocess(image_batch(image, channels)), axes)
        except Exception as other:
            raise InvalidArgumentError(
                f"`preprocess` must make of a picture, or of images in [0, 1], what the model takes, and "
                f"fails for the picture ({one_line(error)}) and for a tensor ({one_line(other)})"
            ) from error
