"""A run of Weights & Biases as a writer."""

from __future__ import annotations

import importlib
from html import escape
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from torchlens_viz.trackers.rows import Row, histogram_of, picture_of

_STEP: Final = "monitor/step"
_GROUPS: Final = ("kernels", "maps", "health", "probe", "alarms")


@final
class WandbWriter:
    """Writes rows to a run, each with the training's step in `monitor/step`, which charts are drawn over.

    The run's own counter goes on by one a row. To log at steps of it (`step=`) could not go back to one that
    the training itself has passed, and what was logged would be lost.

    Args:
        run: What `wandb.init` returns.
    """

    def __init__(self, run: Any) -> None:
        self._wandb = importlib.import_module("wandb")
        self._row = Row(lambda entries, step: run.log({**entries, _STEP: step}))
        run.define_metric(_STEP, hidden=True)
        for group in _GROUPS:
            run.define_metric(f"{group}/*", step_metric=_STEP)

    def add_image(self, tag: str, pixels: npt.NDArray[Any], step: int) -> None:
        """Write a picture (C, H, W), uint8."""
        self._row.add(tag, self._wandb.Image(picture_of(pixels)), step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._row.add(tag, value, step)

    def add_histogram(self, tag: str, values: npt.NDArray[Any], step: int) -> None:
        """Write a histogram."""
        counts, edges = histogram_of(values)
        self._row.add(tag, self._wandb.Histogram(np_histogram=(np.array(counts), np.array(edges))), step)

    def add_text(self, tag: str, words: str, step: int) -> None:
        """Write words."""
        self._row.add(tag, self._wandb.Html(f"<pre>{escape(words)}</pre>"), step)

    def flush(self) -> None:
        """Write what is waiting."""
        self._row.flush()
