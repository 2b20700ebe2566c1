"""Receptive fields: against recurrences, against brute force, against published values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.receptive.dependence import Dependence
from torchlens_viz.receptive.extents import Extents, UnknownOperationError
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import followed_field, receptive_field


def seen_rows(model: nn.Module, shape: tuple[int, ...], axis: int) -> list[tuple[int, int] | None]:
    """By brute force: what turns to NaN when one row of the input is NaN depends on that row."""
    size = shape[axis + 2]
    rows = torch.zeros(size, *shape[1:], dtype=torch.float64)  # float32 may be convolved by Winograd's tiles
    for row in range(size):
        rows[row].select(axis + 1, row).fill_(torch.nan)
    with torch.no_grad():
        output = model.double().eval()(rows).isnan()
    depends = output.movedim(axis + 2, 1).flatten(2).any(2)
    places = [column.nonzero().flatten().tolist() for column in depends.T]
    return [(place[0], place[-1]) if place else None for place in places]


def regions(field: ReceptiveField, axis: int) -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for place in range(field.map_shape[axis]):
        position = [0] * len(field.map_shape)
        position[axis] = place
        part = field.region(position)[axis]
        found.append((part.start, part.stop - 1) if part.stop > part.start else None)
    return found


def check_by_brute_force(model: nn.Module, shape: tuple[int, ...]) -> ReceptiveField:
    field = receptive_field(model, "", shape)
    assert field.is_exact
    assert field.input_shape == shape[2:]
    for axis in range(len(shape) - 2):
        assert regions(field, axis) == seen_rows(model, shape, axis)
    return field


# Chains


@st.composite
def windows(draw):
    kernel = draw(st.integers(1, 5))
    dilation = draw(st.integers(1, 2))
    stride = draw(st.integers(1, 3))
    padding = draw(st.integers(0, (kernel - 1) * dilation))
    return kernel, stride, padding, dilation


@settings(max_examples=40)
@given(st.lists(st.tuples(windows(), windows()), min_size=1, max_size=4))
def test_chains_follow_the_recurrence(layers):
    modules, size, jump, start = [], [1, 1], [1, 1], [0, 0]
    for pair in layers:
        kernel, stride, padding, dilation = zip(*pair, strict=True)
        modules.append(nn.Conv2d(2, 2, kernel, stride, padding, dilation))
        for axis, (k, s, p, d) in enumerate(pair):
            start[axis] -= p * jump[axis]
            size[axis] += (k - 1) * d * jump[axis]
            jump[axis] *= s
    field = receptive_field(nn.Sequential(*modules), "", (1, 2, 400, 401))
    assert field.is_exact
    assert field.is_uniform
    assert field.size == tuple(size)
    assert field.stride == tuple(jump)
    assert field.start == tuple(start)
    center = [first + (extent - 1) / 2 for first, extent in zip(start, size, strict=True)]
    assert field.center((0, 0)) == tuple(center)
    assert field.center((2, 3)) == (center[0] + 2 * jump[0], center[1] + 3 * jump[1])


@settings(max_examples=25)
@given(windows(), st.integers(1, 3), st.booleans(), st.integers(0, 1))
def test_chains_agree_with_brute_force(first, pool_stride, ceil_mode, output_padding):
    kernel, stride, padding, dilation = first
    chain = nn.Sequential(
        nn.Conv2d(2, 4, (kernel, 3), (stride, 1), (padding, 1), (dilation, 1)),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, pool_stride, 1, ceil_mode=ceil_mode),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=output_padding),
        nn.Conv2d(3, 3, (3, 1), padding="same", groups=3),
    )
    check_by_brute_force(chain, (1, 2, 29, 24))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, (5, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(2, 2, 3, padding="valid"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.MaxPool2d((3, 2), dilation=(2, 1)),
        nn.AdaptiveAvgPool2d((5, 3)),
        nn.AdaptiveMaxPool2d((20, None)),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2),
        nn.Upsample(size=(30, 9), mode="nearest"),
        nn.ConvTranspose2d(2, 2, (4, 2), (2, 2), (1, 0)),
        nn.ConvTranspose2d(2, 2, 3, padding=1, dilation=2),
        nn.ZeroPad2d((1, 2, 3, 0)),
        nn.ZeroPad2d((-1, 2, -3, 0)),
        nn.Conv2d(2, 2, 5, padding=2, padding_mode="circular"),
        nn.PixelUnshuffle(2),
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ChannelShuffle(2), nn.GELU(), nn.Softmax(dim=1)),
    ],
    ids=lambda layer: " ".join(str(layer).split()),
)
def test_every_kind_of_layer_agrees_with_brute_force(layer):
    check_by_brute_force(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), layer), (1, 2, 16, 14))


def test_holes_at_the_border_do_not_count_as_seen():
    field = check_by_brute_force(nn.Conv2d(1, 1, 3, dilation=2, padding=2), (1, 1, 8, 8))
    assert regions(field, 0)[6] == (4, 6)  # row 7 lies before a tap in the padding
    assert (field.size, field.start) == ((5, 5), (-2, -2))


def test_a_position_may_see_nothing_but_padding():
    field = check_by_brute_force(nn.Conv2d(1, 1, 2, padding=3), (1, 1, 8, 8))
    assert regions(field, 0)[:3] == [None, None, (0, 0)]
    assert field.is_uniform


@pytest.mark.parametrize("scale", [1.5, 2, 3])
def test_bilinear_resizing_agrees_with_brute_force(scale):
    # NaN spreads to pixels of weight zero here, so a finite change it is.
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Upsample(scale_factor=scale, mode="bilinear"))
    nn.init.ones_(net[0].weight)
    field = receptive_field(net, "", (1, 1, 12, 12))
    assert field.is_exact
    assert field.center((0, 0))[0] == pytest.approx(0.5 / scale - 0.5)
    changed = net(torch.eye(12)[:, None, :, None].expand(12, 1, 12, 12)) - net(torch.zeros(1, 1, 12, 12))
    depends = (changed != 0).any(3)[:, 0].T
    places = [column.nonzero().flatten().tolist() for column in depends]
    assert regions(field, 0) == [(place[0], place[-1]) for place in places]


def test_one_and_three_axes_agree_with_brute_force():
    check_by_brute_force(nn.Sequential(nn.Conv1d(2, 3, 5, 2, 2), nn.MaxPool1d(3, 2)), (1, 2, 40))
    net = nn.Sequential(nn.Conv3d(1, 2, (3, 2, 1), (1, 2, 1), (1, 0, 2)), nn.AvgPool3d(2))
    field = check_by_brute_force(net, (1, 1, 8, 9, 10))
    assert field.size == (4, 4, 2)
    assert field.stride == (2, 4, 2)
    assert field.start == (-1, 0, -2)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 5, padding="same", dilation=3),
        nn.Conv1d(2, 2, 3, stride=2, padding=2, dilation=2),
        nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"),
        nn.Conv1d(2, 2, 3, padding=2, padding_mode="reflect", stride=2),
        nn.ConvTranspose1d(2, 2, 4, stride=2, padding=1),
        nn.ConvTranspose1d(2, 2, 3, stride=1, padding=1, dilation=2),
        nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, output_padding=1),
        nn.MaxPool1d(3, 2, 1, dilation=2, ceil_mode=True),
        nn.AvgPool1d(3, 2, 1, ceil_mode=True),
        nn.AdaptiveAvgPool1d(5),
        nn.AdaptiveMaxPool1d(1),
        nn.Upsample(scale_factor=3),
        nn.ReplicationPad1d((2, 1)),
        nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.BatchNorm1d(4), nn.GELU(), nn.Conv1d(4, 2, 2, 2)),
    ],
    ids=lambda layer: " ".join(str(layer).split()),
)
def test_every_kind_of_layer_over_signals_agrees_with_brute_force(layer):
    check_by_brute_force(nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), layer), (1, 2, 17))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(2, 2, (1, 2, 3), stride=(2, 1, 1), padding=(0, 1, 2), dilation=(1, 3, 2)),
        nn.Conv3d(2, 2, 3, padding="same", dilation=(1, 2, 1)),
        nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
        nn.ConvTranspose3d(2, 2, (2, 4, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.ConvTranspose3d(2, 2, 3, stride=2, padding=1, output_padding=(1, 0, 1)),
        nn.MaxPool3d((2, 3, 2), (1, 2, 2), (1, 1, 0), dilation=(2, 1, 2), ceil_mode=True),
        nn.AvgPool3d((1, 2, 3), padding=(0, 1, 1)),
        nn.AdaptiveAvgPool3d((2, None, 3)),
        nn.AdaptiveMaxPool3d(1),
        nn.Upsample(scale_factor=(1, 2, 3)),
        nn.ConstantPad3d((1, 0, -1, 2, 0, 1), 0.0),
        nn.Sequential(nn.Conv3d(2, 4, (3, 1, 1)), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, (1, 3, 3))),
    ],
    ids=lambda layer: " ".join(str(layer).split()),
)
def test_every_kind_of_layer_over_volumes_agrees_with_brute_force(layer):
    check_by_brute_force(nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), layer), (1, 2, 7, 8, 9))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (
            nn.Sequential(nn.Conv1d(1, 2, 3, 2, 1, 2), nn.AvgPool1d(2), nn.ConvTranspose1d(2, 2, 4, 2, 1)),
            (1, 1, 40),
        ),
        (
            nn.Sequential(
                nn.Conv3d(1, 2, 2, (1, 2, 1), 1), nn.AvgPool3d((1, 2, 2)), nn.ConvTranspose3d(2, 1, 2, 2)
            ),
            (1, 1, 6, 9, 8),
        ),
    ],
    ids=["signal", "volume"],
)
def test_regions_are_where_the_gradient_of_every_position_is_not_zero(net, shape):
    net = net.double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.abs_()  # so that nothing cancels
    field = receptive_field(net, "", shape)
    image = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    output = net(image)
    for position in np.ndindex(*output.shape[2:]):
        at = (0, slice(None), *position)
        (gradient,) = torch.autograd.grad(output[at].sum(), image, retain_graph=True)
        seen = gradient[0, 0].nonzero()
        expected = tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in seen.T)
        assert field.region(position) == expected


# Branches


class Branches(nn.Module):
    """Every way in which branches meet, and slices by hand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(2, 4, 3, 2, 1)
        self.narrow = nn.Conv2d(4, 4, 1)
        self.wide = nn.Conv2d(4, 4, 5, padding=2, groups=2)
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.how == "add":
            return self.narrow(x) + self.wide(x)
        if self.how == "in place":
            y = self.wide(x)
            y += x
            F.relu_(y)
            y.mul_(2.0)
            return self.narrow(y)
        if self.how == "cat":
            zeros = torch.zeros(len(x), 3, *x.shape[2:], dtype=x.dtype)
            return torch.cat([self.narrow(x), self.wide(x), zeros], dim=1)[:, 2:]
        if self.how == "gate":
            return self.wide(x) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        if self.how == "slices":
            return torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1)
        if self.how == "split":
            left, right = x.chunk(2, 1)
            return torch.stack([left, right], 2).flatten(1, 2)
        if self.how == "written":
            y = self.narrow(x)
            y[:, :2] = self.wide(x)[:, 2:]
            return y
        assert self.how == "upsampled"
        return F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]) + x


