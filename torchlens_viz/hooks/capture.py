"""`capture`: record what chosen layers put out; the only place that registers forward hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, final

import torch
from torch import nn

from torchlens_viz.arguments import channel_tuple
from torchlens_viz.errors import CaptureError, InvalidArgumentError, TorchlensVizError
from torchlens_viz.hooks.activations import Activations, InputOutput, Inputs, Recorder
from torchlens_viz.hooks.forward import (
    StopForwardError,
    StopPoint,
    eager_stance,
    refuse_torchscript,
    refuse_unhookable,
)
from torchlens_viz.hooks.retention import Reduction, Retention
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import Layer, Selector, select, unwrap
from torchlens_viz.nested import map_tensors, tensors

Opened = TypeVar("Opened")


def capture(
    model: nn.Module,
    layers: Selector,
    *,
    io: Literal["output", "input", "both"] = "output",
    copy: bool | Literal["lazy"] = True,
    grad: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    channels: int | Sequence[int] | None = None,
    channel_dim: int = 1,
    reduce: Reduction | None = None,
    stop: bool = False,
    max_bytes: int | None = None,
    compiled: Literal["eager", "error"] = "eager",
) -> Capture[Activations]:
    """Record what the chosen layers of a model put out, inside a `with` block.

    Only forward passes that run in the thread that entered the block are recorded, those of other asyncio
    tasks included; activations that gradient checkpointing computes a second time, during backward, are not.
    The model is used as it is: train or eval mode, gradients and autocast are the caller's choice.

    Args:
        model: The network; wrapped in DDP or compiled by `torch.compile` too.
        layers: Which layers, as a name, number, glob, pattern, class, instance, predicate or a list of those;
            see `torchlens_viz.models.layers.select`.
        io: Record what the layer put out, what it took, or both as `InputOutput(input, output)`. An input is
            the layer's only positional argument, else `Inputs(args, kwargs)`, as it was before the layer ran.
        copy: `True` clones each tensor, which is safe whatever the network does to it later. `"lazy"` copies
            when either side is written to (CPU only; elsewhere it clones): it cannot see writes through
            memory addresses taken before the layer returned. `False` keeps the layer's own memory: right only
            where nothing works in place, and what is handed out must not be changed.
        grad: Keep the graph: gradients flow through the captured tensor to the model, and
            `torch.autograd.grad(loss, acts[name])` works, since the network goes on from what was captured.
            A layer that hands back its own input (`nn.Identity`, an in-place ReLU) gives new memory instead:
            a network that then writes to one and reads the other computes something else.
        dtype: Convert floating-point tensors to this type.
        device: Move to this device, after `channels`, `reduce` and `dtype`. From CUDA to the host,
            tensors travel beside the computation, through 256 MiB of pinned memory; reading waits for them.
        channels: Keep only these channels, by index from 0.
        channel_dim: The dimension of the channels, for `channels` and `RunningStats`; 1 in (N, C, H, W).
        reduce: Keep `reduce(tensor)` instead of each tensor, for instance `lambda t: t.mean((2, 3))`. With
            `RunningStats` no activation is kept: `acts[name]` is then the `ChannelStats` of all calls in the
            block. `RunningStats(bins="log")` gives its options; it stays empty itself.
        stop: End each forward pass once every selected layer has run at least once; `model(...)` then returns
            None. Where a part of the model is called directly, the `with` block ends there.
        max_bytes: The most this block may hold at once; passing it raises before the copy is made.
        compiled: `"eager"` runs compiled code as plain Python, in the whole process, while the block is
            active, because hooks do not fire in compiled code. `"error"` refuses a compiled model.

    Returns:
        A context manager that gives `Activations`. It may be entered again after it was left.

    Raises:
        LayerNotFoundError: A selector matches nothing.
        CaptureError: The model cannot be hooked (TorchScript, sharded, replicated), or a forward pass runs
            under `vmap` or `torch.jit.trace`, where no value could be kept.
        CaptureMemoryError: `max_bytes` would be passed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
        >>> with capture(net, ["0", -1]) as acts:
        ...     y = net(torch.randn(1, 3, 8, 8))
        >>> acts["0"].shape, torch.equal(acts["2"], y)
        (torch.Size([1, 4, 6, 6]), True)
    """
    if io not in ("output", "input", "both"):
        raise InvalidArgumentError(f'`io` must be "output", "input" or "both", got {io!r}')
    if compiled not in ("eager", "error"):
        raise InvalidArgumentError(f'`compiled` must be "eager" or "error", got {compiled!r}')
    retention = Retention(
        copy=copy,
        grad=grad,
        dtype=dtype,
        device=None if device is None else torch.device(device),
        channels=None if channels is None else channel_tuple(channels),
        channel_dim=channel_dim,
        reduce=reduce,
        max_bytes=max_bytes,
    )
    refuse_torchscript(model)
    selected = select(model, layers)
    check = partial(refuse_unhookable, model, selected, stop=stop, compiled=compiled)
    check()
    return Capture(unwrap(model), selected, check, Recorder(retention), io=io, stop=stop)


@final
class Capture(Generic[Opened]):
    """The context manager that `capture` returns: hooks stand from entry to exit, all of them or none.

    Args:
        root: The model, without wrappers.
        selected: The layers to hook.
        check: Raises where hooks would not tell the truth; called at every entry.
        sink: Where tensors and calls go. What its `open` returns is what `with` gives.
        io: Whether layers give what they took, what they put out, or both.
        stop: Whether to end a forward pass once every layer has run.
    """

    def __init__(
        self,
        root: nn.Module,
        selected: Sequence[Layer],
        check: Callable[[], None],
        sink: Sink[Opened],
        *,
        io: Literal["output", "input", "both"] = "output",
        stop: bool = False,
    ) -> None:
        self._root = root
        self._check = check
        self._sink = sink
        self._io = io
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in selected:
            self._names.setdefault(module, []).append(name)
        self._stop = StopForwardError() if stop else None
        self._waiting: set[nn.Module] = set()
        self._taken: list[tuple[nn.Module, dict[str, Any], Any]] = []
        self._failure: TorchlensVizError | None = None
        self._thread = 0
        self._undo: ExitStack | None = None

    def __enter__(self) -> Opened:
        if self._undo is not None:
            raise CaptureError("this capture is active already; make a second one with `capture(...)`")
        self._check()  # once more: the model may have changed since
        self._failure = None
        self._thread = threading.get_ident()
        opened = self._sink.open([name for names in self._names.values() for name in names])
        with ExitStack() as undo:
            undo.callback(self._sink.close)
            undo.enter_context(eager_stance())
            for module in self._names:
                if self._io != "output":
                    before = module.register_forward_pre_hook(_BeforeHook(self, module), with_kwargs=True)
                    undo.callback(before.remove)
                if self._io != "input":
                    after = module.register_forward_hook(_AfterHook(self, module), with_kwargs=True)
                    undo.callback(after.remove)
            if self._stop is not None:
                undo.enter_context(StopPoint(self._root, self._stop))
                self._waiting = set(self._names)
            self._undo = undo.pop_all()
        return opened

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        undo, self._undo = self._undo, None
        self._taken.clear()
        if undo is not None:
            undo.close()
        if error is None and self._failure is not None:
            raise self._failure  # the model caught it; what was recorded is incomplete all the same
        return error is not None and error is self._stop

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a layer is about to take, before the layer can work on it in place."""
        taken = self._keep(module, args[0] if len(args) == 1 and not kwargs else Inputs(args, kwargs))
        if self._io == "both":
            self._taken.append((module, kwargs, taken))
        else:
            self._record(module, taken)

    def after(self, module: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        """Keep what a layer put out; return what is to replace it, or None."""
        if self._io == "both":
            place = self._place_of_taken(module, kwargs)
            if place is None:  # the block was entered while the layer was running
                return None
            taken = self._taken[place][-1]
            del self._taken[place:]
            kept = self._keep(module, output)
            self._record(module, InputOutput(taken, kept))
        else:
            kept = self._keep(module, output)
            self._record(module, kept)
        if self._sink.is_on_graph and any(tensor.requires_grad for tensor in tensors(kept)):
            return map_tensors(torch.clone, kept)  # the network goes on from what was kept
        return None

    def excuse(self, error: Exception) -> None:
        """Raise what went wrong, unless the sink would rather go on."""
        self._sink.excuse(error)

    def _place_of_taken(self, module: nn.Module, kwargs: dict[str, Any]) -> int | None:
        # Entries above a call's own belong to calls that failed and were caught inside the model, perhaps of
        # the same module. Each call has its own dict of keyword arguments, unless another hook replaced it.
        own = [place for place, entry in enumerate(self._taken) if entry[0] is module]
        exact = [place for place in own if self._taken[place][1] is kwargs]
        return max(exact or own, default=None)

    def applies(self, module: nn.Module) -> bool:
        """Tell whether the call of `module` that is going on is one that this block records."""
        if self._undo is None:
            return False
        if threading.get_ident() != self._thread:
            self._sink.missed(self._names[module])
            return False
        if torch._C._is_tracing():
            raise CaptureError("torch.jit.trace is running: trace the model outside the `capture` block")
        return torch._C._current_graph_task_id() == -1  # else checkpointing runs it again, in backward

    def _keep(self, module: nn.Module, value: Any) -> Any:
        name = self._names[module][0]
        try:
            with _ordinary_tensors():
                return map_tensors(lambda tensor: self._sink.keep(tensor, name), value)
        except TorchlensVizError as failure:
            self._failure = self._failure or failure
            raise

    def _record(self, module: nn.Module, kept: Any) -> None:
        try:
            with _ordinary_tensors():
                self._sink.record(self._names[module], kept)
        except TorchlensVizError as failure:
            self._failure = self._failure or failure
            raise
        if self._stop is not None:
            self._waiting.discard(module)
            if not self._waiting:
                self._waiting = set(self._names)
                self._taken.clear()  # the calls that are going on will not return
                raise self._stop


def _ordinary_tensors() -> AbstractContextManager[None]:
    """Make tensors that can take part in autograd: one made in inference mode never could."""
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode turns gradients on
        yield


class _Hook:
    """A hook for one capture on one module; inert in a copy or a pickle of it, and in compiled code."""

    __slots__ = ("_capture", "_module")

    def __init__(self, capture: Capture[Any], module: nn.Module) -> None:
        self._capture = capture
        self._module = module

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()

    def _applies(self, module: nn.Module) -> bool:
        return not torch.compiler.is_compiling() and module is self._module and self._capture.applies(module)


@final
class _BeforeHook(_Hook):
    __slots__ = ()

    # While one thread registers or removes a hook, another one may call it without the last arguments.
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> None:
        if self._applies(module):
            self._capture.before(module, args, *kwargs)


@final
class _AfterHook(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        try:
            return self._capture.after(module, *kwargs_and_output) if self._applies(module) else None
        except Exception as error:
            self._capture.excuse(error)
            return None


def _inert(*args: object) -> None:
    """Do nothing: what a hook becomes in a copy of the model."""


def _make_inert() -> Callable[..., None]:
    return _inert
