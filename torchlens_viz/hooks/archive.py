"""Recorded calls to a safetensors file and back, without code and without reading what nobody asks for."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from torchlens_viz.arguments import has_values
from torchlens_viz.errors import ArchiveError, reason_of
from torchlens_viz.files.tensors import SafetensorsFile, write_safetensors
from torchlens_viz.hooks.layout import mark, marked_dim
from torchlens_viz.stats.channels import ChannelStats

_FORMAT: Final = "torchlens_viz.activations/1"
_WHAT: Final = "activations"
_SCALARS: Final = (bool, int, float, str, type(None))
_NUMBERS: Final = frozenset(
    ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
     *(f"float{bits}" for bits in (16, 32, 64)))
)  # fmt: skip
_IN_PAIRS: Final = (torch.complex32, torch.complex128)  # which safetensors has as real parts alone
_SEQUENCES: Final[Mapping[str, Callable[[Any], Any]]] = {"tuple": tuple, "list": list, "size": torch.Size}


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
        kinds: Named tuples that may occur, by the name they have in the file. Others come back as a named
            tuple with the same fields, mappings as dicts, and subclasses of tuple and list as those.

    Raises:
        ArchiveError: A value is neither a tensor nor built of tuples, lists, mappings and plain scalars, or
            the file cannot be written.
        MissingDependencyError: safetensors is not installed.
    """
    packing = _Packing(kinds)
    layout = {
        name: [packing.pack_call(value, f"{name}#{index}") for index, value in enumerate(values)]
        for name, values in calls.items()
    }
    dims = {name: dim for name, each in packing.tensors.items() if (dim := marked_dim(each)) is not None}
    header = {"format": _FORMAT, "selected": list(selected), "calls": layout, "channel_dims": dims}
    return write_safetensors(path, packing.tensors, header, what=_WHAT)


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
    file = SafetensorsFile(path, format=_FORMAT, what=_WHAT)

    def reader(packed: Any) -> Callable[[], Any]:
        _unpack(packed, _placeholder(file), kinds)  # the layout is sound; now, and not when it is asked for
        return lambda: _unpack(packed, _once(tensor), kinds)

    def tensor(name: str, form: str) -> torch.Tensor:
        found = file.tensor(name)
        if form == "complex":
            found = _as_complex(found, name)
        if 0 <= dims.get(name, -1) < found.ndim:
            mark(found, dims[name])
        return found

    try:
        dims = dict(file.header.get("channel_dims", {}))
        selected, layout = file.header["selected"], file.header["calls"]
        calls = {name: [reader(packed) for packed in values] for name, values in layout.items()}
        if not all(isinstance(name, str) for name in selected) or not set(calls) <= set(selected):
            raise ValueError("its layers are not those that were selected")
        if not all(type(dim) is int for dim in dims.values()):
            raise ValueError("a dimension is none")
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ArchiveError(
            f"cannot read {str(path)!r}: its header is damaged; save the activations again"
        ) from error
    return list(selected), calls


