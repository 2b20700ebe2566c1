"""Nested values: apply a function to every tensor in what a layer took or gave, keeping its structure."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx, nn

# By id: the value, which is kept alive; what replaces it; whether a tensor is in it.
_Seen: TypeAlias = dict[int, tuple[Any, Any, bool]]
_Mapped: TypeAlias = tuple[Any, bool]  # what replaces a value, and whether a tensor is in it
_Kinds: TypeAlias = type | tuple[type, ...]

# Containers that are copied even where no tensor is in them: a network may go on writing to them.
_COPIED = frozenset({list, set, deque, dict, OrderedDict, defaultdict})
# Containers that are nothing but their items.
_BARE = _COPIED | {tuple, frozenset, torch.Size}


def map_tensors(function: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` with every tensor in it replaced by `function(tensor)`.

    Tuples, named tuples, lists, sets, deques, mappings, dataclasses and plain objects that hold tensors are
    rebuilt, so that the original never changes, and so are lists and dicts without one, so that they do not
    change either. Other objects that hold no tensor are returned as they are.
    What occurs twice is replaced once, by one and the same thing.
    """
    if isinstance(value, torch.Tensor):  # nearly always, and on the path of every call
        return function(value)
    # A proxy stands for a tensor while torch.fx traces.
    return map_leaves((torch.Tensor, fx.Proxy), function, value)


def cloned(value: Any) -> Any:
    """Return the same with a copy of every tensor, which a network may write to."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in a nested value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    yield from leaves((torch.Tensor, fx.Proxy), value)


def map_leaves(kinds: _Kinds, function: Callable[[Any], Any], value: Any) -> Any:
    """Do as `map_tensors` with every instance of `kinds`, whatever it holds itself."""
    return _map(kinds, function, value, {})[0]


def leaves(kinds: _Kinds, value: Any) -> list[Any]:
    """List every instance of `kinds` in a nested value, in order."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_leaves(kinds, note, value)
    return found


def _map(kinds: _Kinds, function: Callable[[Any], Any], value: Any, seen: _Seen) -> _Mapped:
    if value is None or isinstance(value, str | bytes | int | float | complex | type | nn.Module):
        return value, False
    if id(value) in seen:
        return seen[id(value)][1:]
    seen[id(value)] = (value, value, False)  # what a value that contains itself finds there
    if isinstance(value, kinds):
        result, holds = function(value), True
    elif isinstance(value, tuple | list | set | frozenset | deque):
        result, holds = _map_sequence(kinds, function, value, seen)
    elif isinstance(value, Mapping):
        result, holds = _map_mapping(kinds, function, value, seen)
    else:
        result, holds = _map_object(kinds, function, value, seen)
    seen[id(value)] = (value, result, holds)
    return result, holds


def _map_sequence(kinds: _Kinds, function: Callable[[Any], Any], value: Any, seen: _Seen) -> _Mapped:
    mapped = [_map(kinds, function, item, seen) for item in value]
    items, state = [item for item, _ in mapped], _map_state(kinds, function, value, seen)
    holds = any(holds for _, holds in (*mapped, *state.values()))
    can_change = isinstance(value, list | set | deque)
    if not holds and (type(value) not in _COPIED if can_change else _same(items, value)):
        return value, False
    if can_change:
        rebuilt = copy.copy(value)  # a subclass, or a deque, knows more than its items
        rebuilt.clear()
        (rebuilt.update if isinstance(rebuilt, set) else rebuilt.extend)(items)
    else:
        kind = tuple if isinstance(value, tuple) else frozenset
        try:
            rebuilt = kind.__new__(type(value), items)  # its own constructor may want something else
        except TypeError:  # not so what torch.max and its kin return
            rebuilt = type(value)(items)
    _set_state(rebuilt, state)
    return rebuilt, holds


def _map_mapping(kinds: _Kinds, function: Callable[[Any], Any], value: Any, seen: _Seen) -> _Mapped:
    mapped = {key: _map(kinds, function, item, seen) for key, item in value.items()}
    items, state = {key: item for key, (item, _) in mapped.items()}, _map_state(kinds, function, value, seen)
    holds = any(holds for _, holds in (*mapped.values(), *state.values()))
    if not holds and type(value) not in _COPIED:
        return value, False
    if type(value) is dict:
        return items, holds
    if isinstance(value, dict | UserDict):
        rebuilt = copy.copy(value)
        for key, item in items.items():
            rebuilt[key] = item
        _set_state(rebuilt, state)
        return rebuilt, holds
    rebuilds: tuple[Callable[[], Any], ...] = (
        lambda: _set_state(copy.copy(value), state),
        lambda: type(value)(items),
    )
    for rebuild in rebuilds:
        try:
            rebuilt = rebuild()
            if list(rebuilt) == list(items) and _same([rebuilt[key] for key in items], items.values()):
                return rebuilt, holds
        except Exception:  # a class of the caller's, which may want anything
            continue
    return items, holds


def _map_object(kinds: _Kinds, function: Callable[[Any], Any], value: Any, seen: _Seen) -> _Mapped:
    state = _map_state(kinds, function, value, seen)
    if not any(holds for _, holds in state.values()):
        return value, False
    return _set_state(copy.copy(value), state), True


def _map_state(kinds: _Kinds, function: Callable[[Any], Any], value: Any, seen: _Seen) -> dict[str, _Mapped]:
    """Map what an object holds in attributes; the builtin containers have none."""
    if type(value) in _BARE:
        return {}
    return {name: _map(kinds, function, getattr(value, name), seen) for name in _attributes(value)}


def _set_state(rebuilt: Any, state: Mapping[str, _Mapped]) -> Any:
    for name, (item, _) in state.items():
        object.__setattr__(rebuilt, name, item)  # frozen dataclasses too
    return rebuilt


def _attributes(value: Any) -> Iterator[str]:
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                yield name
    yield from getattr(value, "__dict__", ())


def _same(after: Any, before: Any) -> bool:
    return all(new is old for new, old in zip(after, before, strict=True))
