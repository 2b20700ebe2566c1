"""Sheets of maps of one and of three dimensions, of networks for signals, clips and volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.nets import ResNet1d, UNet3d, recorded
from tests.pixels import WHITE, assert_drawn_as_promised, colours, ramp, same, written
from torchlens_viz import feature_grid, kernel_grid, save_feature_grid, save_feature_maps
from torchlens_viz.errors import InvalidArgumentError

AXES = {"depth": 1, "height": 2, "width": 3}


@pytest.mark.parametrize("plane", AXES)
@pytest.mark.parametrize("options", [{}, {"cmap": "hot"}, {"scale_each": True}, {"upscale": 2, "padding": 3}])
def test_a_slice_is_drawn_as_a_map_of_two_dimensions(plane, options):
    maps = ramp(6, 5, 6, 7)
    part = torch.from_numpy(np.take(maps.numpy(), 3, AXES[plane]))
    sheet = feature_grid(maps[None], plane=plane, slices=3, **options)
    assert_drawn_as_promised(sheet, part[:, None], **options)
    assert same(sheet, feature_grid(maps, plane=plane, slices=3, channel_dim=0, **options))


def test_several_slices_make_a_row_for_each_channel(monkeypatch):
    maps, lines = ramp(5, 4, 6, 7), written(monkeypatch)
    sheet = feature_grid(maps[None], channels=[4, 1], slices=[3, 0, 2])
    tiles = maps[[4, 1]][:, [3, 0, 2]].flatten(0, 1)[:, None]
    assert_drawn_as_promised(sheet, tiles, nrow=3)
    feature_grid(maps[None], channels=[4, 1], slices=[3, 0], labels=True, legend=True)
    assert lines[:4] == ["4@3", "4@0", "1@3", "1@0"]
    assert lines[-2:] == ["2 of 5 maps of 4 x 6 x 7", "after @: the slice, of 4 along depth"]


def test_all_slices_of_one_channel_are_a_montage():
    maps = ramp(2, 9, 6, 7)
    montage = feature_grid(maps[None], channels=1, slices="all")
    assert_drawn_as_promised(montage, maps[1][:, None])
    assert_drawn_as_promised(
        feature_grid(maps[None], channels=1, slices="all", nrow=4), maps[1][:, None], nrow=4
    )
    with pytest.raises(
        InvalidArgumentError, match=r"`nrow` .* several slices are drawn: each channel has a row"
    ):
        feature_grid(maps[None], slices="all", nrow=4)


def test_channels_are_ranked_with_all_their_slices():
    maps = torch.stack([torch.full((3, 4, 4), level) for level in (1.0, 3.0, 2.0)])
    sheet = feature_grid(maps[None], slices="all", sort_by="mean", padding=0, upscale=1)
    assert same(sheet, feature_grid(maps[None], channels=[1, 2, 0], slices="all", padding=0, upscale=1))


def test_zero_is_white_in_signed_slices_and_strips():
    volume = torch.randn(1, 2, 4, 5, 6)
    volume[0, :, 2, 1, 3] = 0.0
    pixels = colours(feature_grid(volume, slices=2, padding=0, upscale=1, nrow=2))
    for left in (0, 6):
        assert tuple(pixels[1, left + 3]) == WHITE
    signal = torch.randn(1, 2, 50)
    signal[0, :, 20] = 0.0
    pixels = colours(feature_grid(signal, channel_dim=1, upscale=1, padding=0))
    assert [tuple(pixels[row, 20]) for row in (0, 1)] == [WHITE, WHITE]


def test_maps_of_signals_are_strips_of_their_values():
    signal = ramp(5, 300)
    sheet = feature_grid(signal[None], channel_dim=1)
    assert_drawn_as_promised(sheet, signal[:, None, None].expand(-1, 1, 24, -1), nrow=1, upscale=1)
    raster = feature_grid(signal[None], channel_dim=1, upscale=1, padding=0)
    assert_drawn_as_promised(raster, signal[:, None, None], nrow=1, upscale=1, padding=0)
    assert same(raster, feature_grid(signal, channel_dim=0, upscale=1, padding=0))
    assert feature_grid(ramp(2, 7), channel_dim=0, interpolation="bicubic").size == (7 * 37 + 2, 2 * 37 + 3)


def test_what_a_capture_hands_out_says_that_it_is_a_signal():
    acts = recorded(ResNet1d().eval(), ["stem", "layer1", "layer2"], torch.randn(2, 12, 400))
    for name in acts:
        assert acts[name].ndim == 3
        assert same(feature_grid(acts[name], sample=1), feature_grid(acts[name][1], channel_dim=0))


def test_files_are_the_sheets_and_each_slice_has_its_own(tmp_path):
    acts = recorded(UNet3d().eval(), ["entry", "down"], torch.randn(1, 1, 6, 8, 10))
    path = save_feature_grid(acts["down"], tmp_path / "down.png", slices=[0, 1], labels=True)
    with Image.open(path) as image:
        assert same(image, feature_grid(acts["down"], slices=[0, 1], labels=True))
    files = save_feature_maps(acts, tmp_path / "one", channels=[2, 0])
    assert [str(file.relative_to(tmp_path / "one")) for file in files] == [
        "entry/2.png", "entry/0.png", "down/2.png", "down/0.png",
    ]  # fmt: skip
    files = save_feature_maps(acts, tmp_path / "all", channels=[1], plane="height", slices=[3, 0], upscale=1)
    assert [file.name for file in files] == ["1@3.png", "1@0.png"] * 2
    low, high = (float(limit(acts["down"][0][:, :, [3, 0]])) for limit in (torch.min, torch.max))
    with Image.open(files[2]) as image:
        expected = acts["down"][0][1:2, :, 3]
        sheet = feature_grid(expected, value_range=(low, high), padding=0, upscale=1)
        assert same(image, sheet)


def test_files_of_signals_are_strips(tmp_path):
    acts = recorded(ResNet1d().eval(), "layer2", torch.randn(1, 12, 4000))
    (file,) = save_feature_maps(acts, tmp_path, channels=3)
    with Image.open(file) as image:
        assert image.size == (500, 24)


def test_maps_of_a_video_network_are_drawn_frame_by_frame():
    models = pytest.importorskip("torchvision.models.video")
    net = models.r3d_18(weights=None).eval()
    acts = recorded(net, ["stem", "layer2"], torch.randn(1, 3, 8, 32, 32))
    assert acts["stem"].shape == (1, 64, 8, 16, 16)
    frames = feature_grid(acts["stem"], channels=[7], slices="all", upscale=1, padding=0, nrow=8)
    flat = acts["stem"][0, 7]
    assert same(frames, feature_grid(flat[None], channel_dim=1, upscale=1, padding=0, nrow=8))
    assert feature_grid(acts["layer2"]).mode == "RGB"
    assert kernel_grid(net, filters=range(4)).mode == "RGB"


def test_maps_of_monais_unet_are_drawn_in_every_plane():
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2)).eval()
    acts = recorded(net, nn.Conv3d, torch.randn(1, 1, 16, 24, 32))
    for name in acts:
        for plane, axis in AXES.items():
            values = np.take(acts[name][0].numpy(), 1, axis)
            drawn = feature_grid(acts[name], plane=plane, slices=1)
            assert same(drawn, feature_grid(torch.from_numpy(values)))
