"""The images of a page: with a name, as the model takes them and as a person sees them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import function, listed, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.colours import Bands, as_pixels
from torchlens_viz.models.images import as_shown, made_an_image, model_input
from torchlens_viz.models.kernels import image_channels
from torchlens_viz.models.state import like_parameters, require_values

Given: TypeAlias = str | os.PathLike[str] | Image.Image | torch.Tensor

_MOST: Final = 64


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image of the page.

    Attributes:
        name: What the page calls it: the name of its file, or its number.
        given: The picture or tensor that was given, (C, H, W) where it is a tensor.
        batch: (1, C, H, W), what the model takes, on the model's device.
        pixels: (3, H, W) float32 in [0, 1] on the CPU, the same as a person sees it.
    """

    name: str
    given: torch.Tensor | Image.Image
    batch: torch.Tensor
    pixels: torch.Tensor


def pictures_of(
    model: nn.Module,
    images: Given | Iterable[Given] | Mapping[str, Given],
    preprocess: Callable[[Any], torch.Tensor] | None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None,
    bands: Bands = None,
) -> list[Picture]:
    """Read, name and prepare the images that a page shows.

    Args:
        model: The model that takes them.
        images: A picture, the path of one, a tensor (C, H, W) or a batch (N, C, H, W), or several of those;
            a mapping says by its keys what the page calls them.
        preprocess: Makes of each what the model takes.
        invert: Makes pixels in [0, 1] of what the model takes.
        bands: The channels to show as red, green and blue, or the one to show in gray.

    Raises:
        InvalidArgumentError: There is none, there are more than 64, or one is no image.
        InvalidTypeError: One is something else.
        PictureError: A file cannot be read.
    """
    require_values(model)
    function(preprocess, "preprocess")
    function(invert, "invert")
    channels = image_channels(model)
    found = []
    for name, image in _named(images):
        given = as_shown(image, channels)
        batch = like_parameters(model_input(given, preprocess, channels).detach(), model)
        pixels = as_pixels(batch, given, preprocess=preprocess, invert=invert, bands=bands)
        found.append(Picture(name=name, given=given, batch=batch, pixels=pixels))
    return found


def _named(
    images: Given | Iterable[Given] | Mapping[str, Given],
) -> list[tuple[str, torch.Tensor | Image.Image]]:
    given: list[Any]
    own: list[str] | None = None
    if isinstance(images, Mapping):
        own, given = [str(name) for name in images], list(images.values())
    elif isinstance(images, torch.Tensor):
        given = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, str | os.PathLike | Image.Image):
        given = [images]
    else:
        given = listed(images, "images", most=_MOST)
    if not given:
        raise InvalidArgumentError("`images` must hold at least one image, got none; give a picture")
    if len(given) > _MOST:
        raise InvalidArgumentError(
            f"`images` must be at most {_MOST} images, got {len(given)}; show a whole data set to `survey`, "
            "and give what it finds"
        )
    named: list[tuple[str, torch.Tensor | Image.Image]] = []
    for place, each in enumerate(given):
        if isinstance(each, str | os.PathLike):
            named.append((Path(os.fspath(each)).name, read_image(each)))
        elif isinstance(each, Image.Image):
            file = getattr(each, "filename", "")
            named.append((Path(file).name if isinstance(file, str) and file else f"image {place}", each))
        elif isinstance(each, torch.Tensor):
            named.append((f"image {place}", each[0] if each.ndim == 4 and len(each) == 1 else each))
        else:
            what = type(each).__name__ if isinstance(each, np.ndarray) else shown(each)
            raise InvalidTypeError(
                f"`images` must be pictures, paths or tensors (C, H, W), got {what}; {made_an_image(each)}"
            )
    return named if own is None else [(name, each) for name, (_, each) in zip(own, named, strict=True)]