@pytest.mark.parametrize("how", ["add", "in place", "cat", "gate", "slices", "split", "written", "upsampled"])
def test_branches_agree_with_brute_force(how):
    check_by_brute_force(Branches(how), (1, 2, 24, 20))


def test_a_constant_beside_a_map_sees_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model.forward = lambda x: F.pad(model[0](x), (0, 0, 0, 0, 1, 1))
    assert receptive_field(model, "", (1, 1, 8, 8)).size == (3, 3)
    check_by_brute_force(model, (1, 1, 8, 8))


def test_a_gate_over_the_image_does_not_move_the_positions():
    field = receptive_field(Branches("gate"), "", (1, 2, 32, 32))
    assert field.region((3, 3)) == (slice(0, 32), slice(0, 32))
    assert field.center((3, 5)) == (6.0, 10.0)
    assert field.stride == (2.0, 2.0)
    assert not field.is_uniform


def test_slices_move_and_spread_the_positions():
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    model.forward = lambda x: model[0](x)[:, :, 1::2, 2:]
    field = receptive_field(model, "", (1, 1, 20, 20))
    assert field.center((1, 1)) == (4.0, 4.0)
    assert field.start == (1, 2)
    assert field.is_uniform


# Published values: Araujo, Norris & Sim (2019), and those that follow for torchvision's variants.


