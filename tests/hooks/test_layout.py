"""Which dimension counts channels: said by the kind, followed, told by the caller, or doubted."""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.nets import Gives
from torchlens_viz import (
    RunningStats,
    capture,
    compare,
    feature_grid,
    maximize,
    overlay_grid,
    receptive_field,
    save_feature_maps,
    survey,
)
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.hooks.axes import ChannelAxes
from torchlens_viz.hooks.layout import Layout, marked_dim, mixes_layouts
from torchlens_viz.models.layers import Layer

# What a map (1, 6, 4, 5) that a convolution put out is made into, and where its channels are then.
FOLLOWED = [
    (lambda x: x.relu() + 1, 1),
    (lambda x: x.permute(0, 2, 3, 1), 3),
    (lambda x: x.permute(2, 0, 1, 3), 2),
    (lambda x: x.movedim(1, -1), 3),
    (lambda x: x.movedim((1, 2), (2, 0)), 2),
    (lambda x: x.flatten(2).mT @ torch.ones(6, 7), 2),
    (lambda x: x.permute(0, 2, 3, 1).contiguous().relu_(), 3),
    (lambda x: x.flatten(2), 1),
    (lambda x: x.flatten(2).transpose(1, 2), 2),
    (lambda x: x.flatten(2).mT.unflatten(1, (4, 5)), 3),
    (lambda x: x.mean((2, 3)), 1),
    (lambda x: x.mean((2, 3), keepdim=True), 1),
    (lambda x: x.permute(0, 2, 3, 1).amax(1), 2),
    (lambda x: F.adaptive_avg_pool2d(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 1), 1),
    (lambda x: F.adaptive_avg_pool2d(x.to(memory_format=torch.channels_last), 1), 1),
    (lambda x: F.layer_norm(x.flatten(2).mT.unflatten(2, (2, 3)).transpose(1, 2), (3,)), 3),  # of each head
    (lambda x: F.instance_norm(x.expand(2, -1, -1, -1)), 1),
    (lambda x: x.reshape(6, 1, 4, 5).reshape(1, 6, 4, 5), 1),  # each channel for itself, and back
    (lambda x: F.linear(x, torch.ones(7, 5), torch.ones(7)), 1),  # mixes columns, and no channels
    (lambda x: torch.ones(3, 4) @ x, 1),
    (lambda x: F.unfold(x, 2), 1),
    (lambda x: F.unfold(x.transpose(0, 1), 2), 0),
    (lambda x: F.pixel_unshuffle(x[..., :4], 2), 1),
    (lambda x: x.transpose(1, 2).flatten(2), 2),  # channels and columns, for each row
    (lambda x: torch.cat([x, x * 2], 1), 1),
    (lambda x: torch.cat([x, x], 3), 1),
    (lambda x: x[:, :, 1:], 1),
    (lambda x: x[0], 0),
    (lambda x: x[:, :, 0], 1),
    (lambda x: x.unbind(2)[0], 1),
    (lambda x: x.unsqueeze(1), 2),
    (lambda x: x[:, :, :1].squeeze(2), 1),
    (lambda x: x.repeat(1, 1, 2, 2), 1),
    (lambda x: x.view(1, 2, 3, 4, 5).transpose(1, 2).reshape(1, 6, 4, 5), 1),  # channel shuffle
    (lambda x: x.view(1, 2, 3, 20).permute(0, 3, 1, 2).reshape(1, 20, 6), 2),  # heads, and back
    (lambda x: F.pad(x, (1, 1)).roll(1, 2), 1),
    (lambda x: F.interpolate(x, scale_factor=2), 1),
    (lambda x: torch.where(x > 0, x, 0 * x), 1),
    (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,)), 3),
    (lambda x: F.layer_norm(x, (6, 4, 5)), 1),
    (lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(7, 6)), 3),
    (lambda x: F.linear(x, torch.ones(7, 5)), 1),
    (lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.ones(3, 4, 1, 1)), 1),
    (lambda x: F.batch_norm(x.permute(0, 2, 1, 3), torch.zeros(4), torch.ones(4)), 1),
    (lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT[:, None]] * 3)[:, 0], 2),
    (lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1) @ x.flatten(2).mT, 2),  # attention, in words
    (lambda x: F.linear(x.flatten(2), torch.ones(20, 20)).mT + x.flatten(2).mT, 2),  # over tokens, and back
    (lambda x: x.flatten(2).mT + F.linear(x.flatten(2), torch.ones(20, 20)).mT, 2),
    (lambda x: F.conv1d(x.flatten(2).mT, torch.ones(20, 20, 1)) + x.flatten(2).mT, 2),
]
LOST = [
    lambda x: x.reshape(1, 8, 3, 5),  # channels and rows are mixed
    lambda x: x.view(1, 2, 3, 4, 5),  # there are two dimensions of channels
    lambda x: x.flatten(1).view(1, 5, 24),
    lambda x: x.reshape(6, 1, 4, 5),  # channels and inputs
    lambda x: x.diagonal(dim1=1, dim2=2),
    lambda x: x.sum(1),
    lambda x: x.flatten(2).mT @ x.flatten(2),  # queries times keys: a number for each two places
    lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1),
]


