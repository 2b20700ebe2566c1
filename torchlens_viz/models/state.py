"""Running a model for its values only, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchlens_viz.arguments import has_values, named_device
from torchlens_viz.errors import (
    InvalidArgumentError,
    TorchlensVizError,
    is_out_of_memory,
    message_of,
    one_line,
)
from torchlens_viz.models.keeping import same_buffers, same_flags, same_random_numbers, same_weights
from torchlens_viz.models.layers import unwrap

_CPU: Final = torch.device("cpu")
_QUANTIZED: Final = ("torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized.modules")


@contextmanager
def inference(
    model: nn.Module, *, watched: bool = True
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Run the block in eval mode without gradients, and leave the model and random numbers as they were.

    Afterwards every module has its own `training` flag back, every weight and buffer its values, and random
    numbers go on as if nothing had run: Python's, numpy's, torch's, and those of generators modules hold.

    Args:
        model: The model.
        watched: Look in the whole block for what is written to weights, which takes some microseconds an
            operation. Else that is done within what the block is given, which is to be entered for the
            first pass at least.

    Raises:
        InvalidArgumentError: The model has lazy parameters, which the first run would give values.
    """
    refuse_lazy(chain(model.parameters(), model.buffers()))
    modules = [*model.modules()]
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers(modules))
        stack.enter_context(same_flags(modules))
        stack.enter_context(same_buffers(modules))
        watching = stack.enter_context(same_weights(modules))
        stack.enter_context(torch.no_grad())
        with watching():
            set_eval(model)
        if watched:
            stack.enter_context(watching())
        yield watching


def refuse_lazy(tensors: Iterable[torch.Tensor]) -> None:
    """Refuse parameters and buffers of a model that get their values with the first run.

    Raises:
        InvalidArgumentError: One does.
    """
    if any(map(is_lazy, tensors)):
        raise InvalidArgumentError(
            "`model` has lazy parameters, which have no values yet; run it once on an input first"
        )


def require_values(model: nn.Module, *, is_copied: bool = False, is_placed: bool = False) -> None:
    """Refuse a model that has no values to compute with, or not all of them.

    What torch computes with weights on the meta device may be whatever stands in memory. Parts whose weights
    come as they run, by a hook or a `forward` of their own, have theirs then.

    Args:
        model: The model.
        is_copied: Whether a copy is to run, which would be left without what brings the weights.
        is_placed: Whether it is said where inputs go; else the first parameter must say so.

    Raises:
        InvalidArgumentError: A parameter is lazy, on the meta device, or fake, or a buffer is.
    """
    refuse_lazy(chain(model.parameters(), model.buffers()))
    held = dict(chain(model.named_parameters(), model.named_buffers()))
    missing = {name: tensor for name, tensor in held.items() if not has_values(tensor)}
    brought = () if is_copied or not missing else _brought(model)
    for name, tensor in missing.items():
        is_first = name == next(iter(held))
        if (is_first and not is_placed) or not name.startswith(brought):
            raise InvalidArgumentError(
                f"`model` must have values, got `{name}` {_without(tensor)}; build it on cpu, or call "
                '`model.to_empty(device="cpu")` and load its weights'
            )


def _brought(model: nn.Module) -> tuple[str, ...]:
    """Return how the names begin of parameters that may get their values as their module runs."""
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if "forward" in vars(module) or any(not is_ours(hook) for hook in module._forward_pre_hooks.values())
    )


def is_ours(hook: object) -> bool:
    """Tell whether a hook is of this library, which changes nothing."""
    return type(hook).__module__.partition(".")[0] == __name__.partition(".")[0]


def _without(tensor: torch.Tensor) -> str:
    return "on the meta device" if tensor.is_meta else "made within FakeTensorMode"


