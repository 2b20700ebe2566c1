"""An independent record of a forward pass: `forward` is wrapped on each module, and no hook is used.

It shares no code with the library. A call is written down the moment the module's `forward` returns, in
memory of its own, so nothing that the network does later can change it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Frozen:
    """A structure taken apart: its type, its keys, and its items, each of them frozen."""

    kind: type
    keys: tuple
    items: tuple


@dataclass(frozen=True)
class Call:
    """One call of one module: all names it is reached by, what it was called with, what it returned."""

    names: tuple
    args: Frozen
    kwargs: Frozen
    output: object


def freeze(value, *, clone=True):
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if clone else value
    if isinstance(value, tuple | list):
        return Frozen(type(value), (), tuple(freeze(item, clone=clone) for item in value))
    if isinstance(value, dict):
        return Frozen(type(value), tuple(value), tuple(freeze(item, clone=clone) for item in value.values()))
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        return freeze_object(value, clone)
    return value


def freeze_object(value, clone):
    state = vars(value)
    return Frozen(type(value), tuple(state), tuple(freeze(item, clone=clone) for item in state.values()))


def same(actual, expected) -> bool:
    """Tell whether two frozen values have one structure and the same bits in every tensor."""
    if isinstance(expected, torch.Tensor):
        return isinstance(actual, torch.Tensor) and same_tensor(actual, expected)
    if not isinstance(expected, Frozen):
        return type(actual) is type(expected) and actual == expected
    return (
        isinstance(actual, Frozen)
        and (actual.kind, actual.keys) == (expected.kind, expected.keys)
        and len(actual.items) == len(expected.items)
        and all(map(same, actual.items, expected.items))
    )


def same_tensor(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if (actual.shape, actual.dtype, actual.device) != (expected.shape, expected.dtype, expected.device):
        return False
    if expected.is_quantized:
        scales = [(t.q_scale(), t.q_zero_point()) for t in (actual, expected)]
        return scales[0] == scales[1] and torch.equal(actual.int_repr(), expected.int_repr())
    return torch.equal(bits(actual), bits(expected))


def bits(value: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, so that NaN equals itself."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


class Recorder:
    """Records the calls of every module of a model while the block is active."""

    def __init__(self, model: nn.Module, *, inputs: bool = False) -> None:
        self.calls: list[Call] = []
        self._inputs = inputs
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)

    def __enter__(self) -> Recorder:
        for module in self._names:
            module.forward = functools.partial(self._forward, module, module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._names:
            del module.forward

    def _forward(self, module, forward, *args, **kwargs):
        taken = (freeze(args), freeze(kwargs)) if self._inputs else (None, None)
        output = forward(*args, **kwargs)
        self.calls.append(Call(tuple(self._names[module]), *taken, freeze(output)))
        return output

    def by_name(self) -> dict[str, list[Call]]:
        """Return the calls of each name, names in the order of their first call to return."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            for name in call.names:
                found.setdefault(name, []).append(call)
        return found

    def names(self) -> list[str]:
        """Return every name of every module, called or not, in definition order."""
        return [name for names in self._names.values() for name in names]
