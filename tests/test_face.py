"""The public face: every name is there, documented, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import torchlens_viz


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
