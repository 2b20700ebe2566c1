"""The network with one channel replaced, for many channels at once: what comes before them runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final, TypeAlias, final

import torch
from torch import nn

from torchlens_viz.ablation.rows import CannotRepeatError, Repeating
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.layers import Layer, unwrap
from torchlens_viz.models.state import require_values, untouched
from torchlens_viz.nested import cloned, map_tensors, tensors

# Makes of what a layer puts out, channels second, what is to stand in the place of any of its channels.
Filling: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

NOTHING: Final = -1
"""The channel that no layer has: the network as it is."""


@final
class Rewriting(Sink[None]):
    """Replaces one channel in what a layer puts out, in every call.

    Args:
        layout: Knows where its channels are.
        filling: What is to stand there.

    Attributes:
        channel: Which: a number, within `vmap` one for each copy; or (N,), one for each row; None is none.
        repeating: What makes copies of the batch there, one for each channel.
        watcher: Is told what the layer puts out, channels second.
        looked: The shape of what the layer put out, channels second, when it was last replaced or looked at.
    """

    __slots__ = ("_changed", "_layout", "channel", "filling", "looked", "repeating", "watcher")

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._changed: Any = None
        self.filling: Filling | None = None
        self.channel: torch.Tensor | None = None
        self.looked: tuple[int, ...] | None = None
        self.watcher: Callable[[torch.Tensor], None] | None = None
        self.repeating: Repeating | None = None

    @property
    def is_on_graph(self) -> bool:
        """Whether the network goes on from what was changed."""
        return True

    def open(self, layers: Sequence[str]) -> None:
        """Begin; nothing is needed for it."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Return what the layer puts out with the channel replaced."""
        if isinstance(tensor, torch.fx.Proxy) or not tensor.is_floating_point() or tensor.ndim < 2:
            what = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "a symbol"
            raise InvalidArgumentError(
                f"`layer` must put out floating numbers (N, C, ...), got {what} from `{layer}`; "
                "choose another"
            )
        dim = self._layout.channel_dim(tensor, layer)
        if dim == 0:
            raise InvalidArgumentError(
                f"`layer` must put out a row per input, got channels in the first dimension of "
                f"{tuple(tensor.shape)} from `{layer}`; say with `channel_dim` where they are"
            )
        if self.repeating is not None:
            tensor = self.repeating.repeat(tensor)
            with self.repeating.paused():
                replaced = self._replaced(tensor, dim)
            self.repeating.note_copies(replaced)
            return replaced
        return self._replaced(tensor, dim)

    def _replaced(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        maps = tensor.movedim(dim, 1)
        self.looked = tuple(maps.shape)
        if self.watcher is not None:
            self.watcher(maps)
        if self.channel is None or self.filling is None:
            return tensor
        ones = (1,) * (maps.ndim - 2)
        places = torch.arange(maps.shape[1], device=maps.device).view(1, -1, *ones)
        which = self.channel.view(-1, 1, *ones) if self.channel.ndim else self.channel
        filled = self.filling(maps).to(maps.dtype)
        return torch.where(places == which, filled, maps).movedim(1, dim)

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return what the network goes on from."""
        changed: torch.Tensor = kept
        return changed


@final
class Rewritten:
    """A network in which channels of a layer are replaced; it is left as it was.

    Args:
        model: The network.
        layer: Its layer.
        channel_dim: The dimension that counts channels, where the caller says it.
    """

    def __init__(self, model: nn.Module, layer: Layer, channel_dim: int | None) -> None:
        refuse_torchscript(model)
        require_values(model)
        self._model, self._layer = model, layer
        self._layout = Layout([layer], channel_dim)
        self._sink = Rewriting(self._layout)
        self._ways = [self._from_there, self._at_once, self._in_rows]

    @contextmanager
    def _hooks(self, *, stop: bool = False) -> Iterator[None]:
        layers = [self._layer]
        check = partial(refuse_unhookable, self._model, layers, stop=stop, compiled="eager")
        hooks = Capture(unwrap(self._model), layers, check, self._sink, stop=stop)
        try:
            with untouched(self._model), hooks:
                yield
        finally:
            self._sink.channel = self._sink.filling = self._sink.watcher = self._sink.repeating = None

    def _taking(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        return shown_to(self._model, (args, kwargs), "loader", "say with `input_of` what it takes of a batch")

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Run the network as far as the layer, and return how many channels it puts out.

        Raises:
            InvalidArgumentError: The layer does not run.
        """
        if self._sink.looked is None:
            with self._taking(args, kwargs), self._layout.following(), self._hooks(stop=True):
                self._model(*cloned(args), **cloned(kwargs))
        looked = self._sink.looked
        if looked is None:
            raise InvalidArgumentError(
                f"`layer` must run in eval mode, but `{self._layer.name}` does not; choose another"
            )
        return looked[1]

    def watch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], watcher: Callable[[torch.Tensor], None]
    ) -> None:
        """Run the network as it is, and tell `watcher` what the layer puts out, channels second."""
        self.look(args, kwargs)
        with self._taking(args, kwargs), self._hooks():
            self._sink.watcher = watcher
            self._model(*cloned(args), **cloned(kwargs))

    def outputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], channels: torch.Tensor, filling: Filling
    ) -> list[Any]:
        """Return what the network puts out with each of the channels replaced, channel by channel.

        Args:
            args: What the network takes.
            kwargs: The same by name.
            channels: (K,) int64; `NOTHING` replaces none.
            filling: What is to stand there.
        """
        with self._taking(args, kwargs):
            while True:
                try:
                    with self._hooks():
                        self._sink.filling = filling
                        return self._ways[0](args, kwargs, channels)
                except (CannotRepeatError, RuntimeError):  # this way does not know or cannot do something
                    if len(self._ways) == 1:
                        raise
                    del self._ways[0]

    def _from_there(self, args: tuple[Any, ...], kwargs: dict[str, Any], channels: torch.Tensor) -> list[Any]:
        """Run it on the inputs as far as the layer, and on copies of the batch from there."""
        inputs, copies = len(next(tensors((args, kwargs)))), len(channels)
        own_args, own_kwargs = cloned(args), cloned(kwargs)
        self._sink.channel = channels.repeat_interleave(inputs)
        repeating = self._sink.repeating = Repeating(inputs, copies)
        repeating.start((own_args, own_kwargs))
        repeating.begin()
        try:
            output = self._model(*own_args, **own_kwargs)
        finally:
            repeating.end()
        parts = [
            torch.split(each, inputs) if repeating.has_copies(each) else (each,) * copies
            for each in tensors(output)
        ]
        return [_with(output, [part[place] for part in parts]) for place in range(copies)]

    def _at_once(self, args: tuple[Any, ...], kwargs: dict[str, Any], channels: torch.Tensor) -> list[Any]:
        """Run it once: what does not depend on the channel is not batched by `vmap`, and computed once."""
        found: list[Any] = []

        def run(channel: torch.Tensor) -> tuple[torch.Tensor, ...]:
            self._sink.channel = channel
            output = self._model(*cloned(args), **cloned(kwargs))
            found.append(output)
            return tuple(tensors(output))

        with _batched_or_refused():
            results = torch.vmap(run)(channels)
        return [_with(found[0], [each[place] for each in results]) for place in range(len(channels))]

    def _in_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], channels: torch.Tensor) -> list[Any]:
        """Run it on the inputs as often as there are channels, as one batch."""
        count = len(channels)
        inputs = len(next(tensors((args, kwargs))))

        def repeated(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 0 or len(tensor) != inputs:
                return tensor
            return tensor.repeat(count, *(1,) * (tensor.ndim - 1))

        self._sink.channel = channels.repeat_interleave(inputs)
        output = self._model(*map_tensors(repeated, args), **map_tensors(repeated, kwargs))
        parts = [torch.split(each, inputs) for each in tensors(output)]
        return [_with(output, [part[place] for part in parts]) for place in range(count)]


@contextmanager
def _batched_or_refused() -> Iterator[None]:
    """Let `vmap` raise for an operation that it cannot batch, instead of running it channel by channel."""
    switch: Any = torch._C._functorch
    was_enabled = switch._is_vmap_fallback_enabled()
    switch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        switch._set_vmap_fallback_enabled(was_enabled)


def _with(output: Any, values: Sequence[torch.Tensor]) -> Any:
    """Return an output with other tensors in the place of its own, in order."""
    rest = iter(values)
    return map_tensors(lambda tensor: next(rest), output)
