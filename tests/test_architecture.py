"""The house: imports only go down, hooks are registered in one place, and the first import is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchlens_viz

PACKAGE = Path(torchlens_viz.__file__).parent

# A module may import from lower floors only. `docs/architecture.md` says what each one is for.
FLOORS = [
    {"comoments", "errors", "moments", "norms"},
    {
        "algebra",
        "channel_stats",
        "checkpoints",
        "colormaps",
        "demo_net",
        "dense",
        "filenames",
        "files",
        "images",
        "inputs",
        "layers",
        "lettering",
        "measuring",
        "memory",
        "modes",
        "patterns",
        "peaks",
        "picture_folders",
        "png",
        "progress",
        "ranges",
        "redirection",
        "regions",
        "samplers",
        "schedule",
        "tensors",
        "distributed",
        "stance",
        "stopping",
        "nested",
        "transfers",
        "transforms",
        "updates",
        "windows",
    },
    {
        "batches",
        "arguments",
        "climbs",
        "cutting",
        "extents",
        "hookable",
        "kernels",
        "objectives",
        "pictures",
        "probes",
        "scales",
        "scaling",
        "shadow",
        "statistics",
        "style",
        "tiling",
        "topk",
    },
    {
        "archive",
        "blending",
        "boards",
        "captions",
        "duplicates",
        "findings",
        "health",
        "resumption",
        "retention",
        "slots",
        "spatial",
        "tables",
        "tallies",
    },
    {"canvas", "dependence", "ledgers", "observation", "records", "remarks", "starts", "waking"},
    {"activations", "logbooks", "maximization", "readings", "sheets", "topsheets"},
    {"folders", "pairs", "passes", "portraits", "receptive", "regression", "scoring", "testing"},
    {"climbing", "monitor", "overlays", "patches", "planning", "pytest_plugin", "zoo"},
    {"ascent", "lightning_callback", "surveys"},
    {"commands", "dataset", "demo", "survey_report"},
    {"survey_command"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: height for height, modules in enumerate(FLOORS) for module in modules}


def imports(source: str) -> set[str]:
    """Modules of the package that a source file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(f".{node.module}")  # relative: not our way, and on no floor
        elif isinstance(node, ast.ImportFrom) and node.module == "torchlens_viz":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchlens_viz."):
            found.add(str(node.module).removeprefix("torchlens_viz."))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("torchlens_viz.")
                for alias in node.names
                if alias.name.startswith("torchlens_viz.")
            }
    return found


def goes_up(module: str, source: str) -> set[str]:
    return {
        other
        for other in imports(source)
        if other not in ("__version__",) and FLOOR.get(other, 99) >= FLOOR[module]
    }


def sources() -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_every_module_has_a_floor():
    assert set(sources()) == set(FLOOR)


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_imports_only_go_down(module):
    assert goes_up(module, sources()[module]) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from torchlens_viz.sheets import draw",
        "import torchlens_viz.sheets",
        "from torchlens_viz import sheets",
        "from torchlens_viz.canvas import draw",
        "def f():\n    from torchlens_viz.cli import main",
        "from .errors import TorchlensVizError",
        "from torchlens_viz.unheard_of import thing",
    ],
)
def test_the_guard_on_imports_can_fail(line):
    assert goes_up("canvas", line)
    assert not goes_up("canvas", "from torchlens_viz.errors import CaptureError\nimport torch")


def registers_hooks(source: str) -> bool:
    return "register_forward_hook" in source or "register_forward_pre_hook" in source


def test_the_documented_floors_are_these():
    table = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    documented = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].isdigit():
            documented |= {name.strip(" `"): int(cells[1]) for name in cells[2].split(",")}
    assert documented == FLOOR


def test_forward_hooks_are_registered_in_one_place():
    assert {module for module, source in sources().items() if registers_hooks(source)} == {"activations"}


def test_no_module_bears_the_name_of_what_it_exports():
    assert not set(FLOOR) & set(torchlens_viz.__all__)


def test_every_public_name_is_there_and_documented():
    for name in torchlens_viz.__all__:
        assert getattr(torchlens_viz, name).__doc__, name
    assert set(torchlens_viz.__all__) <= set(dir(torchlens_viz))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = torchlens_viz.nothing


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after running `code`."""
    listing = f"{code}\nimport sys\nprint(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torchvision", "matplotlib", "tensorboard", "lightning", "skimage", "safetensors"}


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import torchlens_viz") & (HEAVY | {"torch", "numpy", "PIL"})


def test_capture_and_sheets_load_nothing_heavy():
    code = (
        "from torchlens_viz import "
        "Monitor, RunningStats, capture, make_grid, pair_grid, save_kernel_grid, testing"
    )
    assert not modules_after(code) & HEAVY


def test_the_guard_on_heavy_imports_can_fail():
    assert "torchvision" in modules_after("import torchvision")


def test_the_package_works_beside_a_torchvision_that_cannot_be_imported():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import torch, torchlens_viz as tv\n"
        "net = torch.nn.Conv2d(3, 4, 3)\n"
        "with tv.capture(net, torch.nn.Conv2d) as acts: net(torch.zeros(1, 3, 4, 4))\n"
        "tv.kernel_grid(net); tv.feature_grid(acts['']); tv.make_grid(torch.zeros(2, 1, 2, 2))"
    )
    modules_after(code)  # raises where it fails
