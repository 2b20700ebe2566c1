"""What a loss says of each channel: sums of gradients over the inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from torchlens_viz.arguments import wide
from torchlens_viz.errors import InvalidArgumentError


class Slopes(NamedTuple):
    """Sums over the inputs: (C,) float64 each, but for the number of inputs.

    Of an input, `G` is the sum over the positions of a channel of the gradient of its loss, and `P` of the
    gradient times the activation.

    Attributes:
        inputs: How many, ().
        gradients: The sum of G.
        products: The sum of P.
        gradient_squares: The sum of the squares of G.
        product_squares: The sum of the squares of P.
        mixed: The sum of G times P.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    products: torch.Tensor
    gradient_squares: torch.Tensor
    product_squares: torch.Tensor
    mixed: torch.Tensor

    def plus(self, other: Slopes) -> Slopes:
        """Return the sums over the inputs of both, on the device of this one."""
        return Slopes(*(ours + theirs.to(ours.device) for ours, theirs in zip(self, other, strict=True)))

    def fits(self, channels: int) -> bool:
        """Tell whether these can be sums of so many channels."""
        shapes = [tuple(part.shape) for part in self]
        return shapes == [(), *[(channels,)] * 5] and {part.dtype for part in self} == {torch.float64}


def slopes_of_each(
    values: torch.Tensor, gradient: torch.Tensor | None, channel_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G and P of every input and channel, (N, C) float64 each.

    Args:
        values: What a layer put out, (N, ...) floating-point numbers.
        gradient: That of the loss there; None for zero.
        channel_dim: Which of the dimensions counts channels.

    Raises:
        InvalidArgumentError: The values have no gradient, or no row per input.
    """
    if not values.is_floating_point() or channel_dim % values.ndim == 0:
        raise InvalidArgumentError(
            f"for effects it must put out floating-point numbers with one row per input, got {values.dtype} "
            f"(shape {tuple(values.shape)}); choose other layers, or leave out `loss`"
        )
    if gradient is None:  # nothing that it puts out reaches the loss
        nothing = wide(torch.zeros(values.shape[0], values.shape[channel_dim], device=values.device))
        return nothing, nothing
    rows, slope = (
        (side if side.dtype.itemsize > 2 else side.float()).movedim(channel_dim, 1)
        for side in (values, gradient)
    )
    rows, slope = (side.reshape(*side.shape[:2], -1) for side in (rows, slope))
    # In float32 as the gradient itself, since sums in float64 would take a tenth of the time of the pass.
    return wide(slope.sum(2)), wide(torch.linalg.vecdot(slope, rows))


def summed(gradients: torch.Tensor, products: torch.Tensor) -> Slopes:
    """Return the sums over the inputs of G and P, (N, C) each."""
    return Slopes(
        gradients.new_tensor(float(len(gradients))),
        gradients.sum(0),
        products.sum(0),
        gradients.square().sum(0),
        products.square().sum(0),
        (gradients * products).sum(0),
    )


class Effect(NamedTuple):
    """The estimated change of the mean loss where a channel is replaced.

    Attributes:
        change: (C,) float64, or (K, C) class by class.
        error: The same, the standard error over the inputs; NaN with one input.
    """

    change: torch.Tensor
    error: torch.Tensor


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
    error = (spread / count).sqrt().masked_fill(count <= 1, torch.nan)
    return Effect(change.cpu(), error.cpu())
