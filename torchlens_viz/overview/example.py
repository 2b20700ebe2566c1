"""What a model takes, where nobody says it: inputs of usual shapes, until one runs through."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from PIL import Image
from torch import nn

from torchlens_viz.errors import LayerNotFoundError
from torchlens_viz.models.images import image_batch
from torchlens_viz.models.kernels import entry_of, image_channels
from torchlens_viz.models.layers import unwrap
from torchlens_viz.models.state import like_parameters
from torchlens_viz.nested import map_tensors
from torchlens_viz.overview.trace import Inputs

_SIDES: Final[Mapping[int, tuple[tuple[int, ...], ...]]] = {  # by how many axes the first convolution has
    1: ((4096,), (1024,), (16000,), (256,)),
    2: tuple((side, side) for side in (224, 64, 32, 28, 256, 299, 384, 512)),
    3: ((16, 112, 112), (16, 224, 224), (32, 32, 32), (64, 64, 64), (96, 96, 96)),
}


def given_inputs(model: nn.Module, x: Any) -> Inputs:
    """Return what a model takes as it is called: of a mapping by name, of a tuple by position.

    Tensors go to the device of the model's parameters, and floating ones become of their type. A picture
    becomes (1, C, H, W) in [0, 1].
    """
    if isinstance(x, Image.Image):
        x = image_batch(x, image_channels(model))
    args: tuple[Any, ...] = () if isinstance(x, Mapping) else x if type(x) is tuple else (x,)
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    placed: Inputs = map_tensors(lambda each: like_parameters(each, model), (args, kwargs))
    return placed


def usual_inputs(model: nn.Module, shapes: Iterable[Sequence[int]] = ()) -> Iterator[Inputs]:
    """Yield inputs of zeros that a model may take, the most likely first.

    Args:
        model: The model.
        shapes: Shapes of one input, (N, C, ...), in place of those found here.
    """
    for shape in dict.fromkeys(map(tuple, shapes)) or dict.fromkeys(_shapes(unwrap(model))):
        yield _called_with(model, like_parameters(torch.zeros(shape, device="cpu"), model))


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    channels = image_channels(model)
    told = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = told.get("input_size") if isinstance(told, Mapping) else getattr(told, "input_size", None)
    if isinstance(size, tuple | list):  # as timm says it
        yield (1, channels, *size[1:])
    config = getattr(model, "config", None)  # as transformers says it
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        yield (1, getattr(config, "num_channels", channels), side, side)
    elif isinstance(side, tuple | list) and len(side) == 2:
        yield (1, getattr(config, "num_channels", channels), *side)
    try:
        axes = entry_of(model).axes
    except LayerNotFoundError:
        first = next((each for each in model.modules() if isinstance(each, nn.Linear)), None)
        if first is not None:
            yield (1, first.in_features)
        axes = 2
    yield from ((1, channels, *sides) for sides in _SIDES.get(axes, ()))


def _called_with(model: nn.Module, image: torch.Tensor) -> Inputs:
    """Return a call with an image: by the name it has in transformers, or as often as one must be given."""
    inner = unwrap(model)
    try:
        parameters = inspect.signature(inner.forward).parameters.values()
    except (TypeError, ValueError):
        return (image,), {}
    if any(each.name == "pixel_values" for each in parameters):
        return (), {"pixel_values": image}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.kind in kinds and each.default is inspect.Parameter.empty]
    return (image, *(image.clone() for _ in needed[1:])), {}
