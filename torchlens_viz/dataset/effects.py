"""`Effects`: what each channel is worth to the loss, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, final

import torch

from torchlens_viz.ablation.result import Ablation
from torchlens_viz.arguments import one_of, wide
from torchlens_viz.dataset.tally import ByLayer, Tally
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.slopes import Slopes


class Effect(NamedTuple):
    """The estimated change of the mean loss where a channel is replaced.

    Attributes:
        change: (C,) float64.
        error: (C,) float64, the standard error over the inputs; NaN with one input.
    """

    change: torch.Tensor
    error: torch.Tensor


@final
class Effects(ByLayer[torch.Tensor]):
    """For each layer the estimated change of the mean loss where a channel is zero, (C,) float64.

    Args:
        tallies: What is known of the layers that ran; those without gradients are left out.
    """

    def __init__(self, tallies: Mapping[str, Tally]) -> None:
        self._known = {name: tally for name, tally in tallies.items() if tally.slopes is not None}
        super().__init__({name: self.of(name).change for name in self._known})

    def of(self, layer: str, by: Literal["zero", "mean"] = "zero") -> Effect:
        """Return the estimated change where each channel is replaced, with its standard error.

        Args:
            layer: The layer's name.
            by: What stands in its place: zero, or the channel's mean over all positions of all inputs.

        Raises:
            InvalidArgumentError: The survey was made without a `loss`.
        """
        one_of(by, "by", ("zero", "mean"))
        if not self._known:
            raise InvalidArgumentError("effects need gradients; make the survey with a `loss`")
        tally = ByLayer(self._known)[layer]
        assert tally.slopes is not None
        return effect(tally.slopes, tally.stats.compute().mean, by)

    def trust(self, exact: Ablation) -> float:
        """Return how far the estimates put channels in the right order: Spearman's rank correlation, -1 to 1.

        Args:
            exact: What `ablate` measured of some channels of a layer, by zero or by the mean, on the same
                data or a part of it.

        Raises:
            InvalidArgumentError: It is of a layer that was not surveyed, by something else, or of fewer than
                three channels.
        """
        if exact.by not in ("zero", "mean") or len(exact.channels) < 3:
            raise InvalidArgumentError(
                '`exact` must be of three channels or more by "zero" or "mean", got '
                f'{len(exact.channels)} by "{exact.by}"'
            )
        change = self.of(exact.layer, "mean" if exact.by == "mean" else "zero").change
        return rank_correlation(change[exact.channels], exact.loss_change)


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


def effect(slopes: Slopes, means: torch.Tensor, by: Literal["zero", "mean"]) -> Effect:
    """Return the first-order effect of replacing each channel at all of its positions.

    With `a` the activations of an input and `g` the gradient of its loss, a channel that becomes `v`
    everywhere changes the loss by `sum(g * (v - a)) = v * G - P` to first order: by `-P` for zero, and by `m
    * G - P` for the channel's mean `m` over the data. The mean over the inputs, and the variance of these
    numbers among them, follow from the sums of G, P, their squares and their product. The mean `m` counts as
    known.

    Args:
        slopes: The sums.
        means: (C,) the mean of each channel over all positions of all inputs.
        by: What stands in the place of the channel.
    """
    count = slopes.inputs
    value = wide(means).to(slopes.products.device) if by == "mean" else torch.zeros_like(slopes.products)
    change = (value * slopes.gradients - slopes.products) / count
    squares = value.square() * slopes.gradient_squares - 2 * value * slopes.mixed + slopes.product_squares
    spread = (squares - count * change.square()).clamp(min=0) / (count - 1)
    error = (spread / count).sqrt() if count > 1 else torch.full_like(change, torch.nan)
    return Effect(change.cpu(), error.cpu())
