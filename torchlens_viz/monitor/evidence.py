"""What layers took and what their weights were as they ran: where to look for the cause of a trouble."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import nn

from torchlens_viz.hooks.sink import Sink, real_tensor

_MODEL = ""  # its own name


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known beside the figures of what layers put out.

    Attributes:
        given: The largest magnitude in what the network was given, NaN or infinite where that was; None where
            the network itself was not called, or not with floating-point numbers.
        taken: The same of what each layer took.
        gains: By which factor a layer's weights stretch inputs that are independent of one another: their
            Euclidean norm over the root of the number of outputs, about 1.4 after He's initialisation. Of
            layers that have weights, at the time when they ran.
        spoilt: A parameter with NaN or Inf of each layer that had one when it ran.
        biases: The mean of the biases of each layer that has any.
        updates: The share of the parameters of each layer that the last step changed.
        elsewhere: Finds a parameter or a buffer with NaN or Inf outside these layers, by name.
    """

    given: float | None = None
    taken: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    spoilt: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, float] = field(default_factory=dict)
    updates: Mapping[str, float] = field(default_factory=dict)
    elsewhere: Callable[[], str | None] = lambda: None


@final
class Intake(Sink[None]):
    """Notes what layers take, and what their weights are, when they first run; waits for no device.

    Args:
        model: The network, without wrappers.
        modules: Its layers by name.
        excuses_error: Told what went wrong; where it says False, that is raised.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], excuses_error: Callable[[Exception], bool]
    ) -> None:
        self._model = model
        self._modules = modules
        self._excuses_error = excuses_error
        self._taken: dict[str, torch.Tensor] = {}
        self._weights: dict[str, dict[str, torch.Tensor]] = {}

    def open(self, layers: Sequence[str]) -> None:
        """Begin."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> None:
        """Take note of a tensor that a layer is about to take."""
        try:
            self._note(real_tensor(tensor, layer), layer)
        except Exception as error:
            if not self._excuses_error(error):
                raise

    def evidence(self, updates: Mapping[str, float]) -> Evidence:
        """Return what was noted; waits for the device once."""
        figures = {("taken", layer, ""): peak for layer, peak in self._taken.items()}
        for layer, parameters in self._weights.items():
            figures |= {("own", layer, name): figure for name, figure in parameters.items()}
        values = dict(zip(figures, _numbers(list(figures.values())), strict=True))
        own = {(layer, what): value for (kind, layer, what), value in values.items() if kind == "own"}
        taken = {layer: value for (kind, layer, _), value in values.items() if kind == "taken"}
        return Evidence(
            given=taken.get(_MODEL),
            taken=taken,
            gains={layer: value for (layer, what), value in own.items() if what == "*gain"},
            biases={layer: value for (layer, what), value in own.items() if what == "*bias"},
            spoilt={
                layer: what
                for (layer, what), value in own.items()
                if not what.startswith("*") and not math.isfinite(value)
            },
            updates=updates,
            elsewhere=self._spoilt_elsewhere,
        )

    def _note(self, tensor: torch.Tensor, layer: str) -> None:
        if tensor.is_floating_point() and tensor.numel():
            peak = _peak(tensor)
            before = self._taken.get(layer)
            self._taken[layer] = peak if before is None else torch.maximum(before, peak)
        module = self._modules.get(layer)
        if module is None or layer in self._weights:
            return
        own = {name: _peak(p) for name, p in module.named_parameters() if p.is_floating_point() and p.numel()}
        # Not as attributes: a parametrisation would compute the weight, and some of them change as they do.
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and weight.is_floating_point():
            norm = torch.linalg.vector_norm(weight.detach(), dtype=_wide(weight))
            own["*gain"] = norm / math.sqrt(max(1, len(weight)))
        bias = module._parameters.get("bias")
        if bias is not None and bias.is_floating_point() and bias.numel():
            own["*bias"] = bias.detach().mean(dtype=_wide(bias))
        self._weights[layer] = own

    def _spoilt_elsewhere(self) -> str | None:
        watched = {id(p) for module in self._modules.values() for p in module.parameters()}
        for tensors in (self._model.named_parameters(), self._model.named_buffers()):
            for name, tensor in tensors:
                is_new = id(tensor) not in watched and tensor.is_floating_point()
                if is_new and not bool(tensor.detach().isfinite().all()):
                    return name
        return None


def _peak(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude, NaN where there is one."""
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # float8, in which nothing can be compared
        values = values.float()
    low, high = values.aminmax()  # in a twentieth of the time of the norm that is the same
    return torch.maximum(low.abs(), high.abs()).to(_wide(tensor))


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _numbers(figures: Sequence[torch.Tensor]) -> list[float]:
    if not figures:
        return []
    device = figures[0].device
    if all(figure.device == device for figure in figures):
        found: list[float] = torch.stack([figure.float() for figure in figures]).tolist()
        return found
    return [figure.item() for figure in figures]
