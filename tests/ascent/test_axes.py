"""`maximize` on networks over signals and volumes: closed forms, plain passes, what is saved and drawn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.nets import ascend
from torchlens_viz import Maximization, objectives
from torchlens_viz.ascent.method import Normalized
from torchlens_viz.ascent.parametrization import Pixels
from torchlens_viz.ascent.transforms import Transforms
from torchlens_viz.errors import InvalidArgumentError

SIGNAL, VOLUME = (20,), (5, 6, 8)

# Layers with the size of what they take.
LINEAR = {
    "signal": (lambda: nn.Conv1d(2, 4, 5), SIGNAL),
    "strided signal": (lambda: nn.Conv1d(1, 3, 5, stride=2, padding=2), SIGNAL),
    "dilated signal": (lambda: nn.Conv1d(3, 3, 3, dilation=3, padding_mode="reflect", padding=3), SIGNAL),
    "12 leads": (lambda: nn.Conv1d(12, 12, 3, groups=12), SIGNAL),
    "transposed signal": (lambda: nn.ConvTranspose1d(2, 3, 4, stride=2), SIGNAL),
    "volume": (lambda: nn.Conv3d(1, 4, 3), VOLUME),
    "clip": (lambda: nn.Conv3d(3, 4, (2, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), VOLUME),
    "dilated volume": (lambda: nn.Conv3d(2, 3, 2, dilation=(1, 2, 3)), VOLUME),
    "transposed volume": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 2)), VOLUME),
}


def slope_at(model, channel, shape):
    """The gradient of the mean of a channel, in float64, which is the same at every image."""
    image = torch.full((1, *shape), 0.5, dtype=torch.float64, requires_grad=True)
    score = copy.deepcopy(model).double()(image)[0, channel].mean()
    return torch.autograd.grad(score, image)[0][0], score.item()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LINEAR)
def test_the_best_image_of_a_linear_layer_is_reached(kind, precision):
    build, size = LINEAR[kind]
    model = build().eval()
    result = ascend(model, "", size=size, steps=40, precision=precision)
    assert result.images.shape == (len(result.channels), model.in_channels, *size)
    exact = copy.deepcopy(model).double()
    for place, channel in enumerate(result.channels.tolist()):
        slope, gray = slope_at(model, channel, (model.in_channels, *size))
        best = exact((slope > 0).double()[None])[0, channel].mean()
        reached = exact(result.images[place][None].double())[0, channel].mean()
        assert (reached - gray) / (best - gray) >= 0.99
        assert result.scores[place].item() == pytest.approx(reached.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["signal", "clip"])
def test_the_recipe_of_keras_makes_the_steps_of_its_rule_for_a_constant_gradient(kind):
    build, size = LINEAR[kind]
    model = build().eval()
    result = ascend(model, "", 1, size=size, steps=6, method="classic", seed=42)
    channels = model.in_channels
    np.random.seed(42)
    start = np.moveaxis(128 + 20 * np.random.random((*size, channels)), -1, 0)
    slope, _ = slope_at(model, 1, (channels, *size))
    roots = (1 - 0.999 ** torch.arange(1, 7).double()).sqrt().view(-1, *[1] * slope.ndim)
    steps = 2.5 * (roots * slope / (roots * slope.abs() + 1e-7)).sum(0)
    expected = torch.from_numpy(start) + steps
    torch.testing.assert_close(result.images[0].double(), expected, rtol=0, atol=1e-3)


def small(convolution, *, channels=1):
    torch.manual_seed(2)
    return nn.Sequential(
        convolution(channels, 5, 3, padding=1), nn.ReLU(), convolution(5, 6, 3), nn.ReLU(inplace=True)
    ).eval()


NETS = {
    "signal": (lambda: small(nn.Conv1d, channels=12), (24,)),
    "volume": (lambda: small(nn.Conv3d), VOLUME),
}


@pytest.mark.parametrize("parametrization", ["pixels", "fourier", "maco"])
@pytest.mark.parametrize("transforms", [None, "gentle", "robust"])
@pytest.mark.parametrize("kind", NETS)
def test_every_way_of_climbing_drives_its_channel(kind, parametrization, transforms):
    build, size = NETS[kind]
    model = build()
    options = {"parametrization": parametrization, "transforms": transforms, "steps": 24}
    result = ascend(model, "2", [0, 3], size=size, **options)
    maps = model[:3](result.images).detach().flatten(2).mean(2)
    torch.testing.assert_close(result.means, maps)
    torch.testing.assert_close(result.scores, maps[[0, 1], [0, 3]])
    assert 0 <= result.images.min() < result.images.max() <= 1
    first = result.history[:, 0]  # of the transformed image, where there are transforms
    assert (result.scores > first).all()


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("max", lambda maps: maps.flatten(1).amax(1)),
        ("center", lambda maps: maps[(slice(None), *(side // 2 for side in maps.shape[1:]))]),
    ],
)
@pytest.mark.parametrize("kind", NETS)
def test_an_objective_is_scored_as_it_says(kind, objective, value):
    build, size = NETS[kind]
    model = build()
    result = ascend(model, "2", [3, 3], size=size, objective=objective)
    torch.testing.assert_close(result.scores, value(model[:3](result.images).detach()[:, 3]))


@pytest.mark.parametrize("size", [(9,), (5, 7), (3, 4, 5)])
def test_the_roughness_of_images_is_the_mean_difference_of_neighbours_along_all_axes(size):
    images = torch.rand(2, 3, *size)
    scene = objectives.Scene(images=images, channels=torch.zeros(2).long(), target="", activations={})
    pixels = images.double().numpy()
    along = [np.abs(np.diff(pixels, axis=axis)).reshape(2, -1).sum(1) for axis in range(2, pixels.ndim)]
    expected = sum(along) / pixels[0].size
    np.testing.assert_allclose(objectives.total_variation()(scene).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("convolution", "size"), [(nn.Conv1d, (9,)), (nn.Conv3d, (4, 5, 5))])
def test_units_are_woken_and_dead_ones_said_to_be_dead(convolution, size):
    model = nn.Sequential(convolution(1, 2, 3), nn.ReLU()).eval()
    taps = model[0].weight[0].numel()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([-0.8, -1.5]) * taps)  # gray gives 0.5, white 1.0
    result = ascend(model, "1", size=size, steps=40, method=Normalized(restarts=1))
    assert result.status[1] == "dead"
    assert result.scores.tolist() == pytest.approx([0.2 * taps, 0.0], rel=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_references_a_start_a_threshold_and_a_checkpoint_work_alike(kind, tmp_path):
    build, size = NETS[kind]
    model = build()
    shape = (model[0].in_channels, *size)
    real = torch.rand(4, *shape)
    options = {"size": size, "method": Normalized(frames=4, references=real), "checkpoint": tmp_path}
    result = ascend(model, "2", [1, 4], **options)
    usual = model[:3](real).detach().flatten(2).mean(2)
    torch.testing.assert_close(result.reference_means, usual)
    again = ascend(model, "2", [1, 4], **options)
    assert torch.equal(again.images, result.images)
    assert all(map(torch.equal, again.frames, result.frames))
    assert result.frames[0].shape == (4, *shape)

    begun = ascend(model, "2", 1, image=real[0], steps=1)
    torch.testing.assert_close(begun.images[0], real[0], rtol=0, atol=0.0501)
    assert begun.history[0, 0].item() == pytest.approx(usual[0, 1].item(), rel=1e-5)
    low = float(begun.history[0, 0]) - 1
    assert ascend(model, "2", 1, image=real[0], threshold=low).status == ("threshold",)


@pytest.mark.parametrize("size", [(7,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_what_is_saved_is_read_again(tmp_path, size, channels):
    result = finished(torch.rand(2, channels, *size))
    again = Maximization.load(result.save(tmp_path))
    assert torch.equal(again.images, result.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("0.png", "2.png", "grid.png", "maximization.npz", "scores.csv"),
    ]


def finished(images, **options):
    count = len(images)
    parts = {
        "channels": torch.arange(0, 2 * count, 2),
        "scores": torch.rand(count),
        "history": torch.rand(count, 3),
        "means": torch.rand(count, 5),
    }
    said = {"status": ("steps",) * count, "evidence": ("3 steps",) * count}
    return Maximization(layer="a", objective="channel()", images=images, **parts, **said, **options)


def test_a_volume_is_shown_as_slices_and_a_clip_in_colour(tmp_path):
    volume, clip = torch.rand(1, 1, 16, 6, 7), torch.rand(1, 3, 4, 6, 7)
    finished(volume).save(tmp_path / "volume")
    drawn = np.asarray(Image.open(tmp_path / "volume" / "0.png")).astype(int)
    assert drawn.shape == (3 * 7 + 1, 3 * 8 + 1)
    for place, depth in enumerate([0, 2, 4, 6, 8, 9, 11, 13, 15]):
        top, left = 1 + 7 * (place // 3), 1 + 8 * (place % 3)
        expected = 255 * volume[0, 0, depth].numpy()
        np.testing.assert_allclose(drawn[top : top + 6, left : left + 7], expected, atol=0.51)
    finished(clip).save(tmp_path / "clip")
    drawn = np.asarray(Image.open(tmp_path / "clip" / "0.png")).astype(int)
    assert drawn.shape == (2 * 7 + 1, 2 * 8 + 1, 3)
    np.testing.assert_allclose(drawn[8:14, 9:16], 255 * clip[0, :, 3].permute(1, 2, 0).numpy(), atol=0.51)
    assert (drawn[7] == 255).all()


def test_a_signal_is_shown_as_a_curve_for_each_channel(tmp_path):
    signal = torch.stack([torch.linspace(0, 1, 64), torch.full((64,), 0.5)])[None]
    finished(signal).save(tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "0.png"))
    assert drawn.shape == (2 * 64, 256)
    ink = drawn < 100
    rows = np.argmax(ink[:64], axis=0)
    assert (rows[0], rows[-1]) == (62, 1)
    assert (np.diff(rows) <= 0).all()
    assert set(np.argmax(ink[64:], axis=0)) <= {31, 32}
    assert not ink[[0, 63, 64, 127]].any()


def test_a_long_signal_keeps_its_extremes():
    signal = torch.full((1, 1, 10_000), 0.5)
    signal[0, 0, 7777], signal[0, 0, 1234] = 1.0, 0.0
    drawn = np.asarray(finished(signal).grid(labels=False, title=None, upscale=1).convert("L"))[1:-1, 1:-1]
    assert drawn.shape == (64, 256)
    assert set(np.nonzero(drawn[1] < 100)[0]) <= {7777 * 256 // 10_000 - 1, 7777 * 256 // 10_000}
    assert set(np.nonzero(drawn[-2] < 100)[0]) <= {1234 * 256 // 10_000 - 1, 1234 * 256 // 10_000}
    assert (drawn[1] < 100).any()
    assert (drawn[-2] < 100).any()


def test_bands_choose_what_is_shown_of_many_channels(tmp_path):
    images = torch.rand(1, 12, 5, 6)
    result = finished(images)
    drawn = np.asarray(result.grid(bands=(7, 1, 2), labels=False, title=None, padding=0, upscale=1))
    np.testing.assert_allclose(drawn, 255 * images[0, [7, 1, 2]].permute(1, 2, 0).numpy(), atol=1.5)
    result.save(tmp_path, bands=3)
    saved = np.asarray(Image.open(tmp_path / "0.png"))
    np.testing.assert_allclose(saved, 255 * images[0, 3].numpy(), atol=0.51)
    curves = finished(torch.rand(1, 12, 64)).grid(bands=5, labels=False, title=None, padding=0, upscale=1)
    assert curves.size == (256, 64)
    with pytest.raises(InvalidArgumentError, match="`bands` must be indices from 0 to 11, got 12"):
        result.grid(bands=12)


@pytest.mark.parametrize(
    ("images", "title"),
    [
        (torch.rand(1, 3, 5, 6), "a"),
        (torch.rand(1, 12, 9), "a"),
        (torch.rand(1, 1, 4, 5, 6), "a"),
        (torch.rand(1, 4, 5, 6), "a, shown: the mean of 4 channels.*"),
        (torch.rand(1, 1, 16, 5, 6), "a, slices 0, 2, 4, 6, 8, 9, 11, 13, 15 of 16"),
    ],
)
def test_the_title_says_what_is_left_out(images, title, monkeypatch):
    import re

    import torchlens_viz.ascent.result as module

    titles = []
    whole = module.Style.of
    monkeypatch.setattr(module.Style, "of", lambda own: titles.append(own["title"]) or whole(own))
    finished(images).grid()
    assert re.fullmatch(title, titles[0])


class Spectrogram(nn.Module):
    """Takes signals, though its convolution is one over images."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)

    def forward(self, signal):
        return self.convolution(signal.unfold(2, 8, 4))


