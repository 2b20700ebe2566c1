"""`explain` for signals, volumes and clips: where planted evidence lies, and the pictures of it."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import ResNet1d, UNet3d
from torchlens_viz import explain
from torchlens_viz.errors import InvalidArgumentError

CONVOLUTIONS = {1: nn.Conv1d, 3: nn.Conv3d}
POOLINGS = {1: nn.MaxPool1d, 3: nn.MaxPool3d}
SIZES = {1: (60,), 3: (20, 28, 24)}
AT = {1: (36,), 3: (12, 8, 16)}
LAYER_METHODS = ("gradcam", "gradcam++", "hirescam", "layercam", "ablationcam")
PIXEL_METHODS = ("gradient", "integrated_gradients", "guided")


class Detector(nn.Module):
    """Two classes, each the sum of a map that fires where its channel of the input is one in a box."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[rank](2, 2, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = POOLINGS[rank](2)
        weight = torch.zeros_like(self.conv.weight)
        weight[0, 0] = weight[1, 1] = 1.0
        self.conv.weight.data.copy_(weight)
        nn.init.constant_(self.conv.bias, 0.5 - 3.0**rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.relu(self.conv(x))).flatten(2).sum(2)


def planted(rank: int) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """An input with a box of ones in channel 0, another in channel 1 elsewhere, and where the first is."""
    values = torch.zeros(2, *SIZES[rank])
    box = tuple(slice(place - 1, place + 2) for place in AT[rank])
    values[0, *box] = 1.0
    values[1, *(slice(2, 5) for _ in AT[rank])] = 1.0
    return values, box


def share_within(heatmap: torch.Tensor, box: tuple[slice, ...], reach: int) -> float:
    wide = tuple(slice(side.start - reach, side.stop + reach) for side in box)
    return float(heatmap[wide].abs().sum() / heatmap.abs().sum())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("method", [*LAYER_METHODS, *PIXEL_METHODS])
def test_all_evidence_lies_where_it_was_planted(rank, method):
    values, box = planted(rank)
    layer = None if method in PIXEL_METHODS else "relu"
    found = explain(Detector(rank), values, 0, method=method, layer=layer)
    assert found.heatmaps.shape == (1, *SIZES[rank])
    assert found.scores.tolist() == [0.5]
    assert share_within(found.heatmaps[0], box, 0) == pytest.approx(1.0, abs=1e-6)
    if layer:
        peak = np.unravel_index(int(found.heatmaps[0].argmax()), SIZES[rank])
        assert tuple(int(place) for place in peak) == AT[rank]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_coarse_map_stands_where_its_positions_do(rank):
    values, box = planted(rank)
    heat = explain(Detector(rank), values, 0, method="hirescam", layer="pool").heatmaps[0]
    # The pooled position covers AT and the next voxel: its middle is half a voxel further, and bilinear
    # interpolation reaches to the next positions, two voxels away.
    for axis, size in enumerate(SIZES[rank]):
        others = tuple(place for place in range(rank) if place != axis)
        profile = heat.sum(others) if others else heat
        middle = float((profile * torch.arange(size)).sum() / profile.sum())
        assert middle == pytest.approx(AT[rank][axis] + 0.5, abs=1e-4)
    assert share_within(heat, box, 2) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_hirescam_at_a_linear_head_sums_to_the_score(rank):
    values, _ = planted(rank)
    batch = torch.stack([values, values.flip(0)])
    found = explain(Detector(rank), batch, [0, 1], method="hirescam", layer="relu")
    assert torch.allclose(found.heatmaps.flatten(1).sum(1), found.scores)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "smoothgrad"])
def test_gradients_at_voxels_are_those_of_autograd(method):
    torch.manual_seed(0)
    net, volume = UNet3d().eval(), torch.rand(1, 1, 4, 6, 8)

    def score(output: torch.Tensor) -> torch.Tensor:
        return output[:, 1].mean((1, 2, 3))

    options = {} if method == "gradient" else {"samples": 3}
    found = explain(net, volume, score, method=method, **options)

    def gradient(values: torch.Tensor) -> torch.Tensor:
        values = values.clone().requires_grad_()
        return torch.autograd.grad(score(net(values)).sum(), values)[0]

    if method == "gradient":
        expected = gradient(volume).abs().amax(1)
    elif method == "smoothgrad":
        noise = torch.Generator().manual_seed(0)
        spread = 0.15 * (volume.max() - volume.min())
        drawn = [torch.randn(volume.shape, generator=noise) for _ in range(3)]
        expected = (sum(gradient(volume + spread * each) for each in drawn) / 3).abs().amax(1)
    else:
        points, weights = np.polynomial.legendre.leggauss(3)
        parts = [w / 2 * gradient((p / 2 + 0.5) * volume) for p, w in zip(points, weights, strict=True)]
        expected = (sum(parts) * volume).sum(1).float()
    assert torch.allclose(found.heatmaps, expected, rtol=1e-4, atol=1e-7)


def test_stages_of_networks_for_signals_and_clips_are_found():
    found = explain(ResNet1d().eval(), torch.randn(3, 12, 400))
    assert found.layers == ("relu", "layer1", "layer2")
    assert found.heatmaps.shape == (3, 400)
    models = pytest.importorskip("torchvision.models.video")
    net = models.r3d_18(weights=None).eval()
    found = explain(net, torch.randn(1, 3, 8, 32, 32), 5)
    assert found.layers == ("stem", "layer1", "layer2", "layer3", "layer4")[-len(found.layers) :]
    assert found.heatmaps.shape == (1, 8, 32, 32)
    assert found.images.shape == (1, 3, 8, 32, 32)


