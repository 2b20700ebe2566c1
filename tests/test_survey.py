"""`survey` finds what brute force finds: statistics and top inputs, over any loader, whole or resumed."""

from __future__ import annotations

import doctest
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchlens_viz import LayerNotFoundError, RunningStats, Survey, survey, testing
from torchlens_viz.dataset.tally import Observation, empty_tally
from torchlens_viz.errors import (
    ArchiveError,
    InvalidArgumentError,
    InvalidTypeError,
    MissingDependencyError,
    NoDataError,
)
from torchlens_viz.files.pictures import pictures_in
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


def same(one: Survey, other: Survey, *, rtol: float = 1e-12) -> None:
    """Assert that two surveys agree: exactly but for the moments, which depend on the order of sums."""
    assert (one.samples_seen, one.not_called) == (other.samples_seen, other.not_called)
    for name, stats in one.stats.items():
        for figure, values in stats.to_dict().items():
            if isinstance(values, torch.Tensor):
                exact = figure not in ("mean", "std")
                torch.testing.assert_close(
                    values,
                    getattr(other.stats[name], figure),
                    rtol=0 if exact else rtol,
                    atol=0 if exact else 1e-13,
                    equal_nan=True,
                )
        for part in ("values", "samples", "positions"):
            ours, theirs = (getattr(each.top[name], part) for each in (one, other))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


