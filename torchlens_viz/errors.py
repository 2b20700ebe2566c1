"""Every exception the library raises; each is also a builtin kind, so either can be caught."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = (  # the rest is for the library itself
    "ArchiveError",
    "CaptureError",
    "CaptureMemoryError",
    "DistributedError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "LayerNotCapturedError",
    "LayerNotFoundError",
    "MissingDependencyError",
    "ModelFailedError",
    "ModelLoadError",
    "NoDataError",
    "PictureError",
    "SeveralCallsError",
    "TorchlensVizError",
)

_RAN_OUT: Final = ("out of memory", "can't allocate memory", "not enough memory")
_MOST_QUOTED: Final = 500  # characters of what somebody else's exception says


class TorchlensVizError(Exception):
    """Base of every error the library raises on purpose."""

    def __str__(self) -> str:
        # KeyError would show the repr of its message; a sentence should read as one.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class InvalidArgumentError(TorchlensVizError, ValueError):
    """An argument has the right type and a value that cannot be used."""


class ModelFailedError(InvalidArgumentError):
    """The model raised something when it was given what was made of an argument; `__cause__` is what."""


class InvalidTypeError(TorchlensVizError, TypeError):
    """An argument has a type that cannot be used."""


class LayerNotFoundError(TorchlensVizError, LookupError):
    """A selector matches no module of the model."""


class LayerNotCapturedError(TorchlensVizError, KeyError):
    """A layer was not selected, or was selected and did not run."""


class SeveralCallsError(TorchlensVizError, LookupError):
    """A layer ran more than once, so that `acts[name]` would be ambiguous."""


class CaptureError(TorchlensVizError, RuntimeError):
    """Capturing is not possible here, or its result could not be trusted."""


class CaptureMemoryError(TorchlensVizError, MemoryError):
    """Recording the next activation would pass the `max_bytes` of the capture."""


class DistributedError(TorchlensVizError, RuntimeError):
    """Another process of a run under torchrun failed."""


class NoDataError(TorchlensVizError, ValueError):
    """Something was asked of statistics that have seen no value yet."""


class PictureError(TorchlensVizError, OSError):
    """A picture cannot be read or written."""


class ModelLoadError(TorchlensVizError, ValueError):
    """A model or its weights cannot be loaded as asked."""


class MissingDependencyError(TorchlensVizError, ImportError):
    """An optional package is missing, or a required one cannot be imported."""


class ArchiveError(TorchlensVizError, OSError):
    """A file of activations cannot be written or read."""


def needed(package: str, what: str, extra: str | None = None, *, otherwise: str = "") -> Any:
    """Import a package that is not always there.

    Args:
        package: What to import, such as `"safetensors.torch"`.
        what: What needs it, as the beginning of a sentence about the package: `"to_frame needs pandas"`.
        extra: The extra of this package that brings it; None where none does.
        otherwise: What can be done instead, such as `"or pass a writer"`.

    Returns:
        The module.

    Raises:
        MissingDependencyError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails: {reason_of(error)}"
        wanted = f'"torchlens_viz[{extra}]"' if extra else package.partition(".")[0]
        more = f", {otherwise}" if otherwise else ""
        raise MissingDependencyError(
            f"{what}, which {why}; run `python -m pip install {wanted}`{more}"
        ) from error


def message_of(error: BaseException) -> str:
    """Return the message of an exception; an empty one where its class fails to make one."""
    try:
        return str.__str__(str(error))  # no text of a class of its own
    except KeyboardInterrupt:
        raise
    except BaseException:
        return ""


def kind_of(value: object) -> str:
    """Return the name of a value's class, as short and printable as a message shows it."""
    name: str = type.__dict__["__name__"].__get__(type(value))  # whatever its metaclass says
    return in_one_line(name, 80)


def in_one_line(text: str, most: int = _MOST_QUOTED) -> str:
    """Return text as a message shows it: in one line of at most `most` printable characters."""
    words = " ".join(text[: 16 * most].split())
    line = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in words
    )
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def reason_of(error: BaseException) -> str:
    """Say in one line what an exception reports."""
    try:
        told = str.__str__(str(getattr(error, "strerror", None) or ""))
    except Exception:
        told = ""
    return in_one_line(told or message_of(error)) or kind_of(error)


def one_line(error: BaseException) -> str:
    """Say in one line what an exception reports: its kind, and the first sentence or line of its message."""
    text = message_of(error)[: 16 * _MOST_QUOTED].strip()
    first = in_one_line(re.split(r"\n|(?<=\.)\s", text, maxsplit=1)[0]).rstrip(" .:")
    return f"{kind_of(error)}: {first}" if first else kind_of(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on whichever device."""
    if isinstance(error, MemoryError) or kind_of(error) == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in message_of(error) for words in _RAN_OUT)


@contextmanager
def calling(call: str, rule: str) -> Iterator[None]:
    """Say of whatever a function of the caller's raises within the block which argument it was given as.

    An error of ours passes as it is, and so does what ran out of memory.

    Args:
        call: How the function is called, by the name of the argument: `"input_of(batch)"`.
        rule: What it must do.

    Raises:
        InvalidArgumentError: It failed.
    """
    try:
        yield
    except TorchlensVizError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        name = call.partition("(")[0]
        raise InvalidArgumentError(
            f"`{name}` must {rule}, but it fails ({one_line(error)}); it is called as `{call}`"
        ) from error