def test_monais_unet_is_explained_by_a_function_of_its_labels():
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2)).eval()
    found = explain(net, torch.rand(1, 16, 24, 32), lambda output: output[:, 1].mean((1, 2, 3)))
    assert found.heatmaps.shape == (1, 16, 24, 32)
    assert bool((found.heatmaps != 0).any())


def test_trust_is_measured_in_one_and_three_dimensions():
    for rank in (1, 3):
        values, _ = planted(rank)
        found = explain(Detector(rank), values, 0, method="hirescam", layer="relu")
        # The heatmap is one position. Alone it is no box; blurred it keeps the part that a Gaussian has in
        # the box, along every axis, and the detector fires with what is above one half.
        assert found.trust.kept.item() == 0.0
        spread = max(1.0, 0.05 * min(SIZES[rank]))
        inside = 1.0
        for size, at in zip(SIZES[rank], AT[rank], strict=True):
            weights = np.exp(-((np.arange(size) - at) ** 2) / (2 * spread**2))
            inside *= weights[at - 1 : at + 2].sum() / weights.sum()
        assert found.trust.lost.item() == pytest.approx(1 - max(0.0, inside - 0.5) / 0.5, abs=1e-4)


# Pictures.


def test_the_slice_with_the_most_evidence_is_drawn_unless_others_are_named():
    values, _ = planted(3)
    found = explain(Detector(3), values, 0, method="hirescam", layer="relu", bands=[0, 1, 1])
    for plane, axis in (("depth", 0), ("height", 1), ("width", 2)):
        sides = tuple(size for place, size in enumerate(SIZES[3]) if place != axis)
        picture = np.asarray(found.overlay(upscale=1, plane=plane))
        assert picture.shape == (*sides, 3)
        named = np.asarray(found.overlay(upscale=1, plane=plane, slices=AT[3][axis]))
        assert np.array_equal(picture, named)
        other = np.asarray(found.overlay(upscale=1, plane=plane, slices=AT[3][axis] + 4))
        pixels = found.images[0].select(axis + 1, AT[3][axis] + 4)
        assert np.array_equal(other, (255 * pixels + 0.5).to(torch.uint8).permute(1, 2, 0).numpy())
    whole = found.overlay(upscale=1, slices=[3, 4])
    assert whole.size == (2 * (24 + 1) + 1, 28 + 2)


def test_a_grid_has_a_row_for_each_slice_and_a_scale_for_each_volume():
    values, _ = planted(3)
    found = explain(Detector(3), values, 0, method="hirescam", layer="relu", bands=0)
    sheet = np.asarray(found.grid(slices=[11, 12, 0], upscale=1, labels=False, legend=False))
    assert sheet.shape[:2] == (3 * 29 + 1, 3 * 25 + 1)
    rows = [sheet[1 + 29 * row : 29 + 29 * row, 26:50] for row in range(3)]
    heats = [found.heatmaps[0, place] for place in (11, 12, 0)]
    for drawn, heat in zip(rows, heats, strict=True):
        strength = drawn.astype(int).sum(2)
        assert strength.argmax() == int(heat.argmax()) or float(heat.max()) == 0.0
    assert rows[1].astype(int).sum() > rows[2].astype(int).sum()


def test_a_signal_is_drawn_above_its_evidence(tmp_path):
    net = ResNet1d().eval()
    found = explain(net, torch.randn(2, 12, 400), 1, bands=[0, 3])
    assert "curves: channels 0, 3 of 12" in found.notes
    assert found.images.shape == (2, 2, 400)
    height, width = 2 * 85, 800
    assert found.overlay().size == (width, height)
    assert found.grid(labels=False, legend=False).size == (width + 2, 4 * (height + 1) + 1)
    assert "heatmap over image 1" in found._repr_html_()
    files = sorted(path.name for path in found.save(tmp_path).iterdir())
    assert files == ["0.png", "1.png", "explanation.npz", "grid.png", "scores.csv"]
    with np.load(tmp_path / "explanation.npz") as kept:
        assert np.array_equal(kept["heatmaps"], found.heatmaps.numpy())


@pytest.mark.parametrize(
    ("net", "image", "options", "message"),
    [
        (UNet3d(), torch.rand(4, 4, 4), {}, r"one volume or clip \(1, C, D, H, W\)"),
        (UNet3d(), torch.rand(1, 1, 0, 4, 4), {}, r"one volume or clip"),
        (UNet3d(), torch.rand(2, 1, 0, 4, 4), {}, r"a batch \(N, C, D, H, W\), got shape"),
        (ResNet1d(), torch.rand(2, 12, 64, 4), {}, r"one signal \(1, C, L\) or \(C, L\)"),
        (ResNet1d(), torch.rand(12, 64), {"layer": "fc"}, "`fc`"),
        (ResNet1d(), torch.rand(12, 64), {"bands": [0, 12]}, "`bands` must be indices from 0 to 11"),
        (UNet3d(), torch.rand(1, 4, 4, 4), {"bands": [0, 0]}, "`bands` must be three channels"),
    ],
)
def test_what_does_not_fit_is_refused(net, image, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        explain(net.eval(), image, **options)


def test_slices_of_what_has_none_are_refused():
    found = explain(ResNet1d().eval(), torch.randn(12, 400))
    with pytest.raises(InvalidArgumentError, match="`slices` has no effect on maps of 400"):
        found.grid(slices=3)


def test_the_examples_of_the_documentation_run():
    page = Path(__file__).parents[2] / "docs" / "dimensions.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 15
    assert result.failed == 0
