"""How far rounding alone may drive two networks apart, measured layer by layer.

Stochastic arithmetic (Vignes, 1993; Parker, "Monte Carlo Arithmetic", 1997): the network runs once more while
what each layer with parameters puts out is changed at random by a few units in the last place, and how far it
ends up from where it was says what rounding grows to on its way. What another algorithm for the same
convolution does is within a constant of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz.arguments import has_float64
from torchlens_viz.comparison.gap import blocks, deviation
from torchlens_viz.comparison.side import Calls, Kept, Row, Side

# How many units in the last place are allowed at least, and how many times what is measured. Over ten
# networks of torchvision the most that was seen was 26 in a first layer, a sum of 768 terms in float32, and
# 11 times what was measured behind it; 1.7 and 2.7 in shorter types, whose sums are made in float32.
_LEAST: Final = 64.0
_FACTOR: Final = 24.0
_LEAST_OF_SHORT: Final = 8.0
_FACTOR_OF_SHORT: Final = 4.0
_SHORT: Final = 1e-4  # the unit in the last place of types that are summed in a longer one
_TF32: Final = 2.0**-10
_QUANTISED: Final = 0.5  # in 8 bits it is not rounding alone, but where the range was cut


def unit_of(tensor: torch.Tensor) -> float:
    """Return the unit in the last place, in parts of the value, with which a tensor was computed."""
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    is_tf32 = tensor.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return _TF32 if is_tf32 and tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).eps


def is_coarse(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has 8 bits per value."""
    return tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)


@final
class Rounding:
    """What rounding may do to each row, as far as is known.

    Attributes:
        growth: For each row, what a unit in the last place grew to, in such units.
        unit: The coarsest unit in the last place that was seen in either network.
        is_coarse: Whether a tensor with 8 bits per value was seen.
    """

    def __init__(self) -> None:
        self.growth: dict[Row, float] = {}
        self.unit = 0.0
        self.is_coarse = False

    def see(self, tensor: torch.Tensor) -> None:
        """Take note of the type that a network computes in."""
        self.unit = max(self.unit, unit_of(tensor))
        self.is_coarse = self.is_coarse or is_coarse(tensor)

    def allowed(self, row: Row) -> float:
        """Return how much of a value rounding may change."""
        is_short = self.unit > _SHORT
        least, factor = (_LEAST_OF_SHORT, _FACTOR_OF_SHORT) if is_short else (_LEAST, _FACTOR)
        found = self.unit * max(least, factor * self.growth.get(row, 0.0))
        return max(found, _QUANTISED) if self.is_coarse else found


@final
class Shaken(Calls):
    """Changes what each layer puts out by a few units in the last place, and notes what has become of it.

    Args:
        side: The network.
        has_place: Tells which layers count in the order of execution.
        kept: What the network put out unshaken.
        rounding: Where to note it.
    """

    def __init__(
        self,
        side: Side,
        has_place: Callable[[nn.Module], bool],
        kept: Mapping[Row, Kept],
        rounding: Rounding,
    ) -> None:
        super().__init__(side, has_place)
        self._kept, self._rounding = kept, rounding
        self._unit = rounding.unit
        self._steps = 4 if rounding.unit > _SHORT else 16  # large enough to be more than rounding itself
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def is_on_graph(self) -> bool:
        """Whether the network goes on from what was kept: from the changed values."""
        return True

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Return a tensor with changes; those of layers without parameters have none of their own."""
        self._changed: Any = tensor
        super().keep(tensor, layer)
        return self._changed

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return what the network goes on from."""
        changed: torch.Tensor = kept
        return changed

    def take(self, tensor: torch.Tensor, dim: int | None, row: Row) -> None:
        """Change a tensor, and note how far it is from what it was unshaken."""
        module = self._side.modules[row.call.layer]
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if tensor.is_floating_point() and not is_coarse(tensor) and has_parameters:
            tensor = self._changed = self._shaken(tensor)
        unshaken = self._kept.get(row)
        if unshaken is not None and unshaken.tensor.shape == tensor.shape and self._unit:
            growth = deviation(unshaken.tensor, tensor) / (self._steps * self._unit)
            self._rounding.growth[row] = max(self._rounding.growth.get(row, 0.0), growth)

    def _shaken(self, tensor: torch.Tensor) -> torch.Tensor:
        generator = self._generators.get(tensor.device)
        if generator is None:  # one of our own, so that the caller's goes on as if nothing had run
            generator = torch.Generator(tensor.device).manual_seed(0)
            self._generators[tensor.device] = generator
        kind = torch.float64 if has_float64(tensor.device) else torch.float32
        in_memory = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        ordered = tensor.permute(in_memory)
        parts = blocks(ordered.flatten())
        square = torch.stack([exact.dot(exact) for exact in (part.to(kind) for part in parts)]).sum()
        level = square.div(max(1, tensor.numel())).sqrt().nan_to_num(0, 0, 0)
        changed = []
        for part in parts:
            exact = part.to(kind)
            noise = torch.empty_like(exact).uniform_(-1, 1, generator=generator)
            size = exact.abs().clamp_(min=level).mul_(self._steps * self._unit)
            changed.append(noise.mul_(size).add_(exact).to(tensor.dtype))
        back = sorted(range(tensor.ndim), key=in_memory.__getitem__)
        return torch.cat(changed).view(ordered.shape).permute(back)
