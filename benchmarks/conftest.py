"""Side-by-side timing: A and B in turn within one run, and a table of the ratios at its end."""

from __future__ import annotations

import platform
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter

import pytest
import torch

_rows: list[tuple[str, ...]] = []


def _timed(function: Callable[[], object], inner: int) -> float:
    start = perf_counter()
    for _ in range(inner):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (perf_counter() - start) / inner


@pytest.fixture
def versus(request, benchmark):
    """Time `ours` and `theirs` in turn; report how many times as long theirs takes (median of the pairs).

    Where theirs would take too long, it does only a `share` of the work, and its time is scaled up.
    """

    def compare(ours, theirs, *, target: str, rounds: int = 15, note: str = "", share: float = 1.0) -> float:
        once = max(_timed(ours, 1), _timed(ours, 1), 1e-6)  # also the warm-up
        _timed(theirs, 1)
        inner = max(1, round(0.01 / once))  # ours in blocks of 10 ms, so that the clock does not count
        mine, other = [], []
        for index in range(rounds):
            # Who comes second finds the memory as the first left it, so they take turns at that as well.
            for is_ours in (True, False) if index % 2 == 0 else (False, True):
                (mine if is_ours else other).append(
                    _timed(ours, inner) if is_ours else _timed(theirs, 1) / share
                )
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        ratio = median(ratios)
        label = request.node.name.removeprefix("test_")
        _rows.append(
            (
                label,
                f"{median(mine) * 1e3:.3f}",
                f"{median(other) * 1e3:.3f}",
                f"{ratio:.2f}",
                f"{low:.2f}..{high:.2f}",
                target,
                note,
            )
        )
        benchmark.extra_info["ratio"] = ratio
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
        return ratio

    return compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    terminalreporter.section("theirs / ours, alternating in one run")
    terminalreporter.write_line(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    header = ("what", "ours ms", "theirs ms", "ratio", "quartiles", "target", "")
    rows = [header, *_rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
