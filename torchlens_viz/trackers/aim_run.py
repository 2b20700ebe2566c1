"""A run of Aim as a writer."""

from __future__ import annotations

import importlib
from typing import Any, final

import numpy as np
import numpy.typing as npt

from torchlens_viz.trackers.rows import histogram_of, picture_of


@final
class AimWriter:
    """Tracks every entry in a run, by its tag and step.

    Args:
        run: An `aim.Run`.
    """

    def __init__(self, run: Any) -> None:
        self._aim = importlib.import_module("aim")
        self._run = run

    def add_image(self, tag: str, pixels: npt.NDArray[Any], step: int) -> None:
        """Write a picture (C, H, W), uint8."""
        self._run.track(self._aim.Image(picture_of(pixels)), name=tag, step=step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._run.track(float(value), name=tag, step=step)

    def add_histogram(self, tag: str, values: npt.NDArray[Any], step: int) -> None:
        """Write a histogram."""
        counts, edges = histogram_of(values)
        found = self._aim.Distribution(hist=np.array(counts), bin_range=(edges[0], edges[-1]))
        self._run.track(found, name=tag, step=step)

    def add_text(self, tag: str, words: str, step: int) -> None:
        """Write words."""
        self._run.track(self._aim.Text(words), name=tag, step=step)