class Given(nn.Module):
    """A network whose layer puts out what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3)
    ).train()


quiet = {"progress": False}


# Top inputs


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
        seen = Observation("layer", tally, torch.arange(8) + 8 * place, in_order=True, alike=False)
        seen.see(torch.rand(8, channels, 2))
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


@pytest.mark.parametrize(
    ("wrap", "input_of"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(len(x))), None),
        (lambda x: [x, ["name"] * len(x)], None),
        (lambda x: {"labels": torch.zeros(len(x)), "pixel_values": x}, None),
        (lambda x: {"labels": torch.zeros(len(x)), "picture": x}, "picture"),
        (lambda x: (torch.zeros(len(x)), x), 1),
        (lambda x: {"deep": {"x": x}}, lambda batch: batch["deep"]["x"]),
        (lambda x: {"deep": x}, lambda batch: {"input": batch["deep"]}),
    ],
)
def test_the_input_is_found_in_batches_of_every_kind(net, wrap, input_of):
    images = torch.randn(5, 3, 9, 9)
    expected = survey(net, images.split(2), "0", **quiet)
    same(survey(net, map(wrap, images.split(2)), "0", input_of=input_of, **quiet), expected)


def test_dead_and_saturated_channels_are_named():
    maps = torch.rand(6, 4, 2, 2) * 0.5
    maps[:, 1] = 0
    maps[2:, 2, 0, 0] = 6
    maps[0, 3], maps[1:, 3] = torch.inf, -1
    found = survey(Given(), maps.split(2), "layer", top_k=2, **quiet)
    assert found.dead("layer").tolist() == [1]
    assert found.dead("layer", eps=1).tolist() == [0, 1]
    assert found.saturated("layer").tolist() == [2]
    assert found.saturated("layer", share=0.9).tolist() == []
    with pytest.raises(InvalidArgumentError, match="`share` must be above 0"):
        found.saturated("layer", share=0)


def test_duplicates_are_found_by_weight_and_by_response():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU())
    net[0].weight.data = torch.tensor([1.0, 2.0, -1.0, 0.5]).view(4, 1, 1, 1)
    images = torch.rand(20, 1, 2, 2)
    found = survey(net, images.split(6), "*", correlations=True, **quiet)
    peaks = images.amax((1, 2, 3)).double().numpy()
    troughs = -images.amin((1, 2, 3)).double().numpy()
    expected = np.corrcoef(np.stack([peaks, 2 * peaks, troughs, 0.5 * peaks]))
    np.testing.assert_allclose(found.correlation["0"].numpy(), expected, atol=1e-10)
    assert [pair.channels for pair in found.duplicates("0")] == [(0, 1), (0, 3), (1, 3)]
    assert found.duplicates("0")[0].cosine == pytest.approx(1)
    assert [pair.channels for pair in found.duplicates("1")] == [(0, 1), (0, 3), (1, 3)]
    assert found.correlation["1"][2].isnan().all()
    plain = survey(net, images.split(6), "*", **quiet)
    assert [pair.channels for pair in plain.duplicates("0")] == [(0, 1), (0, 3), (1, 3)]
    with pytest.raises(InvalidArgumentError, match="`correlations=True`"):
        plain.duplicates("1")


# What a peak sees


def test_patches_are_cut_from_the_input_where_the_peak_looks(net):
    images = torch.randn(8, 3, 12, 10)
    found = survey(net, images.split(3), "0", top_k=3, **quiet)
    kernel = net[0].weight
    for channel in range(5):
        patches = found.patches("0", channel, TensorDataset(images))
        for patch, value, sample in zip(
            patches, found.top["0"].values[channel], found.top["0"].samples[channel], strict=True
        ):
            assert patch.values.equal(images[sample][:, patch.box[0], patch.box[1]])
            if patch.values.shape == kernel.shape[1:]:
                score = (patch.values * kernel[channel]).sum() + net[0].bias[channel]
                torch.testing.assert_close(score, value, rtol=1e-4, atol=1e-5)
    assert any(patch.values.shape == kernel.shape[1:] for patch in patches)
    sheet = found.grid("0", iter(images), channels=[1, 4], labels=False, upscale=1, padding=1)
    assert sheet.size == (3 * 3 + 4, 2 * 3 + 3)
    shown = found.patches("0", 4, images)[0].pixels
    corner = torch.from_numpy(np.array(sheet.convert("RGB")))[5:8, 1:4].permute(2, 0, 1)
    if shown.shape == (3, 3, 3):
        torch.testing.assert_close(corner / 255, shown, rtol=0, atol=0.5 / 255 + 1e-6)
    assert found.grid("0", DataLoader(TensorDataset(images)), labels=True).mode == "RGB"


def test_patches_of_other_inputs_are_refused(net):
    images = torch.randn(8, 3, 12, 10)
    found = survey(net, images.split(3), "2", top_k=3, **quiet)
    with pytest.raises(InvalidArgumentError, match=r"of shape \(3, 12, 10\), got \(3, 9, 9\)"):
        found.patches("2", 0, torch.randn(8, 3, 9, 9))
    with pytest.raises(InvalidArgumentError, match=r"there is no index|ends before"):
        found.patches("2", 0, images[:1][: int(found.top["2"].samples[0, 0] == 0)])
    with pytest.raises(InvalidArgumentError, match="ends before index"):
        found.patches("2", 0, iter([]))
    with pytest.raises(InvalidArgumentError, match="`channels` must be indices from 0 to 3, got 9"):
        found.grid("2", images, channels=9)
    with pytest.raises(LookupError, match="knows nothing of `1`"):
        found.patches("1", 0, images)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "must yield at least one batch"),
        (lambda: [torch.zeros(0, 3, 9, 9)], "one or more inputs, got shape"),
        (lambda: [{"a": torch.zeros(1, 3, 9, 9)}], "the keys 'a'"),
        (lambda: [np.zeros((1, 3, 9, 9))], "got a ndarray"),
        (lambda: DataLoader(TensorDataset(torch.zeros(4, 3, 9, 9)), shuffle=True), "must not shuffle"),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(4, 3, 9, 9)), batch_sampler=[[1, 0], [2, 3]]),
            "order is not known",
        ),
    ],
)
def test_a_loader_that_is_no_good_is_refused(net, make, message):
    with pytest.raises((NoDataError, InvalidArgumentError, InvalidTypeError), match=message):
        survey(net, make(), "0", **quiet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "`top_k` must be 0 or more"),
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


def test_a_shuffling_loader_is_taken_with_its_indices():
    maps = torch.randn(10, 2, 3, 3)
    order = torch.randperm(10).tolist()
    loader = DataLoader(TensorDataset(maps), batch_size=3, sampler=order)
    expected = survey(Given(), maps.split(3), "layer", **quiet)
    same(survey(Given(), loader, "layer", **quiet), expected)  # a list says its order itself
    same(survey(Given(), maps[order].split(4), "layer", indices=order, **quiet), expected)
    pairs = zip(maps[order].split(4), torch.tensor(order).split(4), strict=True)
    same(survey(Given(), pairs, "layer", indices=lambda batch: batch[1], **quiet), expected)


def test_layers_that_do_not_always_run_are_told_apart():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.often, self.never = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.often(self.always(x)) if x.max() > 0 else self.always(x)

    maps = torch.cat([torch.ones(2, 1, 2, 2), -torch.ones(2, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)])
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


# Files


def test_a_survey_comes_back_from_its_file(net, tmp_path):
    images = torch.randn(7, 3, 12, 10)
    found = survey(net, images.split(3), "*", bins=[0.0, 1.0], correlations=True, **quiet)
    loaded = Survey.load(found.save(tmp_path / "new" / "s.safetensors"))
    same(loaded, found, rtol=0)
    assert loaded.correlation["0"].equal(found.correlation["0"])
    assert repr(loaded) == repr(found)
    assert json.loads(json.dumps(loaded.to_dict())) == json.loads(json.dumps(found.to_dict()))
    assert loaded.rows()[0]["layer"] == "0"
    assert loaded.rows()[0]["max"] == found.stats["0"].max[0].item()
    with pytest.raises(InvalidArgumentError, match="`model` must be given"):
        loaded.patches("0", 0, images)
    ours, theirs = loaded.patches("0", 0, images, model=net)[0], found.patches("0", 0, images)[0]
    assert ours.values.equal(theirs.values)
    (tmp_path / "half").write_bytes((tmp_path / "new" / "s.safetensors").read_bytes()[:99])
    for name in ("half", "missing"):
        with pytest.raises(ArchiveError, match="truncated or no survey"):
            Survey.load(tmp_path / name)


def test_a_frame_needs_pandas(net, monkeypatch):
    found = survey(net, [torch.zeros(1, 3, 9, 9)], "0", **quiet)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        found.to_frame()


def test_surveys_of_parts_merge_to_that_of_the_whole(net):
    images = torch.randn(9, 3, 12, 10)
    options = {"top_k": 4, "correlations": True, **quiet}
    whole = survey(net, images.split(3), "*", **options)
    first = survey(net, images[:6].split(3), "*", **options)
    second = survey(net, [images[6:]], "*", indices=[6, 7, 8], **options)
    same(second.merge(first), whole)
    torch.testing.assert_close(second.merge(first).correlation["0"], whole.correlation["0"])
    with pytest.raises(InvalidArgumentError, match="the same layers with the same `top_k`"):
        first.merge(survey(net, [images], "0", **quiet))
    with pytest.raises(InvalidTypeError, match="must be a Survey"):
        first.merge(None)


# Breaking off and going on


def test_ctrl_c_returns_what_was_seen_and_the_checkpoint_goes_on(net, tmp_path):
    images = torch.randn(12, 3, 12, 10)

    def broken():
        yield from images[:6].split(2)
        raise KeyboardInterrupt

    file = tmp_path / "c"
    found = survey(net, broken(), "*", checkpoint=file, **quiet)
    assert (found.samples_seen, found.is_complete) == (6, False)
    same(found, survey(net, images[:6].split(2), "*", **quiet), rtol=0)
    calls = []
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    whole = survey(net, images.split(2), "*", **quiet)
    calls.clear()
    same(survey(net, iter(images.split(2)), "*", checkpoint=file, **quiet), whole, rtol=0)
    assert len(calls) == 3
    same(survey(net, iter(()), "*", checkpoint=file, **quiet), whole, rtol=0)  # it is finished
    hook.remove()


def test_a_checkpoint_of_something_else_is_refused(net, tmp_path):
    images = torch.randn(8, 3, 12, 10)

    def broken():
        yield from images[:4].split(2)
        raise KeyboardInterrupt

    file = tmp_path / "c"
    survey(net, broken(), "0", checkpoint=file, **quiet)
    for options, message in (({"top_k": 3}, "`top_k` was 9 and now is 3"), ({}, "`layers` was")):
        with pytest.raises(ArchiveError, match=message):
            survey(net, iter(images.split(2)), "0" if options else "2", checkpoint=file, **options, **quiet)
    with pytest.raises(ArchiveError, match="the first batch is not the one"):
        survey(net, iter(images.add(1).split(2)), "0", checkpoint=file, **quiet)
    with pytest.raises(ArchiveError, match="had 4 inputs and now have 3"):
        survey(net, iter([images[:2], images[2:3]]), "0", checkpoint=file, **quiet)
    with torch.no_grad():
        net[0].bias += 1
    with pytest.raises(ArchiveError, match="`weights` was"):
        survey(net, iter(images.split(2)), "0", checkpoint=file, **quiet)
    finished = survey(net, images.split(2), "0", **quiet).save(tmp_path / "finished")
    with pytest.raises(ArchiveError, match="a finished survey"):
        survey(net, images.split(2), "0", checkpoint=finished, **quiet)


SLOW = """
import sys, time, torch
from torch import nn
from torchlens_viz import survey

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True))
images = torch.randn(40, 3, 8, 8)

