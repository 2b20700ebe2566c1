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
from torch import nn

from torchlens_viz import ChannelStats, RunningStats, capture
from torchlens_viz.errors import CaptureError, NoDataError, TorchlensVizError
from torchlens_viz.stats.running import LOG_EDGES


def gathered(*parts: torch.Tensor, **options) -> RunningStats:
    stats = RunningStats(**options)
    for part in parts:
        stats.update(part)
    return stats


def stats_of(*parts: torch.Tensor, **options) -> ChannelStats:
    return gathered(*parts, **options).compute()


def reference(values: torch.Tensor, channel_dim: int = 1) -> dict[str, np.ndarray]:
    """Two passes in float64 over the finite values of each channel, by numpy."""
    rows = values.double().movedim(channel_dim, 0).flatten(1).numpy()
    found = {name: [] for name in ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")}
    for row in rows:
        kept = row[np.isfinite(row)]
        nothing = kept.size == 0
        found["mean"].append(np.nan if nothing else kept.mean())
        found["std"].append(np.nan if nothing else np.sqrt(((kept - kept.mean()) ** 2).mean()))
        found["min"].append(np.nan if nothing else kept.min())
        found["max"].append(np.nan if nothing else kept.max())
        found["zero_fraction"].append(np.nan if nothing else (kept == 0).mean())
        found["nonfinite"].append(row.size - kept.size)
        found["count"].append(row.size)
    return {name: np.array(column) for name, column in found.items()}


def assert_right(stats: ChannelStats, values: torch.Tensor, channel_dim: int = 1) -> None:
    expected = reference(values, channel_dim)
    for name in ("min", "max", "zero_fraction", "nonfinite", "count"):
        np.testing.assert_array_equal(getattr(stats, name).numpy(), expected[name], err_msg=name)
    scale = np.nan_to_num(np.abs([expected["mean"], expected["std"]])).max(0)
    assert np.all(np.isnan(expected["mean"]) == np.isnan(stats.mean.numpy()))
    for name in ("mean", "std"):
        known = ~np.isnan(expected[name])
        is_near = np.abs(getattr(stats, name).numpy() - expected[name])[known] <= 1e-12 * scale[known]
        assert is_near.all(), (name, getattr(stats, name), expected[name])
    seen = expected["std"] > 1e-12 * scale  # numpy's own rounding makes a spread of what is constant
    np.testing.assert_allclose(stats.std.numpy()[seen], expected["std"][seen], rtol=1e-6)


def seeded(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


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
    assert_right(stats_of(values), values)


@pytest.mark.parametrize("name", ["normal", "bfloat16", "channels last", "many blocks of vectors"])
def test_nan_and_inf_are_counted_and_touch_nothing_else(name):
    values = ADVERSARIAL[name].clone()
    values[0, 0] = torch.nan
    values[1, 0] = torch.inf
    values[2, 1] = -torch.inf
    values[:, 2] = torch.nan  # nothing left
    stats = stats_of(values)
    assert_right(stats, values)
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
    np.testing.assert_allclose(stats_of(values).std.numpy(), reference(values)["std"], rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_way_of_other_devices_gives_the_same(monkeypatch, dtype):
    from torchlens_viz.stats import measure as measuring

    values = (30 + seeded(9, 5, 70, 31)).to(dtype)  # not so far from zero that a CPU would go the same way
    assert isinstance(measuring.measure(values, 1, None).moments, measuring.Sums)
    expected = gathered(values).to_dict()
    monkeypatch.setattr(measuring, "_is_odd", lambda sums: np.ones(5, bool))
    assert isinstance(measuring.measure(values, 1, None).moments, measuring.Moments)
    found = gathered(values).to_dict()
    for name in ("total", "finite", "zeros", "low", "high"):
        assert torch.equal(found[name], expected[name])
    torch.testing.assert_close(found["mean"], expected["mean"], rtol=1e-13, atol=0)
    torch.testing.assert_close(found["squares"], expected["squares"], rtol=1e-9, atol=0)


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
    assert_right(merged.merge(stats).compute(), torch.cat([ADVERSARIAL[name]] * 3))


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((6, 4), 1), ((6, 4), -1), ((6, 4, 3), 1), ((6, 3, 4), -1), ((4, 3, 5), 0)]
)
def test_channels_run_along_the_dimension_that_is_named(shape, channel_dim):
    values = seeded(*shape)
    assert_right(stats_of(values, channel_dim=channel_dim), values, channel_dim)


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
    assert_right(stats, values)
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
        assert_right(stats_of(values, values), torch.cat([values, values]))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_quantised_and_sparse_values_count_as_what_they_stand_for():
    values = seeded(4, 3).float().round()
    assert_right(stats_of(values.to_sparse()), values)
    quantised = torch.quantize_per_tensor(values, 0.5, 20, torch.quint8)
    assert_right(stats_of(quantised), quantised.dequantize())


def test_pooled_speaks_of_the_whole_layer():
    values = 5 + seeded(4, 3, 6)
    values[0, 0, 0], values[1, 1, 1], values[:, 2] = torch.nan, 0, torch.inf
    pooled = stats_of(values, bins=[5]).pooled()
    assert_right(pooled, values.reshape(-1, 1))
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
    assert_right(stats.compute(), seeded(4, 2))


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


def test_channel_stats_survive_being_written_down():
    stats = stats_of(seeded(4, 3), bins=[0])
    again = ChannelStats(**pickle.loads(pickle.dumps(stats)).to_dict())
    assert torch.equal(again.std, stats.std)
    assert again.bins == stats.bins
    assert torch.equal(stats.to("cpu").histogram, stats.histogram)


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
        (lambda: RunningStats(bins=[]), ValueError, r"`bins` must be finite edges that increase, got \(\)"),
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


# In a capture.


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).eval()


