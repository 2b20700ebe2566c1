"""A run of MLflow as a writer."""

from __future__ import annotations

import importlib
import re
from typing import Any, Final, final

import numpy.typing as npt

from torchlens_viz.trackers.rows import histogram_of, picture_of

_REFUSED: Final = re.compile(r"[^\w/\-. :]")  # in the names of metrics


@final
class MlflowWriter:
    """Writes numbers as metrics, pictures as images of a step, and what MLflow has no kind for as artifacts.

    Those are `histograms/<tag>/<step>.json`, with counts and edges, and `texts/<tag>/<step>.md`.

    Args:
        run: What `mlflow.start_run` returns, or `mlflow.active_run`.
    """

    def __init__(self, run: Any) -> None:
        self._client = importlib.import_module("mlflow").MlflowClient()
        self._run = run.info.run_id

    def add_image(self, tag: str, pixels: npt.NDArray[Any], step: int) -> None:
        """Write a picture (C, H, W), uint8."""
        image = picture_of(pixels).convert("RGB")
        self._client.log_image(self._run, image, key=_named(tag), step=step, synchronous=True)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._client.log_metric(self._run, _named(tag), value, step=step)

    def add_histogram(self, tag: str, values: npt.NDArray[Any], step: int) -> None:
        """Write a histogram."""
        counts, edges = histogram_of(values)
        place = f"histograms/{_named(tag)}/{step:09d}.json"
        self._client.log_dict(self._run, {"step": step, "counts": counts, "edges": edges}, place)

    def add_text(self, tag: str, words: str, step: int) -> None:
        """Write words."""
        self._client.log_text(self._run, words, f"texts/{_named(tag)}/{step:09d}.md")


def _named(tag: str) -> str:
    return _REFUSED.sub("_", tag)