def loader():
    for number, batch in enumerate(images.split(4)):
        if len(sys.argv) > 3 and number == 6:
            print("far enough", flush=True)
            time.sleep(60)
        yield batch

checkpoint = None if sys.argv[1] == "-" else sys.argv[1]
survey(net, loader(), "*", checkpoint=checkpoint, checkpoint_seconds=0, progress=False).save(sys.argv[2])
"""


@pytest.mark.slow
def test_after_kill_9_it_goes_on_to_the_same_answer(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    run = [sys.executable, str(script)]
    with subprocess.Popen([*run, tmp_path / "c", tmp_path / "no", "slow"], stdout=subprocess.PIPE) as killed:
        assert killed.stdout.readline() == b"far enough\n"
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "no").exists()
    subprocess.run([*run, tmp_path / "c", tmp_path / "resumed"], check=True)
    subprocess.run([*run, "-", tmp_path / "whole"], check=True)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


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


def test_padding_of_a_distributed_sampler_counts_once():
    data = TensorDataset(torch.randn(11, 2, 3, 3))
    parts = []
    for rank in range(4):
        sampler = DistributedSampler(data, num_replicas=4, rank=rank, shuffle=True, seed=3)
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        parts.append(survey(Given(), loader, "layer", top_k=20, **quiet))
    assert [part.samples_seen for part in parts] == [3, 3, 3, 2]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    same(merged, survey(Given(), [data.tensors[0]], "layer", top_k=20, **quiet))


@pytest.mark.cuda
def test_a_gpu_finds_what_a_cpu_finds_without_waiting():
    maps = torch.randint(-2, 3, (23, 4, 5, 6)).float()
    maps[3, 1, 2, 2], maps[5, 2] = torch.nan, torch.nan
    expected = survey(Given(), maps.split(4), "layer", top_k=6, **quiet)
    found = survey(Given(), maps.split(4), "layer", top_k=6, device="cuda", **quiet)
    same(found, expected)


# The command line

FOLDER_MODULE = """
import torch
from torch import nn


