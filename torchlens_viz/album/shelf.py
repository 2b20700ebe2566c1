"""`Shelf`: where the pictures of a page are kept, in it or beside it, and under which address."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Final, final
from urllib.parse import quote

from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.paths import safe_name

_KINDS: Final = {b"\x89P": "png", b"RI": "webp", b"\xff\xd8": "jpeg"}


@final
class Shelf:
    """Takes the encoded pictures of a page and says under which address it finds them.

    Attributes:
        files: What is to be written beside the page.

    Args:
        page: The page.
        folder: Where the pictures go; None keeps them in the page, as data URIs.

    Raises:
        InvalidArgumentError: No relative path leads from the page to the folder.
    """

    def __init__(self, page: Path, folder: Path | None) -> None:
        self.files: dict[Path, bytes] = {}
        self._folder = folder
        if folder is not None:
            try:
                way = os.path.relpath(folder, page.parent)
            except ValueError as error:  # another drive of Windows
                raise InvalidArgumentError(
                    f"`assets` must be on the drive of the page, got {str(folder)!r}; choose one beside it"
                ) from error
            self._way = quote(os.fsencode(way.replace(os.sep, "/")))

    @property
    def sources(self) -> str:
        """What the policy of the page must let in; not every browser counts files as `self`."""
        return "data:" if self._folder is None else "'self' file:"

    def address(self, picture: bytes, name: str) -> str:
        """Keep a picture, and return its address: of letters, digits and `%/:;,+=._-~` alone.

        Args:
            picture: PNG, WebP or JPEG.
            name: What its file is called after, whatever is in it. A checksum of the picture follows, so that
                a page that is there already keeps its own pictures until it is replaced.
        """
        kind = _KINDS[picture[:2]]
        if self._folder is None:
            return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        file = f"{safe_name(name)}-{hashlib.sha256(picture).hexdigest()[:16]}.{kind}"
        self.files[self._folder / file] = picture
        return f"{self._way}/{file}"
