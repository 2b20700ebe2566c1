"""The command of all claims: its table, its JSON, peers that are missing, and turns. No time is asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import CLAIMS, FAMILIES, main
from benchmarks.side import growth, timing
from benchmarks.side.growth import Family, Growth, measure_growth, plot, slope
from benchmarks.side.limits import Limit, Rates
from benchmarks.side.table import BEGIN, END, PAGE, render, with_block
from benchmarks.side.timing import Claim, Clock, Pair, Row, Setting, measure

ROOT = Path(__file__).parent.parent
CPU = Setting(torch.device("cpu"), is_quick=True, seed=0)
RATES = Rates({"bytes": 1e9})
HEAD = {
    "machine": {
        **dict.fromkeys(("date", "commit", "cpu", "gpu", "system", "amx"), None),
        "cores": 2,
        "threads": 1,
        "seed": 0,
        "busy": False,
    },
    "versions": {},
    "quick": True,
    "rates": {},
    "cuda": "ran",
}


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


def run(arguments, **options):
    """Run the command on what is tiny, with a clock that stands still."""
    options = {"claims": [pair_of()], "families": [], "readme": Path("no file"), **options}
    return main(arguments, clock=Stub, processor=Stub, **options)


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
    assert run(["--quick", "--json", str(file), "--seed", "7"], claims=claims) == 0
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
    run([])
    assert "Rows on CUDA did not run: there is no CUDA device." in capsys.readouterr().out


def test_the_docs_are_rewritten_between_the_marks_only(tmp_path):
    page, readme = tmp_path / "performance.md", tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", "utf-8")
    run(["--write-docs"], page=page, readme=readme)
    first = page.read_text("utf-8")
    assert first.startswith(PAGE.partition(BEGIN)[0])
    assert "`tiny`" in first
    page.write_text(first + "kept\n", "utf-8")
    run(["--write-docs", "--seed", "5"], page=page, readme=readme)
    second = page.read_text("utf-8")
    assert second.endswith("kept\n")
    assert "seed 5" in second
    assert "seed 0" not in second
    assert second.count(BEGIN) == second.count(END) == 1
    short = readme.read_text("utf-8")
    assert (short.startswith("before\n"), short.endswith("after\n"), "old" in short) == (True, True, False)
    with pytest.raises(ValueError, match="the page must have the lines"):
        with_block("no marks", "block")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only must be part of a name"),
        (["--only", "ti", "--write-docs"], "not measured: ['growth_tiny']"),
        (["--resume"], "name the file"),
    ],
)
def test_refuses(arguments, message, tmp_path, capsys):
    page = tmp_path / "page.md"
    claims = [Claim("ti", "what", "whom", lambda setting: Pair(ours, theirs))]
    family = Family("growth_tiny", "what", "things", (1, 2, 4, 8, 16), lambda size, setting: ours)
    arguments = ["--only", "ti", "--write-docs"] if "--write-docs" in arguments else arguments
    families = [Family("growth_other", "what", "things", (1, 2, 4, 8), lambda size, setting: ours)]
    families = [family] if "--write-docs" not in arguments else families
    message = message.replace("growth_tiny", "growth_other")
    assert run(arguments, claims=claims, families=families, page=page) == 2
    assert message in capsys.readouterr().err
    assert not page.exists()


def test_a_run_that_was_broken_off_goes_on_and_single_rows_are_renewed(tmp_path, capsys):
    file, made = tmp_path / "found.json", []

    def claim(name):
        return Claim(name, "what", "whom", lambda setting: made.append(name) or Pair(ours, theirs))

    both, resumed = [claim("one"), claim("two")], ["--json", str(file), "--resume"]
    run(["--only", "one", *resumed], claims=both)
    run(resumed, claims=both)
    assert made == ["one", "two"]
    run(["--only", "one", *resumed], claims=both)
    assert made == ["one", "two", "one"]
    assert [row["name"] for row in json.loads(file.read_text("utf-8"))["rows"]] == ["one", "two"]
    capsys.readouterr()
    run([*resumed, "--seed", "3"], claims=both)
    assert made == ["one", "two", "one", "one", "two"]
    assert "has another seed: all is measured anew" in capsys.readouterr().err


class Sized(Stub):
    """Work takes as many seconds as the square of its size, as the name of the work says."""

    def seconds(self, work, times=1):
        work()
        return float(work.__name__) ** 2


def sized(size, setting):
    def work():
        pass

    work.__name__ = str(size)
    return work


def test_growth_is_fitted_and_what_grows_faster_than_its_work_is_marked():
    family = Family("growth_tiny", "what", "things", (1, 2, 4, 8, 16), sized)
    found = measure_growth(family, CPU, Sized())
    assert found.sizes == [1, 2, 4, 8]  # a quick run leaves out the largest
    assert (found.exponent, found.last) == (pytest.approx(2), pytest.approx(2))
    assert found.is_too_fast
    assert "2.00, faster than its work |" in render(HEAD, [], [found])
    steady = Growth("growth_tiny", "what", "things", "cpu", [1, 2, 4, 8], [5.0, 5.5, 6.5, 8.5])
    assert not steady.is_too_fast
    assert 0 < steady.exponent < steady.last < 1


def test_growth_names_what_fails():
    found = measure_growth(
        Family("f", "what", "things", (1, 2, 4, 8), lambda size, setting: 1 / 0), CPU, Stub()
    )
    assert found.error == "ZeroDivisionError: division by zero"
    assert "did not run: ZeroDivisionError" in render(HEAD, [], [found])
    assert found.as_dict()["grows_faster_than_its_work"] is False


def test_the_exponent_is_that_of_a_power():
    assert slope([1, 10, 100, 1000], [3.0 * size**1.5 for size in (1, 10, 100, 1000)]) == pytest.approx(1.5)


def test_the_plot_has_every_family_and_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    found = [
        Growth(f"growth_{n}", f"`work {n}`", "things", "cpu", [1, 2, 4, 8], [1.0, 2.0, 4.0, 8.0])
        for n in "ab"
    ]
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    plot(found, first)
    plot(found, second)
    assert first.read_bytes() == second.read_bytes()
    assert all(f"work {n}: 1.00" in first.read_text("utf-8") for n in "ab")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_runs_at_its_smallest_size(family):
    assert len(family.sizes) >= 5  # four in a quick run
    with growth._opened(family.build(family.sizes[0], CPU)) as work:
        work()


def test_a_remark_says_what_stands_in_the_way_only_where_much_is_missing():
    row = Row(
        "tiny", "what", "whom", "cpu", ours_s=[2.0], theirs_s=[6.0], limit="x", limit_s=0.5, gap="a reason"
    )
    assert "- `tiny`: a reason." in render(HEAD, [row])
    row.limit_s = 1.5
    assert "a reason" not in render(HEAD, [row])


def test_the_readme_has_no_figure_of_speed_but_those_of_the_page():
    readme = (ROOT / "README.md").read_text("utf-8")
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    before, _, rest = readme.partition(BEGIN)
    block, _, after = rest.partition(END)
    assert "times as fast" not in before + after
    assert not re.search(r"[0-9.]+ (µs|ms|s)\b", before + after)
    rows = [line for line in block.splitlines() if line.startswith("| `")]
    assert len(rows) >= 5
    there = {
        tuple(cells(line)[n] for n in (1, 3, 2, 4, 6)) for line in page.splitlines() if line.startswith("| `")
    }
    for row in rows:
        what, own, against, ratio = cells(row)[:4]
        whom, _, their_time = against.rpartition(": ")
        assert (what, own, whom, their_time, ratio) in there


def cells(line):
    return [*(cell.strip() for cell in line.strip("|").split("|")), *[""] * 7]


def test_every_claim_has_a_name_of_its_own():
    names = [each.name for each in (*CLAIMS, *FAMILIES)]
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
