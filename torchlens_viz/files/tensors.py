"""Tensors with a JSON header in one file (safetensors, npz), and a number that tells whether they changed."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import nn

from torchlens_viz.errors import ArchiveError, needed, reason_of
from torchlens_viz.files.paths import replacing, require_regular, write_whole

_HEADER: Final = "torchlens_viz"
_NPZ_HEADER: Final = "told"


def require_safetensors(what: str) -> Any:
    """Return the package safetensors; called early, there is no work to lose where it is missing.

    Args:
        what: Whose file it would be, such as `"surveys"`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    needed("safetensors.torch", f"{what} are saved with safetensors", "safetensors")
    return needed("safetensors", f"{what} are saved with safetensors", "safetensors")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
    *,
    what: str,
) -> Path:
    """Write tensors and a header to a file that appears whole or not at all.

    Args:
        path: The file.
        tensors: Strided tensors by name, on any device; those that share memory are copied.
        header: What else is to be kept, in terms of JSON; with a `"format"` that `SafetensorsFile` asks for.
        what: Whose file it is, such as `"surveys"`.

    Raises:
        ArchiveError: The file cannot be written.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require_safetensors(what)
    memory: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        # Of a conjugate or a negative view, the memory holds other numbers than it shows.
        values = tensor.detach().resolve_conj().resolve_neg().contiguous()
        place = values.untyped_storage().data_ptr()
        apart[name] = values.clone() if place in memory else values
        memory.add(place)
    metadata = {_HEADER: json.dumps(dict(header))}
    with replacing(path, ArchiveError) as temporary:
        try:
            safetensors.torch.save_file(apart, temporary, metadata=metadata)
        except (KeyError, RuntimeError, safetensors.SafetensorError) as error:  # a type it lacks; a full disk
            raise ArchiveError(f"cannot write {str(path)!r}: {reason_of(error)}") from error
    return Path(path)


@final
class SafetensorsFile:
    """A file that `write_safetensors` wrote, open; its tensors are read when they are asked for.

    Args:
        path: The file.
        format: What its header must say it is.
        what: Whose file it is, such as `"surveys"`.

    Attributes:
        header: What stood beside the tensors, as JSON gives it back; whoever reads it checks what it says.
        names: The tensors there are.

    Raises:
        ArchiveError: The file is missing, damaged, or holds something else.
        MissingDependencyError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, format: str, what: str) -> None:
        safetensors = require_safetensors(what)
        require_regular(path, ArchiveError, remedy=f"save the {what} again")
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            header = json.loads((self._file.metadata() or {}).get(_HEADER, "{}"))
            self.names: frozenset[str] = frozenset(self._file.keys())
        except Exception as error:  # SafetensorError derives from Exception alone
            raise ArchiveError(
                f"cannot read {str(path)!r}: it is truncated or no safetensors file ({reason_of(error)}); "
                f"save the {what} again"
            ) from error
        if not isinstance(header, dict) or header.get("format") != format:
            raise ArchiveError(
                f"cannot read {str(path)!r}: it holds no {what} in the format {format!r}; read it with "
                "safetensors.torch.load_file"
            )
        self.header: dict[str, Any] = header

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, one of `names`."""
        found: torch.Tensor = self._file.get_tensor(name)
        return found


def write_npz(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors and a header as numpy's .npz, which needs no package; whole or not at all.

    Args:
        path: The file.
        tensors: Tensors on the CPU, of types that numpy has, by name.
        header: What else is to be kept, in terms of JSON.

    Raises:
        ArchiveError: The file cannot be written.
    """
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays[_NPZ_HEADER] = np.frombuffer(json.dumps(dict(header)).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue(), ArchiveError)


