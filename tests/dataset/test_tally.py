"""What is known of a layer, batch by batch: the top inputs are those of brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.nets import Given, quiet
from torchlens_viz import survey
from torchlens_viz.dataset.observation import Observation
from torchlens_viz.dataset.tally import empty_tally
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.peaks import find_peaks
from torchlens_viz.stats.topk import RunningTop


def brute_force(maps: torch.Tensor, k: int, samples: list[int]) -> tuple[list, list, list]:
    """Values, indices and positions of the k highest peaks of every channel of maps (N, C, H, W)."""
    values, indices, positions = [], [], []
    for channel in range(maps.shape[1]):
        peaks = []
        for row, sample in enumerate(samples):
            plane = maps[row, channel].double().numpy()
            if not np.isnan(plane).all():
                place = int(np.nanargmax(plane))
                peaks.append((-plane.flat[place], sample, divmod(place, plane.shape[1])))
        best = sorted(peaks)[:k]
        values.append([-value for value, _, _ in best])
        indices.append([sample for _, sample, _ in best])
        positions.append([list(place) for _, _, place in best])
    return values, indices, positions


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    k=st.integers(1, 6),
    size=st.integers(1, 5),
    levels=st.integers(1, 4),
    with_nan=st.booleans(),
    is_shuffled=st.booleans(),
)
def test_top_inputs_are_those_of_brute_force(seed, count, k, size, levels, with_nan, is_shuffled):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, levels, (count, 3, 2, 3), generator=generator).float() - 1
    if with_nan:
        maps[torch.rand(maps.shape, generator=generator) < 0.5] = torch.nan
    samples = torch.randperm(50, generator=generator)[:count].tolist() if is_shuffled else list(range(count))
    found = survey(
        Given(), maps.split(size), "layer", top_k=k, indices=samples if is_shuffled else None, **quiet
    ).top["layer"]
    values, indices, positions = brute_force(maps, k, samples)
    assert found.values.shape[1] == max(map(len, values))
    for channel in range(3):
        there = len(values[channel])
        assert found.values[channel, :there].tolist() == values[channel]
        assert found.samples[channel, :there].tolist() == indices[channel]
        assert found.positions[channel, :there].tolist() == positions[channel]
        assert found.values[channel, there:].isnan().all()
        assert (found.samples[channel, there:] == -1).all()
        assert (found.positions[channel, there:] == -1).all()


@pytest.mark.parametrize("levels", [3, 1000])
def test_top_inputs_of_many_batches_are_those_of_brute_force(levels):
    generator = torch.Generator().manual_seed(levels)
    maps = torch.randint(0, levels, (301, 3, 2, 3), generator=generator).float()
    maps[100:140] = torch.nan
    maps[290, 1, 1, 2] = levels
    survey_of_all = survey(Given(), maps.split(2), "layer", top_k=4, **quiet)
    found = survey_of_all.top["layer"]
    values, indices, positions = brute_force(maps, 4, list(range(301)))
    assert (found.values.tolist(), found.samples.tolist(), found.positions.tolist()) == (
        values,
        indices,
        positions,
    )
    running = RunningTop(4)
    whole = running.with_peaks(find_peaks(maps, 1, k=4), torch.arange(301), in_order=True)
    batched = survey_of_all._tallies["layer"].top
    assert torch.equal(whole.best()[0], batched.best()[0])
    assert torch.equal(whole.best()[1], batched.best()[1])


def test_batches_out_of_order_may_follow_those_in_order():
    generator = torch.Generator().manual_seed(7)
    maps = torch.randint(0, 3, (200, 3, 2, 3), generator=generator).float()
    maps[146:149] += 3
    samples = [*range(150, 300), *torch.randperm(50, generator=generator).tolist()]
    found = survey(Given(), maps.split(4), "layer", top_k=4, indices=samples, **quiet).top["layer"]
    values, indices, positions = brute_force(maps, 4, samples)
    assert (found.values.tolist(), found.samples.tolist(), found.positions.tolist()) == (
        values,
        indices,
        positions,
    )


@pytest.mark.parametrize(("channels", "do_wait"), [(3, True), (30_000, False)])
def test_peaks_wait_where_they_take_little_memory(channels, do_wait):
    tally, waited = empty_tally(top_k=2, channel_dim=1, bins=None), 0
    for place in range(12):
        seen = Observation(
            "layer", tally, torch.arange(8) + 8 * place, in_order=True, alike=False, by_input=False
        )
        seen.see(torch.rand(8, channels, 2), 1)
        tally = seen.finish()
        waited = max(waited, len(tally.pending))
    assert (waited > 0) == do_wait


def test_channels_that_are_far_from_zero_or_constant_have_the_same_top_and_exact_statistics():
    maps = torch.randn(41, 4, 5, 3)
    maps[:, 1] += 1e6
    maps[:, 2] = 7
    maps[3, 3, 2, 1] = torch.inf
    found = survey(Given(), maps.split(4), "layer", top_k=3, **quiet)
    values, indices, positions = brute_force(maps, 3, list(range(41)))
    top, stats = found.top["layer"], found.stats["layer"]
    assert (top.values.tolist(), top.samples.tolist(), top.positions.tolist()) == (values, indices, positions)
    wide = maps.double().transpose(0, 1).flatten(1)[:3]
    torch.testing.assert_close(stats.mean[:3], wide.mean(1), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(stats.std[:3], wide.std(1, correction=0), rtol=1e-9, atol=0)
    assert (stats.std[2], stats.mean[2], stats.nonfinite.tolist()) == (0, 7, [0, 0, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_positions_are_right_in_every_type_and_layout(dtype, layout):
    maps = torch.randn(7, 4, 5, 6).to(dtype).to(memory_format=layout)
    top = survey(Given(), maps.split(3), "layer", top_k=7, **quiet).top["layer"]
    for channel in range(4):
        for value, sample, (row, column) in zip(
            top.values[channel], top.samples[channel], top.positions[channel], strict=True
        ):
            assert (
                value.item()
                == maps[sample, channel, row, column].item()
                == maps[sample, channel].max().item()
            )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("with_nan", [False, True])
def test_peaks_of_small_types_are_float32(dtype, channel_dim, with_nan):
    values = torch.arange(48.0).view(4, 3, 4)
    values[2, 1, 1] = torch.nan if with_nan else 0
    batches = values.to(dtype).split(2)
    top = survey(Given(), batches, "layer", top_k=2, channel_dim=channel_dim, **quiet).top["layer"]
    assert top.values.dtype == torch.float32
    highest = values.to(dtype).float().nan_to_num(0).amax(2 if channel_dim == 1 else 1)
    assert torch.equal(top.values, highest.T.sort(dim=1, descending=True).values[:, :2])


def test_layers_of_any_rank_have_peaks():
    vector, signal, volume = torch.randn(4, 3), torch.randn(4, 3, 5), torch.randn(4, 3, 2, 3, 4)
    top = survey(Given(), [vector], "layer", top_k=1, **quiet).top["layer"]
    assert top.samples[:, 0].equal(vector.argmax(0))
    assert top.positions.tolist() == [[[0, 0]]] * 3
    top = survey(Given(), [signal], "layer", top_k=1, **quiet).top["layer"]
    sample = signal.amax(2).argmax(0)
    assert top.positions[:, 0].tolist() == [[0, int(signal[n, c].argmax())] for c, n in enumerate(sample)]
    tokens = survey(Given(), [signal.transpose(1, 2)], "layer", top_k=1, channel_dim=-1, **quiet)
    assert tokens.top["layer"].positions.equal(top.positions)
    top = survey(Given(), [volume], "layer", top_k=1, **quiet).top["layer"]
    sample = volume.flatten(2).amax(2).argmax(0)
    places = [np.unravel_index(int(volume[n, c].argmax()), (2, 3, 4)) for c, n in enumerate(sample)]
    assert top.positions[:, 0].tolist() == [list(map(int, place)) for place in places]


def test_a_layer_that_runs_twice_counts_each_input_once_at_its_higher_peak():
    class Twice(Given):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(-x) + self.layer(x)

    maps = torch.randn(9, 2, 3, 3)
    found = survey(Twice(), maps.split(2), "layer", top_k=9, **quiet)
    assert found.top["layer"].values.equal(maps.abs().amax((2, 3)).T.sort(descending=True).values)
    assert found.stats["layer"].count.tolist() == [2 * 81] * 2
    for channel in range(2):
        for sample, (row, column) in zip(
            found.top["layer"].samples[channel], found.top["layer"].positions[channel], strict=True
        ):
            assert maps[sample, channel, row, column].abs() == maps[sample, channel].abs().max()
    with pytest.raises(InvalidArgumentError, match="ran 2 times for one batch"):
        found.patches("layer", 0, maps)
