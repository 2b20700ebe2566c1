"""`project` against captum, closed forms, sums by hand, finite differences; and it leaves no trace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.nets import Gives, Repeats, small_net
from torchlens_viz import project, receptive_field
from torchlens_viz.attribution import units

RULES = ("deconvnet", "guided", "gradient")


def modules_only() -> nn.Sequential:
    """Convolutions with stride, padding and groups, normalisation and both poolings; ReLUs are modules."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def whole(monkeypatch):
    """Go back through the whole image for each unit, as where a unit sees all of it."""
    return lambda: monkeypatch.setattr(units, "crops_for", lambda field, positions: None)


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """Which way every unit was gone back from."""
    seen: list[str] = []
    through_all, through_crops = units.Units._through_all, units.Units._through_crops

    def all_of_it(self, unit):
        seen.append("whole")
        return through_all(self, unit)

    def crops_of_it(self, *arguments):
        before = len(seen)
        found = through_crops(self, *arguments)
        del seen[before:]
        seen.append("refused" if found is None else "crops")
        return found

    monkeypatch.setattr(units.Units, "_through_all", all_of_it)
    monkeypatch.setattr(units.Units, "_through_crops", crops_of_it)
    return seen


# --- against captum, where ReLUs are modules


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layer", ["0", "4", "5", "7", "8"])
@pytest.mark.parametrize("size", [(48, 64), (160, 150)])
def test_projections_are_captums_where_relus_are_modules(layer, size):
    attr = pytest.importorskip("captum.attr")
    net, image = modules_only(), picture(3, *size)
    place = (4, 3)
    theirs = {"deconvnet": attr.NeuronDeconvolution, "guided": attr.NeuronGuidedBackprop}
    for rule, kind in theirs.items():
        found = project(net, layer, image, [0, 3, 5], rule=rule, position=place)
        twin = copy.deepcopy(net)
        method = kind(twin, twin[int(layer)])
        for channel, ours in zip([0, 3, 5], found.images, strict=True):
            expected = method.attribute(image[None], (channel, *place))[0]
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-6)


# --- closed forms


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [12, 80])
def test_of_a_linear_network_every_rule_is_the_transposed_convolution(rule, size):
    torch.manual_seed(1)
    first, second = nn.Conv2d(3, 5, 5, stride=2, padding=1, bias=False), nn.Conv2d(5, 4, 3, padding=1)
    net, image = nn.Sequential(first, second).double(), picture(3, size, size)
    found = project(net, "1", image, rule=rule)
    maps = net(image[None].double())[0]
    for channel, place, ours in zip(found.channels, found.positions, found.images, strict=True):
        seed = torch.zeros_like(maps)[None]
        seed[0, channel, place[0], place[1]] = 1
        back = F.conv_transpose2d(seed, second.weight, padding=1)
        rest = size - ((back.shape[2] - 1) * 2 - 2 + 5)
        back = F.conv_transpose2d(back, first.weight, stride=2, padding=1, output_padding=rest)
        torch.testing.assert_close(ours.double(), back[0].detach(), rtol=1e-5, atol=1e-7)


def test_a_max_pooling_puts_its_value_where_the_maximum_was():
    net = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 1, 2, bias=False))
    net[1].weight.data = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]])
    image = torch.tensor([[[1.0, 2, 3, 4], [5, 0, 1, 2], [9, 8, 7, 6], [1, 2, 3, 7.5]]])
    expected = [[[0.0, 0, 0, -2], [1, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 4]]]
    for rule in RULES:
        assert project(net, "1", image, rule=rule).images[0].tolist() == expected


class Functional(nn.Module):
    """y = relu(x - 2), z = 3 relu(2 - x) - relu(x), with ReLUs of every spelling."""

    def __init__(self, relu):
        super().__init__()
        self.relu, self.end = relu, nn.Identity()

    def forward(self, x):
        return self.end(torch.cat([self.relu(x - 2), 3 * self.relu(2 - x) - self.relu(x * 1)], 1))


