"""Every claim of speed in one command, against the peers that are there, next to the limit of the hardware.

    python -m benchmarks [--quick] [--json FILE] [--resume] [--only NAME] [--write-docs] [--seed N]

Installs nothing. `python -m pip install -e ".[bench]"` brings the peers; one that is missing or fails is
named in the table with its error. With `--json` and `--resume` what the file has of the same commit, machine
and options is not measured again, so that a run that was broken off goes on where it ended, and single rows
are renewed with `--only`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.side import findings, gradients, pictures, recording
from benchmarks.side.growth import FAMILIES, Family, Growth, Processor, measure_growth, plot
from benchmarks.side.limits import Rates, measure_rates
from benchmarks.side.machine import ROOT, machine, versions
from benchmarks.side.table import PAGE, brief, render, with_block
from benchmarks.side.timing import Claim, Clock, Row, Setting, measure, reason

DOCS = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
PLOT = Path("images") / "growth.svg"  # beside the page
CLAIMS = [*pictures.CLAIMS, *recording.CLAIMS, *gradients.CLAIMS, *findings.CLAIMS]
SAME = ("cpu", "cores", "gpu", "threads", "seed", "commit")  # of the machine, for rows to stand in one table

Kind = TypeVar("Kind", Row, Growth)


def main(
    arguments: Sequence[str] | None = None,
    *,
    claims: Sequence[Claim] = CLAIMS,
    families: Sequence[Family] = FAMILIES,
    clock: Callable[[torch.device], Clock] = Clock,
    processor: Callable[[torch.device], Clock] = Processor,
    page: Path = DOCS,
    readme: Path = README,
) -> int:
    options = _parser().parse_args(arguments)
    if options.resume and not options.json:
        print("--resume goes on with what --json FILE holds: name the file", file=sys.stderr)
        return 2
    names = [each.name for each in (*claims, *families)]
    chosen = {name for name in names if not options.only or any(part in name for part in options.only)}
    if not chosen:
        print(f"--only must be part of a name of {names}", file=sys.stderr)
        return 2
    found: dict[str, Any] = {
        "machine": machine(options.seed),
        "versions": versions(),
        "quick": options.quick,
        "cuda": "ran" if torch.cuda.is_available() else "there is no CUDA device",
        "rates": {},
    }
    kept = _kept(options.json, found) if options.resume else {}
    renewed = chosen if options.only else set()
    rows, grown = (
        [each for each in _read(kept.get(key, []), kind) if each.name in names and each.name not in renewed]
        for key, kind in (("rows", Row), ("growth", Growth))
    )
    there = {(each.name, each.device) for each in (*rows, *grown)}

    def write() -> None:
        if options.json:
            lists = {"rows": [row.as_dict() for row in rows], "growth": [each.as_dict() for each in grown]}
            options.json.write_text(json.dumps(found | lists, indent=1, ensure_ascii=False) + "\n", "utf-8")

    for device in _devices():
        rates = measure_rates(device, is_quick=options.quick)
        found["rates"][device.type] = asdict(rates)["per_second"]
        setting = Setting(device, options.quick, options.seed)
        due = [name for name in names if name in chosen and (name, device.type) not in there]
        for row in _measured([each for each in claims if each.name in due], setting, clock(device), rates):
            rows.append(row)
            write()
        for family in (each for each in families if each.name in due):
            print(f"{device.type}: {family.name} ...", file=sys.stderr, flush=True)
            grown.append(measure_growth(family, setting, processor(device)))
            write()
    rows, grown = _in_order(rows, names), _in_order(grown, names)
    write()
    table = render(found, rows, grown)
    print(table)
    if not options.write_docs:
        return 0
    missing = set(names) - {each.name for each in (*rows, *grown)}
    if missing:
        print(f"--write-docs takes the whole table; not measured: {sorted(missing)}", file=sys.stderr)
        return 2
    _write_docs(page, readme, table, rows, grown)
    return 0


def _write_docs(page: Path, readme: Path, table: str, rows: list[Row], grown: list[Growth]) -> None:
    alt = "How cost grows: milliseconds of processor time over size, both in logarithms"
    try:
        if on_cpu := [each for each in grown if each.device == "cpu" and not each.error]:
            plot(on_cpu, page.parent / PLOT)
            table += f"\n\n![{alt}]({PLOT.as_posix()})"
    except ImportError as error:
        table += f"\n\nWithout a plot: {reason(error)}."
    text = page.read_text("utf-8") if page.exists() else PAGE
    page.write_text(with_block(text, table), "utf-8")
    if readme.exists():
        readme.write_text(with_block(readme.read_text("utf-8"), brief(rows)), "utf-8")


def _kept(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return what a file holds, if it was measured as this run is."""
    if not file.exists():
        return {}
    before: dict[str, Any] = json.loads(file.read_text("utf-8"))
    differ = [name for name in SAME if before["machine"].get(name) != found["machine"].get(name)]
    differ += [name for name in ("versions", "quick") if before[name] != found[name]]
    if differ:
        print(f"{file} has another {', '.join(differ)}: all is measured anew", file=sys.stderr)
        return {}
    return before


def _read(kept: list[dict[str, Any]], kind: type[Kind]) -> Iterator[Kind]:
    names = [field.name for field in fields(kind)]
    for each in kept:
        yield kind(**{name: each[name] for name in names})


def _in_order(found: list[Kind], names: Sequence[str]) -> list[Kind]:
    return sorted(found, key=lambda each: (each.device, names.index(each.name)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller work and fewer pairs: under 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured, row by row")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has, measured as this run is")
    parser.add_argument("--only", action="append", metavar="NAME", help="rows with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write-docs", action="store_true", help="renew docs/performance.md, its plot and the README's table"
    )
    return parser


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _measured(claims: Sequence[Claim], setting: Setting, clock: Clock, rates: Rates) -> Iterator[Row]:
    for claim in claims:
        if setting.device.type == "cpu" or claim.on_cuda:
            print(f"{setting.device.type}: {claim.name} ...", file=sys.stderr, flush=True)
            yield measure(claim, setting, clock, rates)


if __name__ == "__main__":
    sys.exit(main())
