"""How much memory there is, and telling when it ran out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

_RAN_OUT: Final = ("out of memory", "can't allocate memory", "not enough memory")
_UNKNOWN: Final = 2**31


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _RAN_OUT)


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
