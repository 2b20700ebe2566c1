"""Draw the rooms of the package from its imports: docs/rooms.svg, and the table of docs/architecture.md.

    python docs/draw_rooms.py

tests/test_docs.py holds both to what this makes of the package as it stands.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from html import escape
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Final

_DOCS: Final = Path(__file__).resolve().parent
_PACKAGE: Final = _DOCS.parent / "torchlens_viz"
PICTURE: Final = _DOCS / "rooms.svg"
PAGE: Final = _DOCS / "architecture.md"
_BEGIN: Final = "<!-- drawn by draw_rooms.py: begin -->"
_END: Final = "<!-- drawn by draw_rooms.py: end -->"

Arrows = dict[str, set[str]]  # a room or a module at the door -> those it imports from

_Y, _X, _WIDE, _HIGH = 86, 166, 126, 36  # pixels from row to row, from room to room; the size of a box
_THIN: Final = 0.3  # of a room's width, where only an arrow passes
_STYLE: Final = (
    "text{font:14px ui-monospace,Menlo,Consolas,monospace;fill:#102a43;text-anchor:middle}"
    "rect{fill:#d9e8f7;stroke:#486581}.door{fill:#fdf0d5;stroke:#8d6b2f}"
    "polyline{fill:none;stroke:#7b8794;stroke-width:1.5;marker-end:url(#tip)}#tip path{fill:#7b8794}"
)


def read_arrows(package: Path) -> Arrows:
    """Find which rooms and modules at the door of a package import from which others.

    Args:
        package: The folder of the package; its face, `__init__`, is no room.

    Returns:
        For each of them, whose modules its own modules import, wherever in the file they do.
    """
    arrows: Arrows = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).with_suffix("").parts
        if place == ("__init__",):
            continue
        found = arrows.setdefault(place[0], set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == package.name:
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= _below(package, node.module or "")
            elif isinstance(node, ast.Import):
                found |= {name for alias in node.names for name in _below(package, alias.name)}
    return {room: (found & set(arrows)) - {room} for room, found in sorted(arrows.items())}


def _below(package: Path, module: str) -> set[str]:
    first, _, rest = module.partition(".")
    return {rest.partition(".")[0]} if first == package.name and rest else set()


def ground_of(arrows: Arrows, package: Path) -> list[str]:
    """Find the modules at the door that know no room: what every room may stand on."""
    ground = {name for name in arrows if (package / f"{name}.py").exists()}
    while above := {name for name in ground if not arrows[name] <= ground}:
        ground -= above
    return sorted(ground, key=lambda name: (-sum(name in ends for ends in arrows.values()), name))


def needed(arrows: Mapping[str, set[str]]) -> Arrows:
    """Leave out the arrows that lead where a longer way leads as well."""

    def reached(room: str) -> set[str]:
        return arrows[room].union(*(reached(below) for below in arrows[room]))

    return {
        room: {end for end in ends if not any(end in reached(other) for other in ends - {end})}
        for room, ends in arrows.items()
    }


def heights_of(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Place rooms in rows, from 0 at the bottom, so that every arrow goes down and few go far."""
    heights: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in heights:
            heights[room] = 1 + max((height(below) for below in arrows[room]), default=-1)
        return heights[room]

    for room in sorted(arrows, key=lambda name: (-height(name), name)):
        above = [heights[other] - 1 for other in arrows if room in arrows[other]]
        if len(above) > len(arrows[room]):  # up, where that shortens more arrows than it lengthens
            heights[room] = min(above)
    return dict(sorted(heights.items()))  # sets have no order, and a drawing has one


def ways_of(arrows: Mapping[str, set[str]], heights: Mapping[str, int]) -> list[list[str]]:
    """Lead every arrow through a place of its own in each row that it passes."""
    return [
        [room, *(f"{room}>{end}.{row}" for row in range(heights[room] - 1, heights[end], -1)), end]
        for room in sorted(arrows)
        for end in sorted(arrows[room])
    ]


def rows_of(heights: Mapping[str, int], ways: list[list[str]]) -> list[list[str]]:
    """Order what stands in each row, the top row first, so that few arrows cross and none goes far aside."""
    rows: list[list[str]] = [[] for _ in range(max(heights.values()) + 1)]
    for way in ways:
        for row, place in enumerate(way, len(rows) - 1 - heights[way[0]]):
            rows[row] += [place] * (place not in rows[row])
    while True:  # move one to another place in its row, until nothing is better
        tried = [rows]
        for number, row in enumerate(rows):
            for name, place in product(row, range(len(row))):
                others = [other for other in row if other != name]
                tried.append([*rows[:number], [*others[:place], name, *others[place:]], *rows[number + 1 :]])
        best = min(tried, key=lambda candidate: _tangle(candidate, ways))
        if best is rows:
            return rows
        rows = best


