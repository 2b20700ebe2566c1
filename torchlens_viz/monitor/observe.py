"""What a monitor keeps of the layers in one logged pass: statistics, a few maps, a sample of values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchlens_viz.arguments import made_of, plain, shown
from torchlens_viz.hooks.followers import Followers
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.hooks.sink import Sink, real_tensor
from torchlens_viz.models.layers import Layer, Selector, named_layers, select
from torchlens_viz.stats.running import RunningStats

# Values of a call that make its histogram: a full one costs more than the pass. The number is prime, so that
# it divides no shape, and the sample does not meet the same column of every map.
_SAMPLE: Final = 8009
_DENSE: Final = (
    nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.MultiheadAttention,
)  # fmt: skip


def watched(model: nn.Module, layers: Selector) -> list[Layer]:
    """Return the layers to watch: those that are chosen, and of a network without `nn.Conv2d`, others.

    Where the choice is the default, `nn.Conv2d`, and there is none, these are the layers that have weights
    for each of their channels: other convolutions, dense layers and attention.

    Raises:
        LayerNotFoundError: There is none of these either, or `layers` matches nothing.
    """
    if layers is not nn.Conv2d or any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return select(model, layers)
    # What attention holds does not run as a module.
    held = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.children()
    }
    found = [
        layer
        for layer in named_layers(model)
        if isinstance(layer.module, _DENSE) and id(layer.module) not in held
    ]
    return found or select(model, layers)


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
class Observation(Sink[None]):
    """Takes in what the layers put out in a logged pass, and never lets a failure reach the network.

    A layer that is reached by two names is seen under the first: it would show the same under another tag.

    Attributes:
        images: How many inputs to keep maps of.
        maps: How many maps to keep of each.
        histograms: Whether to keep a sample of values.
        excuses_error: Told what went wrong; where it says False, that is raised and the forward pass fails.
        layout: Knows which dimension counts channels.
        followers: Finds out what comes after each layer.
        layers: What was seen, by layer, in the order in which the layers first ran.
        ran: The layers that ran, those too of which nothing was seen.
    """

    images: int
    maps: int
    histograms: bool
    excuses_error: Callable[[Exception], bool]
    layout: Layout
    followers: Followers
    layers: dict[str, Observed] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    def open(self, layers: Sequence[str]) -> None:
        """Begin; what is seen stands in `layers`."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> None:
        """Take in what a layer put out."""
        try:
            tensor = real_tensor(tensor, layer)
            with self.followers.put_out(tensor, layer):
                self._take(tensor, layer)
        except Exception as error:
            if not self.excuses_error(error):
                raise

    def record(self, names: Sequence[str], kept: object) -> None:
        """Take note of a call that ended."""
        self.ran.update(names)

    def excuses(self, error: Exception) -> bool:
        """Let the network go on, if that is what is wanted."""
        return self.excuses_error(error)

    def _take(self, tensor: torch.Tensor, layer: str) -> None:
        seen = self.layers.get(layer) or Observed()
        dim = self.layout.channel_dim(tensor, layer)
        channels = tensor.shape[dim]
        stats = seen.stats.get(channels) or RunningStats(channel_dim=dim)
        stats.update(tensor)
        seen.stats[channels] = stats
        self.layers[layer] = seen
        values = plain(tensor.detach())
        if seen.maps is None and values.ndim == 4 and values.numel():
            seen.maps = values.movedim(dim, 1)[: self.images, : self.maps].clone()
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
    whole = (
        torch.cat([part.detach().cpu().double() for part in sample])
        if sample
        else torch.empty(0, device="cpu")
    )
    return whole[whole.isfinite()]


@final
class Schedule:
    """Hears the numbers of steps, and tells which of them are to be logged.

    Args:
        every: Log those whose number it divides, and the next one where that was skipped.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._stride = 1
        self.heard: int | None = None
        self.logged: int | None = None

    def is_due(self, step: int) -> bool:
        """Take note of a step, and tell whether to log it; of several with one number, the first is."""
        heard, self.heard = self.heard, step
        if heard is not None and step != heard:
            self._stride = max(1, step - heard)
        if step == self.logged:
            return False
        is_due = self._passes(step - 1 if heard is None else min(heard, step - 1), step)
        if is_due:
            self.logged = step
        return is_due

    def next_due(self) -> int | None:
        """Return the next step, if it is to be logged and its number is one stride further than the last."""
        if self.heard is None:
            return None
        following = self.heard + self._stride
        return following if self._passes(self.heard, following) else None

    def try_again(self) -> None:
        """Log a step that was broken off when it is heard of again."""
        self.logged = None

    def _passes(self, before: int, step: int) -> bool:
        return step // self._every > before // self._every


def number(global_step: int) -> int:
    """Return the number of a step as an int.

    Raises:
        InvalidTypeError: It is none.
    """
    return made_of(global_step, operator.index, f"`global_step` must be an int, got {shown(global_step)}")


class Update(NamedTuple):
    """What a step added to the parameters of a layer.

    Attributes:
        norm: The Euclidean norm of it.
        ratio: Its share of the norm of the parameters; None where that is zero.
    """

    norm: float
    ratio: float | None


@final
class Norms:
    """Takes a copy of the parameters before a step, and measures what the step added.

    Args:
        layers: The layers by name; those without parameters are left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = {name: module for name, module in layers.items() if list(module.parameters())}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._step: int | None = None

    def before(self, step: int) -> None:
        """Note the parameters as they are before the step of this number."""
        self._before = {name: [each.clone() for each in now] for name, now in self._now().items()}
        self._step = step

    def weights(self) -> dict[str, float]:
        """Return the Euclidean norm of all parameters of each layer."""
        return {name: _norm(own) for name, own in self._now().items()}

    def updates(self, step: int) -> dict[str, Update]:
        """Measure, after a step for which `before` was called, what it added to the parameters.

        Returns:
            By layer. Nothing where no parameter changed: the optimiser is yet to step, as it is while
            gradients accumulate, and the next call may know.
        """
        if self._step != step:
            return {}
        found: dict[str, Update] = {}
        for name, now in self._now().items():
            if name not in self._before:  # the step gave them their first values
                continue
            norm = _norm(new - old for new, old in zip(now, self._before[name], strict=True))
            weight = _norm(now)
            found[name] = Update(norm, norm / weight if weight > 0 else None)
        if not any(update.norm for update in found.values()):
            return {}
        self._before = {}  # a copy of all weights should not be held for longer than a step
        self._step = None
        return found

    def _now(self) -> dict[str, list[torch.Tensor]]:
        """Return the parameters of each layer, but of lazy ones without values yet."""
        parameters = {name: list(module.parameters()) for name, module in self._layers.items()}
        return {
            name: [each.detach() for each in own]
            for name, own in parameters.items()
            if not any(map(is_lazy, own))
        }


def _norm(parts: Iterable[torch.Tensor]) -> float:
    squares = [
        torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts
    ]
    whole: float = torch.stack([square.cpu().double() for square in squares]).norm().item()
    return whole
