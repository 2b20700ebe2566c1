"""What a capture recorded: `Activations`, a read-only mapping from layer name to what the layer put out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch

from torchlens_viz.arguments import listed, shown
from torchlens_viz.errors import (
    CaptureError,
    InvalidTypeError,
    LayerNotCapturedError,
    SeveralCallsError,
    TorchlensVizError,
)
from torchlens_viz.hooks import archive
from torchlens_viz.hooks.layout import Layout, marked_dim
from torchlens_viz.hooks.retention import Retention, Transfers, size_in_bytes
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.layers import nearest
from torchlens_viz.nested import leaves, map_leaves
from torchlens_viz.notebook import Markup, Page
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.running import RunningStats
from torchlens_viz.stats.summary import summary_of


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

    __slots__ = ("_calls", "_complete", "_elsewhere", "_held_bytes", "_selected", "_was_copied")

    def __init__(self, selected: Iterable[str]) -> None:
        names = tuple(listed(selected, "selected"))
        if isinstance(selected, str) or not all(isinstance(name, str) for name in names):
            raise InvalidTypeError(f"`selected` must be names of layers, got {shown(selected)}")
        self._selected = names
        self._calls: dict[str, list[Any]] = {}
        self._elsewhere: set[str] = set()
        self._was_copied = False
        self._held_bytes = 0
        self._complete: Callable[[], None] | None = None  # waits for values that are on their way

    def __getitem__(self, name: str) -> Any:
        recorded = self.calls(name)
        if not recorded:
            raise LayerNotCapturedError(self._why_not(name))
        if len(recorded) > 1:
            raise SeveralCallsError(
                f"`{name}` ran {len(recorded)} times; take one of `acts.calls({name!r})`, or go through all "
                "with `for name in acts: for value in acts.calls(name): ...`. Where it was several forward "
                "passes, `acts.clear()` between them forgets the earlier ones"
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
        if not isinstance(name, str) or name not in self._selected:
            raise LayerNotCapturedError(
                f"`{name if isinstance(name, str) else shown(name)}` was not selected for this capture; "
                f"{nearest(name, self._selected)}"
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

        Tensors keep type, shape and values, and what occurs twice in a call is one tensor again. Named tuples
        come back as such, with the same fields, and other mappings, tuples and lists as dicts, tuples and
        lists; one of a class that knows more than its items is refused.

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
        rows += [(label, *summary_of(value)) for label, value in self._rows()]
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

    def _repr_html_(self) -> str:
        from torchlens_viz.draw.thumbnail import thumbnail  # draws nothing before somebody looks

        page = Page(f"Activations of {len(self)} layers")
        rows = list(self._rows())

        def cells() -> Iterator[Sequence[str]]:
            for label, value in rows:
                maps = thumbnail(value, marked_dim(value)) if isinstance(value, torch.Tensor) else None
                shown = Markup("") if maps is None else page.picture(maps, f"maps of {label}")
                yield (label, *summary_of(value), shown)
            yield from ((name, "not called", *[""] * 6) for name in self.not_called)

        heads = ("layer", "shape", "dtype", "device", "min", "mean", "max", "first maps of the first input")
        page.table(heads, cells(), len(rows) + len(self.not_called))
        return str(page)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Yield every tensor, or what stands in its place, with a label for the first one of each call."""
        for name in self._calls:
            recorded = self.calls(name)
            for index, value in enumerate(recorded):
                label = name if len(recorded) == 1 else f"{name} [call {index}]"
                found = leaves((torch.Tensor, ChannelStats), value) or [None]
                yield from ((label if place == 0 else "", item) for place, item in enumerate(found))

    def _why_not(self, name: str) -> str:
        if name in self._elsewhere:
            return (
                f"`{name}` ran in another thread than the one that entered the block; enter it in that thread"
            )
        if self._was_copied:
            return (
                f"`{name}` was selected but did not run, and the model was copied within the block: if it is "
                "the copy that runs, as in the first `predict()` of some libraries, capture around the copy"
            )
        return (
            f"`{name}` was selected but did not run. Either no forward pass reached it (a head skipped "
            "in eval mode, an earlier `stop=True`), or the model bypasses it: it calls `.forward()` or uses "
            "the weights directly, or the forward pass was compiled within the block; or another model ran, "
            "such as the copy that some libraries' `predict()` makes"
        )


@final
class Recorder(Sink[Activations]):
    """Writes what `capture` keeps into `Activations`, of which it is the only writer.

    Args:
        retention: What becomes of each tensor.
        layout: Knows which dimension of it counts channels.
    """

    __slots__ = ("_acts", "_layout", "_retention", "_transfers")

    def __init__(self, retention: Retention, layout: Layout) -> None:
        self._retention = retention
        self._layout = layout
        self._acts = Activations(())
        self._transfers = Transfers()

    @property
    def is_on_graph(self) -> bool:
        """Whether what is kept stands in the graph for the tensor itself."""
        return self._retention.grad

    def open(self, layers: Sequence[str]) -> Activations:
        """Return activations for this block, empty yet."""
        self._transfers = Transfers()
        self._acts = Activations(layers)
        self._acts._complete = self._transfers.finish
        return self._acts

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Return what is to be kept of a tensor, and count its bytes."""
        held = self._acts._held_bytes
        kept = self._retention.keep(tensor, layer, held, self._transfers.send, self._layout)
        self._acts._held_bytes += size_in_bytes(kept)
        return kept

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return what the network goes on from, so that gradients pass through what was kept."""
        return self._retention.successor(tensor, kept, layer, self._layout)

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

    def copied(self) -> None:
        """Take note that the model was copied."""
        self._acts._was_copied = True

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
        self._acts._held_bytes -= size_in_bytes(kept)
