"""The channels of two networks matched by how they respond: which have moved, died or been born."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch

from torchlens_viz.comparison.gap import numbers_of


class Move(NamedTuple):
    """A channel whose like has another place in the other network.

    Attributes:
        channel: Its place in `a`.
        to: The place in `b` of the channel that responds like it.
        correlation: Of both, over all positions of all inputs.
    """

    channel: int
    to: int
    correlation: float


class Alike(NamedTuple):
    """How alike the channels of two layers respond.

    Attributes:
        correlation: (C of a, C of b) float64; NaN where one of both is constant.
        responds_in_a: (C of a,) bool, which are not constant.
        responds_in_b: (C of b,) bool.
    """

    correlation: torch.Tensor
    responds_in_a: torch.Tensor
    responds_in_b: torch.Tensor


@dataclass(frozen=True, slots=True)
class ChannelMatch:
    """Which channels of a layer respond alike in two networks.

    Attributes:
        partners: (C,) int64, for each channel of `a` its like in `b`; -1 where there is none.
        correlations: (C,) float64 with it; NaN where there is none.
        kept: (K,) int64, the channels whose like has the same place.
        moved: Those whose like has another, the most alike first.
        died: (D,) int64, the channels of `a` that have no like in `b`, though they respond.
        born: (B,) int64, the channels of `b` that have no like in `a`, though they respond.
    """

    partners: torch.Tensor
    correlations: torch.Tensor
    kept: torch.Tensor
    moved: tuple[Move, ...]
    died: torch.Tensor
    born: torch.Tensor


@final
class CoMoments:
    """How channels of one network vary with those of another, batch by batch.

    Means and products of distances from them are united as by Chan, Golub and LeVeque (1979).
    """

    def __init__(self) -> None:
        self._count = 0
        self._means: tuple[torch.Tensor, torch.Tensor] | None = None
        self._products: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor, dim: int) -> None:
        """Take in what both layers put out for one batch: the same positions, any number of channels."""
        x, y = (numbers_of(side).movedim(dim, 0).flatten(1) for side in (a, b))
        y = y.to(x.device)
        count = x.shape[1]
        if count == 0:
            return
        means = (x.mean(1), y.mean(1))
        x, y = x - means[0][:, None], y - means[1][:, None]
        products = (x.square().sum(1), y.square().sum(1), x @ y.T)
        if self._means is not None and self._products is not None:
            steps = [new - old for new, old in zip(means, self._means, strict=True)]
            share = self._count * count / (self._count + count)
            cross = (steps[0].square(), steps[1].square(), torch.outer(*steps))
            old = self._products
            products = (
                products[0] + old[0] + cross[0] * share,
                products[1] + old[1] + cross[1] * share,
                products[2] + old[2] + cross[2] * share,
            )
            part = count / (self._count + count)
            means = (self._means[0] + steps[0] * part, self._means[1] + steps[1] * part)
        self._count += count
        self._means, self._products = means, products

    def compute(self) -> Alike | None:
        """Return what is known, or None where nothing was seen."""
        if self._products is None or self._means is None:
            return None
        of_a, of_b, product = self._products
        # What is constant has a spread of rounding errors alone.
        is_constant = [
            squares <= self._count * (1e-12 * mean) ** 2
            for squares, mean in zip((of_a, of_b), self._means, strict=True)
        ]
        spreads = [
            squares.sqrt().masked_fill(constant, torch.nan)
            for squares, constant in zip((of_a, of_b), is_constant, strict=True)
        ]
        correlation = (product / spreads[0][:, None] / spreads[1]).clamp(-1, 1)
        return Alike(correlation.cpu(), *(~constant.cpu() for constant in is_constant))


def matched(found: Alike, threshold: float) -> ChannelMatch:
    """Match channels one to one: those that kept their place first, then the most alike.

    Args:
        found: How alike they are.
        threshold: What the correlation of two that are alike reaches.
    """
    correlation = found.correlation
    rows, columns = correlation.shape
    partners = torch.full((rows,), -1, dtype=torch.int64, device="cpu")
    alike = correlation.nan_to_num(nan=-2)
    taken = torch.zeros(columns, dtype=torch.bool, device="cpu")
    least = min(rows, columns)
    stays = (alike.diagonal() >= threshold).nonzero().flatten() if least else partners[:0]
    partners[stays], taken[stays] = stays, True
    pairs = (alike >= threshold).nonzero()
    order = alike[pairs[:, 0], pairs[:, 1]].sort(descending=True, stable=True).indices
    moved = []
    for channel, to in pairs[order].tolist():
        if partners[channel] < 0 and not taken[to]:
            partners[channel], taken[to] = to, True
            moved.append(Move(channel, to, correlation[channel, to].item()))
    has_like = partners >= 0
    reached = torch.full((rows,), torch.nan, dtype=torch.float64, device="cpu")
    reached[has_like] = correlation[has_like.nonzero().flatten(), partners[has_like]]
    return ChannelMatch(
        partners=partners,
        correlations=reached,
        kept=stays,
        moved=tuple(moved),
        died=(found.responds_in_a & ~has_like).nonzero().flatten(),
        born=(found.responds_in_b & ~taken).nonzero().flatten(),
    )
