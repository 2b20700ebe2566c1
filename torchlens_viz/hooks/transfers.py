"""Moving tensors from a CUDA device to host memory while the device goes on computing."""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol, final

import torch

PINNED_BYTES: Final = 256 * 2**20


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