@pytest.mark.parametrize(
    "relu",
    [
        F.relu,
        torch.relu,
        torch.relu_,
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu(),
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_(0),
        F.relu6,
        lambda x: F.hardtanh(x, 0, 6),
        nn.ReLU(),
        nn.ReLU(inplace=True),
    ],
)
def test_functional_relus_by_hand(relu):
    image = torch.tensor([[[1.0, 3.0]]])

    # y: open for 3, closed for 1. z: for 1 both are open, for 3 only the last, whose sign is negative.
    slopes = {
        ("gradient", 0): {0: 0.0, 1: -3.0 - 1.0},
        ("gradient", 1): {0: 1.0, 1: -1.0},
        ("guided", 0): {0: 0.0, 1: -3.0},
        ("guided", 1): {0: 1.0, 1: 0.0},
        ("deconvnet", 0): {0: 1.0, 1: -3.0},
        ("deconvnet", 1): {0: 1.0, 1: -3.0},
    }
    for (rule, column), expected in slopes.items():
        found = project(
            Functional(relu), "end", image, [0, 1], rule=rule, position=(0, column), channel_dim=1
        )
        for channel, slope in expected.items():
            row = [0.0, 0.0]
            row[column] = slope
            assert found.images[channel].flatten().tolist() == row, (rule, column, channel)


@pytest.mark.parametrize("position", ["max", "all", (3, 4)])
def test_the_gradient_is_that_of_finite_differences_in_float64(position):
    net = modules_only().double()
    image = picture(3, 40, 44)
    found = project(net, "7", image, [1, 4], rule="gradient", position=position)

    def score(batch, channel, place):
        maps = net[:8](batch)[:, channel]
        return maps.sum((1, 2)) if position == "all" else maps[:, place[0], place[1]]

    generator = torch.Generator().manual_seed(2)
    for channel, place, ours in zip([1, 4], found.positions.tolist(), found.images, strict=True):
        for _ in range(4):
            direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
            step = 1e-6 * direction[None]
            with torch.no_grad():
                up, down = (score(image[None].double() + sign * step, channel, place) for sign in (1, -1))
            expected = (up - down) / 2e-6
            torch.testing.assert_close(
                (ours.double() * direction).sum()[None], expected, rtol=1e-4, atol=1e-6
            )


# --- parts of the image stand for the whole


