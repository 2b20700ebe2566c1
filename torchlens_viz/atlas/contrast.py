"""Another network beside the one of a page: where the two begin to differ, and how far they do."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from torchlens_viz.album.shelf import Shelf
from torchlens_viz.atlas.health import figure
from torchlens_viz.comparison.result import Comparison, LayerDifference
from torchlens_viz.errors import TorchlensVizError, one_line

_NAMED: Final = 12  # layers of a list
_TILES: Final = 12  # of the picture, three for each channel


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """How far apart both are at a layer; `href` leads to it where the page shows it."""

    name: str
    href: str
    other: str
    cells: tuple[str, ...]
    mark: str


@final
@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What the page says of a comparison."""

    says: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    picture: str
    size: tuple[int, int]
    caption: str


def contrast_of(found: Comparison, hrefs: Mapping[str, str], shelf: Shelf) -> Contrast:
    """Return what the page says of a comparison.

    Args:
        found: The comparison.
        hrefs: The addresses of the layers that the page shows.
        shelf: Where its picture is kept.
    """
    first = next((row for row in found.layers if row.is_beyond), None)
    shown = first or max(found.layers, key=lambda row: row.excess, default=None)
    picture, size, caption = "", (0, 0), ""
    if shown is not None:
        try:
            sheet = found.grid(
                shown.layer, call=shown.call, labels=True, value_range="robust", max_tiles=_TILES
            )
        except TorchlensVizError as error:
            caption = f"No picture: {one_line(error)}."
        else:
            buffer = io.BytesIO()
            sheet.save(buffer, "PNG", optimize=True)
            picture, size = shelf.address(buffer.getvalue(), f"{shown.label}-comparison"), sheet.size
            caption = (
                f"{shown.label}: the channels that differ most, the worst first. Of each, what a puts out, "
                "what b does, and b − a, in which red is where b is larger."
            )
    return Contrast(
        says=_said(found, first),
        notes=tuple(_notes(found)),
        rows=tuple(_row(row, hrefs, row is first) for row in found.layers),
        picture=picture,
        size=size,
        caption=caption,
    )


def _said(found: Comparison, first: LayerDifference | None) -> str:
    inputs = f"{found.samples_seen:,} input{'' if found.samples_seen == 1 else 's'}"
    among = f"{len(found.layers):,} layers compared on {inputs}"
    if first is None:
        return f"{among}: none is beyond the tolerance."
    return (
        f"{among}: {len(found.beyond):,} beyond the tolerance, the first is {first.label}. What comes after "
        "it inherits its error: the fault is there, or in what is done without a layer between it and the "
        "one before."
    )


def _notes(found: Comparison) -> list[str]:
    apart = {
        "Only in a": found.only_in_a,
        "Only in b": found.only_in_b,
        "Part of another layer in b": tuple(found.folded),
    }
    return [
        f"{what}: {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more." if len(names) > _NAMED else ".")
        for what, names in apart.items()
        if names
    ]


def _row(row: LayerDifference, hrefs: Mapping[str, str], is_first: bool) -> Row:
    return Row(
        name=row.label,
        href=hrefs.get(row.layer, ""),
        other="" if row.other == row.layer else row.other,
        cells=(
            figure(row.max_abs),
            figure(row.relative),
            f"{row.cosine:.6f}".replace("-", "−"),
            figure(row.excess),
            "–" if row.channel is None else str(row.channel),
        ),
        mark="first beyond" if is_first else "beyond" if row.is_beyond else "",
    )
