"""The documents say what is: the drawing of the rooms, and the table of their signs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs" / "draw_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_rooms = drawing()
HOUSE = {
    "errors.py": "",
    "progress.py": "from house.errors import E\n",
    "objectives.py": "import house.low.a\n",
    "low/__init__.py": '"""What is low."""\n',
    "low/a.py": "from house import errors\n",
    "middle/__init__.py": '"""What is between."""\n',
    "middle/b.py": "def f():\n    from house.low.a import x\n",
    "high/__init__.py": '"""What is high.\n\nAnd more."""\n',
    "high/c.py": "import os\nfrom house.low import a\nfrom house.middle.b import f\n",
    "high/d.py": "from house.high import c\n",
}


@pytest.fixture
def house(tmp_path) -> Path:
    for name, source in HOUSE.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
    (tmp_path / "house" / "__init__.py").write_text("from house.high import c\n", "utf-8")
    return tmp_path / "house"


def test_the_drawing_is_up_to_date():
    assert draw_rooms.PICTURE.read_text("utf-8") == draw_rooms.draw(), "run `python docs/draw_rooms.py`"


def test_the_table_of_rooms_is_up_to_date():
    page = draw_rooms.PAGE.read_text("utf-8")
    assert draw_rooms.with_table(page) == page, "run `python docs/draw_rooms.py`"


def test_arrows_are_the_imports_between_rooms_wherever_they_stand(house):
    assert draw_rooms.read_arrows(house) == {
        "errors": set(),
        "progress": {"errors"},
        "objectives": {"low"},
        "low": {"errors"},
        "middle": {"low"},
        "high": {"low", "middle"},
    }


def test_the_ground_is_what_stands_at_the_door_and_knows_no_room(house):
    assert draw_rooms.ground_of(draw_rooms.read_arrows(house), house) == ["errors", "progress"]


def test_an_arrow_is_drawn_unless_a_longer_way_leads_there():
    arrows = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert draw_rooms.needed(arrows) == {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()}


def test_rooms_stand_above_what_they_import_and_arrows_have_a_place_in_every_row():
    arrows = {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()}
    heights = draw_rooms.heights_of(arrows)
    assert heights == {
        "a": 2,
        "b": 1,
        "c": 0,
        "d": 1,
    }  # d as high as it may, since only arrows from above count
    far = draw_rooms.ways_of({"a": {"e"}, "e": set()}, {"a": 2, "e": 0})
    assert far == [["a", "a>e.1", "e"]]


def test_arrows_do_not_cross_where_they_need_not():
    arrows = {"a": {"z"}, "b": {"y"}, "y": set(), "z": set()}
    heights = draw_rooms.heights_of(arrows)
    rows = draw_rooms.rows_of(heights, draw_rooms.ways_of(arrows, heights))
    assert rows in ([["a", "b"], ["z", "y"]], [["b", "a"], ["y", "z"]])


def test_another_import_is_another_drawing_and_another_table(house):
    before = draw_rooms.draw(house), draw_rooms.table(house)
    assert "| **`high/`** | What is high | middle, low |" in before[1]
    (house / "high" / "d.py").write_text("import house.objectives\n", "utf-8")
    after = draw_rooms.draw(house), draw_rooms.table(house)
    assert before[0] != after[0]
    assert "| **`high/`** | What is high | middle, objectives, low |" in after[1]
    page = "# House\n<!-- drawn by draw_rooms.py: begin -->\nold\n<!-- drawn by draw_rooms.py: end -->\nend\n"
    renewed = draw_rooms.with_table(page, house)
    assert after[1] in renewed
    assert "old" not in renewed
    assert renewed.endswith("end -->\nend\n")
