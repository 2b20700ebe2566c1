"""The house: which room may import which, what stands where, and how large it may grow."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

import torchlens_viz

PACKAGE = Path(torchlens_viz.__file__).parent

# A room, or a module at the door, may import itself and what its row names; a row names only rows above it.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "nested": set(),
    "dimensions": set(),
    "notebook": set(),
    "arguments": {"errors"},
    "progress": {"errors", "arguments"},
    "distributed": {"errors"},
    "files": {"errors", "arguments"},
    "stats": {"errors", "arguments", "notebook"},
    "trackers": {"files"},
    "models": {"errors", "nested", "arguments", "files"},
    "zoo": {"errors", "arguments", "files", "models"},
    "draw": {"errors", "arguments"},
    "hooks": {"errors", "nested", "dimensions", "notebook", "arguments", "files", "stats", "models", "draw"},
    "receptive": {"errors", "nested", "arguments", "models", "hooks"},
    "overview": {"errors", "nested", "arguments", "models", "hooks", "receptive"},
    "backprop": {"errors", "nested", "arguments", "models", "hooks"},
    "comparison": {"errors", "nested", "arguments", "models", "draw", "hooks"},
    "ablation": {"errors", "nested", "arguments", "models", "hooks"},
    "objectives": {"errors", "arguments", "backprop"},
    "testing": {"errors", "nested", "arguments", "files", "stats", "models", "hooks", "comparison"},
    "grids": {"errors", "arguments", "progress", "files", "models", "draw", "hooks", "receptive"},
    "attribution": {
        *("errors", "nested", "notebook", "arguments", "files"),
        *("models", "draw", "hooks", "receptive", "backprop"),
    },
    "dataset": {
        *("errors", "nested", "notebook", "arguments", "progress", "distributed"),
        *("files", "stats", "models", "draw", "hooks", "receptive", "ablation"),
    },
    "ascent": {
        *("errors", "notebook", "arguments", "progress", "distributed", "files"),
        *("models", "draw", "hooks", "backprop", "objectives"),
    },
    "monitor": {
        *("errors", "nested", "arguments", "distributed", "files", "stats"),
        *("trackers", "models", "draw", "hooks", "grids"),
    },
    "callbacks": {"errors", "monitor"},
    "pytest_plugin": {"models", "hooks", "nested", "testing"},
    "album": {"errors", "arguments", "files", "models", "draw"},
    "atlas": {
        *("errors", "arguments", "progress", "files", "stats", "models", "draw", "hooks", "receptive"),
        *("testing", "backprop", "grids", "comparison"),
        *("attribution", "dataset", "ascent", "album"),
    },
    "cli": {
        *("errors", "progress", "distributed", "files", "stats", "models", "zoo", "hooks"),
        *("comparison", "overview", "grids", "attribution", "dataset", "ascent", "atlas"),
    },
    "__main__": {"cli"},
}
TO_COME: set[str] = set()  # rooms that have their place, and no module yet
DOORS = {"testing"}  # rooms whose `__init__` hands names on
HOOKS_ARE_REGISTERED_IN = "hooks.block"
MOST_LINES, MOST_MODULES = 350, 12
MOST_LINES_OF_TESTS = 600

Sources = dict[str, str]  # dotted name below the package -> text


def read_package() -> Sources:
    """Every module but the package's own face; a room's `__init__` bears the name of the room."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path.read_text("utf-8")
    return found


SOURCES = read_package()


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_sign(module: str, sources: Sources) -> bool:
    """Whether this is the `__init__` of a room."""
    return any(other.startswith(f"{module}.") for other in sources)