def test_capture_gathers_over_all_calls_and_keeps_no_activation(net):
    batches = [seeded(2, 3, 8, 8).float(), seeded(3, 3, 9, 7).float() + 1]
    with torch.no_grad(), capture(net, ["0", "1"], reduce=RunningStats) as acts:
        net(batches[0])
        held = acts._held_bytes
        assert_right(acts["0"], net[0](batches[0]).transpose(0, 1).flatten(1).T)  # a call of its own
        for batch in batches[1:] * 5:
            net(batch)
    seen = [net[0](batch).detach() for batch in [batches[0], batches[0], *batches[1:] * 5]]
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in seen], 1).T
    # The call after the first one was caught by the hook too, so that it is in the later reading alone.
    assert_right(acts["0"], flat)
    assert len(acts.calls("0")) == 1
    assert acts._held_bytes == held < 1000
    assert acts["1"].zero_fraction.min() > 0
    assert acts["0"].zero_fraction.max() == 0


def test_capture_takes_the_options_of_an_example(net):
    example = RunningStats(channel_dim=-1, bins=[0])
    with torch.no_grad(), capture(net, "0", reduce=example) as acts:
        net(torch.zeros(1, 3, 8, 9))
    assert acts["0"].channels == 7
    assert acts["0"].histogram.shape == (7, 2)
    assert repr(example) == "RunningStats(nothing yet)"
    with torch.no_grad(), capture(net, "0", reduce=RunningStats, channels=[3, 1]) as acts:
        net(seeded(1, 3, 8, 9).float())
    assert_right(acts["0"], net[0](seeded(1, 3, 8, 9).float())[:, [3, 1]].detach())
    with torch.no_grad(), capture(net, "0", reduce=RunningStats, channel_dim=2) as acts:
        net(torch.zeros(1, 3, 8, 9))
    assert acts["0"].channels == 6


