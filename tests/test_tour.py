"""The notebook of the examples runs, every result in it shows itself, and its outputs are not in git."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "examples" / "tour.ipynb"
MOST_BYTES = 300_000  # of one output


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def left_in(notebook: dict) -> list[str]:
    """The cells that hold outputs or counts of a run."""
    return [
        cell["id"]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"] is not None)
    ]


def shows(cell: dict) -> bool:
    """Whether a cell ends with an expression, whose value a notebook shows."""
    return isinstance(ast.parse("".join(cell["source"])).body[-1], ast.Expr)


def test_outputs_are_stripped():
    assert left_in(read(TOUR)) == []


def test_the_guard_on_outputs_can_fail():
    notebook = read(TOUR)
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"output_type": "stream"}]
    assert left_in(notebook) == [code["id"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the machinery that runs notebooks
def test_the_tour_runs_and_every_result_shows_itself(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        results = [output.data for output in cell.outputs if output.output_type == "execute_result"]
        assert len(results) == shows({"source": cell.source})
        for data in results:
            assert {"text/html", "image/png"} & set(data)
            assert len(data.get("text/html", "").encode()) < MOST_BYTES
    tables = [cell for cell in code for output in cell.outputs if "text/html" in output.get("data", {})]
    assert len(tables) >= 6  # one of each kind of result
    assert list(tmp_path.iterdir()) == []
