"""Where a network goes on from: maps of layers as leaves of the graph, or without one of their channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch

from torchlens_viz.hooks.sink import Sink, real_tensor
from torchlens_viz.nested import tensors


class Passage(NamedTuple):
    """What a layer put out, and what the network went on from instead.

    Attributes:
        layer: The layer's name.
        tensor: What it put out.
        given: The same values in memory of their own.
        written: How often each of them had been written to.
    """

    layer: str
    tensor: torch.Tensor
    given: torch.Tensor
    written: tuple[int, int]


@final
class Leaves(Sink[None]):
    """Makes what layers put out leaves of the graph, or keeps it on the graph where there is one already.

    Attributes:
        calls: What each layer put out, call by call.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}
        self._passages: list[Passage] = []
        self._taken: set[int] = set()

    def shared(self) -> list[str]:
        """Return the layers after which the network may have gone on otherwise than it does by itself.

        They put out memory that they took, as an identity does and a view, and one of both was written to
        later, which the other one did not see.
        """
        return [
            layer
            for layer, tensor, given, written in self._passages
            if (tensor._version, given._version) != written and _place(tensor) in self._taken
        ]

    @property
    def is_on_graph(self) -> bool:
        """Whether the network goes on from what is kept."""
        return True

    def open(self, layers: Sequence[str]) -> None:
        """Begin."""

    def took(self, layer: str, taken: Any) -> None:
        """Take note of the memory that a layer took."""
        self._taken |= {_place(each) for each in tensors(taken)}

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> torch.Tensor:
        """Return the leaf."""
        values = real_tensor(tensor, layer)
        if values.requires_grad or not values.is_floating_point():
            return values.clone()
        return values.detach().clone().requires_grad_()

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return the same values, to which the network may write."""
        given = torch.Tensor.clone(kept)
        self._passages.append(Passage(layer, tensor, given, (tensor._version, given._version)))
        return given

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Take note of a call, under each name of the layer."""
        for name in names:
            self.calls.setdefault(name, []).append(kept)


@final
class Muted(Sink[None]):
    """Lets the network go on from maps with one channel at zero, another one in each part of the batch.

    Args:
        images: How many images each part has.
        channel_dim: The dimension that counts channels.
        channels: Which channels, one for each part.
        intact: How many parts without any change come before.
    """

    def __init__(self, images: int, channel_dim: int, channels: Sequence[int], *, intact: int) -> None:
        self._images = images
        self._dim = channel_dim
        self._channels = channels
        self._intact = intact

    @property
    def is_on_graph(self) -> bool:
        """Whether the network goes on from something else."""
        return True

    def open(self, layers: Sequence[str]) -> None:
        """Begin."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> None:
        """Keep nothing."""

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return the maps as often as there are channels, after those that are intact."""
        parts = len(self._channels) + self._intact
        repeats = parts * self._images // len(tensor)
        values = tensor.repeat(repeats, *[1] * (tensor.ndim - 1))
        by_channel = values.movedim(self._dim, 1)
        for part, channel in enumerate(self._channels, self._intact):
            by_channel[part * self._images : (part + 1) * self._images, channel] = 0
        return values


def _place(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins; 0 where it has none of its own, as subclasses may."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
