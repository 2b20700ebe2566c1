"""What is known of channels class by class: sums over the inputs of each, and class selectivity from them."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from torchlens_viz.arguments import shown
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.slopes import Slopes

MOST_CLASSES: Final = 1024
_SLOPES: Final = 5  # what `Slopes` sums up


class ClassSums(NamedTuple):
    """Sums over the inputs of each class, of which there are K.

    With 8 bytes a number they take at most 8 KiB a channel, and 48 KiB where there is a loss.

    Attributes:
        classes: (K,) int64, the labels, increasing.
        inputs: (K,) float64, how many inputs had each.
        sums: (K, S, C) float64, of the activity of each channel, its mean over the positions of an input; and
            where there is a loss of the five figures that `Slopes` sums up, so that S is 1 or 6.
    """

    classes: torch.Tensor
    inputs: torch.Tensor
    sums: torch.Tensor

    def plus(self, other: ClassSums) -> ClassSums:
        """Return the sums over the inputs of both, on the device of this one.

        Raises:
            InvalidArgumentError: There are more than 1,024 classes.
        """
        device = self.sums.device
        theirs = ClassSums(*(part.to(device) for part in other))
        if torch.equal(self.classes, theirs.classes):
            return ClassSums(self.classes, self.inputs + theirs.inputs, self.sums + theirs.sums)
        classes: torch.Tensor = torch.unique(torch.cat([self.classes, theirs.classes]))
        _require_few(classes)
        inputs = self.inputs.new_zeros(len(classes))
        sums = self.sums.new_zeros(len(classes), *self.sums.shape[1:])
        for part in (self, theirs):
            places = torch.searchsorted(classes, part.classes)
            inputs.index_add_(0, places, part.inputs)
            sums.index_add_(0, places, part.sums)
        return ClassSums(classes, inputs, sums)

    def fits(self, channels: int) -> bool:
        """Tell whether these can be sums of so many channels."""
        count = len(self.classes)
        shapes = [tuple(part.shape) for part in self]
        return (
            shapes[:2] == [(count,)] * 2
            and shapes[2] in ((count, 1, channels), (count, 1 + _SLOPES, channels))
            and [part.dtype for part in self] == [torch.int64, torch.float64, torch.float64]
            and bool((self.classes.diff() > 0).all())
        )

    def slopes(self) -> Slopes | None:
        """Return what the loss says class by class, (K, 1) inputs and (K, C) sums; None without a loss."""
        if self.sums.shape[1] == 1:
            return None
        return Slopes(self.inputs[:, None], *self.sums[:, 1:].unbind(1))

    def means(self) -> torch.Tensor:
        """Return the mean activity of each channel for each class, (K, C) float64 on the CPU."""
        return (self.sums[:, 0] / self.inputs[:, None]).cpu()


def class_sums(
    labels: torch.Tensor, activity: torch.Tensor, slopes: tuple[torch.Tensor, torch.Tensor] | None
) -> ClassSums:
    """Sum up one batch.

    Args:
        labels: (N,) int64.
        activity: (N, C) float64.
        slopes: G and P of `Slopes`, (N, C) float64 each; None without a loss.

    Raises:
        InvalidArgumentError: There are more than 1,024 classes.
    """
    figures = [activity]
    if slopes is not None:
        gradients, products = slopes
        figures += [*slopes, gradients.square(), products.square(), gradients * products]
    rows = torch.stack(figures, 1)
    classes, places = torch.unique(labels.to(rows.device), return_inverse=True)
    _require_few(classes)
    inputs = rows.new_zeros(len(classes)).index_add_(0, places, rows.new_ones(len(places)))
    return ClassSums(
        classes, inputs, rows.new_zeros(len(classes), *rows.shape[1:]).index_add_(0, places, rows)
    )


def _require_few(classes: torch.Tensor) -> None:
    if len(classes) > MOST_CLASSES:
        raise InvalidArgumentError(
            f"`by_class` takes at most {MOST_CLASSES:,} classes, got {len(classes):,} "
            f"({shown(classes[:3].tolist())} and so on); make fewer of them with `label_of`, or leave it out"
        )


def selectivity(means: torch.Tensor) -> torch.Tensor:
    """Return the class selectivity index of each channel, (C,) float64; `Survey.selectivity` says what it is.

    Args:
        means: (K, C), the mean activity of each channel for each class.
    """
    if len(means) < 2:
        return means.new_full(means.shape[1:], torch.nan)
    best = means.amax(0)
    others = (means.sum(0) - best) / (len(means) - 1)
    found = (best - others) / (best + others)
    return found.masked_fill(~(means >= 0).all(0), torch.nan)
