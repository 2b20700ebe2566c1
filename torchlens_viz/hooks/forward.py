"""The forward pass that hooks need: refused where they would lie, run eagerly, ended early."""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import GeneratorType
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from torchlens_viz.errors import CaptureError
from torchlens_viz.models.layers import Layer, unwrap

_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})
_TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)  # of one thread
_lock = threading.RLock()
_holders: set[Hashable] = set()
_previous: Any = None  # the stance that is to be again, once nobody holds another one
_is_eager = False


@final
class StopForwardError(BaseException):
    """Unwinds a forward pass; not an `Exception`, because models may catch those."""


def let_go(error: BaseException) -> None:
    """Forget where an exception that ended a pass came through, as if the pass had returned.

    Its frames hold activations. A checkpoint that it came through would leave the hooks in place that it has
    installed for saved tensors, in all of the process, until its frame is collected.
    """
    step = error.__traceback__
    while step is not None:
        if "checkpoint" in step.tb_frame.f_code.co_filename:
            for value in step.tb_frame.f_locals.values():
                if isinstance(value, GeneratorType):
                    value.close()
        step = step.tb_next
    error.__traceback__ = error.__context__ = None


@final
class StopPoint:
    """Turns a `StopForwardError` raised below `model(...)` into a return value of None.

    It stands in for the instance's compiled call, the one place where the whole call of a module can be
    intercepted: the model's own hooks do not see the missing output, and neither `copy.deepcopy` nor pickle
    takes it along.

    Args:
        model: The module whose call ends early.
        error: The very error to swallow; any other passes.
    """

    def __init__(self, model: nn.Module, error: StopForwardError) -> None:
        self._model = model
        self._error = error
        self._previous: Any = None
        self._thread = 0
        self._depth = 0
        self._active = False

    def begin(self) -> None:
        """Stand in, for calls from this thread."""
        self._thread = threading.get_ident()
        self._previous = self._model.__dict__.get("_compiled_call_impl")
        self._active = True
        self._model.__dict__["_compiled_call_impl"] = self

    def end(self) -> None:
        """Do so no longer; may be called again."""
        self._active = False
        top = self._model.__dict__.get("_compiled_call_impl")
        # One that was left earlier may still stand below this one, where blocks overlap without nesting.
        while isinstance(top, StopPoint) and not top._active:
            top = top._previous
        if top is None:
            self._model.__dict__.pop("_compiled_call_impl", None)
        else:
            self._model.__dict__["_compiled_call_impl"] = top

    def __deepcopy__(self, memo: object) -> None:
        """Vanish in a copy of the model, where a model copies its whole `__dict__`."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; return None where the pass was ended early."""
        call = self._previous or self._model._call_impl
        if not self._active or threading.get_ident() != self._thread:
            return call(*args, **kwargs)
        self._depth += 1
        try:
            return call(*args, **kwargs)
        except StopForwardError as stop:
            if stop is not self._error or self._depth > 1:  # a model that calls itself ends as a whole
                raise
            let_go(stop)
            return None
        finally:
            self._depth -= 1


def refuse_torchscript(model: nn.Module) -> None:
    """Raise `CaptureError` for a scripted, traced, frozen or exported model, whose children never run."""
    if _is_exported(unwrap(model)):
        raise CaptureError(
            "the model was made by torch.export: it is a graph of single operations, in which no layer runs "
            "and hooks never fire; capture the nn.Module it was made from"
        )


def _is_exported(module: nn.Module) -> bool:
    """Tell whether a module is a graph of operations rather than of layers, as torch.export makes."""
    return isinstance(module, torch.fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    )


def refuse_unhookable(model: nn.Module, selected: Sequence[Layer], *, stop: bool, compiled: str) -> None:
    """Raise `CaptureError` where hooks on the selected layers would not fire, or would break something.

    Args:
        model: The model as the caller holds it, with its wrappers.
        selected: The layers to hook.
        stop: Whether forward passes are to end early.
        compiled: `"error"` refuses modules compiled by `torch.compile`.
    """
    for name, module in selected:
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"`{name}` is TorchScript: hooks inside it never fire; use the eager module")
    for module in model.modules():
        if _is_sharded(type(module).__mro__):
            raise CaptureError(
                f"the model is fully sharded ({type(module).__name__}): a layer's output may be a part of "
                "the whole, and its weights are absent between calls; capture the unsharded model"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise CaptureError(
                "the model is a DataParallel over several devices, which runs short-lived replicas: capture "
                "`model.module` on one device, or use DistributedDataParallel"
            )
        if compiled == "error" and is_compiled(module):
            raise CaptureError(
                'the model is compiled and `compiled="error"`: hooks do not fire in compiled code; capture '
                'the uncompiled module, or pass `compiled="eager"`'
            )
    if stop:
        _refuse_stop(model)


@lru_cache
def _is_sharded(kinds: tuple[type, ...]) -> bool:
    return not _SHARDED.isdisjoint(kind.__name__ for kind in kinds)


def is_traced() -> bool:
    """Tell whether the code that asks is being compiled or exported, in which no value can be kept.

    `torch.compiler.is_compiling()` alone would not do: while any thread compiles, it says so in all of them.
    """
    if torch.compiler.is_dynamo_compiling():  # what Dynamo reads as True, and Python as False
        return True
    return torch.compiler.is_compiling() and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING
    )


def is_compiled(module: nn.Module) -> bool:
    """Tell whether `torch.compile` has compiled a module, by wrapping it or in place."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _refuse_stop(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel) and torch.is_grad_enabled():
        raise CaptureError(
            "`stop=True` would leave DistributedDataParallel waiting for the gradients of the layers that "
            "did not run: capture `model.module`, or run under torch.no_grad()"
        )
    refuse_always_called(model)


def refuse_always_called(model: nn.Module) -> None:
    """Raise `CaptureError` where ending a forward pass early would skip what is always to be called."""
    if nn_module._global_forward_hooks_always_called or any(
        module._forward_hooks_always_called for module in model.modules()
    ):
        raise CaptureError(
            "`stop=True` would skip forward hooks that were registered with `always_call=True`; remove them "
            "or capture without `stop`"
        )


@contextmanager
def eager_stance() -> Iterator[None]:
    """Run compiled code eagerly, in the whole process, until the last block that asked for it ends."""
    holder = object()
    try:
        hold_eager(holder)
        yield
    finally:
        try:
            let_compile(holder)
        finally:
            let_compile(holder)  # once more: Ctrl-C may have come within the first


def hold_eager(holder: Hashable) -> None:
    """Run compiled code eagerly, in the whole process, until `let_compile(holder)`."""
    # Importing Dynamo takes a second; where nobody has imported it, nothing has been compiled.
    if "torch._dynamo" in sys.modules:
        _holders.add(holder)
        _settle()


def let_compile(holder: Hashable) -> None:
    """Undo `hold_eager`; may be called again, and where that was broken off."""
    _holders.discard(holder)
    if _previous is not None:
        _settle()


def _settle() -> None:
    """Make the stance what the holders want, from whatever state an earlier call was broken off in."""
    global _is_eager, _previous
    from torch._dynamo import eval_frame

    with _lock:
        if _holders and not _is_eager:
            _previous = _previous or eval_frame._stance
            torch.compiler.set_stance("force_eager")
            _is_eager = True
        elif not _holders and _previous is not None:
            eval_frame._set_stance(_previous)
            _is_eager = False
            _previous = None
