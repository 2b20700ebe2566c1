"""`RunningStats`: the values of numpy's two passes in float64, whatever the data, however it is split."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
import tracemalloc
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.nets import assert_statistics_right, gathered, numpys_statistics, seeded, stats_of
from torchlens_viz import RunningStats
from torchlens_viz.errors import NoDataError, TorchlensVizError
from torchlens_viz.stats.running import LOG_EDGES

ADVERSARIAL = {
    "normal": seeded(8, 5, 7, 9).float(),
    "float64, offset 1e6, std 1e-3": 1e6 + 1e-3 * seeded(8, 5, 7, 9),
    "float64, offset 1e9, std 1e-3": 1e9 + 1e-3 * seeded(8, 5, 7, 9),
    "float32, offset 1e6, std 1": (1e6 + seeded(8, 5, 7, 9)).float(),
    "half, offset 1000": (1000 + 4 * seeded(8, 5, 7, 9)).half(),
    "bfloat16": (3 + seeded(8, 5, 7, 9)).bfloat16(),
    "an outlier first": torch.cat([torch.full((1, 5, 7, 9), 1e6), 1 + 1e-3 * seeded(8, 5, 7, 9).float()]),
    "tiny": (1e-30 * seeded(8, 5, 7, 9)).float(),
    "huge": (1e38 * seeded(8, 5, 7, 9).clamp(-3, 3)).float(),
    "mean almost zero": torch.cat([seeded(4, 5, 7, 9), -seeded(4, 5, 7, 9)]) + 1e-9,
    "all zero": torch.zeros(8, 5, 7, 9),
    "constant": torch.full((8, 5, 7, 9), 0.1),
    "constant, its square too large": torch.full((8, 5, 7, 9), 2.0**600, dtype=torch.float64),
    "the sum of its squares almost too large": 1e152 * (1 + 1e-6 * seeded(8, 5, 7, 9)),
    "half of it zero": seeded(8, 5, 7, 9).relu(),
    "one sample": seeded(1, 5),
    "one value": seeded(1, 1, 1, 1),
    "one channel": seeded(8, 1, 7, 9),
    "vectors": seeded(64, 5),
    "sequences": seeded(8, 5, 31),
    "one large map": seeded(1, 2, 900, 700).float() + 50,
    "many blocks": seeded(9, 64, 40, 31).float() - 20,
    "many blocks of vectors": seeded(40_001, 31).float(),
    "channels last": seeded(8, 5, 7, 9).to(memory_format=torch.channels_last),
    "expanded": seeded(1, 5, 1, 1).expand(3, 5, 7, 9),
    "strided": seeded(8, 10, 7, 18)[:, ::2, :, ::3],
    "transposed": seeded(7, 9, 5, 8).permute(3, 2, 0, 1),
    "int64": torch.arange(48).view(2, 3, 8) - 20,
    "uint8": (torch.arange(48).view(2, 3, 8) * 7).to(torch.uint8),
    "bool": torch.arange(48).view(2, 3, 8) % 3 == 0,
    "float8": seeded(8, 5, 7).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_they_equal_two_passes_in_float64(name):
    values = ADVERSARIAL[name]
    assert_statistics_right(stats_of(values), values)


@pytest.mark.parametrize("name", ["normal", "bfloat16", "channels last", "many blocks of vectors"])
def test_nan_and_inf_are_counted_and_touch_nothing_else(name):
    values = ADVERSARIAL[name].clone()
    values[0, 0] = torch.nan
    values[1, 0] = torch.inf
    values[2, 1] = -torch.inf
    values[:, 2] = torch.nan  # nothing left
    stats = stats_of(values)
    assert_statistics_right(stats, values)
    assert stats.nonfinite[2] == stats.count[2]
    untouched = stats_of(ADVERSARIAL[name])
    torch.testing.assert_close(stats.mean[3:], untouched.mean[3:], rtol=1e-12, atol=0)
    assert stats.mean[2].isnan()
    assert stats.max[2].isnan()


def test_zeros_are_counted_wherever_they_are_and_nothing_else():
    values = torch.full((3, 2, 1, 2**19 + 5), 1e-200, dtype=torch.float64)  # whose squares are zero
    values[1, 0, 0, -3:] = 0
    values[2, 1, 0, 0] = -0.0
    assert stats_of(values).zero_fraction.mul(3 * (2**19 + 5)).tolist() == pytest.approx([3, 1])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        late = torch.linspace(1, 2, 2**15, dtype=dtype).repeat(40, 2, 1)
        late[-1, 1, -7:] = 0
        assert stats_of(late).zero_fraction.mul(40 * 2**15).tolist() == pytest.approx([0, 7])
        early = late.flip(0)
        assert stats_of(early).zero_fraction.mul(40 * 2**15).tolist() == pytest.approx([0, 7])


def test_counts_beyond_what_float32_holds_are_exact():
    values = torch.zeros(17, 1, 1000, 1000)
    values[3, 0, 5, 7] = 1
    assert gathered(values).to_dict()["zeros"].tolist() == [16_999_999]


def test_a_spread_much_smaller_than_the_mean_keeps_its_digits():
    values = 3e3 + seeded(8, 5, 70, 90)  # sums about zero would lose seven of them
    np.testing.assert_allclose(stats_of(values).std.numpy(), numpys_statistics(values)["std"], rtol=1e-13)


def test_whoever_asks_in_between_changes_no_bit():
    asked, left_alone = RunningStats(), RunningStats()
    for number in range(30):
        values = seeded(20, 3, 50) * (number + 1) + number
        if number % 11 == 10:
            values[3, 1, 4] = torch.nan
        for stats in (asked, left_alone):
            stats._update_with_peaks(values)
        if number % 7 == 0:
            asked.compute()
    assert left_alone.to_dict().keys() == asked.to_dict().keys()
    for name, part in left_alone.to_dict().items():
        if isinstance(part, torch.Tensor):
            assert torch.equal(part, asked.to_dict()[name]), name


def test_merging_gives_the_same_bits_whoever_looked_at_the_other():
    def merged(*, is_read: bool) -> RunningStats:
        other = RunningStats()
        for number in range(9):
            other._update_with_peaks(seeded(20, 3, 50) * (number + 1) + number)
        if is_read:
            other = pickle.loads(pickle.dumps(other))
        return gathered(seeded(8, 3, 7)).merge(other)

    for name, part in merged(is_read=True).to_dict().items():
        if isinstance(part, torch.Tensor):
            assert torch.equal(part, merged(is_read=False).to_dict()[name]), name


def test_reading_in_one_thread_loses_nothing_that_another_takes_in():
    stats, is_over = gathered(torch.ones(1, 2)), threading.Event()

    def read() -> None:
        while not is_over.is_set():
            stats.compute()

    readers = [threading.Thread(target=read) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for reader in readers:
            reader.start()
        for _ in range(1000):
            stats._update_with_peaks(torch.ones(2, 2))
    finally:
        is_over.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)
    assert stats.compute().count.tolist() == [2001, 2001]


def test_what_is_handed_out_is_a_copy():
    stats = gathered(seeded(8, 3, 7))
    merged = RunningStats().merge(stats)
    expected = copy.deepcopy(stats.to_dict())
    for each in (stats, merged):
        for part in (*each.to_dict().values(), *each.compute().to_dict().values()):
            if isinstance(part, torch.Tensor):
                part.fill_(99)
    for name, part in expected.items():
        if isinstance(part, torch.Tensor):
            assert torch.equal(stats.to_dict()[name], part), name
            assert torch.equal(merged.to_dict()[name], part), name


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 200_000, 2), (64, 100_000)])
def test_what_waits_takes_little_memory(shape):
    stats, values = RunningStats(), torch.ones(shape)
    stats._update_with_peaks(values)
    tracemalloc.start()
    try:
        for _ in range(70):
            stats._update_with_peaks(values)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(stats._gathered.late) <= 16
    assert held < 2**21 + 100 * shape[1]  # eight numbers a channel are what is known


@pytest.mark.cuda
@pytest.mark.parametrize(
    "name", ["normal", "bfloat16", "float32, offset 1e6, std 1", "channels last", "bool"]
)
def test_on_cuda_they_are_the_same_and_nothing_waits(name):
    values = ADVERSARIAL[name].cuda()
    stats = RunningStats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats.update(values)
        stats.update(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.compute().mean.is_cuda
    merged = RunningStats()
    merged.update(ADVERSARIAL[name])
    assert_statistics_right(merged.merge(stats).compute(), torch.cat([ADVERSARIAL[name]] * 3))


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((6, 4), 1), ((6, 4), -1), ((6, 4, 3), 1), ((6, 3, 4), -1), ((4, 3, 5), 0)]
)
def test_channels_run_along_the_dimension_that_is_named(shape, channel_dim):
    values = seeded(*shape)
    assert_statistics_right(stats_of(values, channel_dim=channel_dim), values, channel_dim)


numbers = st.one_of(
    st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, -0.0, float("nan"), float("inf"), float("-inf")])
)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.data())
def test_any_split_merges_to_one_pass(rows, data):
    values = torch.tensor(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    parts = [values[low:high] for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    gathered = [RunningStats(bins=(-1, 0, 1)) for _ in parts]
    for stats, part in zip(gathered, parts, strict=True):
        stats.update(part)
    for order in (gathered, gathered[::-1]):
        merged = reduce(RunningStats.merge, order, RunningStats(bins=(-1, 0, 1))).compute()
        whole = stats_of(values, bins=(-1, 0, 1))
        for name in ("min", "max", "zero_fraction", "nonfinite", "count", "histogram"):
            torch.testing.assert_close(
                getattr(merged, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True
            )
        scale = values.nan_to_num(0, 0, 0).abs().amax(0).double()
        for name in ("mean", "std"):
            distance = (getattr(merged, name) - getattr(whole, name)).nan_to_num(0).abs()
            # A variance carries an error of 1e-16 of the squares; its root shows it where it is next to 0.
            assert (distance <= (1e-13 if name == "mean" else 1e-7) * scale).all()
        assert torch.equal(merged.mean.isnan(), whole.mean.isnan())


def test_histogram_counts_between_the_edges():
    values = torch.tensor([[-2.0, 0.0], [-1.0, 0.5], [0.0, torch.nan], [1.0, 9.0]])
    stats = stats_of(values, bins=[-1, 0, 1])
    assert stats.bins == (-1.0, 0.0, 1.0)
    assert stats.histogram.tolist() == [[1, 1, 1, 1], [0, 0, 2, 1]]
    assert stats_of(values).histogram is None


@pytest.mark.parametrize("name", ["many blocks", "many blocks of vectors", "channels last", "one large map"])
def test_histogram_equals_numpys(name):
    values = ADVERSARIAL[name]
    found = stats_of(values, bins="log").histogram
    edges = [-np.inf, *LOG_EDGES, np.inf]
    for row, counts in zip(values.transpose(0, 1).flatten(1).double().numpy(), found, strict=True):
        assert counts.tolist() == np.histogram(row, edges)[0].tolist()
    assert 0.0 in LOG_EDGES
    assert [-edge for edge in reversed(LOG_EDGES)] == list(LOG_EDGES)


def test_empty_tensors_add_nothing():
    values = seeded(4, 3, 2)
    stats = stats_of(torch.zeros(0, 3, 2), values, torch.zeros(4, 3, 0))
    assert_statistics_right(stats, values)
    nothing = stats_of(torch.zeros(0, 3), bins=[0])
    assert nothing.count.tolist() == [0, 0, 0]
    assert nothing.mean.isnan().all()
    assert nothing.histogram.tolist() == [[0, 0]] * 3


def test_the_caller_s_tensor_does_not_change_and_keeps_no_graph():
    values = seeded(4, 3, 5).requires_grad_()
    before = values.detach().clone()
    stats = stats_of(values)
    assert torch.equal(values, before)
    assert not stats.mean.requires_grad
    with torch.inference_mode():
        inside = stats_of(before)
    assert not inside.mean.is_inference()


def test_half_precision_under_autocast_loses_nothing():
    values = (100 + seeded(8, 3, 5)).bfloat16()
    with torch.autocast("cpu"):
        assert_statistics_right(stats_of(values, values), torch.cat([values, values]))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_quantised_and_sparse_values_count_as_what_they_stand_for():
    values = seeded(4, 3).float().round()
    assert_statistics_right(stats_of(values.to_sparse()), values)
    quantised = torch.quantize_per_tensor(values, 0.5, 20, torch.quint8)
    assert_statistics_right(stats_of(quantised), quantised.dequantize())


def test_pooled_speaks_of_the_whole_layer():
    values = 5 + seeded(4, 3, 6)
    values[0, 0, 0], values[1, 1, 1], values[:, 2] = torch.nan, 0, torch.inf
    pooled = stats_of(values, bins=[5]).pooled()
    assert_statistics_right(pooled, values.reshape(-1, 1))
    assert pooled.histogram.sum() == pooled.count - pooled.nonfinite
    assert pooled.channels == 1


def test_dead_channels_never_exceed_eps():
    stats = stats_of(torch.tensor([[0.0, -1.0, 0.1, torch.nan], [-3.0, 1.0, 0.0, torch.nan]]))
    assert stats.dead().tolist() == [0]
    assert stats.dead(0.2).tolist() == [0, 2]


def test_reset_forgets():
    stats = RunningStats()
    with pytest.raises(NoDataError, match=r"there are no statistics yet; call `update\(values\)` first"):
        stats.compute()
    stats.update(seeded(4, 3))
    stats.reset()
    assert repr(stats) == "RunningStats(nothing yet)"
    stats.update(seeded(4, 2))
    assert_statistics_right(stats.compute(), seeded(4, 2))


@pytest.mark.parametrize("how", ["pickle", "dict", "json"])
def test_they_survive_being_written_down(how):
    stats = RunningStats(channel_dim=-1, bins=[0, 1])
    stats.update(seeded(4, 2, 3))
    for original in (stats, RunningStats(bins="log")):
        if how == "pickle":
            restored = pickle.loads(pickle.dumps(original))
        else:
            state = original.to_dict()
            if how == "json":
                state = json.loads(json.dumps(state, default=torch.Tensor.tolist))
            restored = RunningStats.from_dict(state)
        assert (restored.channel_dim, restored.bins) == (original.channel_dim, original.bins)
        assert restored.to_dict().keys() == original.to_dict().keys()
        restored.update(seeded(4, 2, 3) + 1)
        original.update(seeded(4, 2, 3) + 1)
        for name in ("mean", "std", "histogram", "count"):
            assert torch.equal(getattr(restored.compute(), name), getattr(original.compute(), name))
    with pytest.raises(
        ValueError, match=r"`state` must be what `to_dict` returned, got one without \['zeros'"
    ):
        RunningStats.from_dict({"total": [1], "finite": [1]})


def test_they_say_what_they_hold():
    values = torch.tensor([[0.0, 2.0], [4.0, torch.inf]])
    expected = (
        "ChannelStats(2 channels, mean 2, std 0..2, min 0..2, max 2..4, zero_fraction 0..0.5, "
        "nonfinite 0..1, count 2)"
    )
    assert repr(stats_of(values)) == expected
    assert repr(stats_of(torch.zeros(3, 0))) == "ChannelStats(0 channels)"


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda: stats_of([1.0]), TypeError, "`values` must be a tensor, got list"),
        (
            lambda: stats_of(torch.zeros(2, 2, dtype=torch.complex64)),
            TypeError,
            "`values` must be a tensor of real numbers, got one that is torch.complex64",
        ),
        (lambda: stats_of(torch.zeros(2, 2, device="meta")), TypeError, "got one that is a meta tensor"),
        (
            lambda: stats_of(torch.zeros(3)),
            ValueError,
            r"`channel_dim` must be a dimension of the values, got 1 \(shape \(3,\)\)",
        ),
        (
            lambda: stats_of(torch.zeros(2, 3), torch.zeros(2, 4)),
            ValueError,
            r"`values` must have 3 channels as before, got 4 \(shape \(2, 4\), `channel_dim` 1\)",
        ),
        (lambda: RunningStats(bins=[1, 1]), ValueError, r"`bins` must be finite edges that increase, got"),
        (lambda: RunningStats(bins=[]), ValueError, r"`bins` must be finite edges that increase, got \[\]"),
        (lambda: RunningStats(bins="lin"), ValueError, '`bins` must be "log", increasing edges or None'),
        (lambda: RunningStats().merge(3), TypeError, "`other` must be a RunningStats, got int"),
        (lambda: RunningStats().merge(RunningStats(bins="log")), ValueError, "must have the same `bins`"),
    ],
)
def test_what_cannot_be_used_is_refused(act, kind, message):
    with pytest.raises(kind, match=message) as caught:
        act()
    assert isinstance(caught.value, TorchlensVizError)


def test_merging_other_channels_is_refused():
    one, two = RunningStats(), RunningStats()
    one.update(torch.zeros(2, 3))
    two.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`other` must have 3 channels, got 4"):
        one.merge(two)
    assert one.merge(RunningStats()).compute().channels == 3


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_nothing_seen_beside_large_values_leaves_their_figures(order):
    parts = [
        torch.full((2, 3, 4, 4), 1e200, dtype=torch.float64),
        torch.zeros(0, 3, 4, 4, dtype=torch.float64),
    ]
    stats = RunningStats()
    for place in order:
        stats.update(parts[place])
    assert stats.compute().std.tolist() == [0] * 3
    assert stats.compute().mean.tolist() == [1e200] * 3
    lost = torch.full((1, 2, 4), torch.nan, dtype=torch.float64)
    lost[:, 0] = 1e200
    mixed = RunningStats()
    mixed.update(lost)
    assert mixed.compute().pooled().std.tolist() == [0]
