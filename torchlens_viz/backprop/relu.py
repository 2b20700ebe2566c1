"""ReLUs in every spelling, found while a network runs, and given another gradient.

`Redirection` is one: ReLUs that let pass what would switch them on. `torchlens_viz.backprop.rules` has
others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchlens_viz.models.state import going_back

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
    {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6, F.hardtanh, F.threshold}
)
_THRESHOLD: Final = ((1, "threshold"), (2, "value"))
_INPLACE_AT: Final = {
    F.relu: 1,
    F.relu6: 1,
    F.hardtanh: 3,
    F.threshold: 3,
}  # where that may stand as a position


class Limits(NamedTuple):
    """Between which values a ReLU lets through what it gets.

    Attributes:
        low: The lower one, 0.
        high: The upper one, such as 6, or infinity.
        is_closed: Whether a gradient passes exactly at the limits.
    """

    low: float
    high: float
    is_closed: bool

    def is_open(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell of each value whether it is above the lower limit, and whether it is below the upper one."""
        if self.is_closed:
            return values >= self.low, values <= self.high
        return values > self.low, values < self.high


class ReLUs(TorchFunctionMode, ABC):
    """While active, something else stands in for every ReLU that works on values with a gradient.

    Found are `nn.ReLU`, `nn.ReLU6`, their functions, in place or not, `clamp(min=0)`, and `hardtanh` and
    `threshold` where their limits are those of a ReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clamp_is_closed = _clamp_is_closed()  # asked here, where no graph of the caller's is recorded

    @abstractmethod
    def stand_in(self, values: torch.Tensor, limits: Limits) -> torch.Tensor | None:
        """Return what a ReLU makes of values, with a gradient of its own; None leaves it alone."""

    def pass_by(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See an operation that is no ReLU, before it runs."""

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
            self.pass_by(func, args, kwargs)
            return func(*args, **kwargs)
        values = args[0] if args else kwargs.get("input")
        if not isinstance(values, torch.Tensor) or not values.requires_grad or values.ndim == 0:
            return func(*args, **kwargs)
        between = _limits(func, args, kwargs)
        if between is None:
            self.pass_by(func, args, kwargs)
            return func(*args, **kwargs)
        result = self.stand_in(values, Limits(*between, func in _CLAMPS and self._clamp_is_closed))
        if result is None:
            return func(*args, **kwargs)
        at = _INPLACE_AT.get(func)
        is_in_place = func in _IN_PLACE or kwargs.get("inplace") or (at is not None and True in args[at:])
        return values.copy_(result) if is_in_place else result


class Redirection(ReLUs):
    """While active, ReLUs pass on gradients for chosen samples of the batch that would otherwise vanish.

    Values stay what they are. A unit that is off passes on a gradient that would switch it on, and none that
    would push it further down.

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

    def stand_in(self, values: torch.Tensor, limits: Limits) -> torch.Tensor | None:
        """Return a ReLU that is redirected for the rows of the chosen samples."""
        if len(values) % len(self._chosen) != 0:
            return None
        # Windows and heads are often folded into the batch, several rows in a row for each sample.
        repeats = len(values) // len(self._chosen)
        chosen, narrow = (
            rows.repeat_interleave(repeats).view(-1, *[1] * (values.ndim - 1))
            for rows in (self._chosen, self._narrow)
        )
        if values.ndim > 3:
            chosen = chosen & (~narrow | _is_highest(values.detach()))
        redirected: torch.Tensor = _RedirectedReLU.apply(values, chosen, limits)
        return redirected


def gradient_within(
    score: torch.Tensor, parameters: torch.Tensor, *, keep_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradient as `torch.autograd.grad` does, and find ReLUs in what checkpointing runs again.

    That function takes every mode off while it runs.

    Raises:
        InvalidArgumentError: No gradient can be taken.
    """
    with going_back():
        if not torch._C._len_torch_function_stack():
            return torch.autograd.grad(score, parameters, allow_unused=True, retain_graph=keep_graph)
        return _engine_run_backward(
            (score,), (torch.ones_like(score),), keep_graph, False, (parameters,), True, accumulate_grad=False
        )


def _limits(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Return between which values `func` lets through what it gets, or None where that is no ReLU."""
    if func is F.relu6:
        return 0.0, 6.0
    if func is F.hardtanh:  # what nn.ReLU6 calls
        low, high = kwargs.get("min_val", -1.0), kwargs.get("max_val", 1.0)
    elif func is F.threshold:
        at, value = (
            kwargs.get(name, args[place] if len(args) > place else None) for place, name in _THRESHOLD
        )
        return (0.0, torch.inf) if at == value == 0 else None
    elif func in _CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
    else:
        return 0.0, torch.inf
    if not isinstance(low, int | float) or low != 0 or not isinstance(high, int | float | None):
        return None
    return 0.0, torch.inf if high is None else float(high)


@cache
def _clamp_is_closed() -> bool:
    """Tell whether this torch lets a gradient through a clamp exactly at its limits, as it did up to 2.8."""
    with torch.enable_grad():
        limit = torch.zeros(1, requires_grad=True, device="cpu")
        (gradient,) = torch.autograd.grad(limit.clamp(min=0), limit)
    return bool(gradient)


def _is_highest(values: torch.Tensor) -> torch.Tensor:
    """Tell of every unit whether it has the highest value of its map."""
    return values == values.amax(tuple(range(2, values.ndim)), keepdim=True)


class _RedirectedReLU(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor, chosen: torch.Tensor, limits: Limits) -> torch.Tensor:
        context.save_for_backward(*limits.is_open(values), chosen)
        return values.clamp(limits.low, limits.high)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        is_above, is_below, chosen = context.saved_tensors
        (gradient,) = gradients
        wakes = torch.where(is_above, gradient < 0, gradient > 0)  # towards the open part, from either side
        passes = (is_above & is_below) | (chosen & wakes)
        return gradient * passes, None, None
