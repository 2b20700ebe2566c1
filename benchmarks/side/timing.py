"""A claim, and how it is measured: A and B in turn, A B A B ..., and the limit beside them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.side.limits import Limit, Rates

BLOCK = 0.01  # seconds: what is shorter runs several times in a row, so that the clock does not count
FEWEST = 3  # pairs of a row, however long they take
QUICK, FULL = (5, 1.5), (15, 12.0)  # pairs of a row at most, and seconds after which no more are begun

Work = Callable[[], object]


@dataclass
class Setting:
    """What a claim is measured under."""

    device: torch.device
    is_quick: bool
    seed: int


@dataclass
class Pair:
    """What a claim compares: ours and theirs do the same work, theirs perhaps only a `share` of it."""

    ours: Work
    theirs: Work
    share: float = 1.0
    limit: Limit | None = None
    note: str = ""
    gap: str = ""  # what stands in the way, where less than half of the limit is reached


@dataclass
class Claim:
    """One row of the table: `build` imports the peer and raises where that fails."""

    name: str
    what: str
    against: str
    build: Callable[[Setting], Any]  # of a Pair, or a context that gives one and cleans up
    package: str = ""  # what `against` is, where it need not be there
    on_cuda: bool = True


@dataclass
class Row:
    """What was found."""

    name: str
    what: str
    against: str
    device: str
    error: str = ""
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)
    order: str = ""
    limit: str = ""
    limit_s: float | None = None
    note: str = ""
    gap: str = ""
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Their time over ours, pair by pair: above 1, ours is faster."""
        return [theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)]

    @property
    def reached(self) -> float | None:
        """The part of the limit that ours reaches."""
        return None if self.limit_s is None else self.limit_s / median(self.ours_s)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"ratios": self.ratios, "ratio": None, "fraction_of_limit": self.reached}
        if self.ratios:
            found["ratio"] = {
                "min": min(self.ratios),
                "median": median(self.ratios),
                "max": max(self.ratios),
            }
        return found


class Clock:
    """Seconds of a piece of work; on CUDA those between two events, after the device has come to rest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        return perf_counter()

    def seconds(self, work: Work, times: int = 1) -> float:
        if self.device.type != "cuda":
            start = self.now()
            for _ in range(times):
                work()
            return (self.now() - start) / times
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3 / times

    def peak(self, work: Work) -> int:
        """Return the most bytes of device memory that the work held; call it on CUDA only."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def measure(claim: Claim, setting: Setting, clock: Clock, rates: Rates) -> Row:
    """Measure one claim; what goes wrong stands in the row, with its error."""
    row = Row(claim.name, claim.what, claim.against, setting.device.type)
    torch.manual_seed(setting.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a peer warns of is not ours to mend
        try:
            if claim.package:
                importlib.import_module(claim.package)
            with _opened(claim.build(setting)) as pair:
                _fill(row, pair, setting, clock, rates)
        except Exception as error:  # a peer may fail in any way
            row.error = reason(error)
            row.ours_s, row.theirs_s, row.limit_s = [], [], None
    return row


def reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


@contextmanager
def _opened(built: Any) -> Iterator[Pair]:
    if isinstance(built, Pair):
        yield built
    else:
        with built as pair:
            yield pair


def _fill(row: Row, pair: Pair, setting: Setting, clock: Clock, rates: Rates) -> None:
    bare = pair.limit.work if pair.limit else None
    works = (pair.ours, pair.theirs, bare)
    first = [0.0 if work is None else clock.seconds(work) for work in works]  # the warm-up
    if setting.device.type == "cuda":
        row.peak_bytes = {"ours": clock.peak(pair.ours), "theirs": clock.peak(pair.theirs)}
    times = [_times(clock, work, seconds) for work, seconds in zip(works, first, strict=True)]
    pairs, budget = QUICK if setting.is_quick else FULL
    start, order, limits = clock.now(), [], []
    for index in range(pairs):
        row.ours_s.append(clock.seconds(pair.ours, times[0]))
        row.theirs_s.append(clock.seconds(pair.theirs, times[1]) / pair.share)
        order += ["A", "B"]
        if bare is not None:
            limits.append(clock.seconds(bare, times[2]))
        if index + 1 >= FEWEST and clock.now() - start > budget:
            break
    row.order, row.note, row.gap = "".join(order), pair.note, pair.gap
    if pair.limit is not None:
        row.limit = pair.limit.name
        if pair.limit.is_theirs:
            row.limit_s = median(row.theirs_s)
        else:
            row.limit_s = median(limits) if bare is not None else rates.seconds(pair.limit)


def _times(clock: Clock, work: Work | None, first: float) -> int:
    """Return how often work runs in a row; what took long in the warm-up is not tried again for that."""
    if work is None or first > 50 * BLOCK:
        return 1
    return max(1, round(BLOCK / max(clock.seconds(work), 1e-6)))
