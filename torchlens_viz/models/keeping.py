"""Leaving a model as it was: its weights, buffers, attributes and flags, and all random numbers."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import is_
from typing import Any, Final, final

import numpy as np
import torch
from torch import nn

from torchlens_viz.models.watching import Restoring, address_of

_GENERATORS: Final = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_CONTAINERS: Final = (list, set, dict, OrderedDict, defaultdict, Counter)
_PARTS: Final = ("_parameters", "_modules")
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
    own = [_rewinding(held) for held in _held_by(modules, _GENERATORS)]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for rewind in own:
            rewind()


def _held_by(modules: Sequence[nn.Module], kinds: tuple[type, ...]) -> list[Any]:
    """Return what modules have of some kinds; each type is asked once, as that takes some of torch's long."""
    held = [value for module in modules for value in vars(module).values()]
    chosen = {kind for kind in set(map(type, held)) if issubclass(kind, kinds)}
    return [value for value in held if type(value) in chosen]


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
    """Give a model back its weights: the parameters it has, and what they held.

    What operations write to them is seen within what the block is given. Where there was anything to give
    back, modules get their attributes back as well, since a model may note that it has folded an update into
    its weights. Else those, such as a count of calls, are what the model makes of them.
    """
    is_sharded = _is_sharded(modules)
    known = {id(each): each for module in modules for each in module._parameters.values() if each is not None}
    plain = _held_by(modules, (torch.Tensor,))
    weights = [] if is_sharded else [each for each in (*known.values(), *plain) if address_of(each)]
    before = [(weight, weight.data) for weight in weights]
    writes = Restoring(weights)
    attributes = _Attributes([] if is_sharded else modules)
    try:
        yield writes.on
    finally:
        is_changed = writes.restore() | attributes.restore_parts()
        for weight, values in before:
            if address_of(weight) != address_of(values):  # `weight.data` was replaced
                weight.data = values
                is_changed = True
        if is_changed:
            attributes.restore()


@contextmanager
def same_attributes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give modules back the attributes that they have now, and what those list."""
    attributes = _Attributes(modules)
    try:
        yield
    finally:
        attributes.restore_parts()
        attributes.restore()


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
    """What the modules of a model have, but for what every module has and a pass has no business with."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # Those in TorchScript keep them elsewhere.
        modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        parts = [vars(module)[kind] for module in modules for kind in _PARTS]
        self._parts = [(held, copy.copy(held)) for held in parts]
        self._own = [(module, self._of(module)) for module in modules]
        listed = [value for _, own in self._own for value in own.values() if type(value) in _CONTAINERS]
        self._listed = [(held, copy.copy(held)) for held in listed]

    @staticmethod
    def _of(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in _EVERYWHERE}

    def restore_parts(self) -> bool:
        """Give modules back the parameters and modules they had; return whether they had others."""
        changed = [_refill(held, content) for held, content in self._parts]
        return any(changed)

    def restore(self) -> None:
        """Give modules back all else."""
        for module, before in self._own:
            own = vars(module)
            for name in self._of(module).keys() - before.keys():
                del own[name]
            own.update(before)
        for held, content in self._listed:
            _refill(held, content)


def _is_sharded(modules: Sequence[nn.Module]) -> bool:
    kinds = {base for kind in set(map(type, modules)) for base in kind.__mro__}
    return any(kind.__module__.startswith(_SHARDING) for kind in kinds)


def _refill(held: Any, content: Any) -> bool:
    """Let a container hold what it held; return whether that has changed."""
    is_same = len(held) == len(content) and all(map(is_, held, content))
    if is_same and isinstance(held, dict):
        is_same = all(map(is_, held.values(), content.values()))
    if not is_same:
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(content)
    return not is_same


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
    try:
        yield
    finally:
        for buffer, value in values:
            with torch.inference_mode(buffer.is_inference()):
                buffer.data.copy_(value)  # `data`, so that what was saved for a backward pass stays valid
        for buffers, own in before:
            buffers.clear()
            buffers.update(own)