class Unsqueezed(nn.Module):
    """Takes images, though its convolution is one over volumes."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(3, 2, (1, 3, 3))

    def forward(self, images):
        return self.convolution(images[:, :, None])


def test_the_size_says_how_many_axes_there_are_and_else_the_network():
    assert ascend(Spectrogram(), "convolution", 0, size=(40,)).images.shape == (1, 1, 40)
    assert ascend(Unsqueezed(), "convolution", 0, size=9).images.shape == (1, 3, 9, 9)
    assert ascend(nn.Conv1d(2, 1, 3), "", size=9).images.shape == (1, 2, 9)
    assert ascend(nn.Conv3d(2, 1, 3), "", size=4).images.shape == (1, 2, 4, 4, 4)
    assert ascend(nn.Conv1d(1, 1, 3), "", size=None, steps=1).images.shape == (1, 1, 4096)
    assert ascend(nn.Conv2d(4, 1, 3), "", size=None, steps=1).images.shape == (1, 4, 224, 224)
    assert ascend(nn.Conv3d(1, 1, 1), "", size=None, steps=1).images.shape == (1, 1, 16, 112, 112)


def test_what_images_get_is_done_to_every_frame_of_a_volume():
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)

    def normalise(images):  # of torchvision's kind: channels are third from last
        return (images - mean) / std

    model = nn.Conv3d(3, 2, (1, 3, 3)).eval()
    for depth in (1, 3, 5):
        result = ascend(model, "", size=(depth, 6, 6), preprocess=normalise)
        frames = torch.stack([normalise(frame) for frame in result.images.unbind(2)], 2)
        torch.testing.assert_close(result.means, model(frames).detach().flatten(2).mean(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": Transforms(rotate=5.0)}, "`rotate` must be 0 for signals"),
        ({"image": torch.rand(3, 4, 5)}, r"`image` must be one signal \(1, C, L\) or \(C, L\)"),
        ({"image": Image.new("RGB", (4, 4))}, r"`image` must be a tensor \(1, C, L\) or \(C, L\)"),
        (
            {"method": Normalized(references=torch.rand(2, 3, 9, 9))},
            r"`references` must be images \(R, 2, 12\)",
        ),
        ({"size": (9, 9)}, r"cannot take images of shape \(2, 9, 9\)"),
    ],
)
def test_what_signals_have_not_is_refused_with_the_reason(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ascend(nn.Conv1d(2, 3, 3), "", **options)


def test_pixels_of_signals_and_volumes_are_blurred_between_steps():
    by = Pixels(decay=0.05, blur=1.0)
    smooth, rough = (
        ascend(nn.Conv3d(1, 2, 3), "", 0, size=(6, 7, 8), parametrization=each, steps=8).images
        for each in (by, Pixels())
    )
    assert smooth.diff(dim=2).abs().mean() < rough.diff(dim=2).abs().mean()


def test_a_residual_network_over_signals_is_climbed_from_end_to_end(tmp_path):
    class Block(nn.Module):
        def __init__(self, width, stride):
            super().__init__()
            self.one = nn.Conv1d(width, 2 * width, 9, stride, 4, bias=False)
            self.norm = nn.BatchNorm1d(2 * width)
            self.skip = nn.Conv1d(width, 2 * width, 1, stride, bias=False)

        def forward(self, x):
            return F.relu(self.norm(self.one(x)) + self.skip(x))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(12, 8, 15, 2, 7), nn.ReLU(), Block(8, 2), Block(16, 2)).eval()
    options = {"parametrization": "fourier", "transforms": "robust", "size": (256,), "steps": 20}
    result = ascend(net, "3", [0, 7], **options)
    torch.testing.assert_close(result.means, net(result.images).detach().mean(2))
    assert (result.scores > net(torch.full((1, 12, 256), 0.5)).mean(2)[0, [0, 7]]).all()
    assert result.grid().mode in ("L", "RGB")
    again = Maximization.load(result.save(tmp_path))
    assert torch.equal(again.images, result.images)
