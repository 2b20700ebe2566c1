"""`make_grid` against torchvision's.

The floor is memory traffic: the grid is written once, and torchvision's, three channels wide, weighs
3 * 4 bytes per pixel. At 64 x 1 x 224 x 224 that is 39 MB, most of whose cost is the pages of a new tensor.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.utils import make_grid as torchvision_grid

from torchlens_viz import make_grid

SHAPES = {
    (512, 1, 14, 14): ">= 20",
    (4096, 1, 3, 3): ">= 200",
    (64, 3, 11, 11): ">= 10",
    (64, 1, 224, 224): ">= 1.5",
}


def _id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=_id)
@pytest.mark.parametrize("kind", ["scale_each", "normalize", "plain"])
def test_make_grid(versus, shape, kind):
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    options = {
        "scale_each": {"normalize": True, "scale_each": True},
        "normalize": {"normalize": True},
        "plain": {},
    }[kind]
    assert torch.equal(make_grid(batch, **options), torchvision_grid(batch, **options))
    versus(
        lambda: make_grid(batch, **options),
        lambda: torchvision_grid(batch, **options),
        target=SHAPES[shape] if kind == "scale_each" else ">= 1",
    )
