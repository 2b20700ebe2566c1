"""Leaving a model as it was: its weights, buffers, attributes and flags, and all random numbers."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Any, Final, final

import numpy as np
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from torchlens_viz.models.watching import Restoring, address_of

_GENERATORS: Final = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_CONTAINERS: Final = (list, set, deque, dict, OrderedDict, defaultdict, Counter)
_PLAIN: Final = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
_PARTS: Final = ("_parameters", "_modules", "_non_persistent_buffers_set")
_EVERYWHERE: Final = vars(nn.Module()).keys()  # hooks, for one
# Wrappers that keep track of weights themselves, which are sharded or gathered as they see fit.
_SHARDING: Final = ("torch.distributed", "deepspeed")


@contextmanager
def same_random_numbers(modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Let random numbers go on, afterwards, as if nothing had run: Python's, numpy's and torch's.

    Args:
        modules: Let those of generators that these hold do so too.
    """
    python, legacy = random.getstate(), np.random.get_state()
    own = [_rewinding(held) for held in _held_by(modules) if isinstance(held, _GENERATORS)]
    try:
        # To look at those of a device would start CUDA, which a process that was forked cannot.
        is_running = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count() if is_running else 0
        with torch.random.fork_rng(devices=range(count)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for rewind in own:
            rewind()


def _held_by(modules: Sequence[nn.Module]) -> list[Any]:
    """Return what modules hold beside what every module has, and what stands in that.

    That is in containers, and in objects of classes that are written beside that of the module.
    """
    found: list[Any] = []
    seen: set[int] = set()
    for module in modules:
        home = type(module).__module__
        waiting: list[Any] = [
            value
            for name, value in vars(module).items()
            if name not in _EVERYWHERE and type(value) not in _PLAIN
        ]
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            found.append(value)
            waiting += [part for part in _parts_of(value, home) if type(part) not in _PLAIN]
    return found


def _parts_of(value: Any, home: str) -> Iterable[Any]:
    kind = type(value)
    if kind is tuple or kind in _CONTAINERS:
        return value.values() if isinstance(value, dict) else value
    is_own = kind is SimpleNamespace or (kind.__module__ == home and not callable(value))
    if is_own and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        return (vars(value),)
    return ()


def _rewinding(generator: Any) -> Callable[[], object]:
    """Return what sets a generator back to where it is now."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


@contextmanager
def same_weights(modules: Sequence[nn.Module]) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Give a model back its weights, what is known of them, and the attributes of its modules.

    Those are the parameters it has, what they held, their gradients and whether they require any; and
    whatever else a pass may leave behind, such as a count of calls, a note that an update was folded into the
    weights, or values that were kept for the next time, which have no graph here. What operations write to
    weights is seen within what the block is given.
    """
    is_sharded = _is_sharded(modules)
    known = {id(each): each for module in modules for each in module._parameters.values() if each is not None}
    held = [] if is_sharded else _held_by(modules)
    plain = [each for each in held if isinstance(each, torch.Tensor)]
    weights = [] if is_sharded else [each for each in (*known.values(), *plain) if address_of(each)]
    before = [(weight, weight.data) for weight in weights]
    asked = [(each, each.requires_grad, each.grad) for each in weights if each.is_leaf]
    writes = Restoring([*weights, *(grad for _, _, grad in asked if grad is not None)])
    attributes = _Attributes([] if is_sharded else modules, held)
    with _same_versions(weights):
        try:
            yield writes.on
        finally:
            writes.restore()
            attributes.restore()
            for weight, values in before:
                if address_of(weight) != address_of(values):  # `weight.data` was replaced
                    weight.data = values
            for weight, requires_grad, grad in asked:
                if weight.requires_grad != requires_grad:
                    weight.requires_grad_(requires_grad)
                if weight.grad is not grad:
                    weight.grad = grad


def _same_versions(tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """Let what is written within the block, and given back, not count as written.

    Else a backward pass whose forward pass came before would be refused.
    """
    counted = tuple(each for each in tensors if not each.is_inference())
    return _unsafe_preserve_version_counter(counted)


@contextmanager
def same_flags(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give every module its own `training` flag back."""
    flags = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in flags:
            if "training" in vars(module):
                vars(module)["training"] = training
            elif module.training != training:  # a property, or kept elsewhere
                module.training = training


@final
class _Attributes:
    """What the modules of a model have, but for what every module has and a pass has no business with.

    Args:
        modules: The modules.
        held: What `_held_by` finds in them.
    """

    def __init__(self, modules: Sequence[nn.Module], held: Sequence[Any]) -> None:
        # Those in TorchScript keep them elsewhere.
        modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        parts = [vars(module)[kind] for module in modules for kind in _PARTS]
        listed = [each for each in held if type(each) in _CONTAINERS]
        self._listed = [(each, copy.copy(each)) for each in (*parts, *listed)]
        self._own = [(module, self._of(module)) for module in modules]
        self._arrays = [(each, each.copy()) for each in held if type(each) is np.ndarray]

    @staticmethod
    def _of(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in _EVERYWHERE}

    def restore(self) -> None:
        """Give modules back the parameters, modules and attributes they had, and what those hold."""
        for module, before in self._own:
            own = vars(module)
            for name in self._of(module).keys() - before.keys():
                del own[name]
            own.update(before)
        for held, content in self._listed:
            _refill(held, content)
        for array, values in self._arrays:
            if not np.array_equal(array, values):
                array[...] = values


@contextmanager
def same_attributes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give modules back the attributes they have, and what those list, where no operation runs."""
    attributes = _Attributes(modules, _held_by(modules))
    try:
        yield
    finally:
        attributes.restore()


def _is_sharded(modules: Sequence[nn.Module]) -> bool:
    kinds = {base for kind in set(map(type, modules)) for base in kind.__mro__}
    return any(kind.__module__.startswith(_SHARDING) for kind in kinds)


def _refill(held: Any, content: Any) -> None:
    """Let a container hold what it held."""
    is_same = len(held) == len(content) and all(map(is_, held, content))
    if is_same and isinstance(held, dict):
        is_same = all(map(is_, held.values(), content.values()))
    if not is_same:
        held.clear()
        (held.extend if isinstance(held, list | deque) else held.update)(content)


@contextmanager
def same_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give every buffer its values back: observers of quantisation, for one, learn in eval mode as well."""
    before = [
        (module._buffers, dict(module._buffers))
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)  # whose buffers stay the same tensors
    ]
    known = {id(each): each for module in modules for each in module._buffers.values() if each is not None}
    values = [(buffer, buffer.clone()) for buffer in known.values()]
    with _same_versions([*known.values()]):
        try:
            yield
        finally:
            for buffer, value in values:
                with torch.inference_mode(buffer.is_inference()):
                    buffer.data.copy_(value)
            for buffers, own in before:
                buffers.clear()
                buffers.update(own)
