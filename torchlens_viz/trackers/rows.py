"""What trackers have in common: the entries of a step in one row, pictures and histograms of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
from PIL import Image

_BINS: Final = 60


@final
class Row:
    """Gathers what is written of a step, and hands it over at once.

    Args:
        write: Takes the entries by tag, and the step.
    """

    def __init__(self, write: Callable[[dict[str, Any], int], object]) -> None:
        self._write = write
        self._entries: dict[str, Any] = {}
        self._step = 0

    def add(self, tag: str, entry: Any, step: int) -> None:
        """Add an entry; what was gathered of another step is handed over before."""
        if step != self._step:
            self.flush()
        self._step = step
        self._entries[tag] = entry

    def flush(self) -> None:
        """Hand over what was gathered."""
        entries, self._entries = self._entries, {}
        if entries:
            self._write(entries, self._step)


def picture_of(pixels: npt.NDArray[Any]) -> Image.Image:
    """Return pixels (C, H, W), uint8, as a picture."""
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def histogram_of(values: npt.NDArray[Any]) -> tuple[list[int], list[float]]:
    """Return how many values lie in each of 60 bins of one width, and the 61 edges."""
    try:
        counts, edges = np.histogram(values, bins=_BINS)
    except ValueError:  # too close to one another for so many edges between them
        counts, edges = np.histogram(values, bins=1, range=(values.min() - 1, values.max() + 1))
    return [int(count) for count in counts], [float(edge) for edge in edges]
