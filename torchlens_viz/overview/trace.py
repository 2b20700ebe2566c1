"""A forward pass as a log: which layer ran when, what it put out, how long it took, who wrote over it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Final, TypeAlias, final

import torch
from torch import nn

from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import Layer, unwrap
from torchlens_viz.models.state import inference
from torchlens_viz.nested import cloned, leaves

_ROUNDS: Final = 3  # of which the median counts

Inputs: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]  # what a model takes, by position and by name


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a layer put out.

    Attributes:
        shape: Its shape.
        channel_dim: Which dimension counts channels, from 0; None where nothing tells.
    """

    shape: tuple[int, ...]
    channel_dim: int | None


@dataclass(slots=True)
class Call:
    """One call of a layer.

    Attributes:
        names: All names of the layer.
        outputs: What it put out; None until it returned.
        ended: How many calls had returned before it.
        overwritten_by: In whose call its output was first written to, after it had returned.
    """

    names: tuple[str, ...]
    outputs: list[Output] | None = None
    ended: int = -1
    overwritten_by: str | None = None


@final
class Trace:
    """Two sinks in one: told when a layer is called, and when it returns.

    Args:
        layout: Of the layers; knows where channels are.

    Attributes:
        layout: The same.
        calls: Every call, in the order in which they began.
    """

    def __init__(self, layout: Layout) -> None:
        self.calls: list[Call] = []
        self.layout = layout
        self._running: list[Call] = []
        self._ended = 0
        self._watched: list[tuple[Call, weakref.ref[torch.Tensor], int]] = []

    def channel_dims(self) -> dict[str, int | None]:
        """Return which dimension of what each layer put out counts channels, by name."""
        done = [call for call in self.calls if call.outputs]
        return {
            name: call.outputs[0].channel_dim
            for call in reversed(done)
            for name in call.names
            if call.outputs
        }

    def begin(self, names: Sequence[str], taken: Any) -> None:
        """Take note of a call."""
        self._find_writes()
        call = Call(tuple(names))
        self.calls.append(call)
        self._running.append(call)

    def put_out(self, tensor: Any, layer: str) -> Any:
        """Take note of a tensor; what stands for it is its description, and a weak reference to it."""
        self._find_writes()
        if not isinstance(tensor, torch.Tensor):
            return tensor
        described = Output(tuple(tensor.shape), self.layout.found(tensor, layer))
        version = -1 if tensor.is_inference() else tensor._version
        return _Noted(described, weakref.ref(tensor), version)

    def end(self, names: Sequence[str], kept: Any) -> None:
        """Take note that a call returned."""
        while self._running and self._running[-1].names != tuple(names):
            self._running.pop()  # it raised, and the model caught that
        if not self._running:
            return
        call = self._running.pop()
        noted = leaves(_Noted, kept)
        call.outputs, call.ended = [each.output for each in noted], self._ended
        self._ended += 1
        self._watched += [(call, each.tensor, each.version) for each in noted if each.version >= 0]

    def _find_writes(self) -> None:
        """Blame what was written since the last look on the layer that is running."""
        still = []
        for call, reference, version in self._watched:
            tensor = reference()
            if tensor is None:
                continue
            if tensor._version == version:
                still.append((call, reference, version))
            elif self._running:
                call.overwritten_by = self._running[-1].names[0]
        self._watched = still


@dataclass(frozen=True, slots=True, eq=False)
class _Noted:
    output: Output
    tensor: weakref.ref[torch.Tensor]
    version: int


@final
class _Ear(Sink[None]):
    """A sink made of two functions."""

    __slots__ = ("_keep", "_record")

    def __init__(
        self, record: Callable[[Sequence[str], Any], None], keep: Callable[[Any, str], Any] | None = None
    ) -> None:
        self._record = record
        self._keep = keep

    def open(self, layers: Sequence[str]) -> None:
        """Begin."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Hand on a tensor."""
        return None if self._keep is None else self._keep(tensor, layer)

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Hand on a call."""
        self._record(names, kept)


def trace(model: nn.Module, layers: Sequence[Layer], inputs: Inputs, log: Trace) -> None:
    """Run a model once, in eval mode and without gradients, and log the calls of some layers.

    Args:
        model: The model.
        layers: Layers of it.
        inputs: What it takes.
        log: Where the calls go; where the model fails, those before are in it.
    """
    begins, ends = _Ear(log.begin), _Ear(log.end, log.put_out)
    args, kwargs = cloned(inputs)
    with inference(model), log.layout.following():
        with _captured(model, layers, begins, "input"), _captured(model, layers, ends, "output"):
            model(*args, **kwargs)


def _captured(model: nn.Module, layers: Sequence[Layer], sink: Sink[None], io: Any) -> Capture[None]:
    refuse_torchscript(model)
    check = partial(refuse_unhookable, model, layers, stop=False, compiled="eager")
    return Capture(unwrap(model), layers, check, sink, io=io)


@dataclass(slots=True)
class _Clock:
    """Adds up how long calls of each layer take."""

    wait: Callable[[], object]
    seconds: dict[str, float] = field(default_factory=dict)
    running: list[tuple[Sequence[str], float]] = field(default_factory=list)

    def begin(self, names: Sequence[str], taken: Any) -> None:
        self.wait()
        self.running.append((names, perf_counter()))

    def end(self, names: Sequence[str], kept: Any) -> None:
        self.wait()
        now = perf_counter()
        while self.running and self.running[-1][0] != names:
            self.running.pop()
        if self.running:
            self.seconds[names[0]] = self.seconds.get(names[0], 0.0) + now - self.running.pop()[1]


def time_shares(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> dict[str, float]:
    """Measure which share of the time of a forward pass each layer takes, those within it included.

    Args:
        model: The model.
        layers: Layers of it, and the model itself among them.
        inputs: What it takes.

    Returns:
        By name, 0 to 1: the median of a few passes.
    """
    found: list[dict[str, float]] = []
    for _ in range(_ROUNDS):
        clock = _Clock(_waiting_for(model))
        begins, ends = _Ear(clock.begin), _Ear(clock.end)
        args, kwargs = cloned(inputs)
        with inference(model):
            with _captured(model, layers, begins, "input"), _captured(model, layers, ends, "output"):
                model(*args, **kwargs)
        found.append(clock.seconds)
    return dict(_medians(found))


def _medians(rounds: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    for name in rounds[0]:
        shares = sorted(each.get(name, 0.0) / max(each.get("", 0.0), 1e-12) for each in rounds)
        yield name, min(1.0, shares[len(shares) // 2])


def _waiting_for(model: nn.Module) -> Callable[[], object]:
    """Return what waits until the device of a model has done what it was asked to."""
    kinds = {each.device.type for each in (*model.parameters(), *model.buffers())}
    for kind in kinds - {"cpu", "meta"}:
        wait: Callable[[], object] | None = getattr(getattr(torch, kind, None), "synchronize", None)
        if wait is not None:
            return wait
    return lambda: None
