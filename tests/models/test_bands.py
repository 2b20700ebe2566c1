"""`bands=`: which channels of gray, four-channel and multispectral images are shown, everywhere alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.pixels import written
from torchlens_viz import explain, overlay_grid, project, report
from torchlens_viz.attribution.projection import Projection
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.models.colours import as_pixels, bands_note, in_bands


def net_of(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), *head).eval()


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_three_bands_are_red_green_and_blue_and_one_is_gray(channels):
    image = torch.rand(1, channels, 5, 6)
    last = channels - 1
    shown = as_pixels(image, image, bands=(last, 0, last))
    assert torch.equal(shown, image[0, [last, 0, last]])
    assert torch.equal(as_pixels(image, image, bands=last), image[0, [last] * 3])
    assert torch.equal(in_bands(image, [last, 0, 0]), image[:, [last, 0, 0]])


def test_values_beyond_one_are_spread_by_what_is_shown_alone():
    image = torch.rand(1, 6, 4, 4)
    image[:, :3] *= 1e4
    shown = as_pixels(image, image, bands=(2, 1, 0))
    low, high = image[0, :3].min(), image[0, :3].max()
    assert torch.allclose(shown, (image[0, [2, 1, 0]] - low) / (high - low))
    assert torch.equal(as_pixels(image, image, bands=(5, 4, 3)), image[0, [5, 4, 3]])


def test_scales_of_a_preprocessing_are_undone_band_by_band():
    mean, std = torch.rand(12)[:, None, None], 0.1 + torch.rand(12)[:, None, None]
    image = torch.rand(12, 5, 6)

    def preprocess(values: torch.Tensor) -> torch.Tensor:
        return (values - mean) / std

    shown = as_pixels(preprocess(image)[None], image, preprocess=preprocess, bands=(7, 3, 11))
    assert torch.allclose(shown, image[[7, 3, 11]], atol=1e-5)


def test_volumes_have_bands_too():
    clip = torch.rand(1, 4, 3, 5, 6)
    assert torch.equal(as_pixels(clip, clip, bands=(3, 2, 1)), clip[0, [3, 2, 1]])


def test_a_mean_that_was_not_asked_for_is_said():
    assert bands_note(1) == bands_note(3) == []
    assert bands_note(12) == ["shown: the mean of 12 channels; choose three of them with `bands`"]
    assert bands_note(12, 4) == ["shown: channel 4 of 12"]
    assert bands_note(4, (2, 1, 0)) == ["red, green, blue: channels 2, 1, 0 of 4"]


@pytest.mark.parametrize(
    ("bands", "error", "message"),
    [
        ((0, 1), InvalidArgumentError, r"`bands` must be three channels.*or one.*got \(0, 1\)"),
        ((0, 1, 12), InvalidArgumentError, "`bands` must be indices from 0 to 11, got 12"),
        (-1, InvalidArgumentError, "`bands` must be indices from 0 to 11, got -1"),
        ("rgb", InvalidTypeError, "`bands` must be an int or a list of ints, got 'rgb'"),
        (1.0, InvalidTypeError, r"`bands` must be an int or a list of ints, got 1\.0"),
    ],
)
@pytest.mark.parametrize(
    "show",
    [
        lambda net, image, **bands: overlay_grid(net, "0", image, **bands),
        lambda net, image, **bands: explain(net, image, **bands),
        lambda net, image, **bands: project(net, "0", image, **bands),
    ],
    ids=["overlay_grid", "explain", "project"],
)
def test_bands_that_there_are_not_are_refused(show, bands, error, message):
    with pytest.raises(error, match=message):
        show(net_of(12), torch.rand(12, 8, 8), bands=bands)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_overlays_show_the_bands(channels, monkeypatch):
    lines = written(monkeypatch)
    net, image, last = net_of(channels), torch.rand(channels, 8, 9), channels - 1
    options = {"channels": 0, "alpha": 0.0, "backdrop": "color", "upscale": 1, "labels": False}
    drawn = np.asarray(overlay_grid(net, "0", image, bands=(last, 0, 0), **options))[1:9, 1:10]
    expected = (255 * image[[last, 0, 0]] + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(drawn, expected)
    assert lines == [f"red, green, blue: channels {last}, 0, 0 of {channels}"]
    lines.clear()
    overlay_grid(net, "0", image, **options)
    mean = f"shown: the mean of {channels} channels; choose three of them with `bands`"
    said = "" if channels == 1 else mean
    assert " ".join(lines) == said


def test_explanations_show_the_bands_and_say_so():
    net, image = net_of(12), torch.rand(2, 12, 8, 9)
    found = explain(net, image, bands=(3, 2, 1))
    assert torch.equal(found.images, image[:, [3, 2, 1]])
    assert "red, green, blue: channels 3, 2, 1 of 12" in found.notes
    assert "shown: the mean of 12 channels; choose three of them with `bands`" in explain(net, image).notes
    assert torch.allclose(explain(net, image).images, image.mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_projections_show_the_bands_in_both_halves(tmp_path, monkeypatch):
    lines = written(monkeypatch)
    net, image = net_of(4), torch.rand(4, 8, 9)
    found = project(net, "0", image, [1], position=(4, 4), bands=(2, 1, 0))
    assert torch.equal(found.pixels, image[[2, 1, 0]])
    whole = np.asarray(found.grid(upscale=1, labels=False, legend=False, padding=0, title=""))
    assert lines == ["red, green, blue: channels 2, 1, 0 of 4"]
    box = (slice(None), *found.regions[0])
    values = found.images[0][[2, 1, 0]][box]
    reach = float(values.abs().flatten().kthvalue(round(0.995 * values.numel())).values)
    expected = (255 * (0.5 + values / (2 * reach)).clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(whole[:3, :3], expected.numpy())
    assert Projection.load(found.save(tmp_path)).bands == (2, 1, 0)
    assert Projection.load(project(net, "0", image, [1]).save(tmp_path / "b")).bands is None


def test_a_page_says_which_bands_it_shows(tmp_path):
    pytest.importorskip("jinja2")
    net, image = net_of(12), torch.rand(12, 16, 16)
    page = Path(report(net, image, tmp_path / "a.html", bands=(3, 2, 1), projections=0)).read_text("utf-8")
    assert "red, green, blue: channels 3, 2, 1 of 12" in page
    page = Path(report(net, image, tmp_path / "b.html", projections=0)).read_text("utf-8")
    assert "shown: the mean of 12 channels" in page