def put_out(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), Gives(make)), torch.rand(1, 3, 4, 5)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("make", "dim"), FOLLOWED)
def test_channels_are_followed(make, dim, inference):
    net, image = put_out(make)
    axes = ChannelAxes()
    with torch.inference_mode(inference), axes:
        assert axes.of(net(image)) == dim


@pytest.mark.parametrize("make", LOST)
def test_channels_that_are_lost_are_not_made_up(make):
    net, image = put_out(make)
    axes = ChannelAxes()
    with axes:
        made = net(image)
        assert axes.of(made) is None
        assert not axes.is_untouched(made)
        assert axes.is_untouched(image)


def test_following_changes_no_value_and_no_gradient():
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    given = torch.rand(2, 5, 8, requires_grad=True)
    plain = net(given).square().sum()
    (expected,) = torch.autograd.grad(plain, given)
    with ChannelAxes():
        followed = net(given).square().sum()
        (found,) = torch.autograd.grad(followed, given)
    torch.testing.assert_close(followed, plain, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


KINDS = [
    (nn.Conv2d(3, 2, 1), (1, 2, 3, 4), 1),
    (nn.Conv2d(3, 2, 1), (2, 3, 4), 0),
    (nn.Conv1d(3, 2, 1), (1, 2, 3), 1),
    (nn.ConvTranspose3d(3, 2, 1), (1, 2, 3, 4, 5), 1),
    (nn.BatchNorm1d(3), (5, 3), 1),
    (nn.GroupNorm(1, 3), (5, 3, 2, 2), 1),
    (nn.AdaptiveAvgPool2d(1), (1, 2, 1, 1), 1),
    (nn.Linear(3, 4), (1, 5, 6, 4), 3),
    (nn.LayerNorm(4), (1, 5, 6, 4), 3),
    (nn.LayerNorm((4, 5, 6)), (1, 4, 5, 6), 1),
    (nn.Embedding(3, 4), (1, 5, 4), 2),
    (nn.LSTM(3, 4), (1, 5, 4), 2),
]


@pytest.mark.parametrize(("module", "shape", "dim"), KINDS)
def test_kinds_say_it_without_following(module, shape, dim):
    layout = Layout([Layer("x", module)])
    assert not layout.must_follow
    assert layout.channel_dim(torch.zeros(shape), "x") == dim


class LayerNorm2d(nn.LayerNorm):
    """Takes maps (N, C, H, W), unlike the class that it is made of."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_class_with_a_forward_of_its_own_is_followed():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), LayerNorm2d(5))
    assert Layout([Layer("1", net[1])]).must_follow
    with capture(net, "1", reduce=RunningStats) as acts:
        net(torch.rand(2, 3, 4, 6))
    assert acts["1"].channels == 5
    changed = nn.Conv2d(3, 5, 1)
    changed.forward = lambda x: nn.Conv2d.forward(changed, x).permute(0, 2, 3, 1)
    with capture(nn.Sequential(changed), "0", reduce=RunningStats) as acts:
        changed(torch.rand(2, 3, 4, 6))
    assert acts["0"].channels == 5


class Affine(nn.Module):
    """A norm of its own, as in ResMLP."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x * self.weight


class Plain(nn.Module):
    """Dense layers over maps, or tokens, in a network that normalises by batch or not at all."""

    def __init__(self, *, is_folded):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 6, 4, 4), Affine(6), nn.ReLU()
        self.dense, self.is_folded, self.head = nn.Linear(6, 7), is_folded, nn.Linear(7, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x.flatten(2).mT if self.is_folded else x.permute(0, 2, 3, 1)
        x = self.act(self.dense(self.norm(x)))
        return self.head(x.flatten(1, -2).mean(1))


def test_dense_layers_over_positions_are_followed_without_any_layer_norm():
    images, plain = torch.rand(2, 3, 12, 20), {"upscale": 1, "padding": 0, "nrow": 1}
    net = Plain(is_folded=False)
    with torch.no_grad(), capture(net, ["norm", "act"]) as acts:
        net(images)
    assert marked_dim(acts["norm"]) == marked_dim(acts["act"]) == 3
    sheet = feature_grid(acts["act"], cmap="gray", value_range=(0, 1), **plain)
    expected = acts["act"][0].movedim(-1, 0).clamp(0, 1).flatten(0, 1).numpy() * 255
    assert np.abs(np.asarray(sheet)[..., 0] - expected).max() < 1.6
    net = Plain(is_folded=True)
    with torch.no_grad(), capture(net, ["norm", "act"]) as acts:
        net(images)
    assert feature_grid(acts["act"], grid=(3, 5), **plain).size == (5, 7 * 3)
    with pytest.raises(InvalidArgumentError, match=r"tokens \(N, L, C\) need `grid="):
        feature_grid(acts["act"])  # not two maps, one of each image


def test_the_channel_that_differs_most_is_a_channel_without_any_layer_norm():
    torch.manual_seed(0)
    nets = [Plain(is_folded=False).eval() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    with torch.no_grad():
        nets[1].norm.weight[4] += 1  # of six channels, in maps of three rows
    image = torch.rand(1, 3, 12, 20)
    with torch.no_grad():
        first, second = (net.norm(net.stem(image).permute(0, 2, 3, 1)) for net in nets)
    assert (first - second).abs().amax((0, 1, 2)).argmax() == 4
    found = next(row for row in compare(*nets, [image]).rows() if row["layer"] == "norm")
    assert found["channel"] == 4


POOLED = [
    nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU()),
    nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2)),
    nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(6, 6)),
]


