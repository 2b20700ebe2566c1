"""File names from layer names, whatever these hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

_MAX_NAME = 120
_RESERVED_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)


def safe_name(name: str) -> str:
    """Turn any name into one that is a plain file name on every system.

    Args:
        name: For example the dotted name of a layer; hostile ones ("../x", "a/b", "NUL") are meant.

    Returns:
        The name with everything but ASCII letters, digits, "_", "-" and "." replaced by "_": never empty,
        hidden or reserved, and at most 120 characters long (a longer one is cut and ends in a hash of the
        whole).
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    cleaned = re.sub(r"^\.+|\.+$", lambda dots: "_" * len(dots[0]), cleaned) or "_"
    if _RESERVED_ON_WINDOWS.match(cleaned):
        cleaned = f"_{cleaned}"
    if len(cleaned) > _MAX_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        cleaned = f"{cleaned[: _MAX_NAME - 17]}-{digest}"
    return cleaned


def safe_names(names: Sequence[str]) -> list[str]:
    """Turn names into file names that differ from one another, also where letter case does not count.

    Args:
        names: The names, in any order; repeated ones are allowed.

    Returns:
        One file name per name, in order. A name that is safe already keeps its form; where others would
        collide they end in "-2", "-3" and so on.
    """
    cleaned = [safe_name(name) for name in names]
    # Names that need no change choose first, so that "a/b" never takes the place of a real "a_b".
    order = sorted(range(len(names)), key=lambda index: cleaned[index] != names[index])
    wanted = {name.lower() for name in cleaned}
    taken: set[str] = set()
    for index in order:
        stem, candidate, number = cleaned[index], cleaned[index], 1
        while candidate.lower() in taken or (number > 1 and candidate.lower() in wanted):
            number += 1
            candidate = f"{stem}-{number}"
        taken.add(candidate.lower())
        cleaned[index] = candidate
    return cleaned