class Branches(nn.Module):
    """A residual block and a concatenation, with functional ReLUs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.down = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.end = nn.Conv2d(12, 5, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, 2, ceil_mode=True)
        x = x + F.relu(self.left(x))
        x = torch.cat([x, torch.relu(self.right(x))], 1)
        return self.end(F.avg_pool2d(self.down(x).clamp(min=0), 3, 1, 1))


def deep_nets() -> dict[str, tuple[nn.Module, str]]:
    torch.manual_seed(4)
    return {
        "chain": (modules_only(), "7"),
        "branches": (Branches().eval(), "end"),
        "ReLU": (small_net(), "3"),
    }


@pytest.mark.parametrize("name", deep_nets())
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(130, 131), (128, 176)])
def test_parts_of_the_image_give_what_the_whole_gives(name, rule, size, whole, ways):
    (net, layer), image = deep_nets()[name], picture(3, *size)
    rows, columns = receptive_field(net, layer, (1, 3, *size)).map_shape
    places = [
        (0, 0),
        (0, columns - 1),
        (rows - 1, 0),
        (rows - 1, columns - 1),
        (rows // 2, columns // 3),
        "max",
    ]
    parts = [project(net, layer, image, range(5), rule=rule, position=place) for place in places]
    assert ways == ["crops"] * len(places)
    whole()
    for place, part in zip(places, parts, strict=True):
        expected = project(net, layer, image, range(5), rule=rule, position=place)
        scale = expected.images.abs().amax()
        torch.testing.assert_close(part.images, expected.images, rtol=1e-4, atol=1e-6 * float(scale))
        for box, found in zip(part.regions, part.images, strict=True):
            outside = found.clone()
            outside[:, *box] = 0
            assert not outside.any()


@pytest.mark.parametrize(
    "middle",
    [
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8),
        Gives(lambda x: x / x.std((1, 2, 3), keepdim=True)),
        Gives(lambda x: x * x.shape[3]),
    ],
)
def test_what_depends_on_the_whole_image_is_gone_through_as_a_whole(middle, whole, ways):
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.ReLU(), nn.Conv2d(8, 4, 3))
    image = picture(3, 64, 64)
    found = project(net, "3", image, rule="gradient", position=(9, 12))
    assert "crops" not in ways
    assert ways.count("whole") == 4
    whole()
    assert torch.equal(found.images, project(net, "3", image, rule="gradient", position=(9, 12)).images)
    leaf = image[None].clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(leaf)[0, 2, 9, 12], leaf)
    torch.testing.assert_close(found.images[found.channels.tolist().index(2)], expected[0])


def test_a_gradient_that_differs_though_the_values_do_not_is_gone_through_as_a_whole(ways):
    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient + gradient.sum((2, 3), keepdim=True)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Gives(Leaks.apply), nn.Conv2d(8, 4, 3))
    found = project(net, "2", picture(3, 64, 64), rule="gradient", position=(9, 12))
    assert ways[0] == "refused"
    assert ways.count("whole") == 4
    assert (found.images != 0).float().mean() > 0.9


def test_what_depends_on_where_it_stands_is_gone_through_as_a_whole(ways):
    def fading(x):
        return x / torch.arange(1, 1 + x.shape[3])  # at the left of a crop as at the left of the image

    net = nn.Sequential(nn.Conv2d(2, 2, 3, bias=False), Gives(fading))
    net[0].weight.data = torch.eye(2)[:, :, None, None].expand(2, 2, 3, 3).clone()
    image = torch.zeros(2, 64, 64)
    image[0, :5, :5] = image[1, 30:40, 30:40] = 1
    found = project(net, "1", image, [0, 1])
    assert found.positions.tolist() == [
        [0, 0],
        [30, 30],
    ]  # the first has the larger gradient, right in its crop
    assert ways[0] == "refused"
    expected = torch.zeros(2, 64, 64)
    expected[1, 30:33, 30:33] = 1 / 31
    torch.testing.assert_close(found.images[1], expected)


def test_a_network_may_work_in_place_on_what_it_takes():
    conv = nn.Conv2d(3, 2, 3, bias=False)
    image = picture(3, 30, 30) - 0.5
    found = project(nn.Sequential(nn.ReLU(inplace=True), conv), "1", image, rule="gradient", position=(4, 5))
    expected = torch.zeros(3, 30, 30)
    expected[:, 4:7, 5:8] = conv.weight[1].detach()
    torch.testing.assert_close(found.images[found.channels.tolist().index(1)], expected * (image > 0))
    assert image.min() < 0


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_how_many_parts_at_a_time_changes_nothing_but_rounding(batch_size):
    image = picture(3, 120, 120)
    expected = project(modules_only(), "7", image, range(6), batch_size=6).images
    found = project(modules_only(), "7", image, range(6), batch_size=batch_size).images
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_channels_come_as_they_are_asked_for_twice_or_in_any_order():
    found = project(small_net(), "2", picture(3, 30, 30), [5, 0, 5])
    assert found.channels.tolist() == [5, 0, 5]
    assert torch.equal(found.images[0], found.images[2])
    one = project(small_net(), "2", picture(3, 30, 30), 5)
    torch.testing.assert_close(one.images[0], found.images[0], rtol=1e-5, atol=1e-8)


# --- which units


def test_none_is_the_strongest_and_max_the_first_of_the_highest():
    net = nn.Sequential(nn.Conv2d(1, 20, 1, bias=False))
    net[0].weight.data = torch.arange(20.0).sub(9.5).view(20, 1, 1, 1)
    image = torch.zeros(1, 6, 7)
    image[0, 2, 5] = image[0, 4, 1] = 2
    image[0, 0, 3] = -1
    found = project(net, "0", image)
    values = [2 * (c - 9.5) if c > 9 else 9.5 - c for c in range(20)]
    order = sorted(range(20), key=lambda c: -values[c])[:16]
    assert found.channels.tolist() == order
    assert found.scores.tolist() == [values[c] for c in order]
    assert found.positions.tolist() == [[2, 5] if c > 9 else [0, 3] for c in order]
    assert found.regions[0] == (slice(2, 3), slice(5, 6))
    assert found.images[0, 0, 2, 5] == 9.5
    assert found.images[0].abs().sum() == 9.5
    assert found.images.dtype == torch.float32


@pytest.mark.parametrize("place", [[1, 3], np.array([1, 3]), torch.tensor([1, 3])])
def test_a_place_may_be_any_pair_of_whole_numbers(place):
    found = project(small_net(), "0", picture(3, 12, 12), position=place)
    assert found.position == (1, 3)
    assert found.positions.tolist() == [[1, 3]] * 6


def test_the_sum_of_a_map_and_a_place():
    net, image = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False)), picture(2, 4, 5)
    of_all = project(net, "0", image, [2], position="all")
    torch.testing.assert_close(of_all.scores, net(image[None])[0, 2].sum()[None].detach())
    assert of_all.positions.tolist() == [[-1, -1]]
    assert of_all.regions == ((slice(0, 4), slice(0, 5)),)
    expected = F.conv_transpose2d(torch.ones(1, 1, 3, 4), net[0].weight[2:3])[0]
    torch.testing.assert_close(of_all.images[0], expected.detach())
    there = project(net, "0", image, [2], position=(1, 3))
    torch.testing.assert_close(there.scores, net(image[None])[0, 2, 1, 3][None].detach())
    assert there.positions.tolist() == [[1, 3]]
    assert there.regions == ((slice(1, 3), slice(3, 5)),)
    torch.testing.assert_close(there.images[0, :, 1:3, 3:5], net[0].weight[2].detach())


def test_units_that_are_nan_come_last_and_spoil_no_other():
    net = small_net()
    net[2].weight.data[3] = torch.nan
    found = project(net, "2", picture(3, 20, 20))
    assert found.channels[-1] == 3
    assert found.scores[-1].isnan()
    assert found.images[:-1].isfinite().all()


@pytest.mark.parametrize("channel_dim", [None, -1])
def test_channels_may_come_last(channel_dim):
    conv = nn.Conv2d(3, 5, 3, bias=False)
    net = nn.Sequential(conv, Gives(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(5))
    found = project(net, "1", picture(3, 12, 14), [4], position=(6, 7), channel_dim=channel_dim)
    assert found.regions == ((slice(6, 9), slice(7, 10)),)
    torch.testing.assert_close(found.images[0, :, 6:9, 7:10], conv.weight[4].detach())


def test_tokens_are_a_map_of_one_row_and_vectors_of_one_unit():
    net = nn.Sequential(
        nn.Conv2d(3, 5, 4, stride=4, bias=False), nn.Flatten(2), Gives(lambda x: x.mT), nn.Linear(5, 2)
    )
    net[3].bias.data.zero_()
    image = picture(3, 8, 12)
    found = project(net, "3", image, [1], position=(0, 4))
    kernel = torch.einsum("i,ichw->chw", net[3].weight[1], net[0].weight)
    torch.testing.assert_close(found.images[0, :, 4:8, 4:8], kernel.detach())
    assert found.images[0].count_nonzero() == kernel.numel()
    flat = nn.Sequential(nn.Conv2d(3, 5, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    vector = project(flat, "3", image, [0, 1], rule="gradient")
    torch.testing.assert_close(vector.scores, flat(image[None])[0].detach())
    assert vector.positions.tolist() == [[0, 0], [0, 0]]
    assert vector.regions[0] == (slice(0, 8), slice(0, 12))


def test_a_dimension_that_is_told_wrongly_makes_no_region_that_is_none():
    conv = nn.Sequential(nn.Conv2d(3, 5, 3))
    found = project(conv, "0", picture(3, 12, 16), channel_dim=2)
    assert len(found.channels) == 10  # rows, taken for channels
    assert set(map(str, found.regions)) == {str((slice(0, 12), slice(0, 16)))}


def test_of_several_calls_the_first_counts():
    net, image = Repeats(), picture(2, 6, 6)
    found = project(net, "conv", image, [0], position=(2, 3))
    assert torch.equal(found.images[0, :, 2, 3], net.conv.weight[0, :, 0, 0])


# --- what is an image


def test_a_picture_with_its_preprocessing_and_what_is_shown_beside():
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.1])[:, None, None]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    net = small_net()

    def preprocess(image):
        values = (
            image
            if isinstance(image, torch.Tensor)
            else torch.from_numpy(np.array(image)).movedim(2, 0) / 255
        )
        return ((values - mean) / std)[..., ::2, :]

    found = project(net, "2", Image.fromarray(pixels), preprocess=preprocess)
    values = preprocess(Image.fromarray(pixels))
    same = project(net, "2", values)
    assert torch.equal(found.images, same.images)
    assert found.images.shape == (7, 3, 10, 24)
    expected = torch.from_numpy(pixels).movedim(2, 0)[:, ::2] / 255
    torch.testing.assert_close(found.pixels, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(found.colours, torch.diag(1 / std.flatten()), rtol=1e-4, atol=1e-5)
    assert torch.equal(project(net, "2", values[None]).images, same.images)


def test_uint8_counts_to_255_and_a_gray_model_takes_gray():
    whole_numbers = (picture(3, 12, 12) * 255).round().to(torch.uint8)
    net = small_net()
    found = project(net, "0", whole_numbers)
    assert torch.equal(found.scores, project(net, "0", whole_numbers / 255).scores)
    gray = nn.Sequential(nn.Conv2d(1, 2, 3))
    picture_file = Image.fromarray(whole_numbers[0].numpy())
    assert project(gray, "0", picture_file).images.shape == (2, 1, 12, 12)
