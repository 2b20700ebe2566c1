"""The pictures in a folder and all below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from PIL import Image

from torchlens_viz.errors import PictureError

_NO_PICTURES: Final = {"BUFR", "GRIB", "HDF5", "MPEG"}  # what Pillow knows by name and cannot read by itself


def pictures_in(folder: Path, *, but_not_in: Path) -> list[Path]:
    """List the files with the ending of a picture in a folder and all below it, in the order of their paths.

    Links to folders are followed, each folder once.

    Args:
        folder: The folder.
        but_not_in: A folder whose pictures do not count.

    Raises:
        PictureError: There is no such folder, one cannot be read, or no picture is in it.
    """
    if not folder.is_dir():
        raise PictureError(
            f"IMAGE_FOLDER must name a folder of pictures, got {str(folder)!r}; check the spelling"
        )
    endings = {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PICTURES
    }
    found = sorted(
        (
            path
            for path in _files_below(folder, but_not_in.resolve())
            if path.suffix.lower() in endings and not path.name.startswith("._") and path.is_file()
        ),
        key=lambda path: path.relative_to(folder).parts,
    )
    if not found:
        raise PictureError(
            f"IMAGE_FOLDER must hold pictures, but there is none in {str(folder)!r} or below it; name "
            "another folder"
        )
    return found


def _files_below(folder: Path, but_not_in: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise PictureError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error

    visited = {but_not_in}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(place).resolve()
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield from (Path(place) / name for name in names)
