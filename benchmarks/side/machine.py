"""Where and with what a table was measured: processor, versions, threads, date, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from torchlens_viz import __version__

ROOT = Path(__file__).parents[2]
OTHERS = ("torch", "torchvision", "numpy")
PEERS = (
    "captum",
    "grad-cam",
    "horama",
    "nnsight",
    "timm",
    "torch-lucent",
    "torchextractor",
    "torchlens",
)
BUSY = 2.0  # load average


def machine(seed: int) -> dict[str, Any]:
    """Return what stands above the table."""
    model, flags = _processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx": None if flags is None else "amx_tile" in flags,
        "avx512_bf16": None if flags is None else "avx512_bf16" in flags,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
        "load_average": load,
        "busy": load is not None and load > BUSY,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions, None for what is not installed."""
    here = {"torchlens_viz": __version__}  # of what is imported, be it installed or not
    return {name: _version(name) for name in OTHERS} | here | {name: _version(name) for name in PEERS}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, set[str] | None]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or "unknown", None
    lines = (line.partition(":") for line in path.read_text("utf-8", errors="replace").splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    flags = found.get("flags") or found.get("Features")
    return found.get("model name") or platform.machine(), set(flags.split()) if flags else None


def _commit() -> str:
    """Return the commit, with a plus where files of the package or the benchmarks differ from it."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "torchlens_viz", "benchmarks") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