def test_capture_gathers_for_both_names_of_a_shared_module():
    relu = nn.ReLU()
    net = nn.Sequential(relu, nn.Conv2d(3, 3, 1), relu).eval()
    x = seeded(2, 3, 4, 4).float()
    with torch.no_grad(), capture(net, ["0", "2"], reduce=RunningStats) as acts:
        y = net(x)
    for name in ("0", "2"):
        assert_right(acts[name], torch.cat([x.relu(), y]))


def test_capture_gathers_what_is_in_tuples_and_inputs(net):
    lstm = nn.LSTM(3, 5, batch_first=True)
    with torch.no_grad(), capture(lstm, "", reduce=RunningStats(channel_dim=-1)) as acts:
        output, (hidden, _) = lstm(seeded(2, 7, 3).float())
    assert_right(acts[""][0], output, -1)
    assert_right(acts[""][1][0], hidden, -1)
    x = seeded(2, 3, 8, 8).float()
    with torch.no_grad(), capture(net, "1", io="both", reduce=RunningStats) as acts:
        net(x)
        net(x)
    assert_right(acts["1"].input, torch.cat([net[0](x).detach()] * 2))
    assert_right(acts["1"].output, torch.cat([net[0](x).detach().relu()] * 2))


def test_capture_of_statistics_knows_what_did_not_run_forgets_and_shows_itself(net):
    net.spare = nn.Identity()
    net.forward = lambda x: net[2](net[1](net[0](x)))
    with torch.no_grad(), capture(net, ["0", "spare"], reduce=RunningStats) as acts:
        net(torch.zeros(1, 3, 8, 8))
        acts.clear()
        assert acts.not_called == ("0", "spare")
        net(torch.zeros(1, 3, 8, 8))
    assert acts.not_called == ("spare",)
    assert acts["0"].count.tolist() == [36] * 4
    assert "statistics (4,)  float64  cpu" in repr(acts)


def test_statistics_are_not_saved_as_activations(net, tmp_path):
    with torch.no_grad(), capture(net, "0", reduce=RunningStats) as acts:
        net(torch.zeros(1, 3, 8, 8))
    message = (
        r"`0#0` is statistics \(`reduce=RunningStats`\), which a file of activations does not hold; save"
    )
    with pytest.raises(OSError, match=message):
        acts.save(tmp_path / "acts.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [{"copy": "lazy"}, {"grad": True}, {"dtype": torch.half}, {"device": "cpu"}], ids=str
)
def test_options_without_effect_on_statistics_are_refused(net, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` has no effect with `reduce=RunningStats`"):
        capture(net, "0", reduce=RunningStats, **option)


@pytest.mark.parametrize("swallows", [False, True])
def test_calls_that_have_nothing_in_common_are_refused(swallows):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, *values):
            for value in values:
                try:
                    self.inner(value)
                except CaptureError:
                    if not swallows:
                        raise

    net = Caller()
    first = torch.zeros(1, 3)
    message = "the calls of `inner` have no statistics in common: `other` must have 3 channels, got 4"
    with pytest.raises(CaptureError, match=message), capture(net, "inner", reduce=RunningStats):
        net(first, torch.zeros(1, 4))
    message = "`inner` had 1 tensors in its first call and 2 in a later one, which have no statistics"
    with pytest.raises(CaptureError, match=message), capture(net, "inner", reduce=RunningStats):
        net(first, (first, first.clone()))
    message = r"there are no statistics of `inner`: `channel_dim` must be a dimension of the values, got 1"
    if not swallows:
        with pytest.raises(ValueError, match=message), capture(net, "inner", reduce=RunningStats):
            net(torch.zeros(3))


def test_the_limit_on_memory_counts_statistics(net):
    from torchlens_viz.errors import CaptureMemoryError

    with torch.no_grad(), capture(net, "0", reduce=RunningStats, max_bytes=250) as acts:
        for _ in range(5):
            acts.clear()
            net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(CaptureMemoryError, match="`0` needs 224 bytes, 0 are held and `max_bytes` is 100"):
        with torch.no_grad(), capture(net, "0", reduce=RunningStats, max_bytes=100):
            net(torch.zeros(1, 3, 8, 8))
