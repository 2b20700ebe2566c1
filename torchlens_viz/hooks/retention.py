"""What is kept of a tensor that a layer put out: which part of it, in what form, and where."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, prod
from typing import Any, Final, Literal, Protocol, TypeAlias, cast, final

import torch

from torchlens_viz.arguments import flag, real, shown
from torchlens_viz.errors import (
    CaptureMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    TorchlensVizError,
)
from torchlens_viz.hooks.graph import passage, select_channels
from torchlens_viz.hooks.layout import Layout, doubtful_layer, mark, mark_doubt, marked_dim
from torchlens_viz.hooks.sink import real_tensor
from torchlens_viz.nested import leaves, map_tensors
from torchlens_viz.stats.running import RunningStats

Reduction: TypeAlias = Callable[[torch.Tensor], Any] | type[RunningStats] | RunningStats

_WITHOUT_EFFECT: Final = ("copy", "grad", "dtype", "device")
PINNED_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The options of `capture` that say what becomes of each tensor; its docstring explains them."""

    copy: bool | Literal["lazy"] = True
    grad: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    channels: tuple[int, ...] | None = None
    reduce: Reduction | None = None
    max_bytes: int | None = None
    gathers: bool = field(init=False)  # whether each call adds to statistics, instead of being kept by itself

    def __post_init__(self) -> None:
        if not isinstance(self.copy, bool) and not (isinstance(self.copy, str) and self.copy == "lazy"):
            raise InvalidArgumentError(f'`copy` must be True, False or "lazy", got {shown(self.copy)}')
        object.__setattr__(self, "grad", flag(self.grad, "grad"))
        gathers = self.reduce is RunningStats or isinstance(self.reduce, RunningStats)
        object.__setattr__(self, "gathers", gathers)
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InvalidTypeError(f"`dtype` must be a torch.dtype, got {shown(self.dtype)}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InvalidArgumentError(f"`dtype` must be a floating-point type, got {self.dtype}")
        if self.gathers:
            given = (self.copy is not True, self.grad, self.dtype is not None, self.device is not None)
            names = [name for name, is_given in zip(_WITHOUT_EFFECT, given, strict=True) if is_given]
            if names:
                raise InvalidArgumentError(
                    f"`{names[0]}` has no effect with `reduce=RunningStats`, which keeps no activation and "
                    "sums in float64 where the layer runs; leave it out"
                )
        elif self.reduce is not None and not callable(self.reduce):
            raise InvalidTypeError(
                f"`reduce` must be a function of one tensor or RunningStats, got {shown(self.reduce)}"
            )
        elif self.grad and self.channels is not None and len(set(self.channels)) < len(self.channels):
            raise InvalidArgumentError(
                f"`channels` must be distinct with `grad=True`, got {list(self.channels)}; "
                "of one that is kept twice, neither has the whole gradient"
            )
        elif self.grad and self.reduce is not None:
            raise InvalidArgumentError(
                "`reduce` cannot go with `grad=True`, which lets the network go on from what is kept; "
                "leave `reduce` out, and reduce `acts[name]` yourself: it is on the graph"
            )
        if self.max_bytes is not None and not 0 < real(self.max_bytes, "max_bytes") < inf:
            raise InvalidArgumentError(f"`max_bytes` must be positive, got {shown(self.max_bytes)}")
        if self.max_bytes is not None:
            object.__setattr__(self, "max_bytes", ceil(self.max_bytes))

    def keep(
        self,
        tensor: torch.Tensor | torch.fx.Proxy,
        layer: str,
        held: int,
        send: Callable[[torch.Tensor], torch.Tensor],
        layout: Layout,
    ) -> Any:
        """Return what is to be kept of `tensor`.

        Args:
            tensor: A tensor that `layer` took or put out, or what stands for one while torch.fx traces.
            layer: The layer's name, for messages.
            held: Bytes that the capture holds already.
            send: Moves a tensor of our own to the host; its values may come later.
            layout: Knows which dimension counts channels.

        Raises:
            CaptureError: The tensor exists only within a transform such as `vmap`.
            CaptureMemoryError: Keeping it would pass `max_bytes`.
            InvalidArgumentError: It has no such channel.
        """
        real = real_tensor(tensor, layer)
        kept: Any = real if self.grad else real.detach()
        is_ours = False
        if self.channels is not None:
            dim = layout.channel_dim(kept, layer)
            self._check(held, layer, _bytes_of_channels(kept, self.channels, dim, layer))
            kept, is_ours = select_channels(kept, dim, self.channels, on_graph=self.grad), True
        if self.gathers:
            return self._gathered(kept, layer, held, layout.channel_dim(real, layer))
        if self.reduce is not None:
            reduced = cast("Callable[[torch.Tensor], Any]", self.reduce)(kept)
            reduced = map_tensors(torch.Tensor.detach, reduced)  # it may have parameters, and so a graph
            self._check(held, layer, size_in_bytes(reduced))
            # A reduction may return a view of what it was given, so that it is not ours; but it is small.
            return map_tensors(lambda part: self._place(part, send, is_ours=False), reduced)
        if self.max_bytes is not None:
            itemsize = (self._dtype_of(kept) or kept.dtype).itemsize
            self._check(held, layer, kept.numel() * itemsize)
        placed = self._place(kept, send, is_ours=is_ours)
        if placed is not real:
            if (found := layout.found(real, layer)) is not None:
                mark(placed, found)
            elif layout.doubts(real, layer):
                mark_doubt(placed, layer)
        return placed

    def successor(self, tensor: torch.Tensor, kept: torch.Tensor, layer: str, layout: Layout) -> torch.Tensor:
        """Return what the network is to go on from, so that its gradient passes through what was kept.

        Args:
            tensor: What the layer took or put out.
            kept: What `keep` made of it.
            layer: The layer's name.
            layout: Knows which dimension counts channels.

        Returns:
            The values of `tensor`, in memory of their own; or `tensor`, where that was kept itself, or where
            there is no gradient.
        """
        if kept is tensor or not kept.requires_grad:
            return tensor
        if self.channels is None and (kept.dtype, kept.device) == (tensor.dtype, tensor.device):
            return _lazy_clone(kept) if self.copy == "lazy" and _can_share(kept) else kept.clone()
        dim = None if self.channels is None else layout.channel_dim(tensor, layer)
        return passage(tensor, kept, dim, self.channels)

    def duplicate(self, kept: Any, layer: str, held: int) -> Any:
        """Return what was kept once more for another name of the same layer.

        That is in memory of its own; but on a graph it is the same, from which the network goes on.
        """
        if self.grad:
            return kept
        self._check(held, layer, size_in_bytes(kept))
        return map_tensors(_clone, kept)

    def _gathered(self, tensor: torch.Tensor, layer: str, held: int, dim: int) -> RunningStats:
        example = self.reduce if isinstance(self.reduce, RunningStats) else RunningStats()
        stats = example.fresh() if example.channel_dim is not None else example.fresh(channel_dim=dim)
        try:
            stats.update(tensor)
        except TorchlensVizError as error:
            raise type(error)(f"there are no statistics of `{layer}`: {error}") from error
        self._check(held, layer, size_in_bytes(stats))
        return stats

    def _dtype_of(self, tensor: torch.Tensor) -> torch.dtype | None:
        return self.dtype if tensor.is_floating_point() else None

    def _place(
        self, tensor: torch.Tensor, send: Callable[[torch.Tensor], torch.Tensor], *, is_ours: bool
    ) -> torch.Tensor:
        must_copy = not is_ours and self.copy is not False
        if self.dtype is not None or self.device is not None:
            dtype, device = self._dtype_of(tensor) or tensor.dtype, self.device or tensor.device
            if travels(tensor, self.device):
                return send(tensor.to(dtype, copy=not is_ours))
            if dtype != tensor.dtype or device != tensor.device:
                return tensor.to(device=device, dtype=dtype, copy=must_copy)
        if not must_copy:
            return tensor
        if self.copy == "lazy" and _can_share(tensor):
            return _lazy_clone(tensor)
        return tensor.clone()

    def _check(self, held: int, layer: str, needed: int) -> None:
        if self.max_bytes is not None and held + needed > self.max_bytes:
            raise CaptureMemoryError(
                f"`{layer}` needs {needed:,} bytes, {held:,} are held and `max_bytes` is {self.max_bytes:,}; "
                "keep less with `channels=` or `reduce=`, select fewer layers, call `acts.clear()` between "
                "forward passes, or raise `max_bytes`"
            )


def travels(tensor: torch.Tensor, device: torch.device | None) -> bool:
    """Tell whether a tensor goes to the host beside the computation, which its graph could not."""
    return device is not None and device.type == "cpu" and tensor.is_cuda and not tensor.requires_grad


def size_in_bytes(value: Any) -> int:
    """Return the bytes of all tensors and statistics in a nested value, tensors counted by their elements."""
    if isinstance(value, torch.Tensor):  # nearly always, and on the path of every call
        return value.numel() * value.dtype.itemsize
    return sum(
        each._nbytes if isinstance(each, RunningStats) else each.numel() * each.dtype.itemsize
        for each in leaves((torch.Tensor, torch.fx.Proxy, RunningStats), value)
    )


def _bytes_of_channels(tensor: torch.Tensor, channels: Sequence[int], dim: int, layer: str) -> int:
    if max(channels) >= tensor.shape[dim]:
        raise InvalidArgumentError(
            f"`channels` must be below {tensor.shape[dim]} for `{layer}`, got {max(channels)} "
            f"(shape {tuple(tensor.shape)}, `channel_dim` {dim})"
        )
    rest = prod(size for axis, size in enumerate(tensor.shape) if axis != dim % tensor.ndim)
    return rest * len(channels) * tensor.dtype.itemsize


def _clone(kept: torch.Tensor) -> torch.Tensor:
    clone = kept.clone()
    if (dim := marked_dim(kept)) is not None:
        mark(clone, dim)
    elif (layer := doubtful_layer(kept)) is not None:
        mark_doubt(clone, layer)
    return clone


def _can_share(tensor: torch.Tensor) -> bool:
    """Tell whether a copy on write is as good as a clone: one whole block of memory, nothing beside it."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    # A lazy clone loses the scale of a quantised tensor (reading it crashes), repeats the overlaps of an
    # expanded one, and holds all the memory that a view is a part of.
    if not is_plain or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _lazy_clone(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that PyTorch did not allocate, such as a numpy array's
        return tensor.clone()


class Event(Protocol):
    """Something that happens on a device."""

    def synchronize(self) -> None:
        """Wait until it has happened."""


class Lane(Protocol):
    """A way from a device to pinned host memory that runs beside the computation."""

    def stage(self, like: torch.Tensor) -> torch.Tensor:
        """Return pinned host memory for a tensor."""

    def copy(self, source: torch.Tensor, staging: torch.Tensor) -> Event:
        """Start to copy `source`, which nobody else writes to; return the end of it."""


@final
class CudaLane:
    """A side stream per device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stage(self, like: torch.Tensor) -> torch.Tensor:
        """Return pinned host memory for a tensor; PyTorch keeps such memory for reuse."""
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def copy(self, source: torch.Tensor, staging: torch.Tensor) -> Event:
        """Copy on the side stream, after what the current stream has been given so far."""
        stream = self._streams.get(source.device)
        if stream is None:
            stream = self._streams[source.device] = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            staging.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        source.record_stream(stream)  # its memory is not given away before the copy is done
        return event


@final
class Transfers:
    """Tensors on their way to the host, through a bounded amount of pinned memory.

    What `send` returns has its shape at once and its values only after `finish`.

    Args:
        lane: The way they take.
        limit: The most bytes of pinned memory to hold. A larger tensor travels alone.
    """

    def __init__(self, lane: Lane | None = None, limit: int = PINNED_BYTES) -> None:
        self._lane: Lane = CudaLane() if lane is None else lane
        self._limit = limit
        self._pinned = 0
        self._under_way: deque[tuple[torch.Tensor, torch.Tensor, Event]] = deque()

    def send(self, source: torch.Tensor) -> torch.Tensor:
        """Start to move a tensor that nobody else writes to; return where its values will be.

        Only where the pinned memory is full does this wait, for the tensor that was sent first.
        """
        while self._under_way and self._pinned + source.nbytes > self._limit:
            self._arrive()
        staging = self._lane.stage(source)
        event = self._lane.copy(source, staging)
        destination = torch.empty_like(source, device="cpu")
        self._under_way.append((staging, destination, event))
        self._pinned += staging.nbytes
        return destination

    def finish(self) -> None:
        """Wait until everything that was sent has its values."""
        while self._under_way:
            self._arrive()

    def _arrive(self) -> None:
        staging, destination, event = self._under_way.popleft()
        event.synchronize()
        destination.copy_(staging)
        self._pinned -= staging.nbytes
