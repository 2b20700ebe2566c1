"""Finished images of a long run on disk, so that a broken run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final, get_args

import torch

from torchlens_viz.ascent.plan import Climb, Request, Status, axes_letters
from torchlens_viz.errors import ArchiveError, reason_of
from torchlens_viz.files.paths import is_there, require_regular, write_whole
from torchlens_viz.files.tensors import (
    read_npz,
    require_same_settings,
    require_tensors,
    require_values,
    write_npz,
)

_SETTINGS: Final = "settings.json"
_SHAPES: Final = {
    "means": (torch.float32, "M"),
    "history": (torch.float32, "T"),
}


@final
class Resumption:
    """A folder with one file per finished image.

    Args:
        folder: The folder; it is made where it is missing.
        settings: All that the images depend on; a folder that was begun with others is refused.

    Raises:
        ArchiveError: The folder was begun with other settings, or cannot be used.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        path = folder / _SETTINGS
        if not is_there(path, ArchiveError):
            write_whole(path, json.dumps(settings, indent=1).encode(), ArchiveError)
            return
        require_regular(path, ArchiveError)
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArchiveError(
                f"cannot read {str(path)!r}: {reason_of(error)}; choose another folder"
            ) from error
        require_same_settings(before, settings, folder)

    def finished(self, requests: Sequence[Request], shape: Sequence[int], **sizes: int) -> list[Climb]:
        """Read those of the requested images that are finished; a damaged file counts as not finished.

        Args:
            requests: The images.
            shape: (C, H, W), or of a signal (C, L) or a volume (C, D, H, W).
            sizes: What their other tensors must be: M channels of the layer, T steps; what is left out may be
                anything.
        """
        letters = "C" + axes_letters(len(shape) - 1)
        known = {**dict(zip(letters, shape, strict=True)), **sizes}
        found = (self._read(request, letters, known) for request in requests)
        return [climb for climb in found if climb is not None]

    def keep(self, climb: Climb) -> None:
        """Write a finished image."""
        told = {"score": climb.score, "status": climb.status, "evidence": climb.evidence}
        arrays = {
            "image": climb.image,
            "means": climb.means,
            "history": climb.history,
            "frames": climb.frames,
        }
        present = {name: values for name, values in arrays.items() if values is not None}
        write_npz(self._path(climb.request), present, told)

    def _read(self, request: Request, letters: str, sizes: Mapping[str, int]) -> Climb | None:
        try:
            tensors, told = read_npz(self._path(request), remedy="delete it")
            known = require_tensors(tensors, {"image": (torch.float32, letters), **_SHAPES}, sizes)
            if "frames" in tensors:
                require_tensors(tensors, {"frames": (torch.uint8, f"F{letters}")}, known)
            require_values(told, {"score": float, "status": str, "evidence": str})
            if told["status"] not in get_args(Status) or not bool(tensors["image"].isfinite().all()):
                return None
            return Climb(request=request, **{"frames": None, **tensors, **told})
        except (ArchiveError, TypeError, ValueError):
            return None

    def _path(self, request: Request) -> Path:
        return self._folder / f"{request.channel}-{request.copy}.npz"