def _columns(rows: list[list[str]]) -> dict[str, float]:
    """How far from the middle everything stands, in rooms; what an arrow passes through is narrow."""
    columns = {}
    for row in rows:
        widths = [_THIN if ">" in name else 1.0 for name in row]
        for place, name in enumerate(row):
            columns[name] = sum(widths[:place]) + widths[place] / 2 - sum(widths) / 2
    return columns


def _tangle(rows: list[list[str]], ways: list[list[str]]) -> tuple[int, float]:
    """How badly a drawing reads: how many arrows cross, then how far they go aside."""
    columns = _columns(rows)
    below: dict[str, list[str]] = {}
    for way in ways:
        for place, following in pairwise(way):
            below.setdefault(place, []).append(following)
    crossings = 0
    for row in rows:
        ends = [[columns[following] for following in below.get(place, ())] for place in row]
        for left, right in combinations(ends, 2):
            crossings += sum(a > b for a, b in product(left, right))
    return crossings, sum((columns[a] - columns[b]) ** 2 for way in ways for a, b in pairwise(way))


def draw(package: Path = _PACKAGE) -> str:
    """Draw the rooms as SVG: who stands above imports from those below, along the arrows and further down."""
    everything = read_arrows(package)
    ground = ground_of(everything, package)
    arrows = needed({room: ends - {*ground} for room, ends in everything.items() if room not in ground})
    heights = heights_of(arrows)
    ways = ways_of(arrows, heights)
    rows = rows_of(heights, ways)
    columns = _columns(rows)
    width = _X * max(len(ground), *(len(row) for row in rows))
    height = _Y * len(rows) + 2 * _HIGH + 16
    lines, boxes = [], []
    middle = {name: width / 2 + column * _X for name, column in columns.items()}
    top = {name: 10 + number * _Y for number, row in enumerate(rows) for name in row}
    for way in ways:
        leaving = sorted((middle[other[1]], other[-1]) for other in ways if other[0] == way[0])
        arriving = sorted((middle[other[-2]], other[0]) for other in ways if other[-1] == way[-1])
        points = [(_along(leaving, way[-1], middle[way[0]]), top[way[0]] + _HIGH)]
        for place in way[1:-1]:
            points += [(middle[place], top[place]), (middle[place], top[place] + _HIGH)]
        points.append((_along(arriving, way[0], middle[way[-1]]), top[way[-1]] - 2))
        # Rounded twice: versions of Python differ in the last place of a sum, which halves would show.
        path = " ".join(f"{round(x, 3):.0f},{y}" for x, y in points)
        lines.append(f'<polyline points="{path}"/>')
    for room in heights:
        boxes += _box(room, middle[room], top[room], at_door=(package / f"{room}.py").exists())
    y = 10 + _Y * len(rows)
    boxes.append(f'<rect class="door" x="4" y="{y}" width="{width - 8}" height="{2 * _HIGH - 8}" rx="6"/>')
    boxes.append(f'<text x="{width / 2:.0f}" y="{y + 25}">{"   ".join(ground)}</text>'.replace("   ", " · "))
    boxes.append(f'<text x="{width / 2:.0f}" y="{y + 48}">at the door, for every room</text>')
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    return "\n".join([head, f"<style>{_STYLE}</style>", tip, *lines, *boxes, "</svg>", ""])


def _along(ends: list[tuple[float, str]], name: str, middle: float) -> float:
    """Where on the edge of a box an arrow begins or ends, among all on that edge from left to right."""
    place = [other for _, other in ends].index(name)
    return middle + (place - (len(ends) - 1) / 2) * _WIDE / (len(ends) + 1)


def _box(name: str, x: float, y: float, *, at_door: bool) -> list[str]:
    kind = ' class="door"' if at_door else ""
    return [
        f'<rect{kind} x="{x - _WIDE / 2:.0f}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="6"/>',
        f'<text x="{x:.0f}" y="{y + 23}">{escape(name)}</text>',
    ]


def table(package: Path = _PACKAGE) -> str:
    """Write a row for each room and module at the door: its sign, and all it imports from."""
    arrows = read_arrows(package)
    ground = ground_of(arrows, package)
    heights = heights_of({room: ends - {*ground} for room, ends in arrows.items() if room not in ground})
    rooms = sorted(heights, key=lambda room: (-heights[room], room))
    lines = ["| room | its sign | imports from |", "|---|---|---|"]
    for name in [*rooms, *ground]:
        path = package / f"{name}.py"
        is_room = not path.exists()
        sign = ast.get_docstring(
            ast.parse((package / name / "__init__.py" if is_room else path).read_text("utf-8"))
        )
        first = (sign or "").partition("\n")[0].rstrip(".")
        ends = ", ".join(end for end in [*rooms, *ground] if end in arrows[name])
        lines.append(
            f"| **`{name}/`** | {first} | {ends} |" if is_room else f"| `{name}` | {first} | {ends} |"
        )
    return "\n".join(lines)


def with_table(page: str, package: Path = _PACKAGE) -> str:
    """Put the table into a page, in place of the one that stands between the two marks."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{table(package)}\n\n{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
