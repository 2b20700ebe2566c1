"""What is kept of a tensor that a layer put out: which part of it, in what form, and where."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal, Protocol, TypeAlias, cast, final

import torch

from torchlens_viz.errors import (
    CaptureMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    TorchlensVizError,
)
from torchlens_viz.hooks.sink import real_tensor
from torchlens_viz.nested import map_tensors, tensors
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
    channel_dim: int = 1
    reduce: Reduction | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.copy not in (True, False, "lazy"):
            raise InvalidArgumentError(f'`copy` must be True, False or "lazy", got {self.copy!r}')
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
                f"`reduce` must be a function of one tensor or RunningStats, got {self.reduce!r}"
            )
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise InvalidArgumentError(f"`max_bytes` must be positive, got {self.max_bytes}")

    @property
    def gathers(self) -> bool:
        """Whether each call adds to statistics, instead of being kept by itself."""
        return self.reduce is RunningStats or isinstance(self.reduce, RunningStats)

    @property
    def is_on_graph(self) -> bool:
        """Whether what is kept can stand in the graph for the tensor itself: a whole clone, of its type."""
        changes = (self.dtype, self.device, self.channels, self.reduce)
        return self.grad and self.copy is True and all(change is None for change in changes)

    def keep(
        self,
        tensor: torch.Tensor | torch.fx.Proxy,
        layer: str,
        held: int,
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> Any:
        """Return what is to be kept of `tensor`.

        Args:
            tensor: A tensor that `layer` took or put out, or what stands for one while torch.fx traces.
            layer: The layer's name, for messages.
            held: Bytes that the capture holds already.
            send: Moves a tensor of our own to the host; its values may come later.

        Raises:
            CaptureError: The tensor exists only within a transform such as `vmap`.
            CaptureMemoryError: Keeping it would pass `max_bytes`.
            InvalidArgumentError: It has no such channel.
        """
        real = real_tensor(tensor, layer)
        kept: Any = real if self.grad else real.detach()
        is_ours = False
        if self.channels is not None:
            self._check(held, layer, _bytes_of_channels(kept, self.channels, self.channel_dim, layer))
            index = torch.tensor(self.channels, device="cpu").to(kept.device, non_blocking=True)
            kept, is_ours = kept.index_select(self.channel_dim, index), True
        if self.gathers:
            return self._gathered(kept, layer, held)
        if self.reduce is not None:
            reduced = cast("Callable[[torch.Tensor], Any]", self.reduce)(kept)
            if not self.grad:  # it may have parameters, and so a graph of its own
                reduced = map_tensors(torch.Tensor.detach, reduced)
            self._check(held, layer, size_in_bytes(reduced))
            # A reduction may return a view of what it was given, so that it is not ours; but it is small.
            return map_tensors(lambda part: self._place(part, send, is_ours=False), reduced)
        if self.max_bytes is not None:
            itemsize = (self._dtype_of(kept) or kept.dtype).itemsize
            self._check(held, layer, kept.numel() * itemsize)
        return self._place(kept, send, is_ours=is_ours)

    def duplicate(self, kept: Any, layer: str, held: int) -> Any:
        """Return what was kept once more, in memory of its own, for another name of the same layer."""
        self._check(held, layer, size_in_bytes(kept))
        return map_tensors(torch.clone, kept)

    def _gathered(self, tensor: torch.Tensor, layer: str, held: int) -> RunningStats:
        example = self.reduce
        if isinstance(example, RunningStats):
            stats = example.fresh()
        else:
            stats = RunningStats(channel_dim=self.channel_dim)
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
        dtype, device = self._dtype_of(tensor) or tensor.dtype, self.device or tensor.device
        if travels(tensor, self.device):
            return send(tensor.to(dtype, copy=not is_ours))
        must_copy = not is_ours and self.copy is not False
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
    """Return the bytes of all tensors in a nested value, counted by their elements."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors(value))


def _bytes_of_channels(tensor: torch.Tensor, channels: Sequence[int], dim: int, layer: str) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise InvalidArgumentError(
            f"`channel_dim` must be a dimension of what `{layer}` puts out, got {dim} "
            f"(shape {tuple(tensor.shape)})"
        )
    if max(channels) >= tensor.shape[dim]:
        raise InvalidArgumentError(
            f"`channels` must be below {tensor.shape[dim]} for `{layer}`, got {max(channels)} "
            f"(shape {tuple(tensor.shape)}, `channel_dim` {dim})"
        )
    rest = prod(size for axis, size in enumerate(tensor.shape) if axis != dim % tensor.ndim)
    return rest * len(channels) * tensor.dtype.itemsize


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