def read_npz(path: str | os.PathLike[str], *, remedy: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_npz` wrote, and never more than the file is long.

    Args:
        path: The file.
        remedy: What to do where it cannot be read, as the end of a sentence.

    Returns:
        The tensors by name, and the header; whoever reads them checks shapes and types.

    Raises:
        ArchiveError: The file is missing or damaged, or holds something else.
    """
    require_regular(path, ArchiveError, remedy=remedy)
    try:
        data = io.BytesIO(Path(path).read_bytes())  # numpy leaves a damaged file open
        with zipfile.ZipFile(data) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(data.getbuffer()):
                raise ValueError("its entries overlap, or are longer than the file")
            arrays = {
                entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in archive.infolist()
            }
        header = json.loads(arrays.pop(_NPZ_HEADER).tobytes())
        if not isinstance(header, dict):
            raise ValueError("its header is damaged")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, header
    except Exception as error:  # zip and numpy meet damaged data with nearly any exception
        raise ArchiveError(f"cannot read {str(path)!r}: {reason_of(error)}; {remedy}") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    """Read an array that is stored as it is and as long as its header says: neither grows in memory."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename!r} is compressed")
    stored = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(stored)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = read[version](stored)
    values = stored.getbuffer()[stored.tell() :]
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or any(length < 0 for length in shape) or size != len(values):
        raise ValueError(f"{entry.filename!r} has {len(values)} bytes for {dtype} of shape {shape}")
    return np.frombuffer(bytearray(values), dtype).reshape(shape, order="F" if is_fortran else "C")


def require_tensors(
    tensors: Mapping[str, object],
    wanted: Mapping[str, tuple[torch.dtype, str]],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Refuse tensors from a file that are not what its writer writes.

    Args:
        tensors: What was found, by name.
        wanted: For each name the type, and a letter per dimension: the same letter is the same size.
        sizes: What letters stand for, where that is known.

    Returns:
        What every letter stands for.

    Raises:
        ValueError: One is missing, or of another type or shape.
    """
    known = dict(sizes or {})
    for name, (dtype, letters) in wanted.items():
        found = tensors.get(name)
        if not isinstance(found, torch.Tensor):
            raise ValueError(f"`{name}` is missing")
        fits = found.dtype == dtype and found.ndim == len(letters)
        if not fits or any(
            known.setdefault(letter, size) != size for letter, size in zip(letters, found.shape, strict=True)
        ):
            places = ", ".join(f"{letter} = {known[letter]}" for letter in letters if letter in known)
            raise ValueError(
                f"`{name}` must be {dtype} ({', '.join(letters)}){f' with {places}' if places else ''}, got "
                f"{found.dtype} {tuple(found.shape)}"
            )
    return known


def require_values(told: object, wanted: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Refuse what a file tells where it is not what its writer tells: these names with values of these types.

    A bool is no int, an int is a float too, and one that float64 does not hold is neither.

    Raises:
        ValueError: A name is missing or unknown, or a value of another type.
    """
    if not isinstance(told, dict) or told.keys() != wanted.keys():
        given = ", ".join(map(str, told)) if isinstance(told, dict) else "nothing of that kind"
        raise ValueError(f"it must tell {', '.join(wanted)}, and tells {given}")
    for name, kinds in wanted.items():
        value, kinds = told[name], kinds if isinstance(kinds, tuple) else (kinds,)
        is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        if not (type(value) in kinds or (float in kinds and is_number)) or (
            type(value) is int and not is_number
        ):
            raise ValueError(f"`{name}` must be {' or '.join(kind.__name__ for kind in kinds)}")
    return told


def require_same_settings(before: object, now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with what was begun otherwise.

    Args:
        before: The settings in the checkpoint.
        now: Those of this run, in terms of JSON.
        path: Where the checkpoint is.

    Raises:
        ArchiveError: They differ; the first that does is named.
    """
    if not isinstance(before, dict):
        raise ArchiveError(
            f"cannot read the settings in {str(path)!r}; delete it to start anew, or choose another"
        )
    now = json.loads(json.dumps(now))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ArchiveError(
                f"`checkpoint` must have been begun with the same settings: in {str(path)!r} `{name}` "
                f"was {before.get(name)!r} and now is {now.get(name)!r}; delete it to start anew, or "
                "choose another"
            )


def checksum(*sources: nn.Module | torch.Tensor | None) -> int:
    """Return a number that differs where weights or values differ.

    Of what has no values, such as weights on the meta device, only the type and shape count.
    """
    total = 0
    for source in sources:
        tensors = [source] if isinstance(source, torch.Tensor) else []
        if isinstance(source, nn.Module):
            tensors = [*source.parameters(), *source.buffers()]
        for tensor in tensors:
            total = zlib.crc32(_bytes_of(tensor.detach()), total)
    return total


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Return what a tensor holds, as memory that can be read; of another layout, what it stands for."""
    try:
        dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
        values = dense.cpu().resolve_conj().resolve_neg().contiguous()
        return values.view(-1).view(torch.uint8).numpy().data
    except (RuntimeError, TypeError, NotImplementedError):  # it has none, or is of a class of its own
        return repr((str(tensor.dtype), tuple(tensor.shape))).encode()
