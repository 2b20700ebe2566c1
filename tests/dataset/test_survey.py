"""`survey` finds what brute force finds, in one pass, in one process or in several."""

from __future__ import annotations

import doctest
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import Given, quiet, same_survey
from torchlens_viz import LayerNotFoundError, RunningStats, Survey, survey, testing
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

# One pass


def test_statistics_are_those_of_all_values(net):
    images = torch.randn(10, 3, 9, 8)
    flags = [module.training for module in net.modules()]
    before = torch.random.get_rng_state()
    found = survey(net, images.split(4), nn.Conv2d, bins="log", **quiet)
    assert [module.training for module in net.modules()] == flags
    assert torch.random.get_rng_state().equal(before)
    assert not any(module._forward_hooks for module in net.modules())
    expected = RunningStats(bins="log")
    with torch.no_grad():
        for batch in images.split(4):
            expected.update(net[0](batch))
    for figure, values in expected.compute().to_dict().items():
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(getattr(found.stats["0"], figure), values, rtol=1e-12, atol=1e-14)
    assert (found.samples_seen, found.inputs_seen["0"], found.not_called) == (10, 10, ())
    testing.assert_finite(found)
    testing.assert_no_dead_channels(found)
    with pytest.raises(AssertionError, match="`0`"):
        testing.assert_mean(found, 5, 6, layers="0")


# Bad input, and layers of all kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "`top_k` must be at least 0"),
        ({"top_k": 1.5}, "`top_k` must be an int"),
        ({"indices": [0, 1, 1, 2]}, "must name each input once, got 1 twice"),
        ({"indices": [0, 1, 2, -3]}, "must not be negative"),
        ({"indices": [0, 1, 2]}, "got 3 and more inputs"),
        ({"indices": range(5)}, "got 5 for 4 inputs"),
        ({"indices": [0.5] * 4}, "must be ints"),
        ({"indices": lambda batch: [1]}, "got 1 for a batch of 2"),
        ({"input_of": "x"}, "`input_of` must be a part of every batch"),
        ({"checkpoint_seconds": -1}, "`checkpoint_seconds` must be 0 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(net, options, message):
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=message):
        survey(net, torch.zeros(4, 3, 9, 9).split(2), "0", **quiet, **options)


def test_layers_that_do_not_always_run_are_told_apart():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.often, self.never = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.often(self.always(x)) if x.max() > 0 else self.always(x)

    maps = torch.cat([torch.ones(2, 1, 2, 2), -torch.ones(2, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)])
    with pytest.warns(
        UserWarning, match=r"fewer than the 5 inputs of the survey: `often` 3; .*`inputs_seen`"
    ):
        found = survey(Sometimes(), maps.split(2), "*", top_k=9, **quiet)
    assert dict(found.inputs_seen) == {"always": 5, "often": 3}
    assert found.top["often"].samples.tolist() == [[4, 0, 1]]
    assert found.not_called == ("never",)
    with pytest.raises(LookupError, match="knows nothing of `never`"):
        _ = found.stats["never"]
    with pytest.raises(LayerNotFoundError, match="no layer is named `nothing`"):
        survey(Sometimes(), [maps], "nothing", **quiet)


def test_maps_may_change_their_size_but_not_their_channels():
    small, large = torch.rand(2, 2, 3, 3), torch.rand(2, 2, 5, 4) + 1
    found = survey(Given(), [small, large], "layer", top_k=4, **quiet)
    assert found.top["layer"].samples.sort().values.tolist() == [[0, 1, 2, 3]] * 2
    assert found.stats["layer"].count.tolist() == [2 * 9 + 2 * 20] * 2
    assert found.input_shape is None
    with pytest.raises(InvalidArgumentError, match=r"`layer` cannot be surveyed.*2 channels, got 3"):
        survey(Given(), [small, torch.rand(2, 3, 3, 3)], "layer", **quiet)
    with pytest.raises(InvalidArgumentError, match=r"`layer` cannot be surveyed.*axes, got 3"):
        survey(Given(), [small, torch.rand(2, 2, 3, 3, 3)], "layer", **quiet)


@pytest.mark.parametrize("batch", [2, 9, 14, 30])
def test_a_change_of_axes_is_refused_by_name_in_any_batch(batch):
    class Odd(Given):
        count = 0

        def forward(self, x):
            self.count += 1
            return self.layer(x[:, :, None] if self.count == batch else x)

    with pytest.raises(InvalidArgumentError, match="`layer` cannot be surveyed, because its shape changed"):
        survey(Odd(), torch.rand(60, 3, 2, 3).split(2), "layer", top_k=4, **quiet)


def test_layers_without_a_row_per_input_are_refused():
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, -x

    class Odd(Given):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.repeat(2, 1, 1, 1))

    with pytest.raises(InvalidArgumentError, match=r"got shape \(6, 2, 3, 3\) for 3 inputs"):
        survey(Odd(), [torch.rand(3, 2, 3, 3)], "layer", **quiet)
    found = survey(Odd(), [torch.rand(3, 2, 3, 3)], "layer", top_k=0, **quiet)
    assert found.stats["layer"].count.tolist() == [54, 54]
    with pytest.raises(InvalidArgumentError, match="`top_k` of 1 or more"):
        found.patches("layer", 0, [])
    with pytest.raises(InvalidArgumentError, match="`0` cannot be surveyed: it must put out one tensor"):
        survey(nn.Sequential(Pair()), [torch.rand(3, 2, 3, 3)], "0", **quiet)


