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
from torchlens_viz.models.demo_net import DemoNet

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


def with_monitor(step: Callable[[], None], monitor: Monitor, source: str) -> Callable[[], None]:
    """Return a training step that the monitor hears of, by the name of one of its methods."""
    number = count()

    def by_step() -> None:
        step()
        monitor.step(next(number))

    def by_watch() -> None:
        with monitor.watch(next(number)):
            step()

    return by_step if source == "step" else by_watch


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("source", ["step", "watch"])
def test_a_hundred_steps_of_which_one_is_logged(source, versus, tmp_path):
    net, step, probe = demo()
    monitor = Monitor(net, tmp_path, probe=probe if source == "step" else None, every=EVERY, alarm=None)
    monitored = with_monitor(step, monitor, source)

    def ours() -> None:
        for _ in range(EVERY):
            monitored()

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
    logged = with_monitor(step, monitor, source)
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
