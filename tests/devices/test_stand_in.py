"""Every public function on a device that is none of torch's own, with float64 and without."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _device():
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot have a device that is written in Python")


def rehearse(*options):
    run = [sys.executable, "-m", "tests.devices.rehearsal", *options]
    done = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", [(), ("--no-float64",)])
def test_every_public_function_gives_on_a_device_what_it_gives_on_the_cpu(options):
    wrong = rehearse(*options)
    assert len(wrong) > 25
    assert {name: texts for name, texts in wrong.items() if texts} == {}


def test_the_rehearsal_can_fail():
    """The stand-in tells of a wait, and refuses float64 and tensors that are elsewhere."""
    program = (
        "from tests.devices.stand_in import Desk\n"
        "import torch\n"
        "with Desk(float64=False) as desk:\n"
        "    x = torch.rand(3).to('desk')\n"
        "    x.sum().item()\n"
        "    print(len(desk.waits))\n"
        "    for wrong in (lambda: x.double(), lambda: x + torch.rand(3)):\n"
        "        try: print(wrong())\n"
        "        except (TypeError, RuntimeError) as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "TypeError", "RuntimeError"]
