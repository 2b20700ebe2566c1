"""One scale per picture for a whole training: given, or taken from the first picture and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import NamedTuple, final

import torch

from torchlens_viz.draw.scale import finite_range
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.layers import nearest


class Scale(NamedTuple):
    """The values of the first and the last colour, and the words for where they come from."""

    low: float
    high: float
    origin: str


@final
class Scales:
    """Remembers the scale of every tag, so that pictures of different steps can be compared.

    Args:
        given: (low, high) by tag, or by a glob of tags; the first that matches counts.
        headroom: A scale that is not given reaches this many times as far from zero as the values of the
            first picture, since the values of a new network mostly grow.
        tags: The tags that there are.

    Raises:
        InvalidArgumentError: A range is no range, it matches no tag, or `headroom` is below 1.
    """

    def __init__(
        self, given: Mapping[str, Sequence[float]] | None, *, headroom: float, tags: Iterable[str]
    ) -> None:
        if not (headroom >= 1 and isfinite(headroom)):
            raise InvalidArgumentError(f"`headroom` must be at least 1, got {headroom}")
        self._headroom = headroom
        self._of: dict[str, Scale] = {}
        tags = list(tags)
        for glob, limits in (given or {}).items():
            matching = [tag for tag in tags if tag == glob or fnmatchcase(tag, glob)]
            if not matching:
                raise InvalidArgumentError(f"`scales` must name tags, got `{glob}`; {nearest(glob, tags)}")
            ends = [float(limit) for limit in limits]
            if len(ends) != 2 or not all(map(isfinite, ends)) or ends[0] >= ends[1]:
                raise InvalidArgumentError(
                    f"`scales` must hold (low, high) with low < high, got {limits!r} for `{glob}`"
                )
            for tag in matching:
                self._of.setdefault(tag, Scale(ends[0], ends[1], "scale given"))

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) by tag, of all tags whose scale is known by now."""
        return {tag: (scale.low, scale.high) for tag, scale in self._of.items()}

    def of(self, tag: str, values: torch.Tensor, step: int, *, signed: bool) -> Scale:
        """Return the scale of a tag.

        Args:
            tag: The tag of the picture.
            values: What the picture shows, floating point, at least one value. Others are left out.
            step: The global step.
            signed: Put zero in the middle, even where no value is negative.
        """
        if tag in self._of:
            return self._of[tag]
        low, high, _ = (
            float(part) if isinstance(part, torch.Tensor) else part
            for part in finite_range(values.detach().reshape(1, -1))
        )
        far = max(abs(low), abs(high)) * self._headroom
        is_range = 0 < far < float("inf") and bool(values.isfinite().any())
        if not is_range:  # nothing to go by yet: a later picture decides
            return Scale(-1.0 if signed else 0.0, 1.0, "scale not known yet")
        scale = Scale(-far if signed or low < 0 else 0.0, far, f"scale of step {step}")
        self._of[tag] = scale
        return scale


def beyond(values: torch.Tensor, scale: Scale) -> float:
    """Return the share of the finite values that lie beyond a scale, 0 to 1."""
    is_finite = values.isfinite()
    outside = ((values < scale.low) | (values > scale.high)) & is_finite
    return (outside.sum() / is_finite.sum().clamp(min=1)).item()
