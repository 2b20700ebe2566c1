"""`Block`: the hooks of one capture, from entry to exit; the only place that registers forward hooks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal, final

import torch
from torch import nn

from torchlens_viz.errors import CaptureError, TorchlensVizError
from torchlens_viz.hooks.activations import InputOutput, Inputs
from torchlens_viz.hooks.calls import Call, Calls, Exchange, exchanged
from torchlens_viz.hooks.forward import (
    StopForwardError,
    StopPoint,
    hold_eager,
    is_traced,
    let_compile,
    refuse_always_called,
)
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import Layer
from torchlens_viz.nested import map_tensors

_AS_IT_IS: Final = nullcontext()


@final
class Block:
    """What stands on the model while a capture is active, and what its hooks report to.

    Args:
        root: The model, without wrappers.
        selected: The layers to hook.
        sink: Where tensors and calls go.
        io: Whether layers give what they took, what they put out, or both.
        stop: What is to end each forward pass, once every layer has run.
        layout: Is told of the operations meanwhile, if it is given.

    Attributes:
        is_open: Whether calls are recorded.
        failure: What went wrong in a hook.
    """

    def __init__(
        self,
        root: nn.Module,
        selected: Sequence[Layer],
        sink: Sink[Any],
        *,
        io: Literal["output", "input", "both"],
        stop: StopForwardError | None,
        layout: Layout | None,
    ) -> None:
        self.is_open = False
        self._stands = False  # whether anything may be left to take away
        self.failure: TorchlensVizError | None = None
        self._stop = stop
        self._root = root
        self._layout = layout
        self._sink = sink
        self._io = io
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in selected:
            self._names.setdefault(module, []).append(name)
        self._stop_point: StopPoint | None = None
        self._waiting: set[nn.Module] = set()
        self._calls = Calls()
        self._is_on_graph = sink.is_on_graph
        self._needs_after = io != "input" or self._is_on_graph
        self._thread = 0

    def open(self) -> Any:
        """Put everything in place; what was, when this is broken off, `close` takes away."""
        self.is_open = self._stands = True
        self.failure = None
        self._thread = threading.get_ident()
        opened = self._sink.open([name for names in self._names.values() for name in names])
        hold_eager(self)
        if self._layout is not None:
            self._layout.begin()
        for module in self._names:
            if self._io != "output":
                module.register_forward_pre_hook(_BeforeHook(self, module), with_kwargs=True)
            if self._needs_after:
                module.register_forward_hook(_AfterHook(self, module), with_kwargs=True)
        if self._stop is not None:
            self._waiting = set(self._names)
            self._stop_point = StopPoint(self._root, self._stop)
            self._stop_point.begin()
        return opened

    def close(self) -> None:
        """Take everything away again; may be called again, and where that was broken off."""
        if not self._stands:
            return
        if self._stop_point is not None:
            self._stop_point.end()
        for module in self._names:
            _withdraw(self, module)
        if self._layout is not None:
            self._layout.end()
        let_compile(self)
        self._calls.clear()
        if self.is_open:
            self._sink.close()
        self.is_open = self._stands = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep what a layer is about to take; return what it takes instead, or None."""
        value = args[0] if len(args) == 1 and not kwargs else Inputs(args, kwargs)
        taken, exchanges = self._keep(module, value)
        if exchanges:
            args, kwargs = exchanged(exchanges, (args, kwargs))
        if self._needs_after:
            self._calls.begin(Call(module, kwargs, taken, exchanges))
        if self._io == "input":
            self._record(module, taken)
        return (args, kwargs) if exchanges else None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep what a layer put out; return what is to replace it, or None."""
        call = None
        if self._io != "output":
            call = self._calls.end(module, kwargs)
            if call is None:  # the block was entered while the layer was running
                return None
            for exchange in call.exchanges:
                exchange.settle()
        if self._io == "input":
            return None
        if self._is_on_graph:
            self._sink.took(self._names[module][0], (args, kwargs))
        kept, exchanges = self._keep(module, output)
        self._record(module, kept if call is None else InputOutput(call.taken, kept))
        return exchanged(exchanges, output) if exchanges else None

    def excuses(self, error: Exception) -> bool:
        """Tell whether the network goes on although this went wrong."""
        return self._sink.excuses(error)

    def copied(self) -> None:
        """Take note that a hook of this block was left out of a copy of the model."""
        if self.is_open:
            self._sink.copied()

    def applies(self, module: nn.Module) -> bool:
        """Tell whether the call of `module` that is going on is one that this block records."""
        if not self.is_open:
            return False
        if threading.get_ident() != self._thread:
            self._sink.missed(self._names[module])
            return False
        if torch._C._is_tracing():
            raise CaptureError("torch.jit.trace is running: trace the model outside the `capture` block")
        return torch._C._current_graph_task_id() == -1  # else checkpointing runs it again, in backward

    def _keep(self, module: nn.Module, value: Any) -> tuple[Any, tuple[Exchange, ...]]:
        """Return what is kept of a value, and the tensors for which the network gets others."""
        name, sink = self._names[module][0], self._sink
        try:
            with _ordinary_tensors():
                if not self._is_on_graph:
                    return map_tensors(lambda tensor: sink.keep(tensor, name), value), ()
                exchanges: list[Exchange] = []

                def keep_on_graph(tensor: torch.Tensor) -> Any:
                    kept = sink.keep(tensor, name)
                    given = sink.successor(tensor, kept, name)
                    if given is not tensor:
                        exchanges.append(Exchange(tensor, given, given._version))
                    return kept

                return map_tensors(keep_on_graph, value), tuple(exchanges)
        except TorchlensVizError as failure:
            self.failure = self.failure or copy.copy(failure)  # without the frames it came through
            raise

    def _record(self, module: nn.Module, kept: Any) -> None:
        try:
            with _ordinary_tensors():
                self._sink.record(self._names[module], kept)
        except TorchlensVizError as failure:
            self.failure = self.failure or copy.copy(failure)  # without the frames it came through
            raise
        if self._stop is not None:
            self._waiting.discard(module)
            if not self._waiting:
                self._waiting = set(self._names)
                refuse_always_called(self._root)  # one may have been added since
                self._calls.clear()  # the calls that are going on will not return
                raise self._stop


def _ordinary_tensors() -> AbstractContextManager[None]:
    """Make tensors that can take part in autograd: one made in inference mode never could."""
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else _AS_IT_IS


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode turns gradients on
        yield


class _Hook:
    """A hook for one capture on one module; inert in a copy or a pickle of it, and in compiled code."""

    __slots__ = ("_block", "_module")

    def __init__(self, block: Block, module: nn.Module) -> None:
        self._block = block
        self._module = module

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        self._block.copied()
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()

    def _applies(self, module: nn.Module) -> bool:
        return not is_traced() and module is self._module and self._block.applies(module)


@final
class _BeforeHook(_Hook):
    """Reports a call, and may change what the layer takes."""

    __slots__ = ()

    # While one thread registers or removes a hook, another one may call it without the last arguments.
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> Any:
        """Report the call."""
        return self._block.before(module, args, *kwargs) if self._applies(module) else None


@final
class _AfterHook(_Hook):
    """Reports a result, and may change it."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        """Report the result; where that fails the network may go on without."""
        try:
            return self._block.after(module, args, *kwargs_and_output) if self._applies(module) else None
        except Exception as error:
            if not self._block.excuses(error):
                raise
            return None


def _withdraw(block: Block, module: nn.Module) -> None:
    """Remove the hooks of a block from a module, those too of which nobody got the handle."""
    sides: tuple[tuple[dict[int, Any], ...], ...] = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    )
    for hooks, with_kwargs in sides:
        if not hooks:
            continue
        # A copy: other threads register and remove hooks at the same time.
        ours = [key for key, hook in list(hooks.items()) if isinstance(hook, _Hook) and hook._block is block]
        for key in ours:
            with_kwargs.pop(key, None)
            hooks.pop(key, None)


def _inert(*args: object) -> None:
    """Do nothing: what a hook becomes in a copy of the model."""


def _make_inert() -> Callable[..., None]:
    return _inert
