"""Every claim of speed in one command, against the peers that are there, next to the limit of the hardware.

    python -m benchmarks [--quick] [--json FILE] [--only NAME] [--write-docs] [--seed N]

Installs nothing. `python -m pip install -e ".[bench]"` brings the peers; one that is missing or fails is
named in the table with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.side import gradients, pictures, recording
from benchmarks.side.limits import Rates, measure_rates
from benchmarks.side.machine import ROOT, machine, versions
from benchmarks.side.table import PAGE, render, with_block
from benchmarks.side.timing import Claim, Clock, Row, Setting, measure

DOCS = ROOT / "docs" / "performance.md"
CLAIMS = [*pictures.CLAIMS, *recording.CLAIMS, *gradients.CLAIMS]


def main(
    arguments: Sequence[str] | None = None,
    *,
    claims: Sequence[Claim] = CLAIMS,
    clock: Callable[[torch.device], Clock] = Clock,
    page: Path = DOCS,
) -> int:
    options = _parser().parse_args(arguments)
    chosen = [claim for claim in claims if not options.only or any(o in claim.name for o in options.only)]
    if not chosen:
        print(f"--only must be part of a name of {[claim.name for claim in claims]}", file=sys.stderr)
        return 2
    if options.write_docs and options.only:
        print("--write-docs takes the whole table: leave out --only", file=sys.stderr)
        return 2
    found: dict[str, Any] = {
        "machine": machine(options.seed),
        "versions": versions(),
        "quick": options.quick,
        "cuda": "ran" if torch.cuda.is_available() else "there is no CUDA device",
        "rates": {},
    }
    rows: list[Row] = []
    for device in _devices():
        rates = measure_rates(device, is_quick=options.quick)
        found["rates"][device.type] = asdict(rates)["per_second"]
        rows += _measured(chosen, Setting(device, options.quick, options.seed), clock(device), rates)
    table = render(found, rows)
    print(table)
    if options.json:
        document = found | {"rows": [row.as_dict() for row in rows]}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if options.write_docs:
        text = page.read_text("utf-8") if page.exists() else PAGE
        page.write_text(with_block(text, table), "utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller work and fewer pairs: under 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured, every pair")
    parser.add_argument("--only", action="append", metavar="NAME", help="rows with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write-docs", action="store_true", help="renew the table in docs/performance.md")
    return parser


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _measured(claims: Sequence[Claim], setting: Setting, clock: Clock, rates: Rates) -> list[Row]:
    rows = []
    for claim in claims:
        if setting.device.type == "cpu" or claim.on_cuda:
            print(f"{setting.device.type}: {claim.name} ...", file=sys.stderr, flush=True)
            rows.append(measure(claim, setting, clock, rates))
    return rows


if __name__ == "__main__":
    sys.exit(main())