def preprocess(image):
    import numpy as np
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1)[None].float() / 255


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].weight.data[1] = model[0].weight.data[0]
    model[0].bias.data[1] = model[0].bias.data[0]
    model[0].bias.data[2] = -100
    return model
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "survey_net.py").write_text(FOLDER_MODULE)
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures / "a.png")
    Image.fromarray(pixels[:10, :8]).convert("CMYK").save(pictures / "b.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(pictures / "c.png")
    Image.fromarray(pixels).convert("P").save(pictures / "deep" / "d.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(pictures / "e.jpg", exif=exif)
    (pictures / "notes.txt").write_text("no picture")
    yield tmp_path
    sys.modules.pop("survey_net", None)


@pytest.fixture
def run(capsys):
    from torchlens_viz.cli.main import main

    def call(*arguments):
        code = main([str(argument) for argument in ("survey", "survey_net:net", *arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def test_the_command_writes_statistics_sheets_and_findings(folder, run):
    code, out, _ = run("pictures", "-o", "out", "--layer", "*", "--batch-size", "2", "--top-k", "3")
    assert code == 0
    names = ("findings.csv", "statistics.csv", "pictures.csv", "statistics.json", "survey.safetensors")
    assert out == [str(folder / "out" / name) for name in (*names, "top/0.png", "top/1.png")]
    found = Survey.load("out/survey.safetensors")
    assert (found.samples_seen, found.dead("1").tolist(), found.duplicates("1")[0].channels) == (
        5,
        [2],
        (0, 1),
    )
    told = json.loads((folder / "out" / "statistics.json").read_text())
    assert told["layers"]["0"]["max"] == found.stats["0"].max.tolist()
    kinds = [line.split(",")[1] for line in (folder / "out" / "findings.csv").read_text().splitlines()]
    assert kinds[:3] == ["kind", "dead", "dead"]
    assert "duplicate" in kinds
    assert "notes.txt" not in (folder / "out" / "pictures.csv").read_text()
    assert not (folder / "out" / "unfinished.safetensors").exists()


def test_a_corrupt_picture_is_named_or_skipped_and_listed(folder, run):
    whole = (folder / "pictures" / "a.png").read_bytes()
    (folder / "pictures" / "bad.png").write_bytes(whole[:200])
    code, out, err = run("pictures", "-o", "out", "--layer", "0")
    assert (code, out, len(err)) == (2, [], 1)
    assert "bad.png" in err[0]
    assert "--skip-bad" in err[0]
    code, _, err = run("pictures", "-o", "out", "--layer", "0", "--skip-bad")
    assert code == 0
    assert any("5 pictures surveyed, 1 bad ones skipped" in line for line in err)
    listed = (folder / "out" / "pictures.csv").read_text().splitlines()
    assert next(line for line in listed if "bad.png" in line).startswith("2,pictures/bad.png,")
    assert set(Survey.load("out/survey.safetensors").top["0"].samples[0].tolist()) == {0, 1, 3, 4, 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("empty", "-o", "out"), "there is none in 'empty'"),
        (("nowhere", "-o", "out"), "must name a folder of pictures, got 'nowhere'"),
        (("pictures", "-o", "survey_net.py"), "must name a folder, got the file"),
        (("pictures", "-o", "out", "--batch-size", "0"), "`--batch-size` must be at least 1, got 0"),
        (("pictures", "-o", "out", "--layer", "none"), "no layer is named `none`"),
        (("bad", "-o", "out", "--skip-bad"), "no picture in 'bad' can be read"),
    ],
)
def test_the_command_refuses_what_it_cannot_survey(folder, run, arguments, message):
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "x.png").write_bytes(b"no picture")
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_torchrun_shares_the_folder_among_processes(folder, run):
    options = ["pictures", "--layer", "*", "--batch-size", "1", "--top-k", "2"]
    assert run(*options, "-o", "alone")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "torchlens_viz", "survey", "survey_net:net", *options, "-o", "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    same(Survey.load("out/survey.safetensors"), Survey.load("alone/survey.safetensors"))
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        path.name for path in (folder / "alone").iterdir()
    )


def test_the_examples_of_the_documentation_run():
    page = Path(__file__).parent.parent / "docs" / "survey.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_a_view_across_rows_is_measured_like_its_copy():
    values = torch.randn(8, 10)[:, :5]
    stats = RunningStats()
    stats.update(values)
    np.testing.assert_allclose(stats.compute().mean, values.double().numpy().mean(0))
    np.testing.assert_allclose(stats.compute().std, values.double().numpy().std(0))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (torch.rand(4, 3, 8, 8), r"got a Tensor, .*`x.split\(64\)`"),
        (TensorDataset(torch.rand(4, 3, 8, 8)), "got a TensorDataset, .*`DataLoader"),
    ],
)
def test_single_inputs_are_not_taken_for_batches(net, loader, message):
    with pytest.raises(InvalidTypeError, match=message):
        survey(net, loader, "*", progress=False)


