"""Recorded calls to a safetensors file and back, without code and without reading what nobody asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from torchlens_viz.errors import ArchiveError, needed, reason_of
from torchlens_viz.files.paths import replacing
from torchlens_viz.stats.channels import ChannelStats

_FORMAT: Final = "torchlens_viz.activations/1"
_SCALARS: Final = (bool, int, float, str, type(None))


def write(
    path: str | os.PathLike[str],
    calls: Mapping[str, Sequence[Any]],
    *,
    selected: Sequence[str],
    kinds: Mapping[str, type],
) -> Path:
    """Write recorded calls.

    Args:
        path: The file; it appears whole or not at all.
        calls: What each layer put out, by name, call by call.
        selected: The names of all selected layers.
        kinds: Named tuples that may occur, by the name they have in the file.

    Raises:
        ArchiveError: A value is neither a tensor nor built of tuples, lists, dicts and plain scalars, or the
            file cannot be written.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = _safetensors()
    tensors: dict[str, torch.Tensor] = {}
    layout = {
        name: [_pack(value, f"{name}#{index}", tensors, kinds) for index, value in enumerate(values)]
        for name, values in calls.items()
    }
    about = {"format": _FORMAT, "selected": list(selected), "calls": layout}
    metadata = {"torchlens_viz": json.dumps(about)}
    with replacing(path, ArchiveError) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except (RuntimeError, safetensors.SafetensorError) as error:  # tensors that share memory, a full disk
            raise ArchiveError(f"cannot write {str(path)!r}: {reason_of(error)}") from error
    return Path(path)


def read(
    path: str | os.PathLike[str], *, kinds: Mapping[str, type]
) -> tuple[list[str], dict[str, list[Callable[[], Any]]]]:
    """Open a file that `write` wrote.

    Returns:
        The selected names, and for every call of every layer a function that reads it.

    Raises:
        ArchiveError: The file is missing, truncated, or holds something else.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = _safetensors()
    try:
        file = safetensors.safe_open(path, framework="pt")
        about = json.loads((file.metadata() or {}).get("torchlens_viz", "{}"))
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ArchiveError(
            f"cannot read {str(path)!r}: it is missing, truncated or no safetensors file "
            f"({reason_of(error)}); save the activations again"
        ) from error
    if about.get("format") != _FORMAT:
        raise ArchiveError(
            f"cannot read {str(path)!r}: it holds no activations in the format {_FORMAT!r}; read it with "
            "safetensors.torch.load_file"
        )

    def reader(packed: Any) -> Callable[[], Any]:
        return lambda: _unpack(packed, file.get_tensor, kinds)

    calls = {name: [reader(packed) for packed in values] for name, values in about["calls"].items()}
    return about["selected"], calls


def _pack(value: Any, key: str, tensors: dict[str, torch.Tensor], kinds: Mapping[str, type]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ArchiveError(
                f"`{key}` is a {value.layout} tensor of {value.dtype} on {value.device}, which safetensors "
                "cannot hold; capture with a `reduce=` that makes it a plain one"
            )
        tensors[key] = value.detach().contiguous()
        return {"tensor": key}
    if isinstance(value, _SCALARS):
        return {"value": value}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        parts = {name: _pack(part, f"{key}.{name}", tensors, kinds) for name, part in value.items()}
        return {"dict": parts}
    if isinstance(value, tuple | list):
        items = [_pack(part, f"{key}.{index}", tensors, kinds) for index, part in enumerate(value)]
        for name, kind in (*kinds.items(), ("tuple", tuple), ("list", list)):
            if type(value) is kind:
                return {name: items}
    if isinstance(value, ChannelStats):
        raise ArchiveError(
            f"`{key}` is statistics (`reduce=RunningStats`), which a file of activations does not hold; save "
            "what their `to_dict()` returns instead"
        )
    raise ArchiveError(
        f"`{key}` is a {type(value).__name__}, which a file cannot hold without code; select layers that put "
        "out tensors, tuples, lists or dicts"
    )


def _unpack(packed: Any, get: Callable[[str], torch.Tensor], kinds: Mapping[str, type]) -> Any:
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return get(content)
    if kind == "value":
        return content
    if kind == "dict":
        return {name: _unpack(part, get, kinds) for name, part in content.items()}
    items = [_unpack(part, get, kinds) for part in content]
    if kind in kinds:
        return kinds[kind](*items)
    return tuple(items) if kind == "tuple" else items


def _safetensors() -> Any:
    needed("safetensors.torch", "activations are saved with safetensors", "safetensors")
    return needed("safetensors", "activations are saved with safetensors", "safetensors")
