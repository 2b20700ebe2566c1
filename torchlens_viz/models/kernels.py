"""The kernels of a layer, whatever kind of convolution it is, as one tensor (O, I, kH, kW)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.weight_norm import WeightNorm

from torchlens_viz.arguments import real_numbers
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.models.layers import Layer, Selector, named_layers, select_one
from torchlens_viz.models.state import inference


class Kernels(NamedTuple):
    """Kernels (O, I, kH, kW), detached, and the name of their layer, `""` where there is no model.

    Those of a 3-D convolution are (O, I, kD, kH, kW).
    """

    weight: torch.Tensor
    name: str


def kernels_of(model_or_weight: nn.Module | torch.Tensor, layer: Selector | None = None) -> Kernels:
    """Take the kernels from a model or from a weight tensor.

    Args:
        model_or_weight: A model, or kernels (O, I, kH, kW), (O, I, k) of a 1-D or (O, I, kD, kH, kW) of a 3-D
            convolution.
        layer: Which layer of the model, by a selector that finds exactly one; None is the first convolution.

    Returns:
        One filter per output channel: transposed convolutions, stored the other way round, too. Kernels of
        1-D convolutions are one pixel high. Quantised kernels are given as the numbers they stand for.

    Raises:
        LayerNotFoundError: There is no such layer, or no convolution.
        InvalidArgumentError: The layer has no kernels, `layer` finds several, or the kernels have no pixels.
        InvalidTypeError: The first argument is neither a model nor a tensor, or the kernels are no dense real
            numbers.
    """
    if isinstance(model_or_weight, torch.Tensor):
        if layer is not None:
            raise InvalidArgumentError("`layer` has no effect on a weight tensor; leave it out")
        return Kernels(_as_planes(_numbers(model_or_weight, "the weight"), "the weight"), "")
    if not isinstance(model_or_weight, nn.Module):
        raise InvalidTypeError(f"expected a model or a weight tensor, got {type(model_or_weight).__name__}")
    name, module = convolutions(model_or_weight)[0] if layer is None else select_one(model_or_weight, layer)
    weight = _stored_weight(module)
    if weight is None:
        raise InvalidArgumentError(f"`{name}` ({type(module).__name__}) has no kernels; choose a convolution")
    what = f"`{name}`" if name else "the weight"
    weight = _numbers(weight, what)
    if getattr(module, "transposed", False):
        # Stored as (in, out / groups, ...), the group being part of the input channel.
        grouped = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        weight = grouped.flatten(0, 1)
    return Kernels(_as_planes(weight, what), name)


def has_kernels(module: nn.Module) -> bool:
    """Tell whether a module is a convolution of any kind."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return any("Conv" in kind for kind in kinds) and _stored_weight(module) is not None


def convolutions(model: nn.Module) -> list[Layer]:
    """List the convolutions of a model, of every kind, in definition order.

    Raises:
        LayerNotFoundError: There is none.
    """
    found = [layer for layer in named_layers(model) if has_kernels(layer.module)]
    if found:
        return found
    raise LayerNotFoundError(
        f"the model ({type(model).__name__}) has no convolution; pass the weight of a layer as (O, I, kH, kW)"
    )


def _stored_weight(module: nn.Module) -> torch.Tensor | None:
    is_plain = "weight" in module._parameters and not hasattr(type(module), "weight")
    if is_plain and not module._forward_pre_hooks:  # nothing computes it anew
        return _if_kernels(module.weight)
    with inference(module):  # a spectral norm in training mode changes with every look at the weight
        weight = getattr(module, "weight", None)
        if callable(weight) and not isinstance(weight, torch.Tensor):
            weight = weight()  # quantised layers
        for hook in module._forward_pre_hooks.values():  # the attribute is of the last forward pass
            if isinstance(hook, WeightNorm) and hook.name == "weight":
                weight = hook.compute_weight(module)
    return _if_kernels(weight)


def _if_kernels(weight: object) -> torch.Tensor | None:
    if isinstance(weight, UninitializedParameter):
        return weight
    return weight if isinstance(weight, torch.Tensor) and weight.ndim >= 3 else None


def _numbers(weight: torch.Tensor, what: str) -> torch.Tensor:
    if isinstance(weight, UninitializedParameter):
        raise InvalidArgumentError(f"{what} has no values yet; run the model once on an input first")
    return real_numbers(weight, what)


def _as_planes(weight: torch.Tensor, what: str) -> torch.Tensor:
    if weight.ndim == 3:
        weight = weight[:, :, None]
    if weight.ndim not in (4, 5) or weight.numel() == 0:
        raise InvalidArgumentError(
            f"{what} must be (O, I, kH, kW) with at least one pixel, got shape {tuple(weight.shape)}"
        )
    return weight
