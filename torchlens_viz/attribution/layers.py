"""Which layers are explained where none is named, and which stand above one: by the order of their calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final, NamedTuple, final

import torch
from torch import nn

from torchlens_viz.attribution.goal import Goal
from torchlens_viz.attribution.twin import Twin
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.images import AXES
from torchlens_viz.models.layers import named_layers
from torchlens_viz.models.state import refuse_quantized

# What these put out are the maps that they took: pooled to a fixed size, or not changed in eval mode.
_NO_MAPS_OF_THEIR_OWN: Final = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample),
)


class Seen(NamedTuple):
    """What one call of a layer put out.

    Attributes:
        name: The layer.
        tensor: What it put out, or None where that is not one floating-point tensor.
        dim: Which of its dimensions counts channels, as far as that is known.
    """

    name: str
    tensor: torch.Tensor | None
    dim: int | None


def maps_to_explain(twin: Twin, batch: torch.Tensor, *, of_each_resolution: bool) -> list[str]:
    """Choose layers with maps, in the order in which they run.

    Only layers that run once and put out one tensor (N, C, H, W) or (N, H, W, C), or the like with as many
    spatial axes as the batch has, of more than one position count. Of each resolution, that is the last one
    of those with the shortest names in dots: the stages of a network, and not what is inside them.

    Args:
        twin: The network.
        batch: (N, C, H, W), what it takes.
        of_each_resolution: Return one of each resolution, and not only the last of all.

    Raises:
        InvalidArgumentError: There is none.
    """
    best: dict[tuple[int, ...], tuple[int, int, str]] = {}
    for place, seen in enumerate(_seen_once(twin, batch)):
        if seen.tensor is None or seen.tensor.ndim != batch.ndim or seen.dim == 0:
            continue
        size = tuple(seen.tensor.movedim(1 if seen.dim is None else seen.dim, 1).shape[2:])
        if prod(size) > 1:
            depth = seen.name.count(".") + bool(seen.name)
            best[size] = min(best.get(size, (depth, -place, seen.name)), (depth, -place, seen.name))
    chosen = [name for _, place, name in sorted(best.values(), key=lambda each: -each[1])]
    if not chosen:
        refuse_quantized(twin.model)
        raise InvalidArgumentError(
            f"`layer` must be named, since none of this model puts out maps (N, {AXES[batch.ndim - 2]}) of "
            "more than one position; give `grid=(rows, columns)` for the tokens of a transformer, or choose "
            'a method such as "gradient" that needs no layer'
        )
    return chosen if of_each_resolution else chosen[-1:]


def tokens_to_explain(twin: Twin, batch: torch.Tensor, goal: Goal) -> list[str]:
    """Choose the last layer with tokens (N, L, C) through which the score depends on those of the grid.

    The last layers of a transformer often are not such, since all but the class token is dropped there.

    Raises:
        InvalidArgumentError: There is none.
    """
    assert twin.grid is not None
    places = twin.grid[0] * twin.grid[1]
    names = [
        seen.name
        for seen in _seen_once(twin, batch)
        if seen.tensor is not None and seen.tensor.ndim == 3 and seen.tensor.shape[1] >= places and seen.name
    ]
    found = twin.maps(batch, names, goal)[1] if names else []
    for maps in reversed(found):
        if bool(maps.gradients.any()):
            return [maps.layer]
    raise InvalidArgumentError(
        f"`layer` must be named, since none of this model puts out at least {places} tokens (N, L, C) on "
        f"which the score depends, for `grid={twin.grid}`; name one, or correct the grid"
    )


def above(twin: Twin, batch: torch.Tensor, layer: str) -> set[nn.Module]:
    """Return the modules within a layer, and those that run after it, with all that is only part of them.

    A layer without weights, such as a ReLU, counts together with the last one before it that has some.
    """
    known = named_layers(twin.model)
    at = next(found.module for found in known if found.name == layer)
    order = [seen.name for seen in _run(twin, batch[:1])]
    last = {name: place for place, name in enumerate(order)}
    inside = set(at.modules())
    if not any(True for _ in at.parameters()):
        modules = {found.name: found.module for found in known}
        before = [modules[name] for name in order[: last[layer]] if modules[name]._parameters]
        inside |= set(before[-1:])
    after = {
        found.module
        for found in known
        if last.get(found.name, -1) > last[layer] and at not in set(found.module.modules())
    }
    ran = {found.module for found in known if found.name in last}
    # Attention, for one, uses the weights of a part without calling it.
    parts = {part for module in after for part in module.modules() if part not in ran}
    return inside | after | parts


def _seen_once(twin: Twin, batch: torch.Tensor) -> list[Seen]:
    """Return what every layer that runs once puts out, in the order in which they end.

    That is seen on a batch without images, which costs nothing, or on one image where that does not work.
    """
    images, seen = 0, []
    if not twin.mixes_layouts:  # else it takes values to follow which dimension counts channels
        with contextlib.suppress(Exception):  # it may look at values, or count images
            seen = _run(twin, batch[:0])
    if not seen:
        images, seen = 1, _run(twin, batch[:1])
    calls: dict[str, int] = {}
    for each in seen:
        calls[each.name] = calls.get(each.name, 0) + 1
    kinds = {layer.name: layer.module for layer in named_layers(twin.model)}
    return [
        each
        for each in seen
        if calls[each.name] == 1
        and not isinstance(kinds[each.name], _NO_MAPS_OF_THEIR_OWN)
        and "parametrizations" not in each.name.split(".")  # what these put out are weights
        and (each.tensor is None or each.tensor.shape[:1] == (images,))  # a row per image
    ]


def _run(twin: Twin, batch: torch.Tensor) -> list[Seen]:
    # Hooks cannot be registered on parts that are TorchScript.
    layers = [
        each for each in named_layers(twin.model) if not isinstance(each.module, torch.jit.ScriptModule)
    ]
    layout = Layout(layers, twin.channel_dim)
    sink = _Order(layout, asks=twin.mixes_layouts or twin.channel_dim is not None)
    follow: Callable[[], Any] = layout.begin if twin.mixes_layouts else _nothing
    with twin.unchanged(), Capture(twin.model, layers, _nothing, sink):
        try:
            follow()
            twin.output(batch)
        finally:
            layout.end()
    return sink.seen


def _nothing() -> None:
    return


@final
class _Order(Sink[None]):
    """Takes note of which layers ran, one after the other as they end."""

    def __init__(self, layout: Layout, *, asks: bool) -> None:
        self.seen: list[Seen] = []
        self._layout = layout
        self._asks = asks

    def open(self, layers: Sequence[str]) -> None:
        """Begin."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> Any:
        """Return the shape of a tensor, and where its channels are."""
        assert isinstance(tensor, torch.Tensor)
        if not tensor.is_floating_point():
            return Seen(layer, None, None)
        dim = self._layout.found(tensor, layer) if self._asks else None
        return Seen(layer, torch.empty(tensor.shape, device="meta"), dim)

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Take note of a call."""
        seen = kept if isinstance(kept, Seen) else Seen("", None, None)
        self.seen += [Seen(name, seen.tensor, seen.dim) for name in names]
