"""A run of trackio as a writer."""

from __future__ import annotations

import importlib
from typing import Any, final

import numpy as np
import numpy.typing as npt

from torchlens_viz.trackers.rows import Row, histogram_of, picture_of


@final
class TrackioWriter:
    """Writes a row per step to a run.

    Args:
        run: What `trackio.init` returns.
    """

    def __init__(self, run: Any) -> None:
        self._trackio = importlib.import_module("trackio")
        self._row = Row(lambda entries, step: run.log(entries, step=step))

    def add_image(self, tag: str, pixels: npt.NDArray[Any], step: int) -> None:
        """Write a picture (C, H, W), uint8."""
        self._row.add(tag, self._trackio.Image(picture_of(pixels).convert("RGB")), step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._row.add(tag, value, step)

    def add_histogram(self, tag: str, values: npt.NDArray[Any], step: int) -> None:
        """Write a histogram."""
        counts, edges = histogram_of(values)
        self._row.add(tag, self._trackio.Histogram(np_histogram=(np.array(counts), np.array(edges))), step)

    def add_text(self, tag: str, words: str, step: int) -> None:
        """Write words."""
        self._row.add(tag, self._trackio.Markdown(words), step)

    def flush(self) -> None:
        """Write what is waiting."""
        self._row.flush()
