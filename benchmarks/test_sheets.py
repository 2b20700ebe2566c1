"""Saving sheets against torchvision's `save_image`. The floor is the compression of the pixels."""

from __future__ import annotations

import torch
from torchvision.utils import save_image

from torchlens_viz import save_feature_grid


def test_save_feature_sheet_64x224x224(versus, tmp_path):
    maps = torch.randn(1, 64, 224, 224, generator=torch.Generator().manual_seed(0)).relu_()
    maps = torch.nn.functional.avg_pool2d(maps, 9, 1, 4)  # smooth, as feature maps are
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"

    def save_ours():
        save_feature_grid(maps, ours, cmap="gray", scale_each=True)

    def save_theirs():
        save_image(maps[0][:, None], theirs, normalize=True, scale_each=True)

    save_ours()
    save_theirs()
    sizes = f"{ours.stat().st_size / 1e6:.2f} MB against {theirs.stat().st_size / 1e6:.2f} MB"
    versus(save_ours, save_theirs, target=">= 8, smaller", note=sizes, rounds=7)
    assert ours.stat().st_size < theirs.stat().st_size