@pytest.mark.parametrize("net", POOLED)
def test_a_classifier_costs_no_following(net):
    assert not mixes_layouts(net)
    assert mixes_layouts(nn.Sequential(net, nn.Conv2d(6, 6, 1), nn.Linear(6, 6), nn.ReLU()))


def test_a_doubtful_tensor_says_what_was_drawn_of_it(tmp_path):
    net, image = put_out(LOST[0])
    net.append(nn.LayerNorm(5))
    with torch.no_grad(), capture(net, ["1", "1"]) as acts:
        net(image)
    plain = {"upscale": 1, "padding": 0, "nrow": 1}
    said = r"nothing tells which dimension of what `1`.*\(1, 8, 3, 5\)\): the second one is drawn"
    with pytest.warns(UserWarning, match=said):
        assert feature_grid(acts["1"], **plain).size == (5, 8 * 3)
    with pytest.warns(UserWarning, match=said):
        save_feature_maps(acts, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert feature_grid(acts["1"], channel_dim=-1, **plain).size == (3, 5 * 8)


class Mixed(nn.Module):
    """Maps, channels-last maps, tokens and a vector, as a network of today has them in one pass."""

    SIZES: ClassVar = {"stem": 6, "act": 6, "norm": 6, "last": 8, "tokens": 8, "mixer": 8, "head": 3}

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 6, 2, 2), nn.ReLU()
        self.norm, self.last = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 8), nn.GELU())
        self.tokens, self.head = nn.Identity(), nn.Linear(8, 3)
        self.mixer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        x = self.norm(self.act(self.stem(x)).permute(0, 2, 3, 1))
        x = self.tokens(self.last(x).flatten(1, 2))
        return self.head(self.mixer(x).mean(1))


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


def test_one_pass_of_capture_finds_the_channels_of_every_layer(mixed):
    names = list(Mixed.SIZES)
    with torch.no_grad(), capture(mixed, names, reduce=RunningStats) as acts:
        mixed(torch.rand(4, 3, 12, 20))
    assert {name: acts[name].channels for name in names} == Mixed.SIZES
    with torch.no_grad(), capture(mixed, names) as whole, capture(mixed, names, channels=[2, 0]) as part:
        mixed(torch.rand(4, 3, 12, 20))
    for name in names:
        dim = marked_dim(whole[name])
        assert whole[name].shape[dim] == Mixed.SIZES[name]
        assert part[name].equal(whole[name].index_select(dim, torch.tensor([2, 0])))


def test_survey_and_maximize_find_the_channels_of_every_layer(mixed):
    images, names = torch.rand(6, 3, 12, 20), list(Mixed.SIZES)
    found = survey(mixed, images.split(2), names, top_k=2, progress=False)
    with torch.no_grad(), capture(mixed, names) as acts:
        mixed(images)
    for name in names:
        values = acts[name].movedim(marked_dim(acts[name]), 1)
        flat = values.flatten(2) if values.ndim > 2 else values[..., None]
        expected = flat.double().mean((0, 2))
        torch.testing.assert_close(found.stats[name].mean, expected, rtol=1e-6, atol=1e-9)
        assert found.top[name].samples[:, 0].equal(flat.amax(2).argmax(0))
        result = maximize(mixed, name, [1], size=(12, 20), steps=2, precision="float32")
        assert result.means.shape == (1, Mixed.SIZES[name])


