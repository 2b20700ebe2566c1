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

    def plus(self, other: Comoments) -> Comoments:
        """Return the sums over the inputs of both, on the device of this one."""
        return Comoments(*(ours + theirs.to(ours.device) for ours, theirs in zip(self, other, strict=True)))

    def fits(self, channels: int) -> bool:
        """Tell whether these can be sums of so many channels."""
        shapes = {tuple(part.shape) for part in self}
        return shapes == {(channels, channels)} and {part.dtype for part in self} == {torch.float64}


def comoments(figures: torch.Tensor) -> Comoments:
    """Measure one batch.

    Args:
        figures: (N, C), one figure of each input and channel; those that are not finite are left out.
    """
    values = wide(figures)
    is_known = values.isfinite()
    known, values = is_known.double(), values.masked_fill(~is_known, 0)
    return Comoments(known.T @ known, values.T @ known, values.square().T @ known, values.T @ values)


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


def rank_correlation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return Spearman's correlation of two rows of numbers, -1 to 1; NaN where one is constant.

    That of their ranks; equal numbers share the mean of theirs.
    """
    ranks = torch.stack([_ranks(ours), _ranks(theirs)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    spread = ranks.square().sum(1).prod().sqrt()
    return (ranks.prod(0).sum() / spread).item() if spread > 0 else float("nan")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, group, sizes = torch.unique(wide(values).cpu(), return_inverse=True, return_counts=True)
    last: torch.Tensor = sizes.cumsum(0).double()
    ranks: torch.Tensor = last - (sizes - 1) / 2
    return ranks[group]
