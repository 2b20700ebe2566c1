"""Which call of a layer of one network is to be held against which call of another's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from torch import nn
from torch.nn.modules import batchnorm

Match: TypeAlias = Literal["name", "order"] | Mapping[str, str]

# What hands its input on in eval mode, so that it may be there in one network and not in the other.
_IDLE: Final = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# What a convolution or a dense layer before it is fused with.
_RECTIFIERS: Final = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.Tanh)
# torch.export appends it to the names of layers that are called several times.
_CALL_SUFFIX: Final = re.compile(r"@\d+")


class Call(NamedTuple):
    """One call of a layer in the forward pass of a batch.

    Attributes:
        layer: The layer's name.
        number: Which of its calls, from 0.
    """

    layer: str
    number: int

    def __str__(self) -> str:
        return f"{self.layer} [call {self.number}]" if self.number else self.layer


def plain_name(name: str) -> str:
    """Return the name of a layer in the network that an exported one was made from."""
    return _CALL_SUFFIX.sub("", name)


def has_place(module: nn.Module) -> bool:
    """Tell whether a module has a place in the order of layers: whether it computes something."""
    return not isinstance(module, _IDLE)


def is_layer(module: nn.Module) -> bool:
    """Tell the same of a module that nobody chose: what has parts of its own has no place."""
    return has_place(module) and not module._modules


def by_name(
    order: Sequence[Call], a: Mapping[str, nn.Module], b: Mapping[str, nn.Module]
) -> tuple[dict[Call, Call], dict[str, str]]:
    """Match calls by name, and where layers were folded into one, at the last of them.

    A batch normalisation that is gone, or has become an `nn.Identity`, was folded into the layer before it:
    what that layer puts out in `b` is what the normalisation puts out in `a`. The same holds for a rectifier,
    if the layer in `b` is one of torch's fused ones.

    Args:
        order: The calls of `a` in the order in which they ended.
        a: Its modules by name.
        b: The other's.

    Returns:
        The call of `a` for each call of `b` that has one, and for each layer of `a` that was folded, the
        layer of `a` where it is looked at.
    """
    folded: dict[str, str] = {}
    found = {call: call for call in order if call.layer in b}
    leaves = [call for call in order if not a[call.layer]._modules]
    place = 0
    while place < len(leaves):
        start, end = leaves[place], place + 1
        while end < len(leaves) and _is_folded(start, leaves[end], a, b):
            end += 1
        last = leaves[end - 1]
        for call in leaves[place : end - 1]:
            found.pop(call, None)
            folded[call.layer] = last.layer
        if last is not start and last.layer not in b:
            found[start] = last
        place = end
    return found, folded


def _is_folded(start: Call, call: Call, a: Mapping[str, nn.Module], b: Mapping[str, nn.Module]) -> bool:
    """Tell whether a layer of `a` is, in `b`, part of the layer `start`."""
    if start.layer not in b or getattr(a[start.layer], "weight", None) is None:
        return False
    module, other = a[call.layer], b.get(call.layer)
    if other is not None and not isinstance(other, nn.Identity):
        return False
    if isinstance(module, batchnorm._BatchNorm):
        return True
    is_fused = "intrinsic" in type(b[start.layer]).__module__
    return isinstance(module, _RECTIFIERS) and (other is not None or is_fused)
