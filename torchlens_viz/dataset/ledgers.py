"""The tallies of a survey to a safetensors file and back, without code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from torchlens_viz.dataset.tally import Tally
from torchlens_viz.errors import ArchiveError, MissingDependencyError
from torchlens_viz.files.paths import reason_of, replacing

_FORMAT: Final = "torchlens_viz.survey/1"


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
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "surveys are saved with safetensors, which is not installed; run "
            '`python -m pip install "torchlens_viz[safetensors]"`'
        ) from error
    return safetensors
