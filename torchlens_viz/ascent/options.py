"""What `maximize` is given, checked and made into a plan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any, Final

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import indices_of, shown
from torchlens_viz.ascent.fourier import FixedSpectrum, Fourier
from torchlens_viz.ascent.method import Method
from torchlens_viz.ascent.parametrization import Parametrization, ParametrizationName, Pixels, Size
from torchlens_viz.ascent.plan import Plan, Request
from torchlens_viz.backprop.device import free_bytes
from torchlens_viz.backprop.objective import Objective
from torchlens_viz.backprop.scorer import Scorer
from torchlens_viz.errors import InvalidArgumentError, is_out_of_memory
from torchlens_viz.files.tensors import checksum
from torchlens_viz.models.images import image_batch
from torchlens_viz.models.layers import OnImages, unwrap

_MOST_AT_ONCE: Final = {"cpu": 16, "cuda": 256}
_SIZES: Final[dict[int, Size]] = {1: (4096,), 2: (224, 224), 3: (16, 112, 112)}
MOST_STEPS: Final = 1_000_000  # of each, the score is kept
_KEPT_AT_ONCE: Final = 160 * 2**20
_MEMORY_SHARE: Final = 0.6
_PLANNED: Final = (
    "parametrization", "transforms", "size", "image_channels", "steps", "rate", "threshold", "seed",
    "method",
)  # fmt: skip


def requests_for(channels: Sequence[int]) -> list[Request]:
    """Return one request per channel, in order; those of a channel that is named again are numbered."""
    copies = Counter[int]()
    requests = []
    for place, channel in enumerate(channels):
        requests.append(Request(place, channel, copies[channel]))
        copies[channel] += 1
    return requests


def chosen_channels(channels: int | Sequence[int] | None, goal: Objective, count: int) -> list[int]:
    """Return the channels that are to be maximised, of the `count` that the layer has."""
    if goal.uses_target:
        chosen = indices_of(channels, count, "channels")
    else:  # the numbers of images, and of their streams of random numbers
        chosen = indices_of(0 if channels is None else channels, 2**31, "channels")
    if goal.couples and len(set(chosen)) == len(chosen):
        raise InvalidArgumentError(
            f"`objective` {goal!r} compares the images of a channel with one another, which needs channels "
            "that are named several times, as in `channels=[3, 3, 3]`"
        )
    return chosen


def fitting_batch(scorer: Scorer, plan: Plan, count: int) -> int:
    """Return how many images to make at a time: what memory has room for, in batches of one size."""
    stream = torch.Generator("cpu").manual_seed(plan.seed)
    start = plan.parametrization.start(plan.image_channels, plan.size, stream, plan.start)
    try:
        image = plan.parametrization.decode(start[None].to(scorer.device), plan.size)
        per_image = 3 * scorer.saved_bytes(image)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return 1  # where that is still too many, the climb says so
        raise
    free = free_bytes(scorer.device)
    most = min(_MOST_AT_ONCE.get(scorer.device.type, 16), int(_MEMORY_SHARE * free / max(1, per_image)))
    if scorer.device.type == "cpu":  # beyond that, fresh pages cost more than a larger batch gains
        most = min(most, 3 * _KEPT_AT_ONCE // max(1, per_image))
    most = max(1, min(most, count))
    return ceil(count / ceil(count / most))


def small_scorer(plan: Plan, scorer_of: Callable[[Sequence[int]], Scorer]) -> Scorer:
    """Return what scores the smaller images that a climb with `tiles` begins with.

    Raises:
        InvalidArgumentError: There is no room for two phases, or the network cannot take smaller images.
    """
    copies = plan.method.copies
    if plan.start is not None:
        raise InvalidArgumentError("`tiles` has no effect beside `image`, which has its size; leave out one")
    if plan.steps < 2 or min(plan.size) < copies:
        raise InvalidArgumentError(
            f"`tiles` must be at most the sides of the image, {plan.size}, and `steps` at least 2, got "
            f"{copies} and {plan.steps}"
        )
    size = plan.phases()[0].size
    try:
        return scorer_of(size)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"`tiles={copies}` begins with images of {' x '.join(map(str, size))}, which do not do: {error}; "
            "or leave `tiles` out"
        ) from error


def start_of(
    image: torch.Tensor | Image.Image, by: Parametrization, method: Method, channels: int, axes: int
) -> torch.Tensor:
    """Return the image to begin from, float32 on the CPU; a picture, over the range of pixels.

    Args:
        image: A picture; a tensor (C, H, W) or (1, C, H, W), or with as many other axes as there are.
        by: What it is to be made of.
        method: How it is to climb.
        channels: How many channels the network takes.
        axes: How many spatial axes an image has.
    """
    start = image_batch(image, channels, axes)[0].detach().to("cpu", torch.float32)
    if isinstance(image, Image.Image) or image.dtype == torch.uint8:
        start = method.pixels_of(start, by)
    _check_values(start, by, "image")
    return start


def references_of(
    given: torch.Tensor, shape: tuple[int, ...], by: Parametrization, device: torch.device
) -> torch.Tensor:
    """Return the reference images, checked, on the device."""
    if (
        not isinstance(given, torch.Tensor)
        or given.is_nested
        or given.is_meta
        or given.ndim != len(shape) + 1
        or not len(given)
        or tuple(given.shape[1:]) != shape
    ):
        told = shown(given)
        raise InvalidArgumentError(
            f"`references` must be images (R, {', '.join(map(str, shape))}), got {told}"
        )
    real = given.detach().to(device, torch.float32)
    _check_values(real, by, "references")
    return real


def _check_values(images: torch.Tensor, by: Parametrization, name: str) -> None:
    if not bool(images.isfinite().all()):
        raise InvalidArgumentError(f"`{name}` must hold finite values only")
    if by.low is not None and by.high is not None and (images.min() < by.low or images.max() > by.high):
        raise InvalidArgumentError(
            f"`{name}` must have values from {by.low:g} to {by.high:g}, as before `preprocess`, got "
            f"{images.min():.4g} to {images.max():.4g}; scale the values, or give a parametrization with "
            "other limits"
        )


def channel_means(scorer: Scorer, images: torch.Tensor) -> torch.Tensor:
    """Return the mean of every channel of the layer on each image, (R, C_layer) on the CPU."""
    unused = torch.zeros(1, dtype=torch.int64, device=images.device)
    return torch.cat([scorer.evaluate(image[None], unused).means for image in images]).cpu()


def size_of(size: int | Sequence[int] | None, axes: int) -> Size | None:
    """Return the size of an image along its spatial axes, or None where none was given.

    Args:
        size: What the caller gave: as many numbers as there are axes, or one for all of them.
        axes: How many axes the network takes; as many numbers as the caller gave stand for as many axes.
    """
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) else (size,) * axes
    if len(sides) not in _SIZES or not all(_is_side(side) for side in sides):
        raise InvalidArgumentError(
            "`size` must be a number of pixels or (height, width), for signals (length,) and for volumes "
            f"(depth, height, width), got {shown(size)}"
        )
    return sides


def _is_side(side: object) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and 1 <= side < 2**31


def shape_of(size: Size | None, start: torch.Tensor | None, channels: int, axes: int) -> tuple[int, ...]:
    """Return the shape (C, ...) of the images: that of the one to begin from, where there is one."""
    if start is None:
        return (channels, *(size or _SIZES[axes]))
    own = tuple(start.shape)
    if size not in (None, own[1:]):
        raise InvalidArgumentError(
            f"`size` must be left out with `image`, which has {' x '.join(map(str, own[1:]))} pixels, got "
            f"{size!r}; resize the image"
        )
    return own


def require_room(shape: Sequence[int], device: torch.device) -> None:
    """Refuse an image (C, ...) for which there is no room, before any is taken.

    Raises:
        InvalidArgumentError: It needs more memory than is free, without what the network needs.
    """
    # The image, its parameters and their gradient, two moments, what the network gets and what comes back.
    needed, free = 8 * 4 * prod(shape), free_bytes(device)
    if needed > free:
        raise InvalidArgumentError(
            f"`size` of {' x '.join(f'{side:,}' for side in shape[1:])} pixels needs "
            f"{needed / 2**30:.1f} GiB for an image alone, and {free / 2**30:.1f} GiB are free; choose a "
            "smaller one"
        )


def settings_of(
    plan: Plan,
    scorer: Scorer,
    model: nn.Module,
    preprocess: object,
    channels: Sequence[int],
) -> dict[str, Any]:
    """Return all that the images depend on, for a folder to be refused that was begun with other settings."""
    return {
        "layer": scorer.layer,
        "objective": repr(scorer.objective),
        "model": type(unwrap(model)).__name__,
        "weights": checksum(unwrap(model)),
        "inputs": _inputs_told(model),
        "preprocess": None if preprocess is None else _named(preprocess),
        "channel_dim": scorer.channel_dim,
        "precision": str(scorer.dtype),
        "start": checksum(plan.start),
        "references": checksum(plan.references),
        "compared": sorted(channels) if scorer.objective.couples else None,
        **{name: repr(getattr(plan, name)) for name in _PLANNED},
    }


def _inputs_told(model: nn.Module) -> list[object] | None:
    """Return what tells apart what a model is called with beside images; None where that is nothing."""
    if not isinstance(model, OnImages):
        return None
    return [
        checksum(each) if isinstance(each, torch.Tensor) else _named(each) if callable(each) else repr(each)
        for each in model.told
    ]


def _named(function: object) -> str:
    """Return what a function is called, or how an object such as `Normalize` writes itself."""
    name = getattr(function, "__qualname__", None)
    if name is not None:
        return f"{getattr(function, '__module__', '')}.{name}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function))  # the address is another one in every process


def check_independence(model: nn.Module, batch_size: int | str) -> None:
    """Refuse a model in which the images of a batch change one another."""
    if batch_size == 1:
        return
    for name, module in unwrap(model).named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InvalidArgumentError(
                f"`{name}` (track_running_stats=False) normalises by the statistics of the batch in eval "
                "mode too, so that images would change one another; give `batch_size=1`"
            )


def parametrization_of(chosen: ParametrizationName | Parametrization) -> Parametrization:
    """Return the parametrisation of that name with its defaults, or the one that was given."""
    if isinstance(chosen, Parametrization):
        return chosen
    kinds: dict[str, type[Parametrization]] = {"pixels": Pixels, "fourier": Fourier, "maco": FixedSpectrum}
    if not isinstance(chosen, str) or chosen not in kinds:
        raise InvalidArgumentError(
            f"`parametrization` must be one of {', '.join(map(repr, kinds))} or a Parametrization, "
            f"got {shown(chosen)}"
        )
    return kinds[chosen]()
