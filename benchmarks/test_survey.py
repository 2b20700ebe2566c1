"""A survey against torchlens' extraction of a data set, and relevance against the backward pass it needs.

`python -m benchmarks --only survey` has the bare loop, keeping everything, and a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import models

from torchlens_viz import survey

IMAGES, BATCH = 128, 32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def dataset() -> TensorDataset:
    return TensorDataset(torch.randint(0, 256, (IMAGES, 3, 224, 224), dtype=torch.uint8))


def loader_of(dataset: Dataset, batch: int) -> DataLoader:
    def collate(rows: list[tuple[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([row[0] for row in rows]).float() / 255

    return DataLoader(dataset, batch_size=batch, collate_fn=collate)


def ours(model: nn.Module, loader: DataLoader, **options: object) -> Callable[[], object]:
    return lambda: survey(model, loader, nn.Conv2d, progress=False, **options)


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