@pytest.mark.parametrize(
    ("name", "layer", "size", "stride"),
    [
        ("alexnet", "features.10", 163, 16),
        ("alexnet", "features.12", 195, 32),
        ("vgg16", "features.28", 196, 16),
        ("vgg16", "features.30", 212, 32),
        ("resnet18", "layer4", 435, 32),
        ("resnet50", "layer4", 427, 32),
        ("mobilenet_v2", "features", 491, 32),
        ("inception_v3", "Mixed_7c", 1311, 32),
        ("densenet121", "features", 2071, 32),
    ],
)
def test_published_sizes(name, layer, size, stride):
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):  # only the geometry counts, so that no weights are needed
        model = models.get_model(name, weights=None, **options)
    field = receptive_field(model, layer, (2, 3, 299, 299) if name == "inception_v3" else (2, 3, 224, 224))
    assert field.is_exact
    assert field.is_uniform
    assert field.size == (size, size)
    assert field.stride == (stride, stride)


# Layers that see everything, and layers without positions


def test_a_vector_sees_the_whole_image():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    field = receptive_field(net, "2", (1, 3, 8, 8))
    assert field.map_shape == ()
    assert field.region() == (slice(0, 8), slice(0, 8))
    assert field.center() == (3.5, 3.5)
    assert field.is_exact


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Identity()
        self.back = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.patch(x)
        x = self.first(self.norm(maps.flatten(2).transpose(1, 2)))
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.back(x.transpose(1, 2).reshape(maps.shape))


