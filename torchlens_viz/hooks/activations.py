"""What a capture recorded: `Activations`, a read-only mapping from layer name to what the layer put out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch

from torchlens_viz.errors import CaptureError, LayerNotCapturedError, SeveralCallsError, TorchlensVizError
from torchlens_viz.hooks import archive
from torchlens_viz.hooks.retention import Retention, Transfers, size_in_bytes
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import nearest
from torchlens_viz.nested import leaves, map_leaves, tensors
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.running import RunningStats


class Inputs(NamedTuple):
    """What a layer was called with, where that is anything but one positional argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class InputOutput(NamedTuple):
    """What a layer took and gave in one call, as `io="both"` records it."""

    input: Any
    output: Any


_KINDS: Final[Mapping[str, type]] = {"Inputs": Inputs, "InputOutput": InputOutput}


@final
class _Unread:
    """A call whose values are still in a file."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read


@final
class _Gathered:
    """Statistics in the place of tensors, of all calls together."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def add(self, name: str, value: Any) -> None:
        ours, theirs = leaves(RunningStats, self.value), leaves(RunningStats, value)
        if len(ours) != len(theirs):
            raise CaptureError(
                f"`{name}` had {len(ours)} tensors in its first call and {len(theirs)} in a later one, which "
                "have no statistics in common; capture without `reduce=RunningStats`"
            )
        try:
            for mine, other in zip(ours, theirs, strict=True):
                mine.merge(other)
        except TorchlensVizError as error:
            raise CaptureError(f"the calls of `{name}` have no statistics in common: {error}") from error

    def read(self) -> Any:
        return map_leaves(RunningStats, RunningStats.compute, self.value)


