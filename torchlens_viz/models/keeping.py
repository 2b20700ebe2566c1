"""Leaving a model as it was: its weights, buffers, attributes and flags, and all random numbers."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
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
def same_random_numbers(model: nn.Module | None = None) -> Iterator[None]:
    """Let random numbers go on, afterwards, as if nothing had run: Python's, numpy's and torch's.

    Args:
        model: Let those of generators that its modules hold do so too.
    """
    python, legacy = random.getstate(), np.random.get_state()
    own = [] if model is None else [_rewinding(held) for held in _generators(model)]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for rewind in own:
            rewind()


def _generators(model: nn.Module) -> list[Any]:
    held = (value for module in model.modules() for value in vars(module).values())
    return [value for value in held if isinstance(value, _GENERATORS)]


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
def same_weights(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Give a model back its weights: the parameters it has, and what they held.

    What operations write to them is seen within what the block is given. Where there was anything to give
    back, modules get their attributes back as well, since a model may note that it has folded an update into
    its weights. Else those, such as a count of calls, are what the model makes of them.
    """
    plain = [value for module in model.modules() for value in vars(module).values()]
    tensors = [*model.parameters(), *(value for value in plain if isinstance(value, torch.Tensor))]
    weights = [] if _is_sharded(model) else [tensor for tensor in tensors if address_of(tensor)]
    before = [(weight, weight.data) for weight in weights]
    writes = Restoring(weights)
    attributes = _Attributes(model)
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
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Give modules back the attributes that they have now, and what those list."""
    attributes = _Attributes(model)
    try:
        yield
    finally:
        attributes.restore_parts()
        attributes.restore()


@contextmanager
def same_flags(model: nn.Module) -> Iterator[None]:
    """Give every module its own `training` flag back."""
    flags = [(module, module.training) for module in model.modules()]
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

    def __init__(self, model: nn.Module) -> None:
        # Modules in TorchScript keep their attributes elsewhere.
        is_theirs = nn.Module if _is_sharded(model) else torch.jit.ScriptModule
        modules = [module for module in model.modules() if not isinstance(module, is_theirs)]
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


def _is_sharded(model: nn.Module) -> bool:
    kinds = {base for module in model.modules() for base in type(module).__mro__}
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
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Give every buffer its values back: observers of quantisation, for one, learn in eval mode as well."""
    before = [
        (module._buffers, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # whose buffers stay the same tensors
    ]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in values:
            with torch.inference_mode(buffer.is_inference()):
                buffer.data.copy_(value)  # `data`, so that what was saved for a backward pass stays valid
        for buffers, own in before:
            buffers.clear()
            buffers.update(own)
