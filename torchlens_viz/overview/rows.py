"""From the calls of a forward pass to the rows of the table: layouts, maps, marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Final

from torch import nn

from torchlens_viz.models.kernels import has_kernels
from torchlens_viz.models.layers import Layer
from torchlens_viz.overview.table import LayerRow
from torchlens_viz.overview.trace import Call, Output
from torchlens_viz.receptive.field import ReceptiveField

_MOST_EXTRA_TOKENS: Final = 16  # class, distillation and register tokens before those that have a place
# The letters of the axes beside samples and channels, by how many there are.
_AXES: Final[Mapping[int, str]] = {0: "", 1: "L", 2: "HW", 3: "DHW"}

Positions = tuple[int, ...]


def rows_of(
    layers: Sequence[Layer],
    calls: Sequence[Call],
    image: Sequence[int],
    fields: Mapping[str, ReceptiveField],
    shares: Mapping[str, float],
) -> list[LayerRow]:
    """Make a row of every layer that ran, apart from the network itself, in the order they began to run.

    Args:
        layers: All layers.
        calls: All calls, in the order in which they began.
        image: The shape of the input, (N, C, ...).
        fields: The receptive fields that are known, by name.
        shares: The share of time of each layer, by name.
    """
    modules = {layer.name: layer.module for layer in layers}
    by_layer: dict[str, list[Call]] = {}
    for call in calls:
        if call.outputs is not None:
            by_layer.setdefault(call.names[0], []).append(call)
    maps = _maps(calls, image)
    marks = _marks(calls, _alike(calls, maps, image, fields), modules)
    rows = []
    for name, own in by_layer.items():
        outputs = own[0].outputs or []
        first = outputs[0] if outputs else None
        field = fields.get(name)
        rows.append(
            LayerRow(
                name=name,
                names=own[0].names,
                kind=type(modules[name]).__name__,
                is_block=is_block(modules[name]),
                output_shape=None if first is None else first.shape,
                outputs=len(outputs),
                channel_dim=None if first is None else first.channel_dim,
                layout="" if first is None else layout_of(first),
                maps=maps.get(name),
                is_tokens=first is not None and name in maps and _is_tokens(first),
                receptive_field=None if field is None else field.size,
                step=None if field is None or not field.map_shape else field.stride,
                parameters=parameters_of(modules[name]),
                calls=len(own),
                time_share=shares.get(name) if shares else None,
                overwritten_by=own[0].overwritten_by,
                marks=tuple(marks.get(name, ())),
            )
        )
    return [row for row in rows if row.name]


def is_block(module: nn.Module) -> bool:
    """Tell whether a module holds other modules."""
    return any(True for _ in module.children())


def parameters_of(module: nn.Module) -> int:
    """Count the numbers that are learned in a module and in those within it; of quantised layers too."""
    count = sum(each.numel() for each in module.parameters())
    for part in module.modules():
        for name in ("weight", "bias"):
            held = getattr(type(part), name, None)
            if callable(held):  # quantised layers keep them packed
                value = held(part)
                count += value.numel() if value is not None else 0
    return count


def layout_of(output: Output) -> str:
    """Write the dimensions of an output by letter; `""` where it is not known which one counts channels."""
    axes = _AXES.get(len(output.shape) - 2)
    if output.channel_dim is None or output.channel_dim == 0 or axes is None:
        return ""
    letters = ["N", *axes]
    letters.insert(output.channel_dim, "C")
    return "".join(letters)


def _is_tokens(output: Output) -> bool:
    return layout_of(output) == "NLC"


def _maps(calls: Sequence[Call], image: Sequence[int]) -> dict[str, Positions]:
    """Return the positions of each layer that has maps in its first call, by its first name."""
    found: dict[str, Positions] = {}
    last: Positions | None = None  # the maps of two axes that came before
    for call in sorted(calls, key=lambda call: call.ended):
        if not call.outputs or call.names[0] in found:
            continue
        output = call.outputs[0]
        positions: Positions | None = None
        if not image or output.shape[:1] != tuple(image[:1]):
            continue  # windows, or frames, take the place of the samples
        if _is_tokens(output):
            positions = _grid_of(output.shape[1], image, last)
        elif output.channel_dim and len(output.shape) == len(image):
            others = {0, output.channel_dim}
            positions = tuple(size for dim, size in enumerate(output.shape) if dim not in others)
            last = positions if len(positions) == 2 else last
        if positions is not None and max(positions) > 1:
            found[call.names[0]] = positions
    return found


def _grid_of(tokens: int, image: Sequence[int], last: Positions | None) -> Positions | None:
    """Guess the rows and columns of tokens: those of the image's shape, or of the maps they were made of."""
    if len(image) != 4:
        return None
    rows = round(sqrt(tokens * image[2] / image[3]))
    columns = tokens // max(rows, 1)
    if rows * columns == tokens and rows > 1 and columns == round(rows * image[3] / image[2]):
        return rows, columns
    if last is not None and 0 <= tokens - last[0] * last[1] <= _MOST_EXTRA_TOKENS:
        return last
    return None


def _alike(
    calls: Sequence[Call],
    maps: Mapping[str, Positions],
    image: Sequence[int],
    fields: Mapping[str, ReceptiveField],
) -> dict[str, Positions]:
    """Leave out what looks like maps and is none of the image: windows of attention, tables, weights."""
    ended = {call.names[0]: call.ended for call in calls}
    last = max((ended.get(name, -1) for name in fields), default=-1)  # up to here dependence is known
    found = {}
    for name, positions in maps.items():
        steps = [size / count for size, count in zip(image[2:], positions, strict=False)]
        depends = name in fields or ended[name] > last
        if depends and max(steps[-2:], default=1) <= 2 * min(steps[-2:], default=1):
            found[name] = positions
    return found


def _marks(
    calls: Sequence[Call], maps: Mapping[str, Positions], modules: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    marks: dict[str, list[str]] = {}
    for call in calls:
        if has_kernels(modules[call.names[0]]):
            marks.setdefault(call.names[0], []).append("first convolution")
            break
    first_calls = {call.names[0]: call for call in reversed(calls) if call.names[0]}
    ended = sorted(first_calls.values(), key=lambda call: call.ended)
    at = {maps[call.names[0]]: call.names[0] for call in ended if call.names[0] in maps}
    for positions, name in at.items():
        marks.setdefault(name, []).append(f"last at {' x '.join(map(str, positions))}")
    last = next((call.names[0] for call in reversed(ended) if call.names[0] in maps), None)
    if last is not None:
        marks.setdefault(last, []).append("last with maps")
    return marks