def test_attention_sees_the_whole_image_and_keeps_its_places():
    field = receptive_field(Tokens(), "back", (1, 3, 16, 24))
    assert field.is_exact
    assert field.region((2, 3)) == (slice(0, 16), slice(0, 24))
    assert field.center((1, 2)) == (5.5, 9.5)
    assert receptive_field(Tokens(), "first", (1, 3, 16, 24)).map_shape == ()


def test_channels_last_positions_are_found():
    model = nn.Sequential(nn.Conv2d(3, 6, 4, 4))
    model.forward = lambda x: model[0](x).permute(0, 2, 3, 1)
    field = receptive_field(model, "", (1, 3, 16, 24))
    assert field.map_shape == (4, 6)
    assert field.region((1, 5)) == (slice(4, 8), slice(20, 24))
    assert field.center((1, 5)) == (5.5, 21.5)


# Measured by gradient


class Odd(nn.Module):
    """A convolution, then something that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, (5, 3), 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.erfcx(self.conv(x))


def test_what_has_no_rule_is_measured():
    with Dependence(), pytest.raises(UnknownOperationError, match="`special_erfcx` has no rule"):
        Odd()(Extents.of_input((1, 1, 40, 40)))
    measured = receptive_field(Odd(), "", (1, 1, 40, 40))
    exact = receptive_field(Odd(), "conv", (1, 1, 40, 40))
    assert not measured.is_exact
    assert exact.is_exact
    assert measured.size == exact.size == (5, 3)
    assert measured.start == exact.start == (-1, -1)
    assert measured.stride == exact.stride == (2, 2)
    assert measured.center((4, 7)) == exact.center((4, 7))
    assert measured.region((0, 3)) == exact.region((0, 3))


def test_a_measured_vector_sees_the_whole_image():
    model = nn.Sequential(Odd(), nn.Flatten())
    field = receptive_field(model, "1", (1, 1, 12, 10))
    assert (field.is_exact, field.map_shape) == (False, ())
    assert field.region() == (slice(0, 12), slice(0, 10))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernels_keep_the_size():
    check_by_brute_force(nn.Conv2d(1, 1, (4, 2), padding="same"), (1, 1, 9, 9))


# The model stays as it was


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.conv(x)))


@pytest.mark.parametrize("odd", [False, True])
def test_nothing_of_the_callers_changes(odd):
    model = nn.Sequential(Noisy(), *([Odd()] if odd else []), nn.Identity())
    if odd:
        model[1].conv = nn.Conv2d(2, 4, 3)
    model.train()
    model[0].drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    field = receptive_field(model, -1, (1, 1, 20, 20))
    assert field.is_exact is not odd
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model[0].drop.training
    assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_and_a_second_call():
    model = nn.Sequential(nn.Conv2d(1, 2, 3).half(), nn.ReLU())
    assert receptive_field(model, "1", (4, 1, 9, 9)).size == (3, 3)
    twice = nn.Sequential(nn.Conv2d(1, 1, 3))
    twice.forward = lambda x: twice[0](twice[0](x))
    assert receptive_field(twice, "0", (1, 1, 9, 9)).size == (3, 3)  # the first call
    assert receptive_field(twice, "", (1, 1, 9, 9)).size == (5, 5)


# What cannot be


def test_layers_and_shapes_that_do_not_fit():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(LayerNotFoundError, match="no layer is named `7`"):
        receptive_field(net, "7", (1, 3, 8, 8))
    with pytest.raises(InvalidArgumentError, match="`layer` must find one layer, got 2: `0`, `1`"):
        receptive_field(net, "*", (1, 3, 8, 8))
    with pytest.raises(InvalidArgumentError, match=r"`input_shape` must be \(N, C, ...\) with one to three"):
        receptive_field(net, "1", (8, 8))
    with pytest.raises(InvalidArgumentError, match="`input_shape` must be"):
        receptive_field(net, "1", (1, 3, 0, 8))
    with pytest.raises(InvalidTypeError, match="`input_shape` must be"):
        receptive_field(net, "1", (1, 3, 8.5, 8))
    with pytest.raises(InvalidTypeError, match="`input_shape` must be"):
        receptive_field(net, "1", 8)
    with pytest.raises(
        InvalidArgumentError, match=r"`input_shape` must be what the model takes.*expected input"
    ):
        receptive_field(net, "1", (1, 4, 8, 8))


class Constant(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> object:
        if self.what == "several":
            return self.inner((x, 2 * x))
        if self.what == "never":
            return x
        return self.inner(torch.ones(1, 2, 3, 3))


@pytest.mark.filterwarnings("ignore:nothing tells which dimension of what `inner` puts out")
def test_layers_that_see_nothing_or_too_much():
    with pytest.raises(InvalidArgumentError, match="`inner` has no gradient with respect to the image"):
        receptive_field(Constant("ones"), "inner", (1, 3, 8, 8))
    with pytest.raises(InvalidArgumentError, match="must put out one tensor, but `inner` puts out 2 tensors"):
        receptive_field(Constant("several"), "inner", (1, 3, 8, 8))
    with pytest.raises(InvalidArgumentError, match="must put out one tensor, but `inner` did not run"):
        receptive_field(Constant("never"), "inner", (1, 3, 8, 8))


class Sorted(nn.Module):
    """Sorts pixels, which extents cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, images):
        return self.conv(images.sort(dim=3).values)


def test_a_field_that_one_pass_does_not_tell_is_none_where_it_must_not_be_measured():
    assert followed_field(Sorted(), "conv", (1, 1, 8, 8)) is None
    assert not receptive_field(Sorted(), "conv", (1, 1, 8, 8)).is_exact
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU())
    found = followed_field(net, "1", (1, 1, 9, 9))
    assert found is not None
    assert (found.size, found.stride, found.is_exact) == ((3, 3), (2.0, 2.0), True)
