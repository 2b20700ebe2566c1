"""What type checkers know of the package where somebody else's project uses it."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import torchlens_viz
from tests.typed import sample
from torchlens_viz import objectives, testing

HERE = Path(__file__).parent
ROOT = Path(torchlens_viz.__file__).parents[1]
CHECKERS = {
    "mypy": ("--strict", "--no-pretty", f"--cache-dir={ROOT / '.mypy_cache' / 'typed'}"),
    "pyright": ("--pythonpath", sys.executable),
}


def said(checker: str, *arguments: str, folder: Path) -> str:
    """Run a checker elsewhere, so that the package is a foreign one to it and no options of ours are read."""
    pytest.importorskip(checker)
    command = [sys.executable, "-m", checker, *arguments]
    # `pyright --verifytypes` looks at the libraries of the first Python on the path.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    ).stdout


def lines_with_errors(checker: str, name: str, folder: Path) -> set[int]:
    (folder / name).write_text((HERE / name).read_text("utf-8"), "utf-8")
    answer = said(checker, *CHECKERS[checker], name, folder=folder)
    assert re.search(r"^(Found|Success|\d+ errors?)", answer, re.MULTILINE), answer
    return {int(line) for line in re.findall(rf"{name}:(\d+)(?::\d+)?(?: -|:) error: ", answer)}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_checker_finds_every_wrong_use_and_none_in_the_sample(checker, tmp_path):
    lines = (HERE / "wrong.py").read_text("utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(wrong) == 25
    assert lines_with_errors(checker, "wrong.py", tmp_path) == wrong
    assert lines_with_errors(checker, "sample.py", tmp_path) == set()


def not_known(symbols: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """The symbols, among those with these names and their attributes, whose type is not written down."""
    inside = re.compile(rf"torchlens_viz\.({'|'.join(map(re.escape, names))})(\.\w+)?")
    found = [each for each in symbols if inside.fullmatch(each["name"])]
    assert found
    return [each["name"] for each in found if not each["isTypeKnown"] or each["isTypeAmbiguous"]]


@pytest.mark.slow
def test_the_type_of_every_public_name_and_attribute_is_written_down(tmp_path):
    answer = said(
        "pyright", "--verifytypes=torchlens_viz", "--ignoreexternal", "--outputjson", folder=tmp_path
    )
    symbols = json.loads(answer)["typeCompleteness"]["symbols"]
    homes = [f"{module}.{name}" for name, module in torchlens_viz._HOME.items()]
    assert {f"torchlens_viz.{home}" for home in homes} <= {each["name"] for each in symbols}
    assert not_known(symbols, [*homes, *torchlens_viz.__all__, *torchlens_viz._DOORS]) == []


def test_the_guard_on_types_that_are_not_written_down_can_fail():
    parts = ("stats.A", "stats.A.x", "stats.A.y", "other.B.x")
    symbols = [
        {"name": f"torchlens_viz.{part}", "isTypeKnown": part != "stats.A.x", "isTypeAmbiguous": "B" in part}
        for part in parts
    ]
    assert not_known(symbols, ["stats.A"]) == ["torchlens_viz.stats.A.x"]
    assert not_known(symbols, ["other.B"]) == ["torchlens_viz.other.B.x"]


def test_the_sample_uses_every_public_name():
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(ast.parse(inspect.getsource(sample)))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    public = {*torchlens_viz.__all__, *torchlens_viz._DOORS, *objectives.__all__, *testing.__all__}
    assert public - used == set()


def test_the_sample_runs(tmp_path):
    sample.main(tmp_path)
