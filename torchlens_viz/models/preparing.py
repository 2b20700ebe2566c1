"""What preprocessing makes of images that climb: differentiably, and the same as of pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz.errors import InvalidArgumentError, calling, one_line
from torchlens_viz.models.colours import CHECKS, CLOSE, Colours, Preprocess, colours_of, typical
from torchlens_viz.models.images import AXES, as_batch, image_batch, model_input
from torchlens_viz.models.keeping import same_random_numbers


def preprocess_of(preprocess: Preprocess | None, example: torch.Tensor) -> Preprocess | None:
    """Return what makes of images (N, C, H, W) what the model takes, so that gradients pass through.

    Args:
        preprocess: What the caller gave. Where it takes pictures only, what it does to colours stands for it.
        example: (1, C, H, W), an image, or (1, C, L) or (1, C, D, H, W).

    Raises:
        InvalidArgumentError: It takes neither images nor pictures of one colour.
    """
    if preprocess is None:
        return None
    axes = example.ndim - 2
    try:
        preprocess(example.clone())
        if axes == 3 and example.shape[2] in (1, example.shape[1]):
            preprocess(example.repeat(1, 1, 2, 1, 1))  # one for images would take frames for colours
    except Exception as error:
        try:
            return _of_colours(preprocess, example)
        except InvalidArgumentError as other:
            raise InvalidArgumentError(
                f"`preprocess` must make of images (N, {AXES[axes]}) what the model takes, and fails for "
                f"them ({one_line(error)}); nor does what it does to pictures stand for it: {other}"
            ) from error
    if axes != 2 or example.shape[1] not in (1, 3) or is_alike(preprocess, example):
        return preprocess
    try:
        return _of_colours(preprocess, example)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            "`preprocess` must make the same of a picture and of that picture as a tensor (N, C, H, W) in "
            "[0, 1], so that what is saved is what was climbed, and does not; nor does what it does to "
            f"pictures stand for it: {error}; pass one that takes tensors only"
        ) from error


def check_prepared_alone(preprocess: Preprocess, example: torch.Tensor) -> None:
    """Refuse preprocessing by which the images of a batch change one another.

    Args:
        preprocess: Takes batches like `example`.
        example: (1, C, ...), an image.

    Raises:
        InvalidArgumentError: It makes another image of the first of two than of that one alone.
    """
    ramp = torch.linspace(0.2, 0.8, example.numel(), device=example.device).view_as(example)
    pair = torch.cat([ramp, (ramp + 1) / 2])

    def prepared(images: torch.Tensor) -> object:
        with same_random_numbers(), torch.no_grad():
            return preprocess(images.clone())

    with calling("preprocess(images)", "take a batch of any number of images"):
        alone, together, again = prepared(ramp), prepared(pair), preprocess(pair.clone())
    if not isinstance(alone, torch.Tensor) or not isinstance(together, torch.Tensor):
        return  # which is said elsewhere
    if not isinstance(again, torch.Tensor) or together.ndim < 2 or together.shape[1:] != alone.shape[1:]:
        return
    if torch.equal(together, again) and not torch.allclose(together[:1], alone, rtol=1e-3, atol=1e-3):
        raise InvalidArgumentError(
            "`preprocess` must make of each image what it makes of that image alone, and the images of a "
            "batch change one another: take means over the last dimensions, or give `batch_size=1`"
        )


def _of_colours(preprocess: Preprocess, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what preprocessing does to the colours of pictures, for images or volumes made of them."""
    axes = example.ndim - 2
    if axes == 1:
        raise InvalidArgumentError("signals have no colours")
    try:
        colours = colours_of(preprocess, axes=axes)
    except InvalidArgumentError:
        if axes == 2:
            raise
        return colours_of(preprocess).apply  # what is done to one picture is done to every frame
    if axes == 2 and not _keeps_places(preprocess, colours, example):
        height, width = example.shape[2:]
        warnings.warn(
            f"`preprocess` does more to pictures of {height} x {width} than change their colours: it "
            "resizes, crops or moves them, or sets their contrast. That is left out, so that scores are "
            "those of the images as they are; put through it, what is saved has another score",
            stacklevel=4,
        )
    return colours.apply


def _keeps_places(preprocess: Preprocess, colours: Colours, example: torch.Tensor) -> bool:
    """Tell whether preprocessing makes of a picture with shapes in it what it does to its colours alone."""
    height, width = example.shape[2:]
    generator = torch.Generator("cpu").manual_seed(0)
    levels = torch.randint(256, (1, 3, 8, 8), generator=generator, device="cpu", dtype=torch.uint8)
    pixels = F.interpolate(levels, (height, width), mode="nearest")[0].movedim(0, 2)
    picture = Image.fromarray(pixels.contiguous().numpy())
    picture = picture.convert("L") if example.shape[1] == 1 else picture
    try:
        with same_random_numbers():
            made = model_input(picture, preprocess, example.shape[1]).detach().cpu().float()
    except Exception:
        return True  # which is said elsewhere
    told = colours.apply(image_batch(picture, example.shape[1]))
    if made.shape != told.shape:
        return False
    reach = (colours.matrix.abs().sum(1)).max()
    return bool((made - told).abs().mean() <= 2 * CLOSE * reach)


def is_alike(preprocess: Preprocess, example: torch.Tensor) -> bool:
    """Tell whether preprocessing makes of pictures what it makes of the same pictures as tensors in [0, 1].

    Many that take both do not: a processor that divides by 255 does so with tensors as well. One that takes
    no pictures has nothing to be compared.

    Args:
        preprocess: Takes tensors like `example`.
        example: (1, C, H, W) of 1 or 3 channels.
    """
    made: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for colour in ((0, 0, 0), *CHECKS):
        picture = Image.new("RGB", (example.shape[3], example.shape[2]), colour)
        picture = picture.convert("L") if example.shape[1] == 1 else picture
        given = image_batch(picture, example.shape[1]).to(example)
        for values, each in zip(made, (picture, given), strict=True):
            try:
                with same_random_numbers():
                    values.append(typical(as_batch(preprocess(each))))
            except Exception:
                return each is picture and not made[0]
    pictured, other = (torch.stack(values).nan_to_num() for values in made)  # a picture may have no contrast
    if pictured.shape != other.shape:
        return False
    reach = pictured.amax(0) - pictured.amin(0)
    return bool(((pictured - other).abs() <= 2 * CLOSE * reach + 1e-6).all())
