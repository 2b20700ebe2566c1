"""Files that appear whole or not at all, and file names from hostile layer names."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from torchlens_viz.errors import InvalidTypeError, TorchlensVizError, reason_of

_MAX_NAME = 120
_TEMPORARY = ".torchlens-viz-"
_swept: set[tuple[int, Path]] = set()
_RESERVED_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)


def as_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Return what names a file or a folder as a path.

    Args:
        path: What the caller gave.
        name: What the option is called.

    Raises:
        InvalidTypeError: It is neither a string nor a path.
    """
    try:
        found = os.fspath(path)
    except Exception:  # one of the caller's own kind may raise anything
        raise InvalidTypeError(f"`{name}` must be a string or a path, got a {type(path).__name__}") from None
    if not isinstance(found, str):
        raise InvalidTypeError(f"`{name}` must be a string or a path of text, got bytes; use `os.fsdecode`")
    return Path(found)


def is_there(path: Path, error: type[TorchlensVizError]) -> bool:
    """Tell whether there is anything of that name.

    Raises:
        TorchlensVizError: Nothing can have that name: it is too long, or holds a character that none has.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as reason:
        raise error(f"cannot read {str(path)!r}: {reason_of(reason)}; choose another name") from reason
    return True


def require_writable(
    path: Path, name: str, kind: Literal["file", "folder"], error: type[TorchlensVizError]
) -> None:
    """Refuse a place where nothing can be written: at once, and not when there is something to lose.

    Args:
        path: What is to be written later. Nothing is left there.
        name: What the option is called.
        kind: What it will be.
        error: What to raise.
    """
    try:
        if kind == "file":
            target = Path(os.path.realpath(path))
            _mode_to_keep(target, path, error, name)
            place = target.parent
        elif is_there(path, error) and not path.is_dir():
            raise error(f"`{name}` must name a folder, got the file {str(path)!r}; choose another name")
        else:
            place = path.absolute()
        there = next(each for each in (place, *place.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except TorchlensVizError:
        raise
    except (OSError, ValueError) as reason:
        raise error(
            f"`{name}` must name a {kind} that can be written, got {str(path)!r}: {reason_of(reason)}; "
            "choose a path in a folder you can write to"
        ) from reason


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], error: type[TorchlensVizError]) -> Iterator[Path]:
    """Give a temporary file to write to, which takes the place of `path` where the block succeeds.

    Missing folders are made, and removed again if the block fails. Where `path` is a symbolic link, the file
    it points to is replaced and the link stays, as with `open`. A new file gets the permissions that `open`
    would give it; an existing one keeps its own.

    Args:
        path: The file to write or replace.
        error: What to raise where the file cannot be written.
    """
    given = as_path(path)
    try:
        target = Path(os.path.realpath(given))
        mode = _mode_to_keep(target, given, error)
        with _folders(target.parent), _renamed(target, mode) as temporary:
            yield temporary
    except TorchlensVizError:
        raise
    except (OSError, ValueError) as reason:
        raise error(
            f"cannot write {str(given)!r}: {reason_of(reason)}; choose a path in a folder you can write to"
        ) from reason


def write_whole(path: str | os.PathLike[str], data: bytes, error: type[TorchlensVizError]) -> None:
    """Write a file that appears whole or not at all; see `replacing`."""
    with replacing(path, error) as temporary:
        temporary.write_bytes(data)


def write_together(files: Mapping[Path, bytes], error: type[TorchlensVizError]) -> None:
    """Write files one after the other, each whole; where one fails, remove those that were not there before.

    Args:
        files: What to write. A file that replaces another one should come last: it stays replaced.
        error: What to raise where one cannot be written.
    """
    new: list[Path] = []
    try:
        with contextlib.ExitStack() as folders:
            for folder in dict.fromkeys(path.parent for path in files):
                folders.enter_context(_folders(folder))
            try:
                for path, data in files.items():
                    is_new = not is_there(path, error)
                    write_whole(path, data, error)
                    new += [path] if is_new else []
            except BaseException:
                for path in new:
                    path.unlink(missing_ok=True)
                raise
    except (OSError, ValueError) as reason:
        named = getattr(reason, "filename", None) or next(iter(files))
        raise error(
            f"cannot write {str(named)!r}: {reason_of(reason)}; choose a path in a folder you can write to"
        ) from reason


def require_regular(
    path: str | os.PathLike[str], error: type[TorchlensVizError], *, remedy: str = "check the path"
) -> None:
    """Refuse to read what is no file: a pipe would wait for ever, and a device never ends.

    Args:
        path: What is to be read.
        error: What to raise where it is missing, a folder, a pipe or a device.
        remedy: What to do then, as the end of a sentence.
    """
    named = as_path(path)
    try:
        mode = named.stat().st_mode
    except (OSError, ValueError) as reason:
        raise error(f"cannot read {str(path)!r}: {reason_of(reason)}; {remedy}") from reason
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise error(f"cannot read {str(path)!r}: it is {kind} and no file; {remedy}")


def _mode_to_keep(
    target: Path, given: Path, error: type[TorchlensVizError], name: str = "path"
) -> int | None:
    """Return the permissions of the file to replace, or None where there is none yet."""
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(mode):
        raise error(f"`{name}` must name a file, got the folder {str(given)!r}; append a file name")
    # Replacing a device or pipe would delete it, and a read-only file is meant to stay.
    if not stat.S_ISREG(mode) or not os.access(target, os.W_OK):
        kind = "is read-only" if stat.S_ISREG(mode) else "is no regular file"
        raise error(
            f"`{name}` must name a file that can be replaced, got {str(given)!r}, which {kind}; "
            "choose another name"
        )
    return stat.S_IMODE(mode)


@contextlib.contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; where the block fails, remove those it made, if they are empty."""
    if folder.is_dir():
        yield
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


@contextlib.contextmanager
def _renamed(target: Path, mode: int | None) -> Iterator[Path]:
    _sweep(target.parent)
    # Not made by tempfile, whose files are private to the user whatever the umask says.
    temporary = target.parent / f"{_TEMPORARY}{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            usual = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        temporary.chmod(usual if mode is None else mode)  # a library may have put a private file in its place
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what processes of this machine that were killed have left in a folder; once per process."""
    if os.name != "posix" or (os.getpid(), folder) in _swept:
        return
    _swept.add((os.getpid(), folder))
    mine = f"{_TEMPORARY}{_host()}-"
    try:
        left = [entry.name for entry in os.scandir(folder) if entry.name.startswith(mine)]
    except OSError:
        return
    for name in left:
        process = name.removeprefix(mine).partition("-")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


@functools.cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


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
