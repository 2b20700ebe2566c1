"""The calls of hooked layers that are going on: what each took, and what it was given instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from torchlens_viz.nested import map_tensors


@dataclass(frozen=True, slots=True)
class Exchange:
    """A tensor that a layer was to take, and the one of the same values that it was given instead.

    Attributes:
        tensor: The network's own.
        given: What the layer works on.
        version: How often `given` had been written to before.
    """

    tensor: torch.Tensor
    given: torch.Tensor
    version: int

    def settle(self) -> None:
        """Do to the network's tensor what the layer did in place to the one it was given."""
        if self.given._version != self.version:
            self.tensor.copy_(self.given)


def exchanged(exchanges: Sequence[Exchange], value: Any) -> Any:
    """Return a nested value with what was given in the place of the network's own tensors."""
    given = {id(exchange.tensor): exchange.given for exchange in exchanges}
    return map_tensors(lambda tensor: given.get(id(tensor), tensor), value)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer that has not returned yet.

    Attributes:
        module: The layer.
        kwargs: The very dict of keyword arguments, by which calls of one module are told apart.
        taken: What is kept of what it took.
        exchanges: What it was given instead of what it was to take.
    """

    module: nn.Module
    kwargs: dict[str, Any]
    taken: Any
    exchanges: tuple[Exchange, ...]


@final
class Calls:
    """A stack of calls: layers hold layers, which return first."""

    def __init__(self) -> None:
        self._open: list[Call] = []

    def begin(self, call: Call) -> None:
        """Take note of a call."""
        self._open.append(call)

    def end(self, module: nn.Module, kwargs: dict[str, Any]) -> Call | None:
        """Return the call that returns now, or None where it had begun before there were hooks."""
        # Calls above its own failed and were caught inside the model, perhaps calls of the same module. Each
        # has its own dict of keyword arguments, unless another hook replaced it.
        own = [place for place, call in enumerate(self._open) if call.module is module]
        exact = [place for place in own if self._open[place].kwargs is kwargs]
        place = max(exact or own, default=None)
        if place is None:
            return None
        call = self._open[place]
        del self._open[place:]
        return call

    def clear(self) -> None:
        """Forget all calls, which will not return."""
        self._open.clear()
