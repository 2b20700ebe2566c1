"""The table as Markdown, and the block of `docs/performance.md` that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.side.machine import BUSY
from benchmarks.side.timing import Row

BEGIN = "<!-- written by python -m benchmarks --write-docs: begin -->"
END = "<!-- written by python -m benchmarks --write-docs: end -->"
PAGE = f"""# Performance

How long others take for the same work, over what it takes here, next to the limit of the hardware. One
command measures it, installs nothing, and writes this page:

```
python -m benchmarks [--quick] [--json FILE] [--only NAME] [--write-docs]
```

A and B run in turn, A B A B ..., in one process; a ratio is their time over ours in one pair, so that above 1
ours is faster. Against a bare forward pass or loop, which does less, it can at best be 1. The limit is the
least that the work can take: bytes moved at the rate of a large copy, FLOP at the rate of a matrix product,
or other work that cannot be left out, timed in the same turns; the last column is how much of it is reached.
What fits the cache can be above 1. More rows, and what stands in the way where there is room, are in
[speed.md](speed.md).

A quick run, which this is if the table says so, has small networks, images of 112 pixels, batches of four and
few pairs: what is added to a forward pass weighs more there than in a full run.

{BEGIN}
{END}
"""
HEADER = ("name", "what", "against", "ours", "theirs", "min", "median", "max", "limit", "reached")


def render(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return what is printed: where and when, the table, what did not run, and remarks."""
    is_on_cuda = any(row.peak_bytes for row in rows)
    header = (*HEADER, "peak memory, ours / theirs") if is_on_cuda else HEADER
    lines = [*_above(found), "", "| " + " | ".join(header) + " |", "|---|---|---|" + "--:|" * 5 + "---|--:|"]
    lines[-1] += "--:|" * is_on_cuda
    for row in rows:
        cells = (*_cells(row), _memory(row)) if is_on_cuda else _cells(row)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    remarks = [f"- `{row.name}`: {row.note}." for row in rows if row.note]
    lines += ["", *remarks] if remarks else []
    if found["cuda"] != "ran":
        lines += ["", f"Rows on CUDA did not run: {found['cuda']}."]
    return "\n".join(lines)


def with_block(page: str, block: str) -> str:
    """Return a page whose marked block is a new one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def _above(found: dict[str, Any]) -> list[str]:
    here, rates = found["machine"], found["rates"]
    amx = {True: "with AMX", False: "without AMX", None: "AMX unknown"}[here["amx"]]
    present = [f"{name} {version}" for name, version in found["versions"].items() if version]
    missing = [name for name, version in found["versions"].items() if not version]
    lines = [
        f"{here['date']}, commit `{here['commit']}`, {'quick' if found['quick'] else 'full'} run, "
        f"seed {here['seed']}, {here['threads']} thread{'s' * (here['threads'] != 1)}.",
        "",
        f"- Machine: {here['cpu']}, {here['cores']} cores, {amx}; "
        f"{here['gpu'] or 'no CUDA device'}; {here['system']}.",
        f"- Versions: {', '.join(present)}." + (f" Not installed: {', '.join(missing)}." if missing else ""),
    ]
    for device, rate in rates.items():
        lines.append(
            f"- Rates measured ({device}): {rate['bytes'] / 1e9:.1f} GB/s read and written by a copy "
            f"({rate['fresh bytes'] / 1e9:.1f} into fresh pages), "
            f"{rate['flop float32'] / 1e9:,.0f} GFLOP/s in float32, "
            f"{rate['flop bfloat16'] / 1e9:,.0f} in bfloat16, noise deflated at "
            f"{rate['deflated bytes'] / 1e6:.0f} MB/s, {rate['files']:,.0f} files/s created and removed."
        )
    if here["busy"]:
        lines.append(
            f"- The machine was loaded by other work while this was measured (load average "
            f"{here['load_average']:.1f}, above {BUSY:.0f}): ratios are of pairs that ran in turn, and "
            "still scatter more than on an idle one."
        )
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    name = f"`{row.name}`" + (" (CUDA)" if row.device == "cuda" else "")
    if row.error:
        return (name, row.what, row.against, f"did not run: {row.error}", *[""] * 6)
    reached = "" if row.reached is None else f"{row.reached:.2f}"
    ratios = (min(row.ratios), median(row.ratios), max(row.ratios))
    times = (_time(median(row.ours_s)), _time(median(row.theirs_s)))
    return (name, row.what, row.against, *times, *(f"{ratio:.3g}" for ratio in ratios), row.limit, reached)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _memory(row: Row) -> str:
    peak = row.peak_bytes
    return f"{peak['ours'] / 2**20:.0f} / {peak['theirs'] / 2**20:.0f} MiB" if peak else ""
