"""What an assertion speaks of: tensors, activations, statistics or surveys -> values with their layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from torchlens_viz.arguments import has_values, integer, listed, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.hooks.activations import Activations
from torchlens_viz.hooks.layout import marked_dim
from torchlens_viz.models.layers import nearest
from torchlens_viz.nested import leaves
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.running import RunningStats

Globs: TypeAlias = str | Sequence[str] | None


class Measured(Protocol):
    """What has statistics of layers by name, as a `Survey` has."""

    @cached_property
    def stats(self) -> Mapping[str, ChannelStats]:
        """The statistics of each layer."""


Subject: TypeAlias = torch.Tensor | ChannelStats | RunningStats | Mapping[str, Any] | Measured


class Reading(NamedTuple):
    """One value, and the words for where it comes from."""

    label: str
    value: torch.Tensor | ChannelStats


def read(x: Subject, layers: Globs, *, whole: bool = False) -> list[Reading]:
    """List what `x` holds, layer by layer and call by call.

    Args:
        x: A tensor, `Activations`, `ChannelStats`, `RunningStats`, a mapping from layer names to those, or
            what has such a mapping as `.stats`.
        layers: Names or globs of the layers that count; None for all.
        whole: Take all tensors of a layer that puts out several, instead of refusing it.

    Raises:
        InvalidArgumentError: Nothing is there, or `layers` is given where there are no layers.
        InvalidTypeError: `x` is something else, or a layer put out several tensors.
        LayerNotFoundError: A glob matches nothing.
        LayerNotCapturedError: A layer that was named did not run.
    """
    if isinstance(x, torch.Tensor | ChannelStats | RunningStats):
        if layers is not None:
            raise InvalidArgumentError(
                f"`layers` has no effect on a {type(x).__name__}, which has no layers; leave it out"
            )
        label = "the tensor" if isinstance(x, torch.Tensor) else "the statistics"
        return list(_readings(label, x, whole=whole))
    found: list[Reading] = []
    for name, values in _by_layer(x, layers).items():
        for index, value in enumerate(values):
            label = f"`{name}`" if len(values) == 1 else f"`{name}` [call {index}]"
            found += _readings(label, value, whole=whole)
    return found


def _by_layer(x: Subject, layers: Globs) -> dict[str, tuple[Any, ...]]:
    """Return the calls of each layer that counts, by name."""
    source = x if isinstance(x, Mapping) else getattr(x, "stats", None)
    if not isinstance(source, Mapping):
        raise InvalidTypeError(
            "`x` must be a tensor, Activations, ChannelStats, a Survey or a mapping from layer names to "
            f"those, got {type(x).__name__}"
        )
    unrun = source.not_called if isinstance(source, Activations) else ()
    names = _chosen([*source, *unrun], unrun, layers)
    if not names:
        missing = f": {', '.join(f'`{name}`' for name in unrun)} did not run" if unrun else ""
        raise InvalidArgumentError(f"`x` must hold at least one layer, got none{missing}")
    if isinstance(source, Activations):
        # `source[name]` raises, and says why the layer did not run.
        return {name: source.calls(name) or (source[name],) for name in names}
    return {name: (source[name],) for name in names}


def _chosen(known: list[str], unrun: Sequence[str], layers: Globs) -> list[str]:
    if layers is None:
        return [name for name in known if name not in unrun]
    wanted: set[str] = set()
    for glob in [layers] if isinstance(layers, str) else listed(layers, "layers"):
        if not isinstance(glob, str):
            raise InvalidTypeError(f"`layers` must be names or globs of layers, got {shown(glob)}")
        found = {glob} if glob in known else {name for name in known if fnmatchcase(name, glob)}
        if not found:
            raise LayerNotFoundError(f"no layer matches `{glob}`; {nearest(glob, known)}")
        wanted |= {name for name in found if name not in unrun} or found
    return [name for name in known if name in wanted]


def _readings(label: str, value: Any, *, whole: bool) -> Iterator[Reading]:
    if isinstance(value, RunningStats):
        value = value.compute()
    if isinstance(value, torch.Tensor | ChannelStats):
        parts = [value]
    else:
        parts = leaves((torch.Tensor, ChannelStats), value)
        if not parts or not (whole or len(parts) == 1):
            what = f"{len(parts)} tensors in a {type(value).__name__}" if parts else type(value).__name__
            raise InvalidTypeError(f"{label} must be one tensor, got {what}; pass the one that counts")
    for index, part in enumerate(parts):
        name = label if len(parts) == 1 else f"{label} [tensor {index}]"
        if isinstance(part, torch.Tensor) and (part.is_nested or not has_values(part)):
            kind = "a nested tensor" if part.is_nested else "a tensor on meta, which has no values"
            raise InvalidTypeError(f"{name} must be a tensor of numbers, got {kind}")
        amount = part.numel() if isinstance(part, torch.Tensor) else int(part.count.sum())
        if amount == 0:
            raise InvalidArgumentError(f"{name} must hold values, got none, so that nothing can be asserted")
        yield Reading(name, part)


def statistics_of(reading: Reading, channel_dim: int | None) -> ChannelStats:
    """Return the statistics per channel of what was read."""
    label, value = reading
    if isinstance(value, ChannelStats):
        return value
    if channel_dim is None:
        found = marked_dim(value)
        channel_dim = 1 if found is None else found
    if not -value.ndim <= integer(channel_dim, "channel_dim") < value.ndim:
        raise InvalidArgumentError(
            f"{label} must have a dimension {shown(channel_dim)} for its channels, got shape "
            f"{tuple(value.shape)}; say which one it is with `channel_dim=`"
        )
    stats = RunningStats(channel_dim=channel_dim)
    stats.update(value)
    return stats.compute()