def test_regions_patches_and_overlays_of_channels_last_maps_are_those_of_the_maps(mixed):
    for layer in ("norm", "last"):
        field = receptive_field(mixed, layer, (1, 3, 12, 20))
        assert field.map_shape == (6, 10)
        assert field.region((2, 7)) == (slice(4, 6), slice(14, 16))
    images = torch.rand(3, 3, 12, 20)
    found = survey(mixed, images.split(2), "norm", top_k=1, progress=False)
    for channel in range(6):
        (patch,) = found.patches("norm", channel, images)
        row, column = found.top["norm"].positions[channel, 0].tolist()
        assert patch.box == (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
    plain = {"labels": False, "upscale": 1, "alpha": 1.0, "interpolation": "nearest", "cmap": "gray"}
    drawn = np.asarray(overlay_grid(mixed, "norm", images[0], channels=0, **plain))
    with torch.no_grad(), capture(mixed, "norm") as acts:
        mixed(images[:1])
    brightest = np.unravel_index(int(acts["norm"][0, ..., 0].argmax()), (6, 10))
    place = tuple(1 + 2 * index for index in brightest)
    assert drawn[place].sum() == drawn.sum(-1)[1:-1, 1:-1].max()


def test_sheets_draw_a_tile_per_channel_of_what_capture_hands_out(mixed, tmp_path):
    from torchlens_viz import Activations

    with torch.no_grad(), capture(mixed, ["norm", "last", "tokens"]) as acts:
        mixed(torch.rand(1, 3, 12, 20))
    options = {"upscale": 1, "padding": 0, "nrow": 1}
    assert feature_grid(acts["norm"], **options).size == (10, 6 * 6)
    assert feature_grid(acts["norm"].clone(), channel_dim=-1, **options).size == (10, 6 * 6)
    assert feature_grid(acts["tokens"], grid=(6, 10), **options).size == (10, 8 * 6)
    loaded = Activations.load(acts.save(tmp_path / "a.safetensors"))
    assert (
        feature_grid(loaded["norm"], **options).tobytes() == feature_grid(acts["norm"], **options).tobytes()
    )
    with pytest.raises(
        InvalidArgumentError, match=r"channels in dimension 2; tokens \(N, L, C\) need `grid="
    ):
        feature_grid(acts["tokens"])
    with pytest.raises(
        InvalidArgumentError, match=r"`channel_dim` must be a dimension of `activation`, got 4"
    ):
        feature_grid(acts["norm"], channel_dim=4)


def test_maps_of_one_row_have_a_tile_per_channel():
    net = nn.Sequential(nn.Conv1d(1, 4, 3))
    with torch.no_grad(), capture(net, "0") as acts:
        net(torch.rand(2, 1, 9))
    assert feature_grid(acts["0"], upscale=1, padding=0, nrow=1).size == (7, 4)


def test_what_nothing_tells_is_said_and_can_be_told():
    net, image = put_out(LOST[0])
    for run in (
        lambda **told: survey(net, [image], "1", progress=False, **told).stats["1"].channels,
        lambda **told: maximize(net, "1", [0], size=(4, 5), steps=1, **told).means.shape[1],
    ):
        with pytest.warns(UserWarning, match=r"nothing tells which dimension of what `1`.*\(1, 8, 3, 5\)"):
            assert run() == 8
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run(channel_dim=-1) == 5
    with pytest.raises(InvalidTypeError, match="`channel_dim` must be an int, got '1'"):
        capture(net, "1", channel_dim="1")
    with (
        pytest.raises(
            InvalidArgumentError, match=r"`channel_dim` must be a dimension of what `1` puts out, got 4"
        ),
        capture(net, "1", channels=0, channel_dim=4),
    ):
        net(image)


def test_a_layer_that_seldom_runs_does_not_make_every_batch_slow():
    """Operations are followed in the first batches alone, and weights watched in the first."""

    class Seldom(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.often, self.never = nn.Conv2d(1, 2, 1), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            modes.append(len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()))
            return self.often(self.conv(x))

    modes: list[int] = []
    net = Seldom()
    survey(net, torch.rand(5, 1, 3, 3).split(1), ["often", "never"], progress=False)
    assert modes == [3, 2, 0, 0, 0]
    modes.clear()
    survey(net, torch.rand(3, 1, 3, 3).split(1), ["conv"], progress=False)
    assert modes == [2, 0, 0]  # what comes after the layer is seen at once


def test_what_torch_fx_generates_has_no_kind_and_is_followed():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    graph = torch.fx.symbolic_trace(net)
    assert type(graph).forward.__module__ is None
    found = survey(graph, torch.rand(4, 1, 3, 3).split(2), [""], progress=False)
    assert found.stats[""].channels == 2
