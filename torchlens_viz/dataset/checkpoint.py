"""How far a survey has come, in a file that a broken run goes on from."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch

from torchlens_viz.dataset.loader import Batch
from torchlens_viz.dataset.tally import Tally
from torchlens_viz.errors import ArchiveError, needed, reason_of
from torchlens_viz.files.paths import replacing
from torchlens_viz.files.tensors import checksum
from torchlens_viz.nested import tensors

_FORMAT: Final = "torchlens_viz.survey/1"


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
        require_safetensors()
        self._path = Path(path)
        _require_writable(self._path)  # now, and not when there is something to lose
        self._settings = json.loads(json.dumps(settings))
        self._seconds = seconds
        self._written = time.monotonic()

    def read(self) -> Progress | None:
        """Return what an earlier run has found; None where there was none.

        Raises:
            ArchiveError: It was begun with other settings or weights, or the file is damaged.
        """
        if not self._path.exists():
            return None
        tallies, about = read_ledger(self._path)
        if "settings" not in about:
            raise ArchiveError(
                f"`checkpoint` must name a new file or one that `survey` began, got {str(self._path)!r}, "
                "which holds a finished survey; choose another name"
            )
        before = about["settings"]
        for name in {**before, **self._settings}:
            if before.get(name) != self._settings.get(name):
                raise ArchiveError(
                    f"`checkpoint` must have been begun with the same settings: in {str(self._path)!r} "
                    f"`{name}` was {before.get(name)!r} and now is {self._settings.get(name)!r}; delete the "
                    "file to start anew, or choose another"
                )
        told = about["progress"]
        shape = None if told["shape"] is None else tuple(told["shape"])
        return Progress(tallies, **{**told, "shape": shape})

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


def _require_writable(path: Path) -> None:
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ArchiveError(
            f"`checkpoint` must name a file that can be written, got {str(path)!r}: {error.strerror}"
        ) from error


def fingerprint(batch: Batch) -> int:
    """Return a number that differs where inputs or their indices differ."""
    dense = [each for each in tensors((batch.args, batch.kwargs)) if each.layout is torch.strided]
    return checksum(*dense, batch.samples)


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
    safetensors = _safetensors()
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for number, (name, tally) in enumerate(tallies.items()):
        layers[name] = {}
        for key, value in tally.to_dict().items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value.contiguous().clone()  # no two may share memory
            else:
                layers[name][key] = value
    metadata = {"torchlens_viz": json.dumps({"format": _FORMAT, "layers": layers, "about": dict(about)})}
    with replacing(path, ArchiveError) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except (RuntimeError, safetensors.SafetensorError) as error:  # a full disk
            raise ArchiveError(f"cannot write {str(path)!r}: {reason_of(error)}") from error
    return Path(path)


def read_ledger(path: str | os.PathLike[str]) -> Ledger:
    """Read what `write_ledger` wrote.

    Raises:
        ArchiveError: The file is missing, damaged, or holds something else.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("torchlens_viz", "{}"))
            if told.get("format") != _FORMAT:
                raise ArchiveError(f"cannot read {str(path)!r}: it holds no survey in the format {_FORMAT!r}")
            layers: dict[str, dict[str, Any]] = told["layers"]
            kept = list(layers.values())
            for key in file.keys():  # noqa: SIM118 - it is no dict
                number, _, field = key.partition(".")
                kept[int(number)][field] = file.get_tensor(key)
        tallies = {name: Tally.from_dict(state) for name, state in layers.items()}
        return Ledger(tallies, told["about"])
    except ArchiveError:
        raise
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ArchiveError(
            f"cannot read {str(path)!r}: it is missing, truncated or no survey ({reason_of(error)}); make "
            "the survey again"
        ) from error


def require_safetensors() -> None:
    """Raise `MissingDependencyError` where no file could be written, before there is work to lose."""
    _safetensors()


def _safetensors() -> Any:
    needed("safetensors.torch", "surveys are saved with safetensors", "safetensors")
    return needed("safetensors", "surveys are saved with safetensors", "safetensors")
