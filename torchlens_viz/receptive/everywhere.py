"""Receptive fields of many layers at once: one pass of the model instead of one per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_unhookable
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import Layer, unwrap
from torchlens_viz.models.state import inference
from torchlens_viz.nested import leaves, map_leaves
from torchlens_viz.receptive.dependence import Dependence
from torchlens_viz.receptive.extents import Extents
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import field_of

_MOST_NUMBERS: Final = 2**26  # that the extents of one tensor may take: 256 MiB


def receptive_fields(
    model: nn.Module,
    layers: Sequence[Layer],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    channel_dims: Mapping[str, int | None],
) -> dict[str, ReceptiveField]:
    """Find which region of the input each position of each layer sees, as far as the geometry tells.

    Unlike `receptive_field` nothing is measured: where the model does something that has no rule, or where
    dependence would take more than 256 MiB for one tensor, the layers after that are left out. So are those
    that put out several tensors, or do not depend on the input.

    Args:
        model: The model; it may be on the meta device, since no weight is looked at.
        layers: Layers of it.
        args: What it takes by position.
        kwargs: What it takes by name. The first tensor of either that is an image batch, (N, C, ...) with one
            to three spatial axes, is the input that regions lie in.
        channel_dims: For each layer, which dimension of what it puts out counts channels, if that is known.

    Returns:
        The receptive field of each layer that has one, by name. Of several calls, the first counts.
    """
    image = next((each for each in leaves(torch.Tensor, (args, kwargs)) if _is_batch(each)), None)
    if image is None:
        return {}
    shape = (1, *image.shape[1:])
    extents = Extents.of_input(shape)
    args, kwargs = map_leaves(
        torch.Tensor, lambda each: extents if each is image else each.clone(), (tuple(args), dict(kwargs))
    )
    sink = _Fields(shape, channel_dims)
    check = partial(refuse_unhookable, model, layers, stop=False, compiled="eager")
    try:
        with inference(model), Dependence(_MOST_NUMBERS), Capture(unwrap(model), layers, check, sink):
            model(*args, **kwargs)
    except Exception:  # whatever it is that extents cannot do, what ran before is known
        pass
    return {name: field for name, field in sink.found.items() if field is not None}


def _is_batch(tensor: torch.Tensor) -> bool:
    return 3 <= tensor.ndim <= 5 and tensor.is_floating_point() and tensor.numel() > 0


@final
class _Fields(Sink[None]):
    """Finds the field of each layer as it first puts something out: later operations may change that.

    Args:
        shape: The shape of the input.
        channel_dims: Where each layer has its channels.
    """

    __slots__ = ("_channel_dims", "_shape", "found")

    def __init__(self, shape: tuple[int, ...], channel_dims: Mapping[str, int | None]) -> None:
        self.found: dict[str, ReceptiveField | None] = {}
        self._shape = shape
        self._channel_dims = channel_dims

    def open(self, layers: Sequence[str]) -> None:
        """Begin."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Keep a tensor until the call is recorded, which is before the network goes on."""
        return tensor

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Find the field of a layer in its first call; None where it puts out several tensors."""
        if names[0] in self.found:
            return
        outputs = leaves(torch.Tensor, kept)
        field = None
        if len(outputs) == 1 and isinstance(outputs[0], Extents):
            with suppress(InvalidArgumentError):  # it does not depend on the image
                field = field_of(outputs[0], names[0], self._shape, self._channel_dims.get(names[0]))
        self.found.update(dict.fromkeys(names, field))
