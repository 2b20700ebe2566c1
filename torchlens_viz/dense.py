"""Tensors that hold plain numbers, one per element; all others are refused, with what to make of them."""

from __future__ import annotations

import torch

from torchlens_viz.errors import InvalidTypeError


def check_dense(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor without one place in memory for every element; costs two looks at attributes.

    Args:
        tensor: Any tensor.
        what: What the caller calls it.

    Raises:
        InvalidTypeError: It is sparse, nested or in a layout of a library's own.
    """
    if tensor.is_nested:
        raise InvalidTypeError(
            f"{what} must be one dense tensor, got a nested one; take its parts one by one with `.unbind()`"
        )
    if tensor.layout is not torch.strided:
        raise InvalidTypeError(
            f"{what} must be a dense tensor, got layout {tensor.layout}; convert it with `.to_dense()`"
        )


def real_numbers(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return the numbers of a tensor, detached; of a quantised one those that it stands for.

    Args:
        tensor: Any tensor.
        what: What the caller calls it.

    Raises:
        InvalidTypeError: It is not dense, or it holds complex numbers or none.
    """
    check_dense(tensor, what)
    if tensor.is_meta or tensor.is_complex():
        remedy = "load its values first" if tensor.is_meta else "take its `.real` part or its `.abs()`"
        raise InvalidTypeError(
            f"{what} must hold real numbers to draw, got {tensor.dtype} on {tensor.device}; {remedy}"
        )
    tensor = tensor.detach()
    return tensor.dequantize() if tensor.is_quantized else tensor
