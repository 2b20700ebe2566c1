"""How alike channels respond: sums over inputs that merge, and Pearson's correlation from them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchlens_viz.arguments import wide


class Comoments(NamedTuple):
    """Sums over the inputs on which both channels of a pair had a finite figure: (C, C) float64 each.

    Attributes:
        inputs: How many.
        sums: The sum of the row's channel.
        squares: The sum of its squares.
        products: The sum of the products.
    """

    inputs: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor


def comoments(figures: torch.Tensor) -> Comoments:
    """Measure one batch.

    Args:
        figures: (N, C), one figure of each input and channel; those that are not finite are left out.
    """
    values = wide(figures)
    is_known = values.isfinite()
    known, values = is_known.double(), values.masked_fill(~is_known, 0)
    return Comoments(known.T @ known, values.T @ known, values.square().T @ known, values.T @ values)


def together(ours: Comoments, theirs: Comoments) -> Comoments:
    """Return the sums over the inputs of both."""
    return Comoments(*(mine + other.to(mine.device) for mine, other in zip(ours, theirs, strict=True)))


def correlation(sums: Comoments) -> torch.Tensor:
    """Return Pearson's correlation of every pair of channels, (C, C); NaN where one does not vary.

    Nor is there one of fewer than three inputs: two points always lie on a line. A channel whose spread is
    less than a millionth of its size does not vary.
    """
    count = sums.inputs.clamp(min=1)
    mean = sums.sums / count
    spread = (sums.squares / count - mean.square()).clamp(min=0)
    # What is left of a constant after its square is taken from itself.
    spread = spread.masked_fill(spread <= 1e-12 * sums.squares / count, 0)
    shared = sums.products / count - mean * mean.T
    is_unknown = (spread * spread.T == 0) | (sums.inputs < 3)
    return (shared / (spread * spread.T).sqrt()).masked_fill(is_unknown, torch.nan).clamp(-1, 1)
