"""What the machine can do at most: the rates at which it copies, multiplies and compresses, as measured."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

BYTES = 64 * 2**20
ROUNDS = 5


@dataclass
class Limit:
    """The least that work takes: an `amount` at a measured rate, or other `work`, timed beside it."""

    name: str
    rate: str = ""
    amount: float = 0.0
    work: Callable[[], object] | None = None
    is_theirs: bool = False  # theirs is the limit


@dataclass
class Rates:
    """Amounts per second, by name: bytes moved, FLOP of matrix products, bytes deflated, files created."""

    per_second: dict[str, float]

    def seconds(self, limit: Limit) -> float | None:
        rate = self.per_second.get(limit.rate)
        return limit.amount / rate if rate else None


def moved(amount: float, *, is_fresh: bool = False) -> Limit:
    """Return the limit of so many bytes read and written, on request into pages that are new."""
    if is_fresh:
        return Limit(f"{amount / 1e6:.3g} MB moved into fresh pages", "fresh bytes", amount)
    return Limit(f"{amount / 1e6:.3g} MB moved", "bytes", amount)


def flop(amount: float, dtype: torch.dtype) -> Limit:
    name = str(dtype).removeprefix("torch.")
    return Limit(f"{amount / 1e9:.3g} GFLOP in {name}", f"flop {name}", amount)


def measure_rates(device: torch.device, *, is_quick: bool) -> Rates:
    """Measure every rate; the best of a few runs, since a limit is what the machine can do at most."""
    side = 1024 if is_quick and device.type == "cpu" else 4096
    source = torch.zeros(BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {
        "bytes": 2 * BYTES / _best(lambda: target.copy_(source), device),
        "fresh bytes": 2 * BYTES / _best(source.clone, device),
    }
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda left=left, right=right: left @ right, device)
        found[f"flop {str(dtype).removeprefix('torch.')}"] = 2 * side**3 / seconds
    pixels = torch.randint(0, 256, (2**20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = pixels.numpy().tobytes()
    found["deflated bytes"] = len(noise) / _best(lambda: zlib.compress(noise, 1), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        found["files"] = 100 / _best(lambda: _create(Path(folder)), torch.device("cpu"))
    return Rates(found)


def _create(folder: Path) -> None:
    for index in range(100):
        path = folder / str(index)
        path.write_bytes(b"")
        path.unlink()


def _best(work: Callable[[], object], device: torch.device) -> float:
    work()
    seconds = []
    for _ in range(ROUNDS):
        _rest(device)
        start = perf_counter()
        work()
        _rest(device)
        seconds.append(perf_counter() - start)
    return min(seconds) if device.type == "cpu" else median(seconds)


def _rest(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
