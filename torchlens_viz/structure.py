"""Nested values: apply a function to every tensor in what a layer took or gave, keeping its structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Return `value` with every tensor in it replaced by `function(tensor)`.

    Tuples, named tuples, lists, dicts (and subclasses of these), dataclasses and plain objects that hold
    tensors are rebuilt, so that the original never changes; whatever holds no tensor is returned as it is.
    """
    return _map(function, value, set())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in a nested value, in order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    yield from found


def _map(function: Callable[[torch.Tensor], Any], value: Any, open_: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if value is None or isinstance(value, str | bytes | int | float | complex | type | nn.Module):
        return value
    if id(value) in open_:  # a value that contains itself
        return value
    open_.add(id(value))
    try:
        if isinstance(value, tuple | list):
            return _map_sequence(function, value, open_)
        if isinstance(value, Mapping):
            return _map_mapping(function, value, open_)
        return _map_object(function, value, open_)
    finally:
        open_.discard(id(value))


def _map_sequence(function: Callable[[torch.Tensor], Any], value: Any, open_: set[int]) -> Any:
    items = [_map(function, item, open_) for item in value]
    if _same(items, value):
        return value
    make = getattr(type(value), "_make", type(value))  # a named tuple takes its fields one by one
    return make(items)


def _map_mapping(function: Callable[[torch.Tensor], Any], value: Any, open_: set[int]) -> Any:
    items = {key: _map(function, item, open_) for key, item in value.items()}
    if _same(items.values(), value.values()):
        return value
    if type(value) is dict:
        return items
    rebuilt = copy.copy(value)
    for key, item in items.items():
        rebuilt[key] = item
    return rebuilt


def _map_object(function: Callable[[torch.Tensor], Any], value: Any, open_: set[int]) -> Any:
    names = [*getattr(value, "__dataclass_fields__", ()), *getattr(value, "__dict__", ())]
    before = {name: getattr(value, name) for name in names if hasattr(value, name)}
    after = {name: _map(function, item, open_) for name, item in before.items()}
    if _same(after.values(), before.values()):
        return value
    rebuilt = copy.copy(value)
    for name, item in after.items():
        object.__setattr__(rebuilt, name, item)  # frozen dataclasses too
    return rebuilt


def _same(after: Any, before: Any) -> bool:
    return all(new is old for new, old in zip(after, before, strict=True))
