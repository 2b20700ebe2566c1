"""A folder of PNG files and JSON lines, for which no package is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, final

import numpy.typing as npt

from torchlens_viz.files.paths import safe_names
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.trackers.rows import histogram_of, picture_of


@final
class FolderWriter(os.PathLike[str]):
    """A writer for `Monitor` that needs no package: pictures as PNG, all else as lines of JSON.

    A picture is `FOLDER/<tag>/<step>.png`. `FOLDER/log.jsonl` has a line per entry, with `step`, `tag` and
    one of `value` (a number, or null where it is not finite), `picture` (its path in the folder), `counts`
    and `edges` (a histogram) and `text`. Lines are added to those that are there, each whole or not at all.

    Args:
        folder: Where to write; it is made with the first entry.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch import nn
        >>> from torchlens_viz import FolderWriter, Monitor
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Monitor(nn.Sequential(nn.Conv2d(3, 4, 3)), FolderWriter(folder), alarm=None) as monitor:
        ...     monitor.step(0)
        >>> (folder / "log.jsonl").read_text("utf-8").strip()
        '{"step": 0, "tag": "kernels/0", "picture": "kernels/0/000000000.png"}'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def __fspath__(self) -> str:
        return str(self._folder)

    def add_image(self, tag: str, pixels: npt.NDArray[Any], step: int) -> None:
        """Write a picture (C, H, W), uint8."""
        folder = "/".join(safe_names([part])[0] for part in tag.split("/"))
        place = f"{folder}/{step:09d}.png"
        save_picture(picture_of(pixels), self._folder / place)
        self._add(step, tag, picture=place)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._add(step, tag, value=float(value) if abs(value) < float("inf") else None)

    def add_histogram(self, tag: str, values: npt.NDArray[Any], step: int) -> None:
        """Write a histogram."""
        counts, edges = histogram_of(values)
        self._add(step, tag, counts=counts, edges=edges)

    def add_text(self, tag: str, words: str, step: int) -> None:
        """Write words."""
        self._add(step, tag, text=words)

    def _add(self, step: int, tag: str, **entry: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step, "tag": tag, **entry}) + "\n"
        # One write at the end of the file: two processes do not mix their lines.
        with (self._folder / "log.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode())
