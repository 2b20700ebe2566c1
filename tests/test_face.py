"""The public face: every name is there, documented, and costs nothing until it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

import torchlens_viz


def test_every_public_name_is_there_and_documented():
    for name in torchlens_viz.__all__:
        assert getattr(torchlens_viz, name).__doc__, name
    assert set(torchlens_viz.__all__) <= set(dir(torchlens_viz))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = torchlens_viz.nothing


@pytest.mark.parametrize("door", sorted(torchlens_viz._DOORS))
def test_a_door_is_an_attribute_without_an_import_of_its_own(door):
    assert door in dir(torchlens_viz)
    listing = f"import torchlens_viz\nassert torchlens_viz.{door}.__name__ == 'torchlens_viz.{door}'"
    assert "torchlens_viz" in modules_after(listing)


def from_elsewhere(home: Mapping[str, str]) -> set[str]:
    """The names that are not defined in the module that is said to be their home."""
    return {
        name
        for name, module in home.items()
        if getattr(importlib.import_module(f"torchlens_viz.{module}"), name).__module__
        != f"torchlens_viz.{module}"
    }


def test_the_home_of_a_name_is_the_module_that_defines_it():
    assert from_elsewhere(torchlens_viz._HOME) == set()


def test_the_guard_on_homes_can_fail():
    assert from_elsewhere({"capture": "hooks.capture", "Layer": "hooks.capture"}) == {"Layer"}


def said_to_type_checkers(source: str) -> dict[str, str]:
    """Name -> module below the package, of what is imported under `if TYPE_CHECKING:`; "" is the package."""
    return {
        alias.name: (node.module or "").removeprefix("torchlens_viz").removeprefix(".")
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # anything else is no public name to mypy
    }


def test_type_checkers_are_told_the_same_names_from_the_same_homes():
    face = Path(torchlens_viz.__file__).read_text("utf-8")
    doors = dict.fromkeys(torchlens_viz._DOORS, "")
    assert said_to_type_checkers(face) == torchlens_viz._HOME | doors


def test_the_guard_on_what_type_checkers_are_told_can_fail():
    block = "if TYPE_CHECKING:\n    from torchlens_viz.{} import capture{}\n"
    assert said_to_type_checkers(block.format("hooks.capture", " as capture")) == {"capture": "hooks.capture"}
    assert said_to_type_checkers(block.format("hooks.passes", " as capture")) == {"capture": "hooks.passes"}
    assert said_to_type_checkers(block.format("hooks.capture", "")) == {}
    assert said_to_type_checkers("from torchlens_viz.hooks.capture import capture as capture") == {}


def hidden_by_a_module(home: Mapping[str, str], package: ModuleType) -> set[str]:
    """The names under which the package shows a module once all homes have been imported."""
    for module in home.values():
        importlib.import_module(f"torchlens_viz.{module}")
    return {name for name in home if isinstance(getattr(package, name, None), ModuleType)}


def test_no_public_name_is_hidden_by_a_module():
    assert hidden_by_a_module(torchlens_viz._HOME, torchlens_viz) == set()


def test_the_guard_on_hidden_names_can_fail():
    package = ModuleType("package")
    package.capture = ModuleType("package.capture")
    assert hidden_by_a_module({"capture": "hooks.capture"}, package) == {"capture"}


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
