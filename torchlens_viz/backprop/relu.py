"""A gradient for units that have none: ReLUs that let pass what would switch them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_IN_PLACE: Final = frozenset(
    {
        torch.relu_, torch.Tensor.relu_, torch.clamp_, torch.Tensor.clamp_, torch.Tensor.clip_,
        torch.clamp_min_, torch.Tensor.clamp_min_,
    }
)  # fmt: skip
_CLAMPS: Final = frozenset(
    {
        torch.clamp, torch.Tensor.clamp, torch.clamp_, torch.Tensor.clamp_,
        torch.clip, torch.Tensor.clip, torch.Tensor.clip_,
        torch.clamp_min, torch.Tensor.clamp_min, torch.clamp_min_, torch.Tensor.clamp_min_,
    }
)  # fmt: skip
_RELUS: Final = frozenset(
    {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6, F.hardtanh}
)


class Redirection(TorchFunctionMode):
    """While active, ReLUs pass on gradients for chosen samples of the batch that would otherwise vanish.

    Values stay what they are. A unit that is off passes on a gradient that would switch it on, and none that
    would push it further down. `nn.ReLU`, `nn.ReLU6`, their functions, in place or not, and `clamp(min=0)`
    are redirected.

    Args:
        chosen: (N,) bool, the samples of the batch this is for.
        narrow: (N,) bool, those of them where only the unit of a map with the highest value is redirected,
            which does nothing where that is on. Units whose windows overlap may undo each other's pull; one
            alone wakes where they do not, though to an image that drives the channel less.

    Source:
        Olah, Mordvintsev & Schubert, "Feature Visualization", Distill 2017, have such a ReLU in their code.
    """

    def __init__(self, chosen: torch.Tensor, narrow: torch.Tensor) -> None:
        super().__init__()
        self._chosen = chosen
        self._narrow = narrow

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what stands in for it."""
        kwargs = kwargs or {}
        if func not in _RELUS and func not in _CLAMPS:
            return func(*args, **kwargs)
        values = args[0] if args else kwargs.get("input")
        if not isinstance(values, torch.Tensor) or not values.requires_grad or values.ndim == 0:
            return func(*args, **kwargs)
        limits = _limits(func, args, kwargs)
        if limits is None or len(values) % len(self._chosen) != 0:
            return func(*args, **kwargs)
        # Windows and heads are often folded into the batch, several rows in a row for each sample.
        repeats = len(values) // len(self._chosen)
        chosen, narrow = (
            rows.repeat_interleave(repeats).view(-1, *[1] * (values.ndim - 1))
            for rows in (self._chosen, self._narrow)
        )
        if values.ndim > 3:
            chosen = chosen & (~narrow | _is_highest(values.detach()))
        result = _RedirectedReLU.apply(values, chosen, *limits)
        is_in_place = (
            func in _IN_PLACE or kwargs.get("inplace") or (func in (F.relu, F.relu6) and True in args[1:])
        )
        return values.copy_(result) if is_in_place else result


def _limits(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Return between which values `func` lets through what it gets, or None where that is no ReLU."""
    if func is F.relu6:
        return 0.0, 6.0
    if func is F.hardtanh:  # what nn.ReLU6 calls
        low, high = kwargs.get("min_val", -1.0), kwargs.get("max_val", 1.0)
    elif func in _CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
    else:
        return 0.0, torch.inf
    if not isinstance(low, int | float) or low != 0 or not isinstance(high, int | float | None):
        return None
    return 0.0, torch.inf if high is None else float(high)


def _is_highest(values: torch.Tensor) -> torch.Tensor:
    """Tell of every unit whether it has the highest value of its map."""
    return values == values.amax(tuple(range(2, values.ndim)), keepdim=True)


class _RedirectedReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, values: torch.Tensor, chosen: torch.Tensor, low: float, high: float
    ) -> torch.Tensor:
        context.save_for_backward(values > low, values < high, chosen)
        return values.clamp(low, high)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        is_above, is_below, chosen = context.saved_tensors
        (gradient,) = gradients
        wakes = torch.where(is_above, gradient < 0, gradient > 0)  # towards the open part, from either side
        passes = (is_above & is_below) | (chosen & wakes)
        return gradient * passes, None, None, None
