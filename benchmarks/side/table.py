"""The table as Markdown, and the block of `docs/performance.md` that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.side.growth import Growth
from benchmarks.side.machine import BUSY
from benchmarks.side.timing import Row

BEGIN = "<!-- written by python -m benchmarks --write-docs: begin -->"
END = "<!-- written by python -m benchmarks --write-docs: end -->"
BRIEF = (  # the rows that the README shows
    "grid_kernels", "grid_large", "sheet_colour", "sheet_deep", "sheet_matplotlib", "folder_save_image",
    "capture_hooks", "capture_captum", "capture_torchlens", "survey_16", "survey_32", "survey_collect",
    "maximize_plain", "maximize_lucent", "explain_gradcam", "project_deconvnet", "ablate",
)  # fmt: skip
HALF = 0.5
PAGE = f"""# Performance

How long others take for the same work, over what it takes here, next to the limit of the hardware. One
command measures it, installs nothing, and writes this page:

```
python -m benchmarks [--quick] [--json FILE] [--resume] [--only NAME] [--write-docs]
```

A and B run in turn, A B A B ..., in one process; a ratio is their time over ours in one pair, so that above 1
ours is faster. Against a bare forward pass or loop, which does less, it can at best be 1. The limit is the
least that the work can take: bytes moved at the rate of a large copy, FLOP at the rate of a matrix product,
or other work that cannot be left out, timed in the same turns; the last column is how much of it is reached.
What fits the cache can be above 1. Where it is under a half, a remark says what stands in the way. More rows
are in [speed.md](speed.md).

A quick run, which this is if the table says so, has small networks, images of 112 pixels, batches of four and
few pairs: what is added to a forward pass weighs more there than in a full run.

How cost grows is measured in processor time at several sizes, each with as much more work: the exponent of a
power of the size, fitted to all points, and to the larger half of them, where what does not grow weighs
least. 1 is in proportion. What grows faster than that by more than 0.2 at the end is marked.

{BEGIN}
{END}
"""
HEADER = ("name", "what", "against", "ours", "theirs", "min", "median", "max", "limit", "reached")


def render(found: dict[str, Any], rows: Sequence[Row], grown: Sequence[Growth] = ()) -> str:
    """Return what is printed: where and when, the table, what did not run, remarks, and how cost grows."""
    is_on_cuda = any(row.peak_bytes for row in rows)
    header = (*HEADER, "peak memory, ours / theirs") if is_on_cuda else HEADER
    lines = [*_above(found), "", "| " + " | ".join(header) + " |", "|---|---|---|" + "--:|" * 5 + "---|--:|"]
    lines[-1] += "--:|" * is_on_cuda
    for row in rows:
        cells = (*_cells(row), _memory(row)) if is_on_cuda else _cells(row)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    remarks = [f"- `{row.name}`: {'; '.join(said)}." for row in rows if (said := _said(row))]
    lines += ["", *remarks] if remarks else []
    lines += ["", *_growth(grown)] if grown else []
    if found["cuda"] != "ran":
        lines += ["", f"Rows on CUDA did not run: {found['cuda']}."]
    return "\n".join(lines)


def brief(rows: Sequence[Row], names: Sequence[str] = BRIEF) -> str:
    """Return the README's table: some of the rows, with the very figures of the page."""
    lines = ["| what | ours | theirs | ratio |", "|---|--:|--:|--:|"]
    for row in rows:
        if row.name in names and not row.error and row.device == "cpu":
            _, what, against, ours, theirs, _, ratio, *_ = _cells(row)
            lines.append(f"| {what} | {ours} | {against}: {theirs} | {ratio} |")
    return "\n".join(lines)


def _said(row: Row) -> list[str]:
    is_short = row.reached is not None and row.reached < HALF
    return [text for text in (row.note, row.gap if is_short else "") if text]


def _growth(grown: Sequence[Growth]) -> list[str]:
    lines = [
        "| name | what | of | least, most | seconds | exponent | at the end |",
        "|---|---|---|---|---|--:|--:|",
    ]
    for each in grown:
        name = f"`{each.name}`" + (" (CUDA)" if each.device == "cuda" else "")
        if each.error:
            lines.append(f"| {name} | {each.what} | {each.of} | did not run: {each.error} | | | |")
            continue
        sizes, times = (
            f"{show(values[0])} to {show(values[-1])}"
            for values, show in ((each.sizes, "{:,}".format), (each.seconds, _time))
        )
        last = f"{each.last:.2f}" + (", faster than its work" if each.is_too_fast else "")
        lines.append(
            f"| {name} | {each.what} | {each.of} | {sizes} | {times} | {each.exponent:.2f} | {last} |"
        )
    return lines


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
