"""A small training to watch, and what was written of it, read back."""

from __future__ import annotations

import io
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from torchlens_viz import RunningStats, capture


def build() -> nn.Sequential:
    """A small network with a batch norm and ReLUs in place."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 20, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 2),
    )


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, object, int]] = []

    def add_image(self, tag, image, step):
        self.entries.append(("image", tag, image, step))

    def add_scalar(self, tag, value, step):
        self.entries.append(("scalar", tag, value, step))

    def add_histogram(self, tag, values, step):
        self.entries.append(("histogram", tag, values, step))

    def steps(self, tag):
        return [entry[3] for entry in self.entries if entry[1] == tag]

    def last(self, tag):
        return next(entry[2] for entry in reversed(self.entries) if entry[1] == tag)


def events(folder) -> EventAccumulator:
    """All that TensorBoard reads in a folder."""
    read = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    return read.Reload()


def decoded(event) -> np.ndarray:
    """The pixels of a logged picture."""
    return np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def train(net, steps, monitor, *, spoil=None, lr=0.05, watch=False):
    """Train by SGD with a monitor on batches that are always the same."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(steps):
        images = torch.randn(8, 3, 10, 10, generator=generator)
        labels = (images[:, 0].mean((1, 2)) > 0).long()
        if spoil is not None:
            spoil(step, net, images)

        take_step(net, optimiser, images, labels, monitor, step, watch=watch)


def take_step(net, optimiser, images, labels, monitor, step, *, watch):
    """Take one step of a training, within `monitor.watch` or with `monitor.step` after it."""
    with monitor.watch(step) if watch else nullcontext():
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
    if not watch:
        monitor.step(step)


def statistics(net, batch, *, training=False):
    """What `RunningStats` says of the convolutions, without a monitor."""
    net.train(training)
    with torch.no_grad(), capture(net, nn.Conv2d, reduce=RunningStats) as seen:
        net(batch)
    return dict(seen)
