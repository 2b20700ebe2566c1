"""Two processes share the channels: to the same result as one, and no waiting for one that failed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from tests.processes import said
from torchlens_viz import objectives
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.distributed import gathered, world

PROGRAM = """
    import datetime, os, sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torchlens_viz import objectives
    from torchlens_viz.ascent.maximize import maximize
    from torchlens_viz.errors import DistributedError

    torch.set_num_threads(1)
    what, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )

    def net():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3)).eval()

    calls = []

    def preprocess(images):
        calls.append(len(images))
        if what == "fails" and rank == 1 and len(calls) > 5:
            raise ValueError("not today")
        if what == "dies" and rank == 1 and len(calls) > 5:
            os._exit(3)
        return images

    options = {"size": 12, "steps": 8, "precision": "float32", "preprocess": preprocess}
    if what in ("fails", "dies"):
        try:
            maximize(net(), "2", **options)
        except DistributedError as error:
            print("DistributedError", error)
        except ValueError as error:
            print("ValueError", error)
        sys.stdout.flush()
        os._exit(0)
    ways = {
        "plain": {},
        "couples": {
            "channels": [1, 1, 4, 4, 2, 2],
            "objective": objectives.channel() + objectives.diversity(),
        },
        "few": {"channels": [5]},
        "resumes": {"checkpoint": f"{folder}/store"},
        "resumed": {"checkpoint": f"{folder}/store"},
    }
    for way, more in ways.items():
        calls.clear()
        result = maximize(net(), "2", **options, **more)
        torch.save(
            (result.channels, result.images, result.scores, result.history, result.status, sum(calls)),
            f"{folder}/{way}{rank}.pt",
        )
    dist.destroy_process_group()
"""


def together(what, folder):
    """Run the program in two processes; return the ends of what they printed."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(path), what, str(folder), str(rank)] for rank in range(2)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    try:
        return [(*process.communicate(timeout=100), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


def alone(**options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3)).eval()
    return maximize(model, "2", size=12, steps=8, precision="float32", **options)


@pytest.mark.slow
def test_two_processes_make_what_one_makes_and_both_have_it_all(tmp_path):
    for _, errors, code in together("works", tmp_path):
        assert code == 0, errors
    goal = objectives.channel() + objectives.diversity()
    whole = alone()
    expected = {
        "plain": whole,
        "couples": alone(channels=[1, 1, 4, 4, 2, 2], objective=goal),
        "few": alone(channels=[5]),
        "resumes": whole,
        "resumed": whole,
    }
    work: dict[str, list[int]] = {}
    for way, one in expected.items():
        for rank in range(2):
            channels, images, scores, history, status, done = torch.load(tmp_path / f"{way}{rank}.pt")
            assert channels.tolist() == one.channels.tolist()
            assert status == one.status
            torch.testing.assert_close(images, one.images, rtol=0, atol=1e-4)
            torch.testing.assert_close(scores, one.scores, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(history, one.history, rtol=1e-4, atol=1e-5, equal_nan=True)
            work.setdefault(way, []).append(done)
    assert max(work["plain"]) < 0.75 * sum(work["plain"])  # 4 of the 7 channels, and 3
    assert min(work["few"]) < 10 < max(work["few"])  # one had nothing to do but to look at `preprocess`
    assert max(work["resumed"]) < 10  # what is finished is only read


@pytest.mark.slow
def test_where_one_process_fails_the_other_says_so(tmp_path):
    (first, _, _), (second, _, _) = together("fails", tmp_path)
    assert "DistributedError process 1 failed, so that the result would be incomplete: Invalid" in first
    assert said(second)[0].startswith("ValueError `preprocess` must make a batch")
    assert all("(ValueError: not today)" in each for each in (first, second))


@pytest.mark.slow
def test_where_one_process_dies_the_other_says_so(tmp_path):
    (first, _, _), (_, _, code) = together("dies", tmp_path)
    assert code == 3
    assert "DistributedError another process of this run died before its share was done" in first
    assert "start the run again" in first


def test_without_processes_the_work_is_ones_own():
    assert world() == (0, 1)
    assert gathered(lambda: (1, 2)) == [1, 2]

    def fail():
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        gathered(fail)