def test_a_loader_that_loses_the_order_is_refused(net):
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 8, 8)), num_workers=2, in_order=False)
    with pytest.raises(InvalidArgumentError, match="`loader` must keep the order"):
        survey(net, loader, "*", progress=False)


def test_inputs_that_a_sampler_names_and_the_loader_drops_are_refused(net):
    loader = DataLoader(
        TensorDataset(torch.rand(8, 3, 8, 8)),
        batch_size=4,
        sampler=[4, 5, 6, 7],
        collate_fn=lambda rows: torch.stack([row[0] for row in rows[1:]]),
    )
    with pytest.raises(InvalidArgumentError, match="yield every input that its sampler names, got 3"):
        survey(net, loader, "*", progress=False)


def test_an_index_given_twice_is_refused(net):
    batches = torch.rand(8, 3, 8, 8).split(4)
    with pytest.raises(InvalidArgumentError, match="`indices` must name each input once"):
        survey(net, batches, "*", indices=lambda batch: range(len(batch)), progress=False)


def test_rows_of_channels_with_fewer_peaks_stay_rows():
    class Gaps(nn.Module):
        def forward(self, x):
            y = x.clone()
            y[3:, 0] = torch.nan
            y[:, 2] = torch.nan
            return y

    images = torch.rand(8, 3, 10, 10)
    found = survey(nn.Sequential(Gaps()), [images], "0", top_k=5, progress=False)
    one = found.grid("0", images, channels=[0])
    both = found.grid("0", images, channels=[0, 0])
    assert (both.width, both.height) == (one.width, 2 * one.height - 2)
    with pytest.raises(InvalidArgumentError, match="have no top inputs"):
        found.grid("0", images, channels=[2])


