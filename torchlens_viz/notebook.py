"""How results show themselves in a notebook: tables with small pictures, as escaped HTML of limited size."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES: Final = 280_000  # of one result; a notebook keeps every one that was ever shown
_MOST_OF_PICTURES: Final = 200_000  # of which pictures may take so much
_OPEN_ROWS: Final = 12
_LONGEST: Final = 160  # letters of a cell
_STYLE: Final = (
    "<style>.tlv table{border-collapse:collapse;margin:.4em 0}.tlv.tlv th,.tlv.tlv td{padding:2px 8px;"
    "text-align:left;vertical-align:middle}.tlv.tlv .n{text-align:right;font-variant-numeric:tabular-nums}"
    ".tlv tr{border-bottom:1px solid rgba(128,128,128,.3)}.tlv summary{cursor:pointer}"
    ".tlv img{image-rendering:pixelated;max-width:100%}</style>"
)


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


@final
class Page:
    """What a result shows, put together piece by piece until there is no room left.

    Args:
        title: What it is, in a few words.
    """

    def __init__(self, title: str) -> None:
        self._parts = [f'<div class="tlv">{_STYLE}<strong>{escaped(title)}</strong>']
        self._left = MOST_BYTES - _size(self._parts[0])
        self._left_for_pictures = _MOST_OF_PICTURES

    def __str__(self) -> str:
        return "".join([*self._parts, "</div>"])

    def text(self, line: str) -> None:
        """Add a line of text."""
        self._add(f"<div>{escaped(line)}</div>")

    def show(self, markup: Markup) -> None:
        """Add a picture."""
        if markup:
            self._add(f"<div>{markup}</div>")

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]], count: int) -> None:
        """Add a table, of which the rows after the first twelve are folded.

        Args:
            heads: A word above each column.
            rows: A cell for each column, text or `Markup`; made one by one, and only as far as there is room.
            count: How many rows there are.
        """
        given = iter(rows)
        first = list(itertools.islice(given, 1))
        kinds = [_kind(cell) for cell in first[0]] if first else [""] * len(heads)
        head = "".join(f"<th{kind}>{escaped(word)}</th>" for word, kind in zip(heads, kinds, strict=True))
        shown: list[str] = []
        room = self._left - 2 * _size(head) - 1000
        for row in _cells(itertools.chain(first, given)):
            room -= _size(row)
            if room < 0:
                break
            shown.append(row)
        opened, folded, missing = shown[:_OPEN_ROWS], shown[_OPEN_ROWS:], count - len(shown)
        table = f"<table><tr>{head}</tr>{{}}</table>"
        markup = table.format("".join(opened))
        if folded:
            inner = table.format("".join(folded))
            markup += f"<details><summary>{len(folded):,} more</summary>{inner}</details>"
        if missing > 0:
            markup += f"<div>{missing:,} more are not shown</div>"
        self._parts.append(markup)
        self._left -= _size(markup)

    def picture(self, image: Image.Image, alt: str, *, side: int = 0) -> Markup:
        """Return a picture as markup for a cell or for `show`, or nothing where there is no room for it.

        Args:
            image: The picture; it is shrunk until it has a size that there is room for.
            alt: What it shows, in words.
            side: The longer side to shrink it to; 0 for its own.
        """
        if side and max(image.size) > side:
            image = image.copy()
            image.thumbnail((side, side))
        for _ in range(3):
            data = _encoded(image)
            markup = (
                f'<img src="data:image/{data[0]};base64,{data[1]}" width="{image.width}" '
                f'height="{image.height}" alt="{escaped(alt)}">'
            )
            if _size(markup) <= self._left_for_pictures:
                self._left_for_pictures -= _size(markup)
                return Markup(markup)
            image = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
        return Markup("")

    def _add(self, markup: str) -> None:
        if _size(markup) <= self._left:
            self._parts.append(markup)
            self._left -= _size(markup)


def escaped(text: str) -> str:
    """Return text as HTML that shows it, whatever it holds; the middle of what is very long is left out."""
    text = str(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return html.escape(shown, quote=True)


def number(value: float) -> Markup:
    """Return a number as the cell of a table."""
    return Markup(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")


def profile(values: Sequence[float], alt: str, *, width: int = 160, height: int = 24) -> Markup:
    """Draw a figure of every channel in order, as bars from zero, at most as many as there are pixels.

    Several channels in one pixel show the one that is farthest from zero; what is not finite is left out.
    """
    count = min(width, len(values))
    if count == 0:
        return Markup("")
    edges = [place * len(values) // count for place in range(count + 1)]
    groups = [[v for v in values[a:b] if math.isfinite(v)] for a, b in itertools.pairwise(edges)]
    bars = [max(group, key=abs) if group else 0.0 for group in groups]
    low, high = min(0.0, *bars, 0.0), max(0.0, *bars, 0.0)
    scale = height / ((high - low) or 1.0)
    step = width / count
    zero = high * scale
    path = "".join(
        f"M{place * step + step / 2:.1f} {zero:.1f}V{(high - bar) * scale:.1f}"
        for place, bar in enumerate(bars)
    )
    return Markup(
        f'<svg width="{width}" height="{height}" role="img" aria-label="{escaped(alt)}">'
        f'<path d="{path}" stroke="#4a7ebb" stroke-width="{max(0.5, 0.8 * step):.1f}"/></svg>'
    )


def _cells(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in rows:
        cells = (
            f"<td{_kind(cell)}>{cell if isinstance(cell, Markup) else escaped(cell)}</td>" for cell in row
        )
        yield f"<tr>{''.join(cells)}</tr>"


def _kind(cell: str) -> str:
    return ' class="n"' if isinstance(cell, Markup) and not cell.startswith("<") else ""


def _size(markup: str) -> int:
    return len(markup.encode())


def _encoded(image: Image.Image) -> tuple[str, str]:
    """Return the format and the bytes, in base 64, of the smaller of a lossless and a lossy file."""
    files = []
    for kind, options in (("png", {}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        image.convert("RGB").save(file, kind, **options)
        files.append((kind, base64.b64encode(file.getvalue()).decode()))
    return min(files, key=lambda each: len(each[1]))