def set_eval(model: nn.Module) -> None:
    """Put every module into eval mode by its flag alone.

    `eval()` and `__setattr__` may be overridden, to fold an update into the weights for one, and what that
    changes could not be undone, or would be changed in memory that another model shares. A flag that is a
    property, or that of a part in TorchScript, has nothing but its setter.
    """
    for module in model.modules():
        if "training" in vars(module):
            vars(module)["training"] = False
        else:
            module.training = False


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients, so that nothing of it is left in a model or elsewhere.

    Flags, buffers, random numbers of Python, numpy and torch, and caches are afterwards as they were.
    """
    with ExitStack() as stack:
        stack.enter_context(no_cached_parametrizations())
        stack.enter_context(no_autocast_cache())
        stack.enter_context(inference(model))
        yield


@contextmanager
def no_cached_parametrizations() -> Iterator[None]:
    """Keep weights that are computed without a graph from the cache of `parametrize.cached()`."""
    was_enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = was_enabled


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Keep weights that are converted without a graph from those that are converted with one.

    Within `torch.autocast` a converted weight is kept for its next use. In versions of torch that keep those
    made without gradients too, the training's next forward pass would find the probe's, and the weight would
    not be trained.
    """
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


@contextmanager
def going_back() -> Iterator[None]:
    """Say in one message why no gradient can be taken, where a backward pass fails that runs within.

    What ran out of memory passes as it is.

    Raises:
        InvalidArgumentError: An operation of the model has no gradient, or its values are gone.
    """
    try:
        yield
    except TorchlensVizError:
        raise
    except Exception as error:  # an operation of the model's own may raise whatever it likes
        if is_out_of_memory(error):
            raise
        text = message_of(error).lower()
        if "checkpoint" in text:
            raise InvalidArgumentError(
                "the model uses gradient checkpointing, which can give no gradient with respect to what goes "
                "into the model or comes out of a layer; switch checkpointing off in the model"
            ) from error
        what = "has an operation without a gradient"
        remedy = "replace it by one that has one"
        if "inplace operation" in text:
            what = (
                "writes in place over values that its gradient needs, which also keeps it from being trained"
            )
            remedy = "write `x = x + y` for `x += y` there, or `inplace=False`"
        raise InvalidArgumentError(
            f"no gradient can be taken: the model {what} ({one_line(error)}); {remedy}, or choose a layer on "
            "the other side of it"
        ) from error


def quantizes(model: nn.Module) -> bool:
    """Tell whether layers of a model put out quantised values, by static quantisation of either kind."""
    return any(
        type(module).__module__.startswith(_QUANTIZED) and hasattr(module, "zero_point")  # of its output
        for module in model.modules()
    )


def refuse_quantized(model: nn.Module) -> None:
    """Say why there is no gradient, or no such output, where a model is quantised.

    Raises:
        InvalidArgumentError: It is.
    """
    if quantizes(model):
        raise InvalidArgumentError(
            f"the model is quantised ({type(unwrap(model)).__name__}), and no gradient passes through "
            "quantised values; take the float network that it was made from, which has the same layers"
        )


def like_parameters(batch: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return a batch on the device of the model's first parameter, and of its type if it is floating."""
    first = next((each for each in model.parameters() if each.is_floating_point()), None)
    device = device_of(model, batch.device)
    return batch.to(device, first.dtype if first is not None and batch.is_floating_point() else None)


def device_of(model: nn.Module, otherwise: torch.device = _CPU) -> torch.device:
    """Return where a model's first parameter or buffer is; a model without any is anywhere."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return otherwise if first is None else first.device


def usable_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return a device that tensors can be put on.

    Args:
        device: What the caller named.
        name: What the option is called.

    Raises:
        InvalidArgumentError: There is no such device, or it holds no values.
    """
    try:
        found = named_device(device, name)
        if found.type != "meta":
            torch.zeros(1, device=found)
            return found
        reason = "it holds no values"
    except TorchlensVizError:
        raise
    except Exception as error:  # each kind of device has its own
        reason = one_line(error)
    raise InvalidArgumentError(
        f"`{name}` must be a device of this machine, got {str(device)!r} ({reason}); "
        "leave it out, or pass cpu"
    )
