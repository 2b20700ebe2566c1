"""`Sink`: where the tensors of a capture go, call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from torchlens_viz.errors import CaptureError

Opened = TypeVar("Opened", covariant=True)


class Sink(Protocol[Opened]):
    """What a `Capture` gives to: every tensor that its layers take or put out, and every call that ended.

    One sink serves all layers of a block, and is told which one each tensor is from.
    """

    __slots__ = ()

    @property
    def is_on_graph(self) -> bool:
        """Whether the network is to go on from what was kept, so that gradients pass through it."""
        return False

    def open(self, layers: Sequence[str]) -> Opened:
        """Begin, as the block is entered; return what `with` is to give.

        Args:
            layers: The names of all layers that are hooked.
        """

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Take in a tensor; return what is to stand for it in the record of the call.

        Args:
            tensor: What the layer took or put out, or what stands for it while torch.fx traces.
            layer: Its name; the first one where it has several.
        """

    def took(self, layer: str, taken: Any) -> None:
        """See what a layer took, as it is after the call; told where the network goes on from what is kept.

        Args:
            layer: Its name; the first one where it has several.
            taken: Its arguments, by position and by name.
        """
        return

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return what the network goes on from instead of a tensor; asked where this is on the graph."""
        return tensor

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Take note of a call that ended.

        Args:
            names: All names of the layer.
            kept: What it took or put out, with what `keep` returned in the place of each tensor.
        """
        return

    def missed(self, names: Sequence[str]) -> None:
        """Take note of a call in another thread, which is not recorded."""
        return

    def copied(self) -> None:
        """Take note that the model was copied, without the hooks of this block."""
        return

    def excuses(self, error: Exception) -> bool:
        """Tell whether the network goes on although this went wrong in a hook; else it is raised there."""
        return False

    def close(self) -> None:
        """End, as the block is left, however it is."""
        return


def real_tensor(tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> torch.Tensor:
    """Return what `keep` was given, if it has values of its own.

    Raises:
        CaptureError: It exists only within a transform such as `vmap`, or stands for a value while torch.fx
            traces.
    """
    if isinstance(tensor, torch.fx.Proxy):
        raise CaptureError(
            f"`{layer}` ran inside torch.fx.symbolic_trace, which computes no values: trace the model "
            "outside the `capture` block"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise CaptureError(
            f"`{layer}` ran inside torch.vmap or torch.func.grad, where its output exists only within "
            "the transform: capture a plain forward pass instead"
        )
    return tensor