# Parts


def test_surveys_of_parts_merge_to_that_of_the_whole(net):
    images = torch.randn(9, 3, 12, 10)
    options = {"top_k": 4, "correlations": True, **quiet}
    whole = survey(net, images.split(3), "*", **options)
    first = survey(net, images[:6].split(3), "*", **options)
    second = survey(net, [images[6:]], "*", indices=[6, 7, 8], **options)
    same_survey(second.merge(first), whole)
    torch.testing.assert_close(second.merge(first).correlation["0"], whole.correlation["0"])
    with pytest.raises(InvalidArgumentError, match="the same layers with the same `top_k`"):
        first.merge(survey(net, [images], "0", **quiet))
    with pytest.raises(InvalidTypeError, match="must be a Survey"):
        first.merge(None)


# Several processes


SHARED = """
import os, sys, datetime, torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchlens_viz import survey

mode, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True))
images = torch.randint(0, 3, (11, 3, 6, 6)).float()
data = TensorDataset(images)

if mode == "early" and rank == 1: os._exit(7)

class Dying:
    def __init__(self, batches): self.batches = batches
    def __iter__(self):
        yield self.batches[0]
        if mode == "dies": os._exit(7)
        raise ValueError("a bad file")

indices = None
loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=True))
if mode == "shards" or (mode in ("dies", "raises")):
    indices = list(range(rank, 11, 2))
    loader = images[indices].split(2)
    if mode != "shards" and rank == 1: loader = Dying(loader)
if mode == "overlap":
    indices = list(range(11))
    loader = images.split(2)
if mode in ("plain", "early"):
    loader = images.split(2)
try:
    found = survey(net, loader, "*", top_k=4, indices=indices, correlations=True, progress=False)
    found.save(f"{out}/{rank}")
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(3)  # gloo may abort while Python shuts down, once the other process is gone
"""


def two_processes(mode, folder):
    script = folder / "shared.py"
    script.write_text(textwrap.dedent(SHARED))
    start = time.monotonic()
    both = [
        subprocess.Popen(
            [sys.executable, script, mode, str(rank), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [each.communicate(timeout=60) for each in both]
    finally:
        for each in both:
            each.kill()
    assert time.monotonic() - start < 60
    return [(each.returncode, out, err) for each, (out, err) in zip(both, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sampler", "shards"])
def test_two_processes_find_what_one_finds(mode, tmp_path):
    assert [code for code, _, _ in two_processes(mode, tmp_path)] == [0, 0]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True))
    images = torch.randint(0, 3, (11, 3, 6, 6)).float()
    alone = survey(net, [images], "*", top_k=4, correlations=True, **quiet)
    for rank in range(2):
        together = Survey.load(tmp_path / str(rank))
        assert together.samples_seen == 11
        # A convolution of another batch size may round otherwise.
        assert together.top["0"].samples.equal(alone.top["0"].samples)
        assert together.top["0"].positions.equal(alone.top["0"].positions)
        torch.testing.assert_close(together.top["0"].values, alone.top["0"].values)
        assert together.stats["0"].count.equal(alone.stats["0"].count)
        torch.testing.assert_close(together.stats["1"].mean, alone.stats["1"].mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(together.correlation["0"], alone.correlation["0"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "own", "other"),
    [
        ("dies", 7, "DistributedError: another process of this run died"),
        ("early", 7, "DistributedError: another process of this run died before its share began"),
        ("raises", 3, "DistributedError: process 1 failed, .* ValueError: a bad file"),
        ("overlap", 3, "DistributedError: `indices` must name each input in one process only, got 0 in two"),
        ("plain", 3, "InvalidArgumentError: `loader` must have a DistributedSampler"),
    ],
)
def test_a_process_that_fails_is_an_error_on_the_others(mode, own, other, tmp_path):
    import re

    (code, out, _), (other_code, _, _) = two_processes(mode, tmp_path)
    assert (code, other_code) == (3, own)
    assert re.search(other, out)


@pytest.mark.cuda
def test_a_gpu_finds_what_a_cpu_finds_without_waiting():
    maps = torch.randint(-2, 3, (23, 4, 5, 6)).float()
    maps[3, 1, 2, 2], maps[5, 2] = torch.nan, torch.nan
    expected = survey(Given(), maps.split(4), "layer", top_k=6, **quiet)
    found = survey(Given(), maps.split(4), "layer", top_k=6, device="cuda", **quiet)
    same_survey(found, expected)


# Examples and options


def test_the_examples_of_the_documentation_run():
    page = Path(__file__).parents[2] / "docs" / "survey.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_options_may_be_numbers_of_numpy(net, tmp_path):
    found = survey(
        net,
        [torch.rand(2, 3, 8, 8)],
        "*",
        top_k=np.int64(1),
        bins=np.linspace(0, 1, 5),
        checkpoint=tmp_path / "found",
        progress=False,
    )
    assert Survey.load(found.save(tmp_path / "saved")).top_k == 1
