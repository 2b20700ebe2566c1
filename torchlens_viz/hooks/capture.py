"""`capture`: record what chosen layers put out, inside a `with` block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Generic, Literal, NoReturn, TypeVar, final

import torch
from torch import nn

from torchlens_viz.arguments import all_indices, flag, named_device, one_of, shown
from torchlens_viz.errors import CaptureError, InvalidArgumentError
from torchlens_viz.hooks.activations import Activations, Recorder
from torchlens_viz.hooks.block import Block
from torchlens_viz.hooks.forward import (
    StopForwardError,
    let_go,
    refuse_torchscript,
    refuse_unhookable,
)
from torchlens_viz.hooks.layout import Layout, has_signals, mixes_layouts
from torchlens_viz.hooks.retention import Reduction, Retention
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import Layer, Selector, select, unwrap

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
    channel_dim: int | None = None,
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
            `torch.autograd.grad(loss, acts[name])` works, since the network goes on from what was captured,
            with the values it had; at an input it is the gradient that comes through the layer. A layer that
            hands back its own input (`nn.Identity`, an in-place ReLU) gives new memory instead: a network
            that then writes to one and reads the other computes something else. Not with `reduce`: reduce
            `acts[name]`, which is on the graph.
        dtype: Convert floating-point tensors to this type.
        device: Move to this device, after `channels`, `reduce` and `dtype`. From CUDA to the host,
            tensors travel beside the computation, through 256 MiB of pinned memory; reading waits for them.
        channels: Keep only these channels, by index from 0.
        channel_dim: The dimension that counts channels, for `channels` and `RunningStats`: 1 in (N, C, H, W),
            -1 in tokens (N, L, C). None finds it for each layer by its kind, and of layers of which the kind
            does not say it by the operations that led to the tensor, in the first forward pass; where nothing
            says it, a warning says what was taken.
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
    one_of(io, "io", ("output", "input", "both"))
    one_of(compiled, "compiled", ("eager", "error"))
    stop = flag(stop, "stop")
    retention = Retention(
        copy=copy,
        grad=grad,
        dtype=dtype,
        device=None if device is None else named_device(device),
        channels=None if channels is None else _channels(channels),
        reduce=reduce,
        max_bytes=max_bytes,
    )
    refuse_torchscript(model)
    selected = select(model, layers)
    check = partial(refuse_unhookable, model, selected, stop=stop, compiled=compiled)
    check()
    layout = Layout(selected, channel_dim)
    followed = None
    if layout.must_follow:
        needs_channels = retention.channels is not None or retention.gathers
        if needs_channels or mixes_layouts(model) or has_signals(model):
            followed = layout
    sink = Recorder(retention, layout)
    return Capture(unwrap(model), selected, check, sink, io=io, stop=stop, layout=followed)


def _channels(channels: int | Sequence[int]) -> tuple[int, ...]:
    """Return channel indices as a tuple, refusing what is not a list of indices from 0."""
    indices = tuple(all_indices(channels, "channels"))
    if min(indices) < 0:
        raise InvalidArgumentError(f"`channels` must be one or more indices from 0, got {shown(channels)}")
    return indices


@final
class Capture(Generic[Opened]):
    """The context manager that `capture` returns: hooks stand from entry to exit, all of them or none.

    The hooks know the block and not this, so that it dies with the `with` statement: where Ctrl-C came in the
    instant before `__exit__` could do anything, they are withdrawn then.

    Args:
        root: The model, without wrappers.
        selected: The layers to hook.
        check: Raises where hooks would not tell the truth; called at every entry.
        sink: Where tensors and calls go. What its `open` returns is what `with` gives.
        io: Whether layers give what they took, what they put out, or both.
        stop: Whether to end a forward pass once every layer has run.
        layout: Is told of the operations within the block, if it is given.
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
        layout: Layout | None = None,
    ) -> None:
        self._check = check
        self._stop = StopForwardError() if stop else None
        self._at_death: weakref.finalize[..., Capture[Opened]] | None = None
        self._block = Block(root, selected, sink, io=io, stop=self._stop, layout=layout)

    def __enter__(self) -> Opened:
        if self._block.is_open:
            raise CaptureError("this capture is active already; make a second one with `capture(...)`")
        self._check()  # once more: the model may have changed since
        self._at_death = weakref.finalize(self, self._block.close)
        try:
            opened: Opened = self._block.open()
            return opened
        except BaseException:
            self._close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._close()
        failure, self._block.failure = self._block.failure, None
        if error is None and failure is not None:
            raise failure  # the model caught it; what was recorded is incomplete all the same
        if self._stop is None or error is not self._stop:
            return False
        let_go(self._stop)
        return True

    def __getitem__(self, name: object) -> NoReturn:
        raise CaptureError(
            "nothing was recorded: a capture is entered, as in `with capture(model, ...) as acts:`, and what "
            f"ran within the block is in `acts[{name!r}]`"
        )

    def _close(self) -> None:
        try:
            self._block.close()
        finally:
            self._block.close()  # once more: Ctrl-C may have come within the first
        if self._at_death is not None:
            self._at_death.detach()
