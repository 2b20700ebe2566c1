"""What a monitor keeps of the layers in one logged pass: statistics, a few maps, a sample of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from torchlens_viz.errors import CaptureError
from torchlens_viz.hooks.retention import Retention
from torchlens_viz.stats.running import RunningStats

# Values of a call that make its histogram: a full one costs more than the pass. The number is prime, so that
# it divides no shape, and the sample does not meet the same column of every map.
_SAMPLE: Final = 8009


@final
class Observed:
    """One layer in one logged pass, over all of its calls.

    Attributes:
        stats: Statistics of all values; one for each number of channels, since a ReLU may serve many layers.
        maps: (S, K, H, W), the first maps of the first inputs in the first call; None for other outputs.
        sample: (V,), values spread evenly over each call; empty unless histograms were asked for.
    """

    __slots__ = ("maps", "sample", "stats")

    def __init__(self) -> None:
        self.stats: dict[int, RunningStats] = {}
        self.maps: torch.Tensor | None = None
        self.sample: list[torch.Tensor] = []


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Observation(Retention):
    """Stands where `capture` keeps tensors, and never lets a failure reach the network.

    Attributes:
        images: How many inputs to keep maps of.
        maps: How many maps to keep of each.
        histograms: Whether to keep a sample of values.
        on_error: Called with what went wrong; it may raise, and then the network's forward pass fails.
        channel_dims: The dimension of the channels, by layer, where it is not 1.
        layers: What was seen, by layer, in the order in which the layers first ran.
    """

    images: int
    maps: int
    histograms: bool
    on_error: Callable[[Exception], None]
    channel_dims: Mapping[str, int]
    layers: dict[str, Observed] = field(default_factory=dict)

    def keep(
        self,
        tensor: torch.Tensor | torch.fx.Proxy,
        layer: str,
        held: int,
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Take in what a layer put out."""
        try:
            self._take(tensor, layer)
        except Exception as error:
            self.on_error(error)

    def excuse(self, error: Exception) -> None:
        """Let the network go on."""
        self.on_error(error)

    def duplicate(self, kept: Any, layer: str, held: int) -> None:
        """Leave a second name of the same layer out: it would show the same under another tag."""

    def _take(self, tensor: Any, layer: str) -> None:
        is_tensor = isinstance(tensor, torch.Tensor)
        if not is_tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise CaptureError(f"`{layer}` ran inside a transform or a trace, where it has no values to log")
        seen = self.layers.get(layer) or Observed()
        dim = self.channel_dims.get(layer, 1)
        channels = tensor.shape[dim] if -tensor.ndim <= dim < tensor.ndim else 0
        stats = seen.stats.get(channels) or RunningStats(channel_dim=dim)
        stats.update(tensor)
        seen.stats[channels] = stats
        self.layers[layer] = seen
        values = tensor.detach()
        if values.is_quantized:
            values = values.dequantize()
        if seen.maps is None and values.ndim == 4 and values.numel():
            seen.maps = values[: self.images, : self.maps].clone()
        if self.histograms and values.numel():
            seen.sample.append(spread(values, _SAMPLE))


def spread(values: torch.Tensor, most: int) -> torch.Tensor:
    """Return at most `most` of the values of a tensor, spread evenly, in memory of their own."""
    flat = values.flatten()
    if len(flat) <= most:
        return flat.clone()
    return flat[torch.arange(most, device=flat.device) * len(flat) // most]


def finite(sample: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return those of the sampled values that are finite, as one tensor (V,) on the host, in float64."""
    whole = torch.cat([part.detach().double().cpu() for part in sample]) if sample else torch.empty(0)
    return whole[whole.isfinite()]
