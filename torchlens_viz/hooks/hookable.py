"""Whether hooks on a model would tell the truth: refuse at entry what can be known to go wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from torchlens_viz.errors import CaptureError
from torchlens_viz.models.layers import Layer

_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})


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