def test_a_place_that_cannot_be_written_is_refused_before_the_pass(net):
    with pytest.raises(ArchiveError, match="`checkpoint` must name a file that can be written"):
        survey(net, [torch.rand(2, 3, 8, 8)], "*", checkpoint="/proc/nowhere/found", progress=False)


def test_a_finished_checkpoint_of_other_data_is_refused(net, tmp_path):
    images = torch.rand(8, 3, 8, 8)
    options = {"checkpoint": tmp_path / "found", "progress": False}
    survey(net, images.split(4), "*", **options)
    with pytest.raises(ArchiveError, match="the first batch is not the one"):
        survey(net, (5 * images).split(4), "*", **options)


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


def test_correlations_of_a_part_are_not_taken_for_those_of_the_whole(net):
    images = torch.rand(8, 3, 8, 8)
    one = survey(net, [images[:4]], "*", correlations=True, progress=False)
    other = survey(net, [images[4:]], "*", indices=[4, 5, 6, 7], progress=False)
    with pytest.raises(InvalidArgumentError, match="both must have `correlations`"):
        one.merge(other)


def test_two_inputs_make_no_duplicates():
    net = nn.Sequential(nn.Conv2d(3, 6, 3))
    found = survey(net, [torch.rand(2, 3, 8, 8)], "0", correlations=True, progress=False)
    assert found.duplicates("0") == []


def test_pictures_behind_links_count_and_sheets_of_an_earlier_run_do_not(tmp_path):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (folder / "out" / "top").mkdir(parents=True)
    elsewhere.mkdir()
    for place in (folder / "a.png", elsewhere / "b.png", folder / "out" / "top" / "conv.png"):
        Image.new("RGB", (4, 4)).save(place)
    (folder / "._a.png").write_bytes(b"no picture")
    (folder / "notes.pdf").write_bytes(b"no picture")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    found = pictures_in(folder, but_not_in=folder / "out" / "top")
    assert [path.relative_to(folder).as_posix() for path in found] == ["a.png", "link/b.png"]


def test_ctrl_c_leaves_what_the_command_goes_on_from(folder, run, monkeypatch):
    import torchlens_viz.cli.survey as command

    read, count = command.read_image, iter(range(100))

    def interrupted(path):
        if next(count) == 3:
            raise KeyboardInterrupt
        return read(path)

    arguments, unfinished = ("pictures", "-o", "out", "--batch-size", "1"), Path("out/unfinished.safetensors")
    monkeypatch.setattr(command, "read_image", interrupted)
    assert run(*arguments)[0] == 130
    assert unfinished.exists()
    monkeypatch.setattr(command, "read_image", read)
    assert run(*arguments)[0] == 0
    assert Survey.load("out/survey.safetensors").samples_seen == 5
    assert not unfinished.exists()