def imports(source: str, sources: Sources) -> set[str]:
    """Modules of the package that a source imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(f".{node.module}")  # relative: not our way, and in no room
        elif isinstance(node, ast.ImportFrom) and re.match(r"torchlens_viz\b", node.module or ""):
            place = str(node.module).removeprefix("torchlens_viz").lstrip(".")
            for alias in node.names:
                inside = f"{place}.{alias.name}".lstrip(".")
                found.add(inside if inside in sources or not place else place)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("torchlens_viz.")
                for alias in node.names
                if alias.name.startswith("torchlens_viz.")
            }
    return found - {"__version__"}


def goes_up(module: str, sources: Sources) -> set[str]:
    """What a module imports and its room may not."""
    mine = room_of(module)
    return {
        other
        for other in imports(sources[module], sources)
        if room_of(other) not in {mine, *ALLOWED[mine]} or other not in sources
    }


def rows_out_of_order(allowed: dict[str, set[str]]) -> set[str]:
    rows = list(allowed)
    return {row for height, row in enumerate(rows) if not allowed[row] <= set(rows[:height])}


def circle(sources: Sources) -> list[str]:
    """Modules that import one another in a circle, or an empty list."""
    graph = {module: imports(source, sources) for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def registers_hooks(source: str) -> bool:
    return re.search(r"register_(module_)?forward_(pre_)?hook", source) is not None


def too_long(sources: Sources, most: int = MOST_LINES) -> dict[str, int]:
    lines = {module: source.count("\n") for module, source in sources.items()}
    return {module: count for module, count in lines.items() if count > most}


def too_full(sources: Sources) -> dict[str, int]:
    """Rooms, and the door (named ""), in which nobody would find anything any more."""
    counts: dict[str, int] = {}
    for module in sources:
        if not is_sign(module, sources):
            place = module.rpartition(".")[0]
            counts[place] = counts.get(place, 0) + 1
    return {place: count for place, count in counts.items() if count > MOST_MODULES}


def says_more_than_a_sign(source: str) -> bool:
    body = ast.parse(source).body
    return len(body) != 1 or ast.get_docstring(ast.Module(body, [])) is None


def test_every_room_has_a_row_and_every_row_a_room():
    assert {room_of(module) for module in SOURCES} == set(ALLOWED) - TO_COME


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_module_imports_only_what_its_room_may(module):
    assert goes_up(module, SOURCES) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from torchlens_viz.grids.kernels import kernel_grid",
        "import torchlens_viz.grids.kernels",
        "from torchlens_viz.grids import kernels",
        "from torchlens_viz import grids",
        "from torchlens_viz import maximize",
        "def f():\n    from torchlens_viz.cli.main import main",
        "from .palette import Palette",
        "from torchlens_viz.unheard_of import thing",
        "from torchlens_viz.draw.unheard_of import thing",
    ],
)
def test_the_guard_on_imports_can_fail(line):
    assert goes_up("draw.canvas", {**SOURCES, "draw.canvas": line})
    fine = (
        "from torchlens_viz.errors import CaptureError\nfrom torchlens_viz.draw import palette\nimport torch"
    )
    assert not goes_up("draw.canvas", {**SOURCES, "draw.canvas": fine})


def test_rows_name_only_rows_above_them():
    assert rows_out_of_order(ALLOWED) == set()


def test_the_guard_on_the_order_of_rows_can_fail():
    assert rows_out_of_order({**ALLOWED, "draw": {"grids"}}) == {"draw"}
    assert rows_out_of_order({**ALLOWED, "draw": {"unheard_of"}}) == {"draw"}


def test_no_modules_import_each_other():
    assert circle(SOURCES) == []


def test_the_guard_on_circles_can_fail():
    within_a_room = SOURCES["draw.palette"] + "\nfrom torchlens_viz.draw.canvas import draw\n"
    assert {"draw.palette", "draw.canvas"} <= set(circle({**SOURCES, "draw.palette": within_a_room}))


def test_forward_hooks_are_registered_in_one_place():
    assert {module for module in SOURCES if registers_hooks(SOURCES[module])} == {HOOKS_ARE_REGISTERED_IN}


@pytest.mark.parametrize(
    "call", ["register_forward_hook(f)", "register_forward_pre_hook(f)", "register_module_forward_hook(f)"]
)
def test_the_guard_on_hooks_can_fail(call):
    assert registers_hooks(f"module.{call}")
    assert not registers_hooks("module.register_buffer('x', x)")


def test_no_room_bears_the_name_of_a_public_function():
    # Importing `torchlens_viz.capture.x` would bind `torchlens_viz.capture` to the room: a hidden function.
    assert not set(ALLOWED) & set(torchlens_viz.__all__)


def test_the_guard_on_names_of_rooms_can_fail():
    assert {"capture", "hooks"} & set(torchlens_viz.__all__) == {"capture"}


def test_no_module_is_two_concepts_long():
    assert too_long(SOURCES) == {}


def test_no_file_of_tests_is_too_long():
    tests = {str(path): path.read_text() for path in Path(__file__).parent.rglob("*.py")}
    assert too_long(tests, MOST_LINES_OF_TESTS) == {}


def test_the_guard_on_length_can_fail():
    assert too_long({"draw.canvas": "\n" * MOST_LINES, "draw.text": "\n" * (MOST_LINES + 1)}) == {
        "draw.text": MOST_LINES + 1
    }


def test_no_room_is_too_full():
    assert too_full(SOURCES) == {}


def test_the_guard_on_full_rooms_can_fail():
    crowd = {f"draw.m{n}": "" for n in range(MOST_MODULES + 1)} | {f"m{n}": "" for n in range(MOST_MODULES)}
    assert too_full({"draw": "", **crowd}) == {"draw": MOST_MODULES + 1}
    assert too_full({**crowd, "one_more": ""}) == {"draw": MOST_MODULES + 1, "": MOST_MODULES + 1}


@pytest.mark.parametrize("room", sorted(set(ALLOWED) - TO_COME - DOORS))
def test_a_room_s_init_is_its_sign_and_nothing_else(room):
    if is_sign(room, SOURCES):
        assert not says_more_than_a_sign(SOURCES[room])


@pytest.mark.parametrize("source", ['"""Sign."""\nfrom x import y\n', "", "x = 1\n"])
def test_the_guard_on_signs_can_fail(source):
    assert says_more_than_a_sign(source)
    assert not says_more_than_a_sign('"""Sign."""\n')
