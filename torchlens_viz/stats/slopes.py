"""What a loss says of each channel: sums of gradients over the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

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

    def plus(self, other: Slopes | None) -> Slopes:
        """Return the sums over the inputs of both, on the device of this one.

        Raises:
            InvalidArgumentError: They have other channels.
        """
        if other is None:
            return self
        if self.products.shape != other.products.shape:
            raise InvalidArgumentError(
                f"it has {len(self.products)} channels here and {len(other.products)} there"
            )
        return Slopes(*(ours + theirs.to(ours.device) for ours, theirs in zip(self, other, strict=True)))
