"""A strip of a few small maps, to be shown beside numbers."""

from __future__ import annotations

from typing import Any, Final

import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz.arguments import has_values
from torchlens_viz.draw.canvas import draw
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import TorchlensVizError

_TILES: Final = 6
_SIDE: Final = 32


def thumbnail(values: Any, channel_dim: int | None) -> Image.Image | None:
    """Draw the first six maps of the first input, averaged to at most 32 pixels a side, with robust limits.

    Args:
        values: Maps (N, C, H, W).
        channel_dim: The dimension that counts channels; None is the second.

    Returns:
        An image, or None for what is no such maps of plain numbers.
    """
    if not isinstance(values, torch.Tensor) or values.is_nested or not has_values(values) or values.ndim != 4:
        return None
    try:
        maps = maps_of(values, 0, channel_dim=channel_dim)[:_TILES].detach()
    except TorchlensVizError:  # complex numbers, or none at all
        return None
    maps = maps.cpu().float()
    factor = -(-max(maps.shape[1:]) // _SIDE)
    if factor > 1:
        maps = F.avg_pool2d(maps, factor, ceil_mode=True)
    style = Style(nrow=_TILES, value_range="robust")
    return draw(maps[:, None], style, labels=[""] * len(maps), notes=())
