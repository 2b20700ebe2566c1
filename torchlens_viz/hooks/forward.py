"""The forward pass that hooks need: refused where they would lie, run eagerly, ended early."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from torchlens_viz.errors import CaptureError
from torchlens_viz.models.layers import Layer

_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})
_lock = threading.Lock()
_holders = 0
_stance: Any = None


@final
class StopForwardError(BaseException):
    """Unwinds a forward pass; not an `Exception`, because models may catch those."""


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

    def __enter__(self) -> StopPoint:
        self._thread = threading.get_ident()
        self._previous = self._model.__dict__.get("_compiled_call_impl")
        self._model.__dict__["_compiled_call_impl"] = self
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            return None
        finally:
            self._depth -= 1


def refuse_torchscript(model: nn.Module) -> None:
    """Raise `CaptureError` for a scripted, traced or frozen model, whose children run without Python."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is TorchScript (scripted, traced or frozen): hooks on its layers never fire; "
            "capture the nn.Module it was made from"
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
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & _SHARDED:
            raise CaptureError(
                f"the model is fully sharded ({type(module).__name__}): a layer's output may be a part of "
                "the whole, and its weights are absent between calls; capture the unsharded model"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise CaptureError(
                "the model is a DataParallel over several devices, which runs short-lived replicas: capture "
                "`model.module` on one device, or use DistributedDataParallel"
            )
        if compiled == "error" and ("_orig_mod" in module._modules or module._compiled_call_impl is not None):
            raise CaptureError(
                'the model is compiled and `compiled="error"`: hooks do not fire in compiled code; capture '
                'the uncompiled module, or pass `compiled="eager"`'
            )
    if stop:
        _refuse_stop(model)


def _refuse_stop(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel) and torch.is_grad_enabled():
        raise CaptureError(
            "`stop=True` would leave DistributedDataParallel waiting for the gradients of the layers that "
            "did not run: capture `model.module`, or run under torch.no_grad()"
        )
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
    # Importing Dynamo takes a second; where nobody has imported it, nothing has been compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    _acquire()
    try:
        yield
    finally:
        _release()


def _acquire() -> None:
    global _holders, _stance
    with _lock:
        if _holders == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _holders += 1


def _release() -> None:
    global _holders, _stance
    with _lock:
        _holders -= 1
        if _holders == 0:
            _stance.__exit__(None, None, None)
            _stance = None
