"""Ctrl-C, at any instruction: no hook, no mode, no stance and no flag is left behind."""

from __future__ import annotations

import random
import signal
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from tests.nets import hook_count
from torchlens_viz import capture
from torchlens_viz.hooks import forward

X = torch.rand(1, 3, 6, 6)


@pytest.fixture
def model():
    torch._dynamo.reset()  # so that there is a stance to take
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.LayerNorm(4), nn.Conv2d(4, 2, 3))
    return net.train()


def leftovers(model: nn.Module) -> dict[str, object]:
    """Return what an interrupted capture has left, by kind; nothing if all is as it was."""
    from torch._dynamo import eval_frame

    found = {
        "hooks": hook_count(model),
        "keyword hooks": sum(
            len(module._forward_hooks_with_kwargs) + len(module._forward_pre_hooks_with_kwargs)
            for module in model.modules()
        ),
        "stop": int("_compiled_call_impl" in model.__dict__),
        "stance": int(eval_frame._stance.stance != "default"),
        "holders": len(forward._holders),
        "modes": _len_torch_dispatch_stack(),
        "eval": sum(not module.training for module in model.modules()),
        "no gradients": int(not torch.is_grad_enabled()),
    }
    return {kind: count for kind, count in found.items() if count}


def instructions(function) -> int:
    """Count the instructions of a call in our own code and in what it calls."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        frame.f_trace_opcodes = True
        seen += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return seen


def interrupted_at(place: int, function) -> bool:
    """Call a function, with Ctrl-C at its n-th instruction; tell whether it came out."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


OPTIONS = [
    {},
    {"io": "both"},
    {"io": "input", "grad": True},
    {"stop": True},
    {"channels": [0]},
    {"io": "both", "stop": True, "channels": [1]},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_stays_behind_wherever_it_is_interrupted(model, options):
    def run():
        with capture(model, ["0", "1"], **options):
            model[:2](X)

    run()
    total = instructions(run)
    chance = random.Random(1)
    faults = {}
    interrupts = 0
    for place in chance.sample(range(1, total), 250):
        interrupts += interrupted_at(place, run)  # not where nothing can pass, as out of `__del__`
        if left := leftovers(model):
            faults[place] = left
            break
    assert faults == {}
    assert interrupts > 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_signal_leaves_nothing_behind(model, options):
    def handler(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    chance = random.Random(2)
    interrupts = 0
    try:
        start = time.perf_counter()
        for _ in range(20):
            with capture(model, ["0", "1"], **options):
                model[:2](X)
        usual = (time.perf_counter() - start) / 20
        for _ in range(350):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, usual * 1.2))
                with capture(model, ["0", "1"], **options):
                    model[:2](X)
                time.sleep(usual * 3)  # where it was quicker than usual
            except KeyboardInterrupt:
                interrupts += 1
            assert leftovers(model) == {}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 300
