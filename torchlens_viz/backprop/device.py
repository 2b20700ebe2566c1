"""What a device can do: how precisely it multiplies, and how much memory it has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch

from torchlens_viz.arguments import one_of

_UNKNOWN: Final = 2**31
Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]


def free_bytes(device: torch.device) -> int:
    """Return how many bytes can still be allocated on a device, as far as can be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # not the pages that are free, of which a machine that reads files has hardly any
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type to run a network in: bfloat16 where the hardware multiplies it natively and faster."""
    one_of(precision, "precision", ("auto", "float32", "bfloat16"))
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    return torch.bfloat16 if _is_bfloat16_fast(device) else torch.float32


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Run the block with gradients on and true float32, whatever modes the caller is in.

    No autocast, no TF32, no other default type; the caller's random numbers go on afterwards as if nothing
    had run.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if torch.amp.autocast_mode.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_true_float32())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield


def autocasting(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Run the block under autocast to `dtype`; float32 is left as it is."""
    if dtype == torch.float32:
        return nullcontext()
    # Nothing would be found in its cache: the weights that count are of this type already.
    return torch.autocast(device.type, dtype, cache_enabled=False)


@contextmanager
def _true_float32() -> Iterator[None]:
    """Multiply float32 as float32: no TF32, and no bfloat16 in its place."""
    known: Any = torch.backends
    settings: list[tuple[Any, str, Any]]
    settings = [(known.cudnn, "allow_tf32", False), (known.cuda.matmul, "allow_tf32", False)]
    if hasattr(known.cuda.matmul, "fp32_precision"):  # torch 2.9 and later, which wants these names alone
        places = (known.cudnn.conv, known.cuda.matmul, known.mkldnn.conv, known.mkldnn.matmul)
        settings = [(place, "fp32_precision", "ieee") for place in places]
    before = [(place, name, getattr(place, name)) for place, name, _ in settings]
    try:
        for place, name, value in settings:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _is_bfloat16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # oneDNN alone would also say yes where AVX-512 has to imitate the type, which gains nothing.
        onednn: Any = torch.backends.mkldnn
        native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_arm_bf16_supported")
        found = any(getattr(torch.cpu, name, lambda: False)() for name in native)
        return bool(onednn.is_available() and found and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
