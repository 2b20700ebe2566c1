"""The highest of the parts are the highest of the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchlens_viz.stats.peaks import find_peaks
from torchlens_viz.stats.topk import RunningTop


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
