"""`overlay_grid` over slices of volumes and clips, and behind the curves of signals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.nets import ResNet1d, UNet3d
from tests.pixels import GREEN, MAGENTA, WHITE, written
from torchlens_viz.draw.curves import curves
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.grids.overlay import overlay_grid

PLANES = ("depth", "height", "width")
SPOT = (8, 4, 12)


def passing(rank: int, stride: int) -> nn.Module:
    """Passes every `stride`-th value on, after a shift that only the receptive field tells."""
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[rank](1, 1, 3, stride, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    conv.weight.data[(0, 0, *[1] * rank)] = 1.0
    return nn.Sequential(conv)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_a_voxel_that_fires_is_shown_where_it_is(plane, interpolation):
    volume = torch.zeros(1, 17, 13, 21)
    volume[0, *SPOT] = 1.0
    axis = PLANES.index(plane)
    options = {"alpha": 1.0, "cmap": "gray", "labels": False, "upscale": 1, "plane": plane}
    options |= {"interpolation": interpolation}
    here = pixels(overlay_grid(passing(3, 4), "0", volume, slices=SPOT[axis], **options))[1:-1, 1:-1].sum(2)
    rest = tuple(place for place in range(3) if place != axis)
    sides = tuple(volume.shape[1 + place] for place in rest)
    assert here.shape == sides
    row, column = (SPOT[place] for place in rest)
    assert here[row, column] == here.max() == 3 * 255
    away = pixels(overlay_grid(passing(3, 4), "0", volume, slices=SPOT[axis] - 4, **options))[1:-1, 1:-1]
    assert away.max() == 0
    most = pixels(overlay_grid(passing(3, 4), "0", volume, slices="max", **options))[1:-1, 1:-1].sum(2)
    assert np.array_equal(most, here)


def test_several_slices_make_a_row_for_each_map(monkeypatch):
    lines = written(monkeypatch)
    net, volume = UNet3d().eval(), torch.rand(1, 8, 12, 16)
    sheet = overlay_grid(net, "down", volume, channels=[5, 2], slices=[1, 6], upscale=2, legend=True)
    assert lines[:4] == ["5@1", "5@6", "2@1", "2@6"]
    assert lines[-1] == "after @: the slice, of 8 along depth"
    assert "down: a position sees 5 x 5 x 5 voxels, every 2 x 2 x 2" in lines
    assert sheet.width >= 2 * 33


def test_ranking_and_pages_count_whole_rows(monkeypatch):
    lines = written(monkeypatch)
    net = nn.Sequential(nn.Conv3d(1, 3, 1, bias=False))
    net[0].weight.data.copy_(torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1, 1, 1))
    options = {"sort_by": "mean", "max_tiles": 4, "slices": [0, 1], "upscale": 1}
    overlay_grid(net, "0", torch.rand(1, 4, 5, 6), **options)
    assert lines[:4] == ["1@0", "1@1", "2@0", "2@1"]
    assert lines[-1] == "4 of 6 shown, ranked by mean"


def test_a_sample_that_fires_colours_the_page_behind_the_curve():
    signal = torch.zeros(1, 101)
    signal[0, 40] = 1.0
    net = passing(1, 4)
    drawn = pixels(
        overlay_grid(net, "0", signal, labels=False, upscale=3, interpolation="nearest", alpha=1.0)
    )
    row = drawn[1:-1, 1:-1][20]  # between the line at zero and the top, where only the peak is drawn
    assert row.shape == (303, 3)
    red = (row == (103, 0, 31)).all(1) | (row == 0).all(1)  # the deepest red, and the curve itself
    # Positions stand 4 samples apart: the one over sample 40 reaches from the middle of 38 to that of 42.
    assert (red.nonzero()[0].min(), red.nonzero()[0].max()) == (3 * 38 + 1, 3 * 42)
    assert (row[~red] == WHITE).all()


def test_a_long_signal_loses_no_peak():
    signal = torch.zeros(1, 100_000)
    signal[0, 77_777] = 1.0
    drawn = pixels(overlay_grid(passing(1, 1), "0", signal, labels=False, interpolation="nearest", alpha=1.0))
    assert drawn.shape[1] == 2048 + 2
    columns = (drawn[1, 1:-1] != 255).any(1).nonzero()[0]  # above the curve
    assert columns.tolist() == [77_777 * 2048 // 100_000]


@pytest.mark.parametrize("length", [100, 5000])
def test_what_is_not_finite_is_told_apart_behind_curves(length):
    signal = torch.zeros(1, length)
    signal[0, length // 2] = torch.inf
    signal[0, length // 4] = torch.nan
    drawn = pixels(overlay_grid(passing(1, 1), "0", signal, labels=False))[5]
    assert (drawn == MAGENTA).all(1).any()
    if length == 100:
        assert (drawn == GREEN).all(1).any()


def test_curves_pass_through_their_samples_and_break_where_there_is_none():
    line = torch.linspace(-1, 1, 50)[None]
    drawn = curves(line, (100, 500)).numpy()
    for sample in (0, 10, 30, 49):
        row = np.nonzero(drawn[:, sample * 10 + 4] == 0)[0]
        assert abs(row.mean() - (2 + (1 - line[0, sample].item()) / 2 * 95)) <= 1.5
    assert (drawn == 176).any(1).sum() == 1  # the line at zero
    line[0, 20:30] = torch.nan
    gap = curves(line, (100, 500)).numpy()[:, 205:290]
    assert not (gap == 0).any()
    assert bool((curves(torch.full((2, 9), torch.nan), (64, 90)) != 0).all())
    assert (curves(torch.zeros(1, 9), (64, 90)) == 0).any()


def test_each_lead_has_a_lane_and_bands_choose_them(monkeypatch):
    lines = written(monkeypatch)
    net, signal = ResNet1d().eval(), torch.randn(12, 600)
    tall = overlay_grid(net, "layer1", signal, channels=0)
    assert tall.height == 12 * 32 + 22 + 2
    low = overlay_grid(net, "layer1", signal[None], channels=0, bands=[3, 7], legend=True)
    assert low.height < tall.height
    low, high = signal[[3, 7]].min().item(), signal[[3, 7]].max().item()
    assert lines[-1] == (
        f"curve: channels 3, 7 from top to bottom, from {low:.3g} to {high:.3g}; gray line: zero"
    )


def test_a_clip_is_laid_under_the_maps_of_a_video_network():
    models = pytest.importorskip("torchvision.models.video")
    net = models.r3d_18(weights=None).eval()
    clip = torch.rand(1, 3, 8, 32, 32)
    sheet = overlay_grid(net, "layer1", clip, channels=[0, 1], slices=[0, 7], labels=False, upscale=1)
    assert sheet.size == (1 + 2 * 33, 1 + 2 * 33)
    same = overlay_grid(net, "layer1", clip, channels=[0, 1], slices=[0, 7], labels=False, upscale=1, alpha=0)
    gray = (clip[0, :, 7] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    expected = (255 * gray + 0.5).to(torch.uint8).numpy()
    assert np.array_equal(np.asarray(same)[1:33, 34:66], np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize(
    ("net", "image", "options", "message"),
    [
        (UNet3d(), torch.rand(2, 1, 4, 4, 4), {}, r"one volume or clip \(1, C, D, H, W\) or \(C, D, H, W\)"),
        (UNet3d(), torch.rand(4, 4, 4), {}, r"one volume or clip .*got shape \(4, 4, 4\)"),
        (UNet3d(), Image.new("RGB", (8, 8)), {}, r"must be a tensor \(1, C, D, H, W\).*got a picture"),
        (ResNet1d(), torch.rand(12, 8, 8, 8), {}, r"one signal \(1, C, L\) or \(C, L\)"),
        (ResNet1d(), torch.rand(12, 64), {"slices": 1}, "`slices` has no effect on maps of 64"),
        (ResNet1d(), torch.rand(12, 64), {"backdrop": "color"}, "`backdrop` has no effect on a signal"),
        (ResNet1d(), torch.rand(12, 64), {"bands": 12}, "`bands` must be indices from 0 to 11"),
        (ResNet1d(), torch.rand(3, 64), {}, r"must be what the model takes: ResNet1d fails"),
    ],
)
def test_what_does_not_fit_is_refused(net, image, options, message):
    layer = "down" if isinstance(net, UNet3d) else "layer1"
    with pytest.raises(InvalidArgumentError, match=message):
        overlay_grid(net.eval(), layer, image, **options)


def test_a_layer_without_positions_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"maps \(1, C, L\), but `fc` puts out shape \(1, 5\)"):
        overlay_grid(ResNet1d().eval(), "fc", torch.rand(12, 64))
