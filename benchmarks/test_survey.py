"""A survey of all convolutions against the bare loop, against keeping everything, and against torchlens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import models

from torchlens_viz import survey

IMAGES, BATCH = 512, 16  # the first few hundred cost more, while most of them get among the top 9


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def loader() -> DataLoader:
    pixels = torch.randint(0, 256, (IMAGES, 3, 224, 224), dtype=torch.uint8)

    def collate(rows: list[tuple[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([row[0] for row in rows]).float() / 255

    return DataLoader(TensorDataset(pixels), batch_size=BATCH, collate_fn=collate)


def ours(model: nn.Module, loader: DataLoader, **options: object) -> Callable[[], object]:
    return lambda: survey(model, loader, nn.Conv2d, progress=False, **options)


def bare(model: nn.Module, loader: DataLoader) -> None:
    with torch.inference_mode():
        for batch in loader:
            model(batch)


def test_statistics_and_top_9_against_the_bare_loop(model, loader, versus):
    versus(ours(model, loader), lambda: bare(model, loader), target=">= 0.85", rounds=11)


def test_statistics_alone_against_the_bare_loop(model, loader, versus):
    versus(ours(model, loader, top_k=0), lambda: bare(model, loader), target="-", rounds=5)


def test_statistics_and_top_9_against_collecting_everything(model, loader, versus):
    def collect() -> None:
        """Keep what every convolution puts out, and compute the same with numpy in the end."""
        kept: dict[str, list[np.ndarray]] = {}
        convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        hooks = [
            m.register_forward_hook(lambda _, __, y, n=n: kept.setdefault(n, []).append(y.numpy().copy()))
            for n, m in convolutions
        ]
        with torch.inference_mode():
            for place, batch in enumerate(loader):
                if place < 3:  # more would not fit the memory of a small machine
                    model(batch)
        for hook in hooks:
            hook.remove()
        for maps in kept.values():
            every = np.concatenate(maps)
            by_channel = every.swapaxes(0, 1).reshape(every.shape[1], -1)
            _ = by_channel.mean(1), by_channel.std(1), by_channel.min(1), by_channel.max(1)
            _ = (by_channel == 0).mean(1)
            flat = every.reshape(*every.shape[:2], -1)
            place, peak = flat.argmax(2), flat.max(2)
            order = np.argsort(-peak, axis=0, kind="stable")[:9]
            _ = np.take_along_axis(place, order, 0)

    few = DataLoader(Subset(loader.dataset, range(3 * BATCH)), BATCH, collate_fn=loader.collate_fn)
    versus(ours(model, few), collect, target=">= 1", rounds=3, note="48 images")


def test_statistics_and_top_9_against_torchlens(model, loader, versus):
    torchlens = pytest.importorskip("torchlens")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    images = loader.dataset.tensors[0][: 2 * BATCH].float() / 255

    def extract() -> None:
        """Keep what every convolution puts out, which torchlens' own dataset extraction does."""
        with torch.inference_mode():
            torchlens.extract_dataset(model, images, names, batch_size=BATCH, progress=False)

    few = images.split(BATCH)
    versus(
        ours(model, few), extract, target=">= 1", rounds=3, note="32 images, torchlens computes no figures"
    )
