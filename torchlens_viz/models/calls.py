"""Calls: what a model is called with, images and what it takes beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from torchlens_viz.arguments import check_dense, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.models.inputs import images_in
from torchlens_viz.models.layers import OnImages, require_module
from torchlens_viz.nested import map_tensors

ModelInputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any] | Callable[[torch.Tensor], Any] | None
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # by position and by name


def arguments_of(given: Any) -> Arguments:
    """Return what a model is called with: a tuple's parts by position, a mapping's by name, or one thing."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def called_with(model: nn.Module, inputs: ModelInputs, images: int = 1) -> nn.Module:
    """Return a model that takes an image batch, of one that takes more or takes it otherwise.

    This is the one rule for what a model is called with: a tuple's parts by position, a mapping's by name.
    None in it, at any depth of tuples, lists and dicts, is the place of the image batch.

    Args:
        model: The model.
        inputs: A tuple or a mapping with None in one place. Tensors in it have one row, which stands for
            every image, or as many as there are images, or are numbers without dimensions; they follow the
            images to their device and, if they are floating, their type. Or a function of the image batch
            (N, C, H, W), which returns such a tuple or mapping, or the only argument: `list` is for models
            that take a list of images. None calls the model with the batch alone.
        images: How many images there are; a larger batch holds all of them several times, one after the
            other, and a smaller one the first of them.

    Raises:
        InvalidArgumentError: Not one place is None, or a tensor has another number of rows.
        InvalidTypeError: It is of another kind.
    """
    if inputs is None:
        return model
    require_module(model)
    if callable(inputs):
        function = inputs
        return OnImages(model, lambda batch: arguments_of(_own_beside(batch, function(batch))), (function,))
    if not isinstance(inputs, tuple | Mapping):
        raise InvalidTypeError(
            "`inputs` must be a tuple or a mapping with None in the place of the images, or a function of an "
            f"image batch, got {shown(inputs)}"
        )
    fault = _fault(inputs, images)
    if fault is not None:
        raise InvalidArgumentError(fault)

    def arguments(batch: torch.Tensor) -> Arguments:
        return arguments_of(_rebuilt(inputs, lambda part: _row_for_each(part, batch)))

    return OnImages(model, arguments, tuple(_parts(inputs)))


def _fault(inputs: Any, images: int) -> str | None:
    """Say what keeps these from being what a model is called with beside so many images."""
    places = sum(part is None for part in _parts(inputs))
    if places != 1:
        return (
            f"`inputs` must have None in one place, where the images go, got {places} such places; leave out "
            "what is None anyway, or pass a function of the image batch, as in `inputs=lambda images: "
            "(images, None)`"
        )
    for part in _parts(inputs):
        if isinstance(part, torch.Tensor):
            check_dense(part, "`inputs`")
            if part.ndim and len(part) not in (1, images):
                each = "" if images == 1 else f" or ({images}, ...)"
                return (
                    f"`inputs` must hold tensors with one row for all images, (1, ...){each}, got shape "
                    f"{tuple(part.shape)}; for anything else pass a function of the image batch, as in "
                    "`inputs=lambda images: (images, table)`"
                )
    return None


def _own_beside(batch: torch.Tensor, given: Any) -> Any:
    """Return what a function made, with tensors beside the batch cloned, which a model may write to."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        is_plain = type(tensor) is torch.Tensor and tensor is not batch and tensor._base is not batch
        return tensor.clone() if is_plain else tensor

    return map_tensors(own, given)


def inputs_like(given: Any) -> ModelInputs:
    """Return as `called_with` takes it what a model was called with: the first image's, where each has one.

    None is nothing beside images, or what cannot be told image by image.
    """
    images = images_in(given)
    if images is given:
        return list if isinstance(images, list) else None
    if isinstance(images, list):
        return None

    def kept(part: Any) -> Any:
        if part is images:
            return None
        is_of_each = isinstance(part, torch.Tensor) and part.ndim and len(part) == len(images)
        return part[:1].detach().clone() if is_of_each else part

    found = _rebuilt(given, kept)
    return found if _fault(found, 1) is None else None


def _parts(given: Any) -> Iterator[Any]:
    """Yield what stands in tuples, lists and mappings, keys included, so that all of it is told."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield key
            yield from _parts(value)
    elif isinstance(given, tuple | list):
        for value in given:
            yield from _parts(value)
    else:
        yield given


def _rebuilt(given: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same structure with what stands in it changed."""
    if isinstance(given, Mapping):
        return {key: _rebuilt(value, change) for key, value in given.items()}
    if isinstance(given, tuple | list):
        made = [_rebuilt(value, change) for value in given]
        return made if isinstance(given, list) else tuple(made)
    return change(given)


def _row_for_each(given: Any, batch: torch.Tensor) -> Any:
    """Return the batch in the place of None, and of a tensor a row for each image."""
    if not isinstance(given, torch.Tensor):
        return batch if given is None else given
    own = given.detach().to(batch.device, batch.dtype if given.is_floating_point() else None)
    rows = len(batch)
    if own.ndim:
        own = own.repeat(-(-rows // len(own)), *[1] * (own.ndim - 1))[:rows]
    return own.clone()  # the model may write to it