@final
class Activations(Mapping[str, Any]):
    """Activations by layer name, in the order in which the layers first ran.

    `acts[name]` is what the layer put out: a tensor of shape (N, C, H, W) for a 2-D convolution, else the
    structure the layer returned. Tensors belong to whoever holds this object: changing one changes nothing
    else, and no later operation of the network changes them. In a capture with `reduce=RunningStats`, a
    `ChannelStats` stands in the place of each tensor: what all calls gathered up to the moment of reading.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchlens_viz import capture
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        >>> with capture(net, nn.Conv2d) as acts:
        ...     _ = net(torch.zeros(1, 3, 5, 5))
        >>> list(acts), acts["0"].shape
        (['0'], torch.Size([1, 8, 3, 3]))
    """

    __slots__ = ("_calls", "_complete", "_elsewhere", "_held_bytes", "_selected")

    def __init__(self, selected: Iterable[str]) -> None:
        self._selected = tuple(selected)
        self._calls: dict[str, list[Any]] = {}
        self._elsewhere: set[str] = set()
        self._held_bytes = 0
        self._complete: Callable[[], None] | None = None  # waits for values that are on their way

    def __getitem__(self, name: str) -> Any:
        recorded = self.calls(name)
        if not recorded:
            raise LayerNotCapturedError(self._why_not(name))
        if len(recorded) > 1:
            raise SeveralCallsError(
                f"`{name}` ran {len(recorded)} times; take one of `acts.calls({name!r})`, or call "
                "`acts.clear()` between forward passes"
            )
        return recorded[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, name: object) -> bool:
        return name in self._calls

    def calls(self, name: str) -> tuple[Any, ...]:
        """Return what the layer put out in each of its calls, over all forward passes in the block.

        Args:
            name: A selected layer.

        Returns:
            One entry per call, in order; empty where the layer did not run. A capture with
            `reduce=RunningStats` has one entry for all calls together.

        Raises:
            LayerNotCapturedError: The layer was not selected.
        """
        if name not in self._selected:
            raise LayerNotCapturedError(
                f"`{name}` was not selected for this capture; {nearest(str(name), self._selected)}"
            )
        if self._complete is not None:
            self._complete()
        recorded = self._calls.get(name, [])
        for index, value in enumerate(recorded):
            if isinstance(value, _Unread):
                recorded[index] = value.read()
        return tuple(value.read() if isinstance(value, _Gathered) else value for value in recorded)

    @property
    def not_called(self) -> tuple[str, ...]:
        """Selected layers that have not run, in definition order."""
        return tuple(name for name in self._selected if name not in self._calls)

    def clear(self) -> None:
        """Forget what was recorded so far. Inside the block the hooks stay and go on recording."""
        self._calls.clear()
        self._elsewhere.clear()
        self._held_bytes = 0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything recorded to a safetensors file, which appears whole or not at all.

        Args:
            path: The file. Missing folders are made.

        Returns:
            The path.

        Raises:
            ArchiveError: A layer put out something that a file cannot hold, or the file cannot be written.
            MissingDependencyError: safetensors is not installed.
        """
        calls = {name: self.calls(name) for name in self}
        return archive.write(path, calls, selected=self._selected, kinds=_KINDS)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Activations:
        """Open a file that `save` wrote.

        Args:
            path: The file. It must stay in place while values are unread.

        Returns:
            The activations, on the CPU; each value is read when it is first asked for.

        Raises:
            ArchiveError: The file is missing, truncated, or holds something else.
            MissingDependencyError: safetensors is not installed.
        """
        selected, calls = archive.read(path, kinds=_KINDS)
        loaded = cls(selected)
        loaded._calls = {name: [_Unread(read) for read in values] for name, values in calls.items()}
        return loaded

    def __repr__(self) -> str:
        rows = [("layer", "shape", "dtype", "device", "min", "mean", "max")]
        for name in self._calls:
            recorded = self.calls(name)
            for index, value in enumerate(recorded):
                label = name if len(recorded) == 1 else f"{name} [call {index}]"
                found = leaves((torch.Tensor, ChannelStats), value) or [None]
                rows += [(label if i == 0 else "", *_describe(item)) for i, item in enumerate(found)]
        rows += [(name, "not called", "", "", "", "", "") for name in self.not_called]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(["Activations", *(f"  {line}" for line in lines)])

    def _why_not(self, name: str) -> str:
        if name in self._elsewhere:
            return (
                f"`{name}` ran in another thread than the one that entered the block; enter it in that thread"
            )
        return (
            f"`{name}` was selected but did not run. Either no forward pass reached it (a head skipped "
            "in eval mode, an earlier `stop=True`), or the model bypasses it: it calls `.forward()` or uses "
            "the weights directly, or the forward pass was compiled within the block"
        )


@final
class Recorder(Sink[Activations]):
    """Writes what `capture` keeps into `Activations`, of which it is the only writer.

    Args:
        retention: What becomes of each tensor.
    """

    __slots__ = ("_acts", "_retention", "_transfers")

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._acts = Activations(())
        self._transfers = Transfers()

    @property
    def is_on_graph(self) -> bool:
        """Whether what is kept stands in the graph for the tensor itself."""
        return self._retention.is_on_graph

    def open(self, layers: Sequence[str]) -> Activations:
        """Return activations for this block, empty yet."""
        self._transfers = Transfers()
        self._acts = Activations(layers)
        self._acts._complete = self._transfers.finish
        return self._acts

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Return what is to be kept of a tensor, and count its bytes."""
        kept = self._retention.keep(tensor, layer, self._acts._held_bytes, self._transfers.send)
        self._acts._held_bytes += size_in_bytes(kept)
        return kept

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Enter a call under each name of its layer, in memory of its own."""
        write = self._gather if self._retention.gathers else self._append
        write(names[0], kept)
        if len(names) > 1:
            self._transfers.finish()
        for name in names[1:]:
            own = self._retention.duplicate(kept, name, self._acts._held_bytes)
            self._acts._held_bytes += size_in_bytes(own)
            write(name, own)

    def missed(self, names: Sequence[str]) -> None:
        """Remember why these layers may have no calls."""
        self._acts._elsewhere.update(names)

    def close(self) -> None:
        """Wait for what is on its way to the host."""
        self._transfers.finish()

    def _append(self, name: str, kept: Any) -> None:
        self._acts._calls.setdefault(name, []).append(kept)

    def _gather(self, name: str, kept: Any) -> None:
        recorded = self._acts._calls.get(name)
        if recorded is None:
            self._acts._calls[name] = [_Gathered(kept)]
            return
        recorded[0].add(name, kept)
        self._acts._held_bytes -= sum(tensor.nbytes for tensor in tensors(kept))


def _describe(value: torch.Tensor | ChannelStats | None) -> tuple[str, str, str, str, str, str]:
    if value is None:
        return ("no tensor", "", "", "", "", "")
    if isinstance(value, ChannelStats):
        whole = value.pooled()
        low, mean, high = (f"{field.item():.4g}" for field in (whole.min, whole.mean, whole.max))
        return (f"statistics ({value.channels},)", "float64", str(whole.mean.device), low, mean, high)
    shape = "nested" if value.is_nested else "(" + ", ".join(map(str, value.shape)) + ")"
    try:
        summary = _summary(value.detach())
    except (RuntimeError, TypeError):  # a kind of tensor that cannot tell its values; a table must not fail
        summary = ("-", "-", "-")
    return (shape, str(value.dtype).removeprefix("torch."), str(value.device), *summary)


def _summary(value: torch.Tensor) -> tuple[str, str, str]:
    if value.is_meta or value.is_nested or value.numel() == 0 or value.is_complex():
        return ("-", "-", "-")
    if value.is_quantized:
        value = value.dequantize()
    if value.layout is not torch.strided:
        value = value.to_dense()
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        value = value.float()
    low, high = value.aminmax()
    mean = value.mean(dtype=torch.promote_types(value.dtype, torch.float32))
    return (f"{low.item():.4g}", f"{mean.item():.4g}", f"{high.item():.4g}")
