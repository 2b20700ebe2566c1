"""Where a monitor writes: a writer of the caller's, a run of a tracker, or TensorBoard in a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from torchlens_viz.errors import InvalidTypeError, needed
from torchlens_viz.files import png
from torchlens_viz.files.pictures import as_chw
from torchlens_viz.trackers.folder import FolderWriter
from torchlens_viz.trackers.recognise import adapted

_METHODS: Final = ("add_image", "add_scalar", "add_histogram")
_PAUSE: Final = 60  # seconds after which to try again where no file could be made
_WIDEST: Final = 9e19  # the buckets that torch's writer has by itself end between that and 1e20
_BUCKETS: Final = 60  # TensorBoard shows 30; by default there would be hundreds


@final
class Board:
    """Pictures, numbers and histograms under a tag and a step.

    Args:
        writer: Anything with `add_image`, `add_scalar` and `add_histogram`, such as torch's or tensorboardX's
            `SummaryWriter`; a run of another tracker, see `torchlens_viz.trackers.recognise`; or a folder, in
            which a `SummaryWriter` writes from the first entry on.

    Raises:
        InvalidTypeError: It is none of these.
        MissingDependencyError: It is a folder, and TensorBoard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        self._folder: Path | None = None
        self._writer: Any = None
        self._next_try = 0.0
        if isinstance(writer, str | os.PathLike) and not isinstance(writer, FolderWriter):
            self._folder = Path(writer)
            _summary_writer()  # what is missing should be said now, not after the first hour of a training
            return
        writer = adapted(writer)
        missing = [name for name in _METHODS if not callable(getattr(writer, name, None))]
        if missing:
            raise InvalidTypeError(
                f"`writer` must be a folder, a run of wandb, mlflow, trackio or aim, or have "
                f"{', '.join(_METHODS)}, got {type(writer).__name__} without {', '.join(missing)}; pass a "
                "torch.utils.tensorboard.SummaryWriter"
            )
        self._writer = writer

    def picture(self, tag: str, image: Image.Image, step: int) -> None:
        """Write a picture, pixel by pixel as it is.

        Writers are given pixels, to encode as RGB with great care. Torch's takes encoded ones as well: with
        palettes kept and little care, that is a third of the time and half the bytes.
        """
        writer = self._opened()
        if _is_torchs(writer):
            writer._get_file_writer().add_summary(_encoded(tag, image), step)
        else:
            writer.add_image(tag, as_chw(image), step)

    def number(self, tag: str, value: float, step: int) -> None:
        """Write a number."""
        self._opened().add_scalar(tag, value, step)

    def values(self, tag: str, values: torch.Tensor, step: int) -> None:
        """Write a histogram of values, finite and at least one; those beyond 9e19 count as 9e19."""
        bounded = values.cpu().double().clamp(-_WIDEST, _WIDEST).numpy()
        writer = self._opened()
        if _is_torchs(writer) and _can_be_parted(bounded):
            writer.add_histogram(tag, bounded, step, bins=_BUCKETS)
        else:
            writer.add_histogram(tag, bounded, step)

    def text(self, tag: str, words: str, step: int) -> None:
        """Write words in Markdown, to a writer that takes any."""
        add = getattr(self._opened(), "add_text", None)
        if callable(add):
            add(tag, words, step)

    def charts(self, series: Mapping[str, str]) -> None:
        """Have numbers of several tags drawn in one chart each, by a writer that can.

        Args:
            series: By the title of each chart, a regular expression for its tags.
        """
        add = getattr(self._opened(), "add_custom_scalars", None)
        if callable(add):
            add({"layers side by side": {title: ["Multiline", [tags]] for title, tags in series.items()}})

    def close(self) -> None:
        """See that everything is on disk. A writer that was made here is closed, until the next entry."""
        if self._writer is None:
            return
        flush = getattr(self._writer, "flush", None)
        if callable(flush):
            flush()
        if self._folder is not None:
            self._writer.close()
            self._writer = None

    def _opened(self) -> Any:
        # Not before there is something to write: of several processes, all but one write nothing, and an
        # empty file of events would stand in the folder for each of them.
        if self._writer is None:
            if monotonic() < self._next_try:
                raise OSError(f"no file of events could be made in {str(self._folder)!r}")
            try:
                self._writer = _summary_writer()(str(self._folder))
            except OSError:  # a full disk, on which each attempt leaves an empty file and a thread that fails
                self._next_try = monotonic() + _PAUSE
                raise
        return self._writer


def _is_torchs(writer: Any) -> bool:
    """Tell whether a writer is torch's, and writes pictures as that does."""
    module = sys.modules.get("torch.utils.tensorboard")
    torchs = getattr(module, "SummaryWriter", None)
    return torchs is not None and getattr(type(writer), "add_image", None) is torchs.add_image


def _can_be_parted(values: npt.NDArray[np.float64]) -> bool:
    """Tell whether there are enough numbers between the lowest and the highest value for all buckets."""
    low, high = values.min(), values.max()
    width = high - low if low < high else 1.0  # what numpy parts around a constant
    return bool(width / _BUCKETS > np.spacing(max(abs(low), abs(high))))


def _encoded(tag: str, image: Image.Image) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = image if png.can_encode(image) else image.convert("RGB")
    picture = Summary.Image(
        width=image.width,
        height=image.height,
        colorspace=1 if image.mode == "L" else 3,
        encoded_image_string=png.encode(image),
    )
    return Summary(value=[Summary.Value(tag=tag, image=picture)])


def _summary_writer() -> Any:
    what = "`writer` is a folder, where TensorBoard would write"
    return needed("torch.utils.tensorboard", what, "tensorboard", otherwise="or pass a writer").SummaryWriter
