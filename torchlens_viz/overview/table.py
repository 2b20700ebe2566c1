"""`LayerTable`: the layers of a network in execution order, as rows, text, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Final, final

from torchlens_viz.errors import LayerNotFoundError
from torchlens_viz.models.layers import nearest

_COLUMNS: Final = (
    *("layer", "kind", "output", "layout", "maps", "sees", "step", "parameters", "time", "calls"),
    *("overwritten by", "marks"),
)
_RIGHT: Final = frozenset({"parameters", "time", "calls"})
_STYLE: Final = "text-align:left;font-family:monospace;white-space:pre"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """What is known of one layer.

    Attributes:
        name: Its dotted name; the first one where it has several.
        names: All its names.
        kind: Its class.
        is_block: Whether it holds other layers.
        output_shape: The shape of what it put out in its first call, of the first tensor if these are
            several; None where it put out none.
        outputs: How many tensors it put out in its first call.
        channel_dim: Which dimension of the output counts channels, from 0; None where nothing tells.
        layout: The dimensions of the output by letter, such as `"NCHW"`, `"NHWC"`, `"NLC"` or `"NC"`; `""`
            where it is not known.
        maps: Positions per axis of its maps, such as (56, 56); None where it has no maps. Of tokens (N, L, C)
            these are the rows and columns in which the last of them lie: what `grid=` takes elsewhere.
        is_tokens: Whether these maps are tokens, so that drawing them needs `grid=`.
        receptive_field: The pixels that a position sees per axis of the input, padding included; None where
            the model does something before the layer of which the geometry is not known.
        step: How many pixels lie between neighbouring positions, per axis; None likewise.
        parameters: How many numbers are learned in it, those of layers within it included.
        calls: How many times it ran.
        time_share: Its share of the time of the forward pass, those within it included, 0 to 1; None where
            no image was given.
        overwritten_by: The layer in whose call its output was written over after it had returned, as an
            in-place ReLU does; None where nothing did.
        marks: Of `"first convolution"`, `"last at 56 x 56"` (the last layer of each resolution) and `"last
            with maps"`, those that apply.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    is_block: bool
    output_shape: tuple[int, ...] | None
    outputs: int
    channel_dim: int | None
    layout: str
    maps: tuple[int, ...] | None
    is_tokens: bool
    receptive_field: tuple[int, ...] | None
    step: tuple[float, ...] | None
    parameters: int
    calls: int
    time_share: float | None
    overwritten_by: str | None
    marks: tuple[str, ...]

    @property
    def has_maps(self) -> bool:
        """Whether it puts out what can be drawn as feature maps."""
        return self.maps is not None


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LayerTable:
    """The layers of a network in execution order, as `layers` returns them.

    It is a sequence of rows; a row is had by its place or by any name of its layer. Printing it, or showing
    it in a notebook, gives the table.

    Attributes:
        model: The class of the network.
        input_shapes: The shapes of the tensors it was given.
        rows: A row per layer that ran and was asked for, in the order in which they began to run.
        not_called: The names of those that were asked for and did not run.
    """

    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    rows: tuple[LayerRow, ...]
    not_called: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __getitem__(self, place: int | str) -> LayerRow:
        if not isinstance(place, str):
            return self.rows[place]
        for row in self.rows:
            if place in row.names:
                return row
        known = [name for row in self.rows for name in row.names]
        raise LayerNotFoundError(f"no row is named `{place}`; {nearest(place, known)}")

    def marked(self, mark: str) -> LayerRow | None:
        """Return the row with a mark, such as `"last with maps"`; None where none has it."""
        return next((row for row in self.rows if mark in row.marks), None)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain lists and dicts."""
        rows = [{**asdict(row), "has_maps": row.has_maps} for row in self.rows]
        found: dict[str, Any] = _listed(
            {
                "model": self.model,
                "input_shapes": self.input_shapes,
                "rows": rows,
                "not_called": self.not_called,
            }
        )
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        columns, cells = self._cells()
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        lines = [self._heading()]
        for line in (columns, *cells):
            parts = [
                cell.rjust(width) if name in _RIGHT else cell.ljust(width)
                for name, cell, width in zip(columns, line, widths, strict=True)
            ]
            lines.append("  ".join(parts).rstrip())
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        columns, cells = self._cells()
        head = "".join(f'<th style="{_STYLE}">{escape(name)}</th>' for name in columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="{_STYLE}">{escape(cell)}</td>' for cell in line) + "</tr>"
            for line in cells
        )
        notes = "".join(f"<div>{escape(note)}</div>" for note in self._notes())
        return (
            f"<div>{escape(self._heading())}</div><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def _heading(self) -> str:
        shapes = ", ".join(map(str, self.input_shapes)) or "no tensor"
        return f"{self.model} on an input of shape {shapes}: {len(self.rows)} layers"

    def _notes(self) -> list[str]:
        notes = []
        if self.not_called:
            shown = ", ".join(self.not_called[:6]) + (", ..." if len(self.not_called) > 6 else "")
            notes.append(f"not called: {shown}")
        return notes

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the heads of columns and the text of cells; a column in which nothing is, is left out."""
        lines = [_cells_of(row) for row in self.rows]
        kept = [place for place in range(len(_COLUMNS)) if place < 3 or any(line[place] for line in lines)]
        heads, *cells = (tuple(line[place] for place in kept) for line in (_COLUMNS, *lines))
        return heads, cells


def _cells_of(row: LayerRow) -> tuple[str, ...]:
    shape = "" if row.output_shape is None else str(row.output_shape)
    return (
        row.name or "(the model)",
        row.kind,
        f"{shape}, and {row.outputs - 1} more" if row.outputs > 1 else shape,
        row.layout,
        _times(row.maps) + (" tokens" if row.is_tokens else ""),
        _times(row.receptive_field),
        _times(row.step),
        f"{row.parameters:,}" if row.parameters else "",
        "" if row.time_share is None else f"{row.time_share:.1%}",
        str(row.calls),
        row.overwritten_by or "",
        ", ".join(row.marks),
    )


def _times(sizes: Sequence[float] | None) -> str:
    """Write sizes as "7 x 7"."""
    return " x ".join(f"{size:.4g}" for size in sizes or ())


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, tuple | list) else value
