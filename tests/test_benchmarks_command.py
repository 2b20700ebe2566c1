"""The command of all claims: its table, its JSON, peers that are missing, and turns. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import CLAIMS, main
from benchmarks.side import timing
from benchmarks.side.limits import Limit, Rates
from benchmarks.side.table import BEGIN, END, PAGE, with_block
from benchmarks.side.timing import Claim, Clock, Pair, Setting, measure

ROOT = Path(__file__).parent.parent
CPU = Setting(torch.device("cpu"), is_quick=True, seed=0)
RATES = Rates({"bytes": 1e9})


class Stub(Clock):
    """Says what each piece of work takes: ours 2 s, whatever else 6 s; a call of the clock takes nothing."""

    def __init__(self, device=CPU.device):
        super().__init__(device)
        self.heard = []

    def now(self):
        return 0.0

    def seconds(self, work, times=1):
        work()
        self.heard.append(work.__name__)
        return 2.0 if work.__name__ == "ours" else 6.0


def ours():
    pass


def theirs():
    pass


def bare():
    pass


def pair_of(**options):
    return Claim("tiny", "what", "whom", lambda setting: Pair(ours, theirs, **options))


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    found = dict.fromkeys(
        ("bytes", "fresh bytes", "flop float32", "flop bfloat16", "deflated bytes", "files"), 1e9
    )
    monkeypatch.setattr("benchmarks.__main__.measure_rates", lambda device, is_quick: Rates(found))


def test_ours_and_theirs_take_turns_and_so_does_the_limit():
    clock = Stub()
    row = measure(pair_of(limit=Limit("bare", work=bare)), CPU, clock, RATES)
    assert row.order == "ABABABABAB"
    pairs = len(row.ratios)
    assert clock.heard[-3 * pairs :] == ["ours", "theirs", "bare"] * pairs
    assert row.ratios == [3.0] * 5
    assert row.as_dict()["ratio"] == {"min": 3.0, "median": 3.0, "max": 3.0}
    assert row.reached == 3.0


def test_a_share_of_the_work_is_scaled_up():
    assert measure(pair_of(share=0.25), CPU, Stub(), RATES).ratios == [12.0] * 5


def test_rows_end_once_their_time_is_up_but_not_before_three_pairs(monkeypatch):
    clock, ticks = Stub(), count()
    monkeypatch.setattr(clock, "now", lambda: 100.0 * next(ticks))
    assert len(measure(pair_of(), CPU, clock, RATES).ratios) == timing.FEWEST


def test_short_work_runs_several_times_in_a_row_and_long_work_once():
    class Short(Stub):
        def seconds(self, work, times=1):
            self.heard.append((work.__name__, times))
            return 0.002 if work.__name__ == "ours" else 2.0

    clock = Short()
    measure(pair_of(), CPU, clock, RATES)
    assert clock.heard[-2:] == [("ours", 5), ("theirs", 1)]
    assert clock.heard.count(("theirs", 1)) == 6  # the warm-up and five pairs


@pytest.mark.parametrize(
    ("limit", "reached"),
    [
        (Limit("bytes", "bytes", 1e9), 0.5),
        (Limit("theirs", is_theirs=True), 3.0),
        (Limit("a rate not measured", "other", 1e9), None),
        (None, None),
    ],
)
def test_the_fraction_of_the_limit(limit, reached):
    assert measure(pair_of(limit=limit), CPU, Stub(), RATES).reached == reached


def test_a_context_is_closed_even_where_the_work_fails():
    heard = []

    @contextmanager
    def build(setting):
        try:
            yield Pair(ours, lambda: 1 / 0)
        finally:
            heard.append("closed")

    row = measure(Claim("tiny", "what", "whom", build), CPU, Clock(CPU.device), RATES)
    assert row.error == "ZeroDivisionError: division by zero"
    assert row.ratios == []
    assert heard == ["closed"]


def test_the_seed_is_set_before_a_row_is_built():
    drawn = []

    def build(setting):
        drawn.append(torch.rand(1).item())
        return Pair(ours, theirs)

    for seed in (1, 1, 2):
        measure(Claim("tiny", "what", "whom", build), Setting(CPU.device, True, seed), Stub(), RATES)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_table_and_the_json_are_well_formed_and_name_a_missing_peer(tmp_path, capsys):
    claims = [
        pair_of(limit=Limit("theirs | bare", is_theirs=True), note="a remark"),
        Claim("absent", "what", "whom", lambda setting: Pair(ours, theirs), package="no_such_peer"),
    ]
    file = tmp_path / "found.json"
    assert main(["--quick", "--json", str(file), "--seed", "7"], claims=claims, clock=Stub) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) >= 4
    assert "| `tiny` | what | whom | 2 s | 6 s | 3 | 3 | 3 | theirs / bare | 3.00 |" in printed
    assert "did not run: ModuleNotFoundError: No module named 'no_such_peer'" in printed
    assert "- `tiny`: a remark." in printed
    assert "seed 7" in printed
    found = json.loads(file.read_text("utf-8"))
    assert [row["name"] for row in found["rows"]][:2] == ["tiny", "absent"]
    assert found["rows"][0]["ratios"] == [3.0] * 5
    assert found["rows"][1]["ratio"] is None
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] is not None
    assert {"cpu", "cores", "amx", "date", "commit", "seed"} <= set(found["machine"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they run")
def test_the_table_says_plainly_that_rows_on_cuda_did_not_run(capsys):
    main([], claims=[pair_of()], clock=Stub)
    assert "Rows on CUDA did not run: there is no CUDA device." in capsys.readouterr().out


def test_the_docs_are_rewritten_between_the_marks_only(tmp_path, capsys):
    page = tmp_path / "performance.md"
    main(["--write-docs"], claims=[pair_of()], clock=Stub, page=page)
    first = page.read_text("utf-8")
    assert first.startswith(PAGE.partition(BEGIN)[0])
    assert "`tiny`" in first
    page.write_text(first + "kept\n", "utf-8")
    main(["--write-docs", "--seed", "5"], claims=[pair_of()], clock=Stub, page=page)
    second = page.read_text("utf-8")
    assert second.endswith("kept\n")
    assert "seed 5" in second
    assert "seed 0" not in second
    assert second.count(BEGIN) == second.count(END) == 1
    with pytest.raises(ValueError, match="the page must have the lines"):
        with_block("no marks", "block")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only must be part of a name"),
        (["--only", "ti", "--write-docs"], "leave out --only"),
    ],
)
def test_refuses(arguments, message, capsys):
    assert main(arguments, claims=[pair_of()], clock=Stub) == 2
    assert message in capsys.readouterr().err


def test_every_claim_has_a_name_of_its_own():
    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_command_runs_one_row_as_the_page_says(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "grid_colour", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| `grid_colour` |" in done.stdout
    row = json.loads(file.read_text("utf-8"))["rows"][0]
    assert row["error"] == ""
    assert all(ratio > 0 for ratio in row["ratios"])
    assert set(row["order"]) == {"A", "B"}
    assert "AA" not in row["order"]
