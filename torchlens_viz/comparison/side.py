"""One of two networks that are compared: its layers, its forward pass, and what its hooks do meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias, final

import torch
from torch import nn

from torchlens_viz.arguments import plain
from torchlens_viz.comparison.matching import Call, plain_name
from torchlens_viz.errors import CaptureError, InvalidTypeError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.layout import Layout, mixes_layouts
from torchlens_viz.hooks.sink import Sink, real_tensor
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.layers import Layer, named_layers, require_module, unwrap
from torchlens_viz.models.state import like_parameters, require_values, untouched
from torchlens_viz.nested import map_tensors

OUTPUT: Final = "(output)"
"""The name of what a network puts out; the network itself has no name."""


class Row(NamedTuple):
    """One tensor of one call, in both networks."""

    call: Call
    part: int


class Kept(NamedTuple):
    """A tensor of the first network, and the dimension of it that counts channels."""

    tensor: torch.Tensor
    dim: int | None


@final
class Side:
    """One of the two networks.

    Args:
        model: The network, or what `torch.export.export` made of one, which is taken apart into layers.
        name: What the caller calls it.
        layers: Which of its layers; None is all of them, and what it puts out.
        channel_dim: The dimension that counts channels, where the caller says it.

    Raises:
        CaptureError: Hooks on its layers would not fire.
        InvalidTypeError: It is no network.
    """

    def __init__(
        self,
        model: object,
        name: str,
        layers: Callable[[nn.Module], Sequence[Layer]] | None,
        channel_dim: int | None,
    ) -> None:
        if type(model).__name__ == "ExportedProgram":
            model = torch.export.unflatten(model)  # type: ignore[arg-type]
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(
                f"`{name}` must be a torch.nn.Module or an ExportedProgram, got {type(model).__name__}"
            )
        require_module(model)
        try:
            refuse_torchscript(model)
        except CaptureError as error:
            raise CaptureError(
                f"`{name}` cannot be compared layer by layer: {error}; of an exported model, pass the "
                "ExportedProgram itself instead of its `.module()`"
            ) from error
        require_values(model)
        self.model = model
        self.hooked = _all_layers(model) if layers is None else list(layers(model))
        self.modules = {plain_name(layer.name) or OUTPUT: layer.module for layer in self.hooked}
        self._layout = Layout(self.hooked, channel_dim)

    def capture(self, sink: Sink[None]) -> Capture[None]:
        """Return a capture of its layers, for one forward pass after the other."""
        check = partial(refuse_unhookable, self.model, self.hooked, stop=False, compiled="eager")
        follows = self._layout.must_follow and mixes_layouts(self.model)
        return Capture(unwrap(self.model), self.hooked, check, sink, layout=self._layout if follows else None)

    def channel_dim(self, tensor: torch.Tensor, layer: str) -> int | None:
        """Return the dimension that counts channels, where something says it."""
        return self._layout.found(tensor, layer) if tensor.ndim > 1 else None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the network on inputs of its own, and leave it as it was."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return like_parameters(tensor.detach().clone(), self.model)

        args, kwargs = map_tensors(own, args), map_tensors(own, kwargs)
        remedy = "say with `input_of` what it takes of a batch"
        with untouched(self.model), shown_to(self.model, (args, kwargs), "inputs", remedy):
            self.model(*args, **kwargs)


class Calls(Sink[None]):
    """Counts the calls of each layer of a side, and knows in which order they ended.

    Args:
        side: The network.
        has_place: Tells which layers count in the order of execution.

    Attributes:
        order: The calls of this batch so far.
        counted: Those of layers that count.
    """

    def __init__(self, side: Side, has_place: Callable[[nn.Module], bool]) -> None:
        self._side, self._has_place = side, has_place
        self.begin()

    def begin(self) -> None:
        """Begin a batch."""
        self._numbers = Counter[str]()
        self._part = 0
        self.order: list[Call] = []
        self.counted: list[Call] = []

    def open(self, layers: Sequence[str]) -> None:
        """Begin; nothing is needed for it."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> None:
        """Take in a tensor of the call that is ending."""
        row = Row(self._ending(layer), self._part)
        self._part += 1
        values = real_tensor(tensor, layer).detach()
        if has_values(values):
            self.take(values, self._side.channel_dim(values, layer), row)

    def take(self, tensor: torch.Tensor, dim: int | None, row: Row) -> None:
        """Do with a tensor what is to be done.

        Args:
            tensor: The network's own.
            dim: Which dimension of it counts channels, where something says it.
            row: Which it is.
        """
        raise NotImplementedError

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Count a call."""
        call = self._ending(names[0])
        self._numbers[call.layer] += 1
        self._part = 0
        self.order.append(call)
        if self.counts(call):
            self.counted.append(call)

    def counts(self, call: Call) -> bool:
        """Tell whether a layer counts in the order of execution."""
        return call.layer != OUTPUT and self._has_place(self._side.modules[call.layer])

    def _ending(self, layer: str) -> Call:
        name = plain_name(layer) or OUTPUT
        return Call(name, self._numbers[name])


@final
class Reference(Calls):
    """Keeps what the first network puts out, until the second has put out the same.

    Args:
        side: The network.
        has_place: Tells which layers count in the order of execution.
        chosen: Of which layers it is to be kept; None is all.
    """

    def __init__(
        self, side: Side, has_place: Callable[[nn.Module], bool], chosen: frozenset[str] | None
    ) -> None:
        self._chosen = chosen
        self.kept: dict[Row, Kept] = {}
        super().__init__(side, has_place)

    def take(self, tensor: torch.Tensor, dim: int | None, row: Row) -> None:
        """Keep a copy: what comes next may work in place."""
        if self._chosen is None or row.call.layer in self._chosen:
            self.kept[row] = Kept(tensor.clone(), dim)


_Counterpart: TypeAlias = Callable[[Call], Call | None]
_Hold: TypeAlias = Callable[[torch.Tensor, int | None, Row, Row], torch.Tensor | None]


@final
class Other(Calls):
    """Holds what the second network puts out against what was kept of the first.

    Args:
        side: The network.
        has_place: Tells which layers count in the order of execution.
        isolates: Whether the network is to go on from what was kept.
    """

    def __init__(
        self,
        side: Side,
        has_place: Callable[[nn.Module], bool],
        *,
        isolates: bool,
    ) -> None:
        self._isolates = isolates
        self._given: Any = None
        self._counterpart: _Counterpart = _nothing
        self._hold: _Hold = _nothing
        super().__init__(side, has_place)

    @contextmanager
    def held_against(self, counterpart: _Counterpart, hold: _Hold) -> Iterator[None]:
        """Hold within the block what is put out against something; both are let go at its end.

        Args:
            counterpart: Finds the call in the other network that a call stands for.
            hold: Is called with a tensor, its channel dimension and its row where it has a counterpart, and
                that; returns what was kept of it.
        """
        self._counterpart, self._hold = counterpart, hold
        try:
            yield
        finally:
            self._counterpart = self._hold = _nothing

    @property
    def is_on_graph(self) -> bool:
        """Whether the network goes on from something else."""
        return self._isolates

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Take in a tensor; return what the network is to go on from."""
        self._given = tensor
        super().keep(tensor, layer)
        given, self._given = self._given, None
        return given

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return what the network goes on from."""
        given: torch.Tensor = kept
        return given

    def take(self, tensor: torch.Tensor, dim: int | None, row: Row) -> None:
        """Hold it against its counterpart, if it has one."""
        call = self._counterpart(row.call)
        kept = None if call is None else self._hold(tensor, dim, row, Row(call, row.part))
        if kept is not None and self._isolates and kept.shape == tensor.shape:
            self._given = _in_the_manner_of(tensor, kept)


def _nothing(*_: object) -> None:
    """Hold nothing against anything."""


def _in_the_manner_of(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return values in the type, the layout and the place of a tensor."""
    values = plain(values)
    if not tensor.is_quantized:
        return torch.empty_like(tensor).copy_(values)
    if tensor.qscheme() != torch.per_tensor_affine:
        return tensor
    floats = values.to(tensor.device, torch.float32)
    return torch.quantize_per_tensor(floats, tensor.q_scale(), tensor.q_zero_point(), tensor.dtype)


def has_values(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds numbers that can be compared."""
    return not (tensor.is_meta or tensor.is_nested)


def _all_layers(model: nn.Module) -> list[Layer]:
    """List all layers but those that only call others in turn, and put out what the last of them does."""
    return [
        layer
        for layer in named_layers(model)
        if not (type(layer.module) is nn.Sequential and layer.module._modules and layer.name)
    ]
