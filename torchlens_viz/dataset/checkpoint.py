"""How far a survey has come, in a file that a broken run goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch

from torchlens_viz.arguments import integer
from torchlens_viz.dataset.loader import Batch
from torchlens_viz.dataset.tally import Tally
from torchlens_viz.errors import ArchiveError, one_line
from torchlens_viz.files.paths import is_there, require_writable
from torchlens_viz.files.tensors import (
    SafetensorsFile,
    checksum,
    require_safetensors,
    require_same_settings,
    require_values,
    write_safetensors,
)
from torchlens_viz.nested import tensors

_FORMAT: Final = "torchlens_viz.survey/1"
_WHAT: Final = "surveys"
_ABOUT: Final[dict[str, type | tuple[type, ...]]] = {
    "samples_seen": int,
    "top_k": int,
    "is_complete": bool,
    "input_shape": (list, type(None)),
}
_PROGRESS: Final[dict[str, type | tuple[type, ...]]] = {
    "batches": int,
    "inputs": int,
    "shape": (list, type(None)),
    "first_batch": int,
    "is_complete": bool,
}


class Progress(NamedTuple):
    """What was found in whole batches, from the first on.

    Attributes:
        tallies: What is known of each layer.
        batches: How many batches there were.
        inputs: How many inputs counted.
        shape: The shape of an input; None where they differ, or there was none.
        first_batch: A number that tells the first batch from others, where a file is kept.
        is_complete: Whether there is nothing more to come.
    """

    tallies: dict[str, Tally]
    batches: int = 0
    inputs: int = 0
    shape: tuple[int, ...] | None = None
    first_batch: int = 0
    is_complete: bool = False


@final
class Logbook:
    """A file with the progress of a survey.

    Args:
        path: The file.
        settings: All that the survey depends on.
        seconds: How often to write it.

    Raises:
        MissingDependencyError: safetensors is not installed.
        ArchiveError: Nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any], *, seconds: float) -> None:
        require_safetensors(_WHAT)
        self._path = Path(path)
        require_writable(self._path, "checkpoint", "file", ArchiveError)
        self._settings = json.loads(json.dumps(settings))
        self._seconds = seconds
        self._written = time.monotonic()

    def read(self) -> Progress | None:
        """Return what an earlier run has found; None where there was none.

        Raises:
            ArchiveError: It was begun with other settings or weights, or the file is damaged.
        """
        if not is_there(self._path, ArchiveError):
            return None
        tallies, about = read_ledger(self._path)
        if "settings" not in about:
            raise ArchiveError(
                f"`checkpoint` must name a new file or one that `survey` began, got {str(self._path)!r}, "
                "which holds a finished survey; choose another name"
            )
        require_same_settings(about["settings"], self._settings, self._path)
        try:
            told = require_values(about.get("progress"), _PROGRESS)
            if list(tallies) != about["settings"]["layers"]:
                raise ValueError("its layers are not those of its settings")
            return Progress(tallies, **{**told, "shape": shape_of(told["shape"])})
        except (TypeError, ValueError) as error:
            raise _damaged(self._path, error) from error

    def require_same_data(self, before: Progress, first_batch: int) -> None:
        """Refuse to go on with another first batch.

        Raises:
            ArchiveError: It is another one.
        """
        if before.first_batch != first_batch:
            raise ArchiveError(
                f"`checkpoint` must have been begun with the same data, but the first batch is not the "
                f"one of {str(self._path)!r}; make the loader repeat itself, or delete the file to start anew"
            )

    def require_same_count(self, before: Progress, inputs: int) -> None:
        """Refuse to go on where the batches passed over have other inputs.

        Raises:
            ArchiveError: They have.
        """
        if before.inputs != inputs:
            raise ArchiveError(
                f"`checkpoint` must have been begun with the same batches: the first {before.batches} had "
                f"{before.inputs} inputs and now have {inputs}; delete {str(self._path)!r} to start anew"
            )

    def write_in_time(self, progress: Progress) -> None:
        """Write the progress where the last time is long enough ago."""
        if time.monotonic() - self._written >= self._seconds:
            self.write(progress)

    def write(self, progress: Progress) -> None:
        """Write the progress.

        Raises:
            ArchiveError: The file cannot be written.
        """
        told = progress._asdict()
        tallies = told.pop("tallies")
        write_ledger(self._path, tallies, {"settings": self._settings, "progress": told})
        self._written = time.monotonic()


def fingerprint(batch: Batch) -> int:
    """Return a number that differs where inputs or their indices differ."""
    dense = [each for each in tensors((batch.args, batch.kwargs)) if each.layout is torch.strided]
    return checksum(*dense, batch.samples)


def shape_of(told: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the shape of an input that a file tells.

    Raises:
        ValueError: It is no shape.
    """
    return None if told is None else tuple(integer(size, "shape", least=0, most=2**31) for size in told)


def read_survey(path: str | os.PathLike[str]) -> Ledger:
    """Read a finished survey.

    Raises:
        ArchiveError: The file is missing, damaged, a checkpoint, or holds something else.
        MissingDependencyError: safetensors is not installed.
    """
    tallies, about = read_ledger(path)
    if "progress" in about:
        raise ArchiveError(
            f"cannot read {os.fspath(path)!r}: it is the checkpoint of a survey; pass it to `survey` as "
            "`checkpoint`, with the same arguments, and save what that returns"
        )
    try:
        told = require_values(about, _ABOUT)
        kept = {None if tally.top is None else tally.top.k for tally in tallies.values()}
        if told["top_k"] < 0 or not kept <= {told["top_k"] or None}:
            raise ValueError("`top_k` is not that of its layers")
        return Ledger(tallies, {**told, "input_shape": shape_of(told["input_shape"])})
    except (TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> ArchiveError:
    reason = one_line(error)
    return ArchiveError(f"cannot read {str(path)!r}: its header is damaged ({reason}); make the survey again")


class Ledger(NamedTuple):
    """What a file holds.

    Attributes:
        tallies: What is known of each layer, by name.
        about: Everything else, as JSON gives it back.
    """

    tallies: dict[str, Tally]
    about: dict[str, Any]


def write_ledger(
    path: str | os.PathLike[str], tallies: Mapping[str, Tally], about: Mapping[str, Any]
) -> Path:
    """Write tallies to a file that appears whole or not at all.

    Args:
        path: The file.
        tallies: What is known of each layer.
        about: What else is to be kept, in terms of JSON.

    Raises:
        ArchiveError: The file cannot be written.
        MissingDependencyError: safetensors is not installed.
    """
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for number, (name, tally) in enumerate(tallies.items()):
        layers[name] = {}
        for key, value in tally.to_dict().items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value
            else:
                layers[name][key] = value
    header = {"format": _FORMAT, "layers": layers, "about": dict(about)}
    return write_safetensors(path, tensors, header, what=_WHAT)


def read_ledger(path: str | os.PathLike[str]) -> Ledger:
    """Read what `write_ledger` wrote.

    Raises:
        ArchiveError: The file is missing, damaged, or holds something else.
        MissingDependencyError: safetensors is not installed.
    """
    file = SafetensorsFile(path, format=_FORMAT, what=_WHAT)
    try:
        layers: dict[str, dict[str, Any]] = file.header["layers"]
        kept = list(layers.values())
        for key in file.names:
            number, _, field = key.partition(".")
            kept[int(number)][field] = file.tensor(key)
        tallies = {name: Tally.from_dict(state) for name, state in layers.items()}
        about = file.header["about"]
        if not isinstance(about, dict):
            raise ValueError("nothing is told about it")
        return Ledger(tallies, about)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error
