"""Whether what drives a channel is alike: sums over inputs that merge, and the MonoScore from them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchlens_viz.arguments import wide
from torchlens_viz.errors import InvalidArgumentError


class Meaning(NamedTuple):
    """Sums over the inputs of their embeddings, of unit length D, weighed by the activity of each channel.

    Attributes:
        inputs: How many, () float64.
        least: (C,) float64, the least activity.
        most: (C,) float64, the largest.
        activity: (C,) float64, the sum.
        squares: (C,) float64, the sum of its squares.
        embeddings: (D,) float64, the sum of the embeddings.
        weighed: (C, D) float64, the sum of the embeddings, each times the activity.
    """

    inputs: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    activity: torch.Tensor
    squares: torch.Tensor
    embeddings: torch.Tensor
    weighed: torch.Tensor

    def plus(self, other: Meaning) -> Meaning:
        """Return the sums over the inputs of both, on the device of this one.

        Raises:
            InvalidArgumentError: The embeddings have other lengths.
        """
        if self.embeddings.shape != other.embeddings.shape:
            raise InvalidArgumentError(
                f"`encoder` must always make embeddings of one length, got {len(self.embeddings)} and "
                f"{len(other.embeddings)}"
            )
        theirs = Meaning(*(part.to(self.weighed.device) for part in other))
        both = {name: ours + theirs[place] for place, (name, ours) in enumerate(self._asdict().items())}
        both["least"] = torch.minimum(self.least, theirs.least)
        both["most"] = torch.maximum(self.most, theirs.most)
        return Meaning(**both)

    def fits(self, channels: int) -> bool:
        """Tell whether these can be sums of so many channels."""
        shapes = [tuple(part.shape) for part in self]
        length = len(self.embeddings)
        known = [(), *[(channels,)] * 4, (length,), (channels, length)]
        return shapes == known and {part.dtype for part in self} == {torch.float64}

    def score(self) -> torch.Tensor:
        """Return the MonoScore of each channel, (C,) float64 on the CPU, from -1 to 1.

        It is the mean cosine similarity of the embeddings of every two inputs, each pair weighed by the
        product of their activities, which are first scaled so that the least is 0 and the largest 1: near 1
        where the inputs that drive a channel are alike to the encoder, near that of any two inputs where they
        have nothing in common. Pach et al. 2025 (arXiv:2504.02821) go through the pairs; of the sums that are
        kept it is the same (arXiv:2602.12403), since the squared length of `sum(a * e)` is the sum over all
        pairs, those of an input with itself included. The scale drops out. NaN for a channel that never
        changes, and for one that is above its least on fewer than two inputs.
        """
        activity = self.activity - self.inputs * self.least
        squares = self.squares - 2 * self.least * self.activity + self.inputs * self.least.square()
        weighed = self.weighed - self.least[:, None] * self.embeddings
        pairs = activity.square() - squares
        found = (weighed.square().sum(1) - squares) / pairs
        shift = self.inputs * self.least.abs()
        rounding = activity * (self.activity.abs() + shift) + self.squares + self.least.abs() * shift
        is_known = (self.most > self.least) & (pairs > 1e-12 * rounding)
        return found.masked_fill(~is_known, torch.nan).clamp(-1, 1).cpu()


def meaning(activity: torch.Tensor, embeddings: torch.Tensor) -> Meaning:
    """Sum up one batch.

    Args:
        activity: (N, C) float64.
        embeddings: (N, D); an input whose embedding has no direction, since it is zero or not finite, does
            not count.
    """
    rows = wide(embeddings).to(activity.device)
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    is_known = unit.isfinite().all(1)
    activity, unit = activity[is_known], unit[is_known]
    nothing = activity.new_full(activity.shape[1:], torch.inf)
    return Meaning(
        activity.new_tensor(float(len(activity))),
        activity.amin(0) if len(activity) else nothing,
        activity.amax(0) if len(activity) else -nothing,
        activity.sum(0),
        activity.square().sum(0),
        unit.sum(0),
        activity.T @ unit,
    )
