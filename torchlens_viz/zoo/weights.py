"""A file of weights and a model in, the model with those weights out, or one sentence saying why not."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from torchlens_viz.arguments import shown
from torchlens_viz.errors import ModelLoadError, needed, one_line

_SAFETENSORS = ".safetensors"
_SLACK = 2**26  # bytes: the code in a TorchScript archive, which is refused in its turn, is compressed
_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
# What training scripts wrap the state_dict in, and what parallel and compiled models put before each key.
# Averaged weights come first: they are what a network is judged by.
_AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "params_ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model_state_dict", "model", "module", "net", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
_COUNTERS = ("n_averaged",)  # what torch's AveragedModel keeps beside the weights
# The densenet files that torchvision publishes are older than the names of its layers.
_OLD_DENSENET_KEY = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)")


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
        tensors: A state_dict with at least one tensor, on the CPU.
        notes: Where in the file it was found, where that is not the file itself.
    """

    tensors: dict[str, Any]
    notes: tuple[str, ...]


def is_weights(path: str) -> bool:
    """Tell whether a path ends as files of weights do."""
    return Path(path).suffix.lower() in (_SAFETENSORS, *_TORCH_SUFFIXES)


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read the tensors in a file of weights, by name.

    Args:
        path: `.safetensors`, or `.pth`, `.pt`, `.ckpt` or `.bin` as written by `torch.save`, of which only
            tensors and plain containers are read. A state_dict inside `{"state_dict": ...}` or
            `{"model": ...}` is found; of several, one of averaged weights (`ema`) is taken.

    Returns:
        The tensors, and under which key they were found.

    Raises:
        ModelLoadError: If the file is missing, damaged, of another kind, or holds no tensors by name.
        MissingDependencyError: If the file is `.safetensors` and safetensors is not installed.
    """
    source = Path(path)
    return _unwrap(_read(source), source)


def load_weights(model: nn.Module, state: dict[str, Any], origin: str) -> list[str]:
    """Load a state_dict into a model, strictly.

    Args:
        model: The network; it gets the weights in place, on its own devices and in its own dtypes.
        state: The tensors that `read_weights` returned. Prefixes that DataParallel (`module.`), torch.compile
            (`_orig_mod.`) and Lightning (`model.`) put before every key are removed, in place.
        origin: Where the weights come from, for the error.

    Returns:
        What was removed, in words.

    Raises:
        ModelLoadError: If a key is missing or left over, or a shape differs; some of each are named.
    """
    own = model.state_dict()
    done = []
    for counter in _COUNTERS:
        if counter in state and counter not in own:
            del state[counter]
            done.append(f"without `{counter}`")
    for prefix in _PREFIXES * 2:
        if (
            state
            and all(key.startswith(prefix) for key in state)
            and not any(key.startswith(prefix) for key in own)
        ):
            consume_prefix_in_state_dict_if_present(state, prefix)
            done.append(f"without the prefix `{prefix}`")
    for key in [key for key in state if key not in own]:
        if match := _OLD_DENSENET_KEY.fullmatch(key):
            state[match[1] + match[2]] = state.pop(key)
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:  # modules read what they find, such as an edited version, each in its own way
        raise ModelLoadError(
            f"`weights` {origin!r} does not fit {type(model).__name__}: "
            f"{_differences(own, state) or one_line(error)}; give a checkpoint of this architecture, "
            "or name the function that builds yours as package.module:factory"
        ) from error
    return done


def _read(path: Path) -> object:
    shown = repr(str(path))
    try:
        is_file, is_there = path.is_file(), path.exists()
    except OSError as error:
        raise ModelLoadError(f"cannot read `weights` {shown}: {error.strerror}; check the path") from error
    if not is_file:
        state = "a folder" if path.is_dir() else "a pipe or device" if is_there else "no such file"
        raise ModelLoadError(
            f'`weights` must be "DEFAULT", "none" or an existing file, got {shown}, which is {state}'
            f"; check the spelling (relative paths start at {str(Path.cwd())!r})"
        )
    suffix = path.suffix.lower()
    if suffix != _SAFETENSORS and suffix not in _TORCH_SUFFIXES:
        known = ", ".join((_SAFETENSORS, *_TORCH_SUFFIXES))
        raise ModelLoadError(f"`weights` must be a file that ends in one of {known}, got {shown}; convert it")
    return _read_safetensors(path) if suffix == _SAFETENSORS else _read_torch(path)


def _read_safetensors(path: Path) -> object:
    what = f"`weights` {str(path)!r} is read with safetensors"
    load_file = needed("safetensors.torch", what, "safetensors").load_file
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ModelLoadError(
            f"`weights` {str(path)!r} is truncated or no safetensors file ({one_line(error)}); "
            "write it again with safetensors.torch.save_file"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # The refusal that follows says what to do about it.
            warnings.filterwarnings("ignore", message=".*TorchScript archive", category=UserWarning)
            _refuse_swollen(path)
            return torch.load(path, weights_only=True, map_location="cpu")
    except ModelLoadError:
        raise
    except Exception as error:  # the unpickler meets damaged data with nearly any exception
        raise ModelLoadError(
            f"`weights` {str(path)!r} is damaged, or holds objects other than tensors, which are never "
            "loaded because they can run code; write one with torch.save(model.state_dict(), 'weights.pth')"
        ) from error


def _refuse_swollen(path: Path) -> None:
    """Refuse an archive that would take more memory than it is long: `torch.save` compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    length = path.stat().st_size
    if sum(entry.file_size for entry in entries) > length + _SLACK:
        raise ModelLoadError(
            f"`weights` {str(path)!r} is an archive of {length:,} bytes that unpacks to many times as many, "
            "which torch.save never writes; write one with torch.save(model.state_dict(), 'weights.pth')"
        )


def _unwrap(content: object, path: Path) -> Weights:
    inner = content
    keys: list[str] = []
    passed: set[int] = set()  # a mapping may hold itself
    while (
        id(inner) not in passed
        and isinstance(inner, Mapping)
        and not any(isinstance(value, Tensor) for value in inner.values())
    ):
        key = next((key for key in _WRAPPERS if isinstance(inner.get(key), Mapping)), None)
        if key is None:
            break
        passed.add(id(inner))
        inner = inner[key]
        keys.append(key)
    if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
        odd = next((key for key, value in inner.items() if not isinstance(key, str) or _is_odd(value)), None)
        if odd is None:
            return Weights(inner, ("from its " + ", ".join(f"`{key}`" for key in keys),) if keys else ())
        raise ModelLoadError(
            f"`weights` {str(path)!r} must hold dense tensors with values under names, got {shown(odd)}: "
            f"{shown(inner[odd])}; write one with torch.save(model.state_dict(), 'weights.pth')"
        )
    held = f"the keys {_some(map(str, inner))}" if isinstance(inner, Mapping) else f"a {type(inner).__name__}"
    raise ModelLoadError(
        f"`weights` {str(path)!r} must hold a state_dict, got {held} with no tensors by name; "
        "write one with torch.save(model.state_dict(), 'weights.pth')"
    )


def _is_odd(value: object) -> bool:
    return isinstance(value, Tensor) and (
        value.is_nested or value.is_meta or value.layout is not torch.strided
    )


def _differences(own: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """List what `state` lacks, has too much, or has in another shape than the model's `own`."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {_shape(state[key])} where the model has {_shape(own[key])}"
        for key in own
        if key in state and _shape(own[key]) != _shape(state[key])
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return ", ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in found if keys)


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "none"
