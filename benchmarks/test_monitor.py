"""What a monitor costs a training: with one step in a hundred logged, and on the logged step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import nn
from torchvision import models

from torchlens_viz import Monitor
from torchlens_viz.demo_net import DemoNet

EVERY = 100


def training(net: nn.Module, batch: int, side: int, classes: int) -> Callable[[], None]:
    """Return a training step on random images."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(classes, (batch,))

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimiser.step()

    return step


def demo() -> tuple[nn.Module, Callable[[], None], torch.Tensor]:
    torch.manual_seed(0)
    net = DemoNet()
    return net, training(net, 64, 64, 48), torch.randn(16, 3, 64, 64)


def resnet() -> tuple[nn.Module, Callable[[], None], torch.Tensor]:
    torch.manual_seed(0)
    net = models.resnet18(weights=None)
    return net, training(net, 32, 112, 1000), torch.randn(16, 3, 112, 112)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("source", ["step", "watch"])
def test_a_hundred_steps_of_which_one_is_logged(source, versus, tmp_path):
    net, step, probe = demo()
    monitor = Monitor(net, tmp_path, probe=probe if source == "step" else None, every=EVERY, alarm=None)
    number = count()

    def ours() -> None:
        for _ in range(EVERY):
            if source == "step":
                step()
                monitor.step(next(number))
            else:
                with monitor.watch(next(number)):
                    step()

    def theirs() -> None:
        for _ in range(EVERY):
            step()

    versus(ours, theirs, target=">= 0.98", rounds=11, note="one step in 100 logged")
    monitor.close()


@pytest.mark.parametrize("build", [demo, resnet], ids=["demo_net", "resnet18"])
@pytest.mark.parametrize("source", ["step", "watch"])
def test_a_logged_step(source, build, versus, tmp_path):
    """Theirs is a training step that is logged, so that the ratio less one is the cost in training steps."""
    net, step, probe = build()
    monitor = Monitor(net, tmp_path, probe=probe if source == "step" else None, every=1, alarm=None)
    number = count()

    def logged() -> None:
        if source == "step":
            step()
            monitor.step(next(number))
        else:
            with monitor.watch(next(number)):
                step()

    logged()
    monitor.close()
    first = bytes_of(tmp_path)
    logged()
    monitor.close()
    versus(
        step, logged, target="-", rounds=7, note=f"{(bytes_of(tmp_path) - first) // 1000} kB a logged step"
    )
    monitor.close()


def test_a_step_that_is_not_logged(versus, tmp_path):
    net, step, probe = demo()
    monitor = Monitor(net, tmp_path, probe=probe, every=10**9, alarm=None)
    number = count(1)
    start, steps = perf_counter(), 100_000
    for _ in range(steps):
        monitor.step(next(number))
    each = (perf_counter() - start) / steps
    versus(step, step, target="1", rounds=3, note=f"`monitor.step` takes {each * 1e6:.2f} us")
