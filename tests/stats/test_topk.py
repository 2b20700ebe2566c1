"""The highest of the parts are the highest of the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchlens_viz.stats.peaks import find_peaks
from torchlens_viz.stats.topk import RunningTop, Top


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 9), k=st.integers(1, 5))
def test_the_union_of_two_parts_is_the_top_of_the_whole(seed, cut, k):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 3, (10, 2, 2, 2), generator=generator).float()
    order = torch.randperm(10, generator=generator)

    def top(rows: torch.Tensor) -> RunningTop:
        running = RunningTop(k)
        return running.with_peaks(find_peaks(maps[rows], 1, k=k), rows, in_order=False)

    whole, parts = top(torch.arange(10)), top(order[:cut]).union(top(order[cut:]))
    for part in ("values", "samples", "positions"):
        assert torch.equal(getattr(whole.compute(), part), getattr(parts.compute(), part))
    assert torch.equal(whole.best()[1], parts.best()[1])


def test_a_top_is_shown_in_a_few_lines():
    values = torch.arange(40.0, 0.0, -1.0).reshape(10, 4)
    samples = torch.arange(40).reshape(10, 4)
    positions = torch.stack([samples, samples + 1], 2)
    lines = repr(Top(values=values, samples=samples, positions=positions)).splitlines()
    assert lines[0] == "Top 4 inputs of 10 channels: value #sample at position"
    assert lines[1] == "  0: 40 #0 at (0, 1), 39 #1 at (1, 2), 38 #2 at (2, 3), ..."
    assert lines[8].startswith("  7: 12 #28 at (28, 29)")
    assert lines[9] == "  ... 2 more"
    few = repr(Top(values=values[:2, :1], samples=samples[:2, :1], positions=positions[:2, :1]))
    assert few.splitlines()[1:] == ["  0: 40 #0 at (0, 1)", "  1: 36 #4 at (4, 5)"]
