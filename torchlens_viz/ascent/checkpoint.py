"""Finished images of a long run on disk, so that a broken run goes on where it was."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final
from zipfile import BadZipFile

import numpy as np
import torch

from torchlens_viz.ascent.plan import Climb, Request
from torchlens_viz.errors import ArchiveError, reason_of
from torchlens_viz.files.paths import write_whole

_SETTINGS: Final = "settings.json"


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
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=1).encode(), ArchiveError)
            return
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ArchiveError(
                f"cannot read {str(path)!r}: {reason_of(error)}; choose another folder"
            ) from error
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise ArchiveError(
                    "`checkpoint` must be a folder that was begun with the same settings: in "
                    f"{str(folder)!r} `{name}` was {before.get(name)!r} and now is "
                    f"{settings.get(name)!r}; choose another folder"
                )

    def finished(self, requests: Sequence[Request]) -> list[Climb]:
        """Read those of the requested images that are finished; a damaged file counts as not finished."""
        found = (self._read(request) for request in requests)
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
        present: dict[str, Any] = {
            name: values.numpy() for name, values in arrays.items() if values is not None
        }
        buffer = io.BytesIO()
        np.savez(buffer, told=np.frombuffer(json.dumps(told).encode(), np.uint8), **present)
        write_whole(self._path(climb.request), buffer.getvalue(), ArchiveError)

    def _read(self, request: Request) -> Climb | None:
        try:
            data = io.BytesIO(self._path(request).read_bytes())  # numpy leaves a damaged file open
            with np.load(data, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            told = json.loads(arrays.pop("told").numpy().tobytes())
            return Climb(request=request, **{"frames": None, **arrays, **told})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error):
            return None

    def _path(self, request: Request) -> Path:
        return self._folder / f"{request.channel}-{request.copy}.npz"
