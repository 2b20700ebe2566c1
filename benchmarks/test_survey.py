"""A survey of all convolutions against the bare loop, against keeping everything, and against torchlens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import models

from torchlens_viz import survey

IMAGES, BATCH = 512, 32  # the first few hundred cost more, while most of them get among the top 9


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def dataset() -> TensorDataset:
    return TensorDataset(torch.randint(0, 256, (IMAGES, 3, 224, 224), dtype=torch.uint8))


@pytest.fixture
def loader(dataset: TensorDataset) -> DataLoader:
    return loader_of(dataset, BATCH)


def loader_of(dataset: Dataset, batch: int) -> DataLoader:
    def collate(rows: list[tuple[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([row[0] for row in rows]).float() / 255

    return DataLoader(dataset, batch_size=batch, collate_fn=collate)


def ours(model: nn.Module, loader: DataLoader, **options: object) -> Callable[[], object]:
    return lambda: survey(model, loader, nn.Conv2d, progress=False, **options)


def bare(model: nn.Module, loader: DataLoader) -> None:
    with torch.inference_mode():
        for batch in loader:
            model(batch)


@pytest.mark.parametrize("batch", [BATCH, 16, 64])
def test_statistics_and_top_9_against_the_bare_loop(model, dataset, batch, versus):
    loader = loader_of(dataset, batch)
    versus(ours(model, loader), lambda: bare(model, loader), target=">= 0.85", rounds=7)


def test_statistics_alone_against_the_bare_loop(model, loader, versus):
    versus(ours(model, loader, top_k=0), lambda: bare(model, loader), target="-", rounds=5)


def test_statistics_and_top_9_against_collecting_everything(model, dataset, versus):
    def collect() -> None:
        """Keep what every convolution puts out, and compute the same with numpy in the end."""
        kept: dict[str, list[np.ndarray]] = {}
        convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        hooks = [
            m.register_forward_hook(lambda _, __, y, n=n: kept.setdefault(n, []).append(y.numpy().copy()))
            for n, m in convolutions
        ]
        with torch.inference_mode():
            for batch in few:
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

    # More would not fit the memory of a small machine.
    few = loader_of(Subset(dataset, range(2 * BATCH)), BATCH)
    versus(ours(model, few), collect, target=">= 1", rounds=5, note=f"{2 * BATCH} images")


def test_statistics_and_top_9_against_torchlens(model, dataset, versus):
    torchlens = pytest.importorskip("torchlens")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    images = dataset.tensors[0][: 2 * BATCH].float() / 255

    def extract() -> None:
        """Keep what every convolution puts out, which torchlens' own dataset extraction does."""
        with torch.inference_mode():
            torchlens.extract_dataset(model, images, names, batch_size=BATCH, progress=False)

    few = images.split(BATCH)
    note = f"{2 * BATCH} images, torchlens computes no figures"
    versus(ours(model, few), extract, target=">= 1", rounds=5, note=note)


def forward_and_backward(model: nn.Module, loader: DataLoader, first: str, *, back: bool) -> None:
    """Run a network from a leaf at its first layer on, and back as far as that."""
    kept: list[torch.Tensor] = []

    def leaf(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()

    hook = model.get_submodule(first).register_forward_hook(leaf)
    for batch in loader:
        scores = model(batch)[:, 3]
        if back:
            torch.autograd.grad(scores.sum(), kept)
    hook.remove()


@pytest.mark.parametrize("layers", ["convolutions", "stages"])
def test_relevance_against_the_backward_pass_it_needs(model, dataset, layers, versus):
    """With relevance and a forward pass, against without relevance and a forward and a backward pass."""
    few = loader_of(Subset(dataset, range(128)), 16)
    selected = nn.Conv2d if layers == "convolutions" else [f"layer{stage}" for stage in range(1, 5)]
    first = "conv1" if layers == "convolutions" else "layer1"
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def with_relevance() -> None:
        survey(model, few, selected, target=lambda output, batch: output[:, 3], progress=False)
        forward_and_backward(model, few, first, back=False)

    def without() -> None:
        survey(model, few, selected, progress=False)
        forward_and_backward(model, few, first, back=True)

    versus(with_relevance, without, target=">= 1", rounds=3)