class _Packing:
    """Values as JSON, and the tensors in them on the side; one that occurs twice is held once."""

    def __init__(self, kinds: Mapping[str, type]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._kinds = kinds
        self._names: dict[int, str] = {}  # by id of a tensor, which the caller keeps alive

    def pack_call(self, value: Any, key: str) -> Any:
        """Pack what a layer put out in one call."""
        try:
            return self.pack(value, key)
        except RecursionError:
            raise ArchiveError(
                f"`{key}` contains itself, or is nested too deeply for a file; select layers that put out "
                "tensors, tuples, lists or mappings"
            ) from None

    def pack(self, value: Any, key: str) -> Any:
        """Pack a value, or a part of one."""
        if isinstance(value, torch.Tensor):
            form = "complex" if value.dtype in _IN_PAIRS else "tensor"
            return {form: self._names.get(id(value)) or self._hold(value, key)}
        if isinstance(value, np.generic) and value.dtype.name in _NUMBERS:
            return {"numpy": [value.dtype.name, value.item()]}
        if isinstance(value, _SCALARS):
            return {"value": value}
        _refuse_state(value, key)
        if isinstance(value, Mapping):
            return self._pack_mapping(value, key)
        if isinstance(value, tuple | list):
            items = [self.pack(part, f"{key}.{index}") for index, part in enumerate(value)]
            for name, kind in (*self._kinds.items(), ("size", torch.Size)):
                if type(value) is kind:
                    return {name: items}
            if fields := _fields_of(value):
                return {"named": {"name": type(value).__name__, "fields": list(fields), "items": items}}
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if isinstance(value, ChannelStats):
            raise ArchiveError(
                f"`{key}` is statistics (`reduce=RunningStats`), which a file of activations does not hold; "
                "save what their `to_dict()` returns instead"
            )
        raise ArchiveError(
            f"`{key}` is a {type(value).__name__}, which a file cannot hold without code; select layers that "
            "put out tensors, tuples, lists or mappings"
        )

    def _hold(self, tensor: torch.Tensor, key: str) -> str:
        if not _is_plain(tensor):
            form = "nested" if tensor.is_nested else str(tensor.layout)
            raise ArchiveError(
                f"`{key}` is a {form} {type(tensor).__name__} of {tensor.dtype} on {tensor.device}, which "
                "safetensors cannot hold; capture with a `reduce=` that makes it a plain one"
            )
        key = key.encode("utf-8", "backslashreplace").decode("utf-8")  # a file has no lone surrogates
        name, number = key, 1
        while name in self.tensors:  # the key "a.b" beside "b" within "a"
            number += 1
            name = f"{key}~{number}"
        self.tensors[name] = torch.view_as_real(tensor) if tensor.dtype in _IN_PAIRS else tensor
        self._names[id(tensor)] = name
        return name

    def _pack_mapping(self, value: Mapping[Any, Any], key: str) -> Any:
        parts = [(name, self.pack(part, f"{key}.{name}")) for name, part in value.items()]
        if all(isinstance(name, str) for name, _ in parts):
            return {"dict": dict(parts)}
        return {"mapping": [[self.pack(name, f"{key}'s key"), part] for name, part in parts]}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has one place in memory for every element, in a type that a file can have."""
    is_usual = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_quantized
    if not is_usual or not has_values(tensor):
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass that is made of other tensors
        return False
    return True


def _refuse_state(value: Any, key: str) -> None:
    """Refuse a mapping, tuple or list of a class that knows more than its items, which would be lost.

    What repeats the items, as the attributes of what transformers return do, and what is private is not
    counted.

    Raises:
        ArchiveError: It does.
    """
    if type(value) in (dict, list, tuple) or not isinstance(value, Mapping | tuple | list):
        return
    items = value.values() if isinstance(value, Mapping) else value
    known = {id(item) for item in items} | {id(None)}
    for name, state in vars(value).items() if hasattr(value, "__dict__") else ():
        is_items = isinstance(state, Mapping) and {id(item) for item in state.values()} <= known
        if not name.startswith("_") and id(state) not in known and not is_items:
            raise ArchiveError(
                f"`{key}` is a {type(value).__name__} with `{name}` beside its items, which a file cannot "
                "hold without code; select layers that put out tensors, tuples, lists or mappings"
            )


def _fields_of(value: Any) -> tuple[str, ...]:
    """Return the names of the fields of a named tuple, or of what `torch.max` and its kin return."""
    kind = type(value)
    return getattr(kind, "_fields", ()) or (kind.__match_args__ if hasattr(kind, "n_fields") else ())


def _unpack(packed: Any, get: Callable[[str, str], Any], kinds: Mapping[str, type]) -> Any:
    ((kind, content),) = packed.items()
    if kind in ("tensor", "complex"):
        return get(content, kind)
    if kind == "numpy":
        name, number = content
        if name not in _NUMBERS or not isinstance(number, bool | int | float):
            raise ValueError("a number is none")
        dtype = np.dtype(name)
        limits = np.iinfo(dtype) if dtype.kind in "iu" else None
        if limits is not None and not (isinstance(number, int) and limits.min <= number <= limits.max):
            raise ValueError("a number is not of its type")  # older numpy only warns
        return dtype.type(number)
    if kind == "value":
        if not isinstance(content, _SCALARS):
            raise ValueError("a scalar is none")
        return content
    if kind == "dict":
        return {name: _unpack(part, get, kinds) for name, part in content.items()}
    if kind == "mapping":
        return {_unpack(name, get, kinds): _unpack(part, get, kinds) for name, part in content}
    if kind == "named":
        items = [_unpack(part, get, kinds) for part in content["items"]]
        return namedtuple(content["name"], content["fields"])(*items)
    items = [_unpack(part, get, kinds) for part in content]
    if kind == "size" and not all(type(item) is int and abs(item) < 2**63 for item in items):
        raise ValueError("a size is none")
    return kinds[kind](*items) if kind in kinds else _SEQUENCES[kind](items)


def _as_complex(pairs: torch.Tensor, name: str) -> torch.Tensor:
    try:
        return torch.view_as_complex(pairs)
    except (RuntimeError, ValueError) as error:
        raise ArchiveError(f"`{name}` is damaged: {reason_of(error)}; save the activations again") from error


def _once(get: Callable[[str, str], torch.Tensor]) -> Callable[[str, str], torch.Tensor]:
    """Let a tensor that occurs twice in a call be one and the same again."""
    found: dict[tuple[str, str], torch.Tensor] = {}

    def got(name: str, form: str) -> torch.Tensor:
        if (name, form) not in found:
            found[name, form] = get(name, form)
        return found[name, form]

    return got


def _placeholder(file: SafetensorsFile) -> Callable[[str, str], Any]:
    def get(name: str, form: str) -> None:
        if name not in file.names:
            raise KeyError(name)

    return get
