"""What is kept as part of the network's graph, so that gradients reach it.

Nothing here saves a tensor for backward: checkpointing counts those, and what it runs again has none of this.
"""

from __future__ import annotations

from typing import Any

import torch


def select_channels(
    tensor: torch.Tensor, dim: int, channels: tuple[int, ...], *, on_graph: bool
) -> torch.Tensor:
    """Return chosen channels of a tensor, in memory of their own.

    Args:
        tensor: Of any shape.
        dim: The dimension that counts channels.
        channels: Which ones, from 0.
        on_graph: Whether gradients are to reach `tensor`.
    """
    if on_graph:
        selected: torch.Tensor = _Selection.apply(tensor, dim, channels)
        return selected
    return _select(tensor, dim, channels)


def passage(
    tensor: torch.Tensor, kept: torch.Tensor, dim: int | None, channels: tuple[int, ...] | None
) -> torch.Tensor:
    """Return the values of a tensor in memory of its own, of which the gradient goes to what was kept of it.

    Args:
        tensor: Of any shape; to it goes what of the gradient is not of what was kept, or finer than its type.
        kept: What was made of it: all of it or `channels`, of any type and on any device.
        dim: The dimension that counts channels, where some were chosen.
        channels: Which ones; None is all.
    """
    passed: torch.Tensor = _Passage.apply(tensor, kept, dim, channels)
    return passed


def _select(tensor: torch.Tensor, dim: int, channels: tuple[int, ...]) -> torch.Tensor:
    return tensor.index_select(dim, _index(channels, tensor.device))


def _index(channels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(channels, device="cpu").to(device, non_blocking=True)


class _Selection(torch.autograd.Function):
    """Chosen channels of a tensor."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, dim: int, channels: tuple[int, ...]) -> torch.Tensor:
        context.dim, context.channels, context.shape = dim, channels, tensor.shape
        return _select(tensor, dim, channels)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        index = _index(context.channels, gradient.device)
        whole = gradient.new_zeros(context.shape).index_copy(context.dim, index, gradient)
        return whole, None, None


class _Passage(torch.autograd.Function):
    """The values of one tensor, with the gradient of another that was made of it, or of its channels."""

    @staticmethod
    def forward(
        context: Any,
        tensor: torch.Tensor,
        kept: torch.Tensor,
        dim: int | None,
        channels: tuple[int, ...] | None,
    ) -> torch.Tensor:
        context.dim, context.channels, context.like = dim, channels, (kept.dtype, kept.device)
        return tensor.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        if context.channels is None:
            told, rest = _told(gradient, context.like)
            return rest, told, None, None
        index = _index(context.channels, gradient.device)
        told, rest = _told(gradient.index_select(context.dim, index), context.like)
        others = gradient.index_fill(context.dim, index, 0)
        if rest is not None:
            others = others.index_copy(context.dim, index, rest)
        return others, told, None, None


def _told(
    gradient: torch.Tensor, like: tuple[torch.dtype, torch.device]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a gradient in another type, and what that type does not hold of it, so that no other changes."""
    dtype, device = like
    told = gradient.to(device, dtype)
    if torch.promote_types(dtype, gradient.dtype) == dtype:
        return told, None
    back = told.to(gradient)
    return told, (gradient - back).masked_fill(~back.isfinite(), 0)
