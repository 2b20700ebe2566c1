"""Pairs: the kernel on the left, its map on the right, and a model that is left as it was."""

from __future__ import annotations

import math
import re
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.nets import Noisy, assert_as_before, mixed_model, snapshot
from tests.pixels import written
from torchlens_viz import pair_grid, save_pair_grid
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.grids.pairs import measure_patterns

PADDING, HEADER, FRAME, WHITE = 6, 22, 192, 255


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.array(image)


def network() -> nn.Sequential:
    """A first layer whose kernels and maps are known: kernel k is black but for one channel of one pixel."""
    conv = nn.Conv2d(3, 3, 3, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        for index in range(3):
            conv.weight[index, index, 1, 1] = 1
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Conv2d(3, 5, 3))


def split(sheet: np.ndarray, kernel_width: int, map_size: tuple[int, int], columns: int, header: int = 0):
    """Cut a sheet of pairs into (kernel, map) by the documented layout: framed, two pixels apart."""
    height, width = map_size
    across, down = kernel_width + width + 2 + 4 + PADDING, height + 2 + header + PADDING
    rows, found = (sheet.shape[0] - PADDING) // down, (sheet.shape[1] - PADDING) // across
    assert found == columns
    pairs = []
    for row in range(rows):
        for column in range(columns):
            top, left = PADDING + header + row * down + 1, PADDING + column * across + 1
            kernel = sheet[top : top + height, left : left + kernel_width]
            start = left + kernel_width + 4
            pairs.append((kernel, sheet[top : top + height, start : start + width]))
    return pairs


def test_kernel_stands_left_of_the_map_it_makes():
    image = torch.rand(3, 34, 34)
    image[:, 1, 1], image[:, 32, 32] = 0.0, 1.0
    sheet = pixels(pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=3))
    assert sheet.shape == (6 + 98 + 6, 6 + 3 * (98 + 2 + 98 + 6), 3)
    maps = image[:, 1:-1, 1:-1]  # each channel by itself, without its border
    low, high = maps.min(), maps.max()
    for index, (kernel, drawn) in enumerate(split(sheet, 96, (96, 96), 3)):
        expected = torch.zeros(96, 96, 3, dtype=torch.uint8)
        expected[32:64, 32:64, index] = 255
        assert np.array_equal(kernel, expected.numpy())
        gray = ((maps[index] - low) / (high - low)).mul(250).round() * 255 / 250
        gray = gray.repeat_interleave(3, 0).repeat_interleave(3, 1)
        assert np.abs(drawn.astype(float) - gray[:, :, None].numpy()).max() <= 1.6


def test_kernel_and_map_are_framed_on_white():
    sheet = pixels(pair_grid(network(), "0", torch.rand(3, 34, 34), sort_by="channel", labels=False, nrow=1))
    row = sheet[6 + 50, :, 0].tolist()
    assert row[:7] == [WHITE] * 6 + [FRAME]
    assert row[6 + 97 : 6 + 101] == [FRAME, WHITE, WHITE, FRAME]
    assert row[-7:] == [FRAME] + [WHITE] * 6
    assert (sheet[6, 6 : 6 + 98] == FRAME).all()


def test_signed_maps_are_white_at_zero_and_red_where_positive():
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(model.weight)
    image = torch.tensor([[-1.0, 0.0, 1.0]]).repeat(3, 1)[None]
    sheet = pixels(pair_grid(model, None, image, labels=False))
    ((_, drawn),) = split(sheet, 96, (96, 96), 1)
    assert [tuple(drawn[50, at]) for at in (10, 48, 90)] == [(5, 48, 97), (255, 255, 255), (103, 0, 31)]


def test_kernels_without_three_channels_show_channel_0():
    model = nn.Conv2d(2, 1, (1, 3), bias=False)
    with torch.no_grad():
        model.weight[0, 0, 0] = torch.tensor([-2.0, 0.0, 2.0])
        model.weight[0, 1, 0] = 99.0
    sheet = pixels(pair_grid(model, None, torch.zeros(2, 32, 34), labels=False))
    ((kernel, _),) = split(sheet, 96, (96, 96), 1)
    assert [tuple(kernel[48, at]) for at in (10, 48, 90)] == [(5, 48, 97), (255, 255, 255), (103, 0, 31)]
    assert (kernel[:30] == WHITE).all()  # set in the middle of the height
    assert (kernel[-30:] == WHITE).all()


def test_one_range_holds_for_all_maps_unless_each_has_its_own():
    image = torch.rand(3, 34, 34)
    image[1] /= 8
    shared, each = (
        [drawn for _, drawn in split(pixels(sheet), 96, (96, 96), 3)]
        for sheet in (
            pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=3),
            pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=3, scale_each=True),
        )
    )
    assert shared[1].max() < 40
    assert [drawn.max() for drawn in each] == [255] * 3
    assert [drawn.min() for drawn in each] == [0] * 3


def test_values_are_those_before_an_in_place_relu():
    model = network()
    with torch.no_grad():
        model[0].weight.neg_()
    ((_, drawn), *_) = split(
        pixels(pair_grid(model, "0", torch.rand(3, 34, 34), sort_by="channel", labels=False, nrow=3)),
        96,
        (96, 96),
        3,
    )
    assert drawn.min() < drawn.max()  # after the ReLU all would be zero


def test_first_convolution_is_taken_where_none_is_named():
    image = torch.rand(3, 34, 34)
    named, first = (pair_grid(network(), layer, image) for layer in ("0", None))
    assert named.tobytes() == first.tobytes()


def test_model_that_is_a_convolution_itself_is_drawn():
    model = network()
    image = torch.rand(3, 34, 34)
    assert pair_grid(model[0], None, image).tobytes() == pair_grid(model, "0", image).tobytes()


@pytest.mark.parametrize("chosen", [[2, 0], (2, 0), torch.tensor([2, 0])])
def test_chosen_channels_are_drawn_in_their_order(chosen):
    image = torch.rand(3, 34, 34)
    image[1] = 0.5
    image[:, 1, 1], image[:, 32, 32] = 0.0, 1.0
    everything, some = (
        split(
            pixels(pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=count, **options)),
            96,
            (96, 96),
            count,
        )
        for count, options in ((3, {}), (2, {"channels": chosen}))
    )
    for index, pair in zip([2, 0], some, strict=True):
        for part, expected in zip(pair, everything[index], strict=True):
            assert np.array_equal(part, expected)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 1), (3, 2), (8, 2), (9, 3), (32, 4)])
def test_sheet_of_pairs_is_near_square(count, columns):
    width, height = pair_grid(nn.Conv2d(1, count, 3), None, torch.rand(1, 34, 34), labels=False).size
    assert width == columns * (98 + 2 + 98 + 6) + 6
    assert height == math.ceil(count / columns) * (98 + 6) + 6


def test_labels_stand_above_and_change_no_pair():
    image = torch.rand(3, 34, 34)
    plain = split(
        pixels(pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=2)), 96, (96, 96), 2
    )
    for labels, height in ((True, 2 * HEADER), (["one", "two", "three"], HEADER)):
        sheet = pixels(pair_grid(network(), "0", image, sort_by="channel", labels=labels, nrow=2))
        labelled = split(sheet, 96, (96, 96), 2, height)
        for before, after in zip(plain, labelled, strict=True):
            assert np.array_equal(before[0], after[0])
            assert np.array_equal(before[1], after[1])
        for line in range(height // HEADER):
            top = PADDING + line * HEADER
            assert (sheet[top : top + HEADER, PADDING : PADDING + 98] < WHITE).any()


def test_labels_say_in_words_what_is_kept(monkeypatch):
    lines, image = written(monkeypatch), torch.rand(3, 34, 34)
    pair_grid(network(), "0", image, channels=[1], labels=True)
    maps = network()[0](image[None]).detach()[0]
    luminance = np.array([0.299, 0.587, 0.114]) @ image.numpy().reshape(3, -1).astype(float)
    seen = torch.nn.functional.interpolate(
        torch.from_numpy(luminance).view(1, 1, 34, 34), (32, 32), mode="bilinear", antialias=True
    )
    kept = abs(np.corrcoef(maps[1].flatten().numpy(), seen.flatten().numpy())[0, 1])
    assert lines[0] == f"1: picture {kept:.2f}"
    assert re.fullmatch(r"edges -?0\.\d\d, colour 0\.67", lines[1])
    assert " ".join(lines[2:]) == (
        "picture, edges: how closely the map follows the picture, and its edges, 1 exactly and 0 not at all; "
        "colour: the share of the kernel that tells colours apart"
    )
    del lines[:]
    pair_grid(nn.Conv2d(1, 2, 3), None, torch.rand(1, 34, 34), labels=True)
    assert all(re.fullmatch(r"edges -?0\.\d\d", line) for line in (lines[1], lines[3]))


def test_first_pairs_are_drawn_as_if_they_were_all_and_the_rest_is_mentioned():
    model, image = nn.Conv2d(3, 32, 3), torch.rand(3, 34, 34)
    few = pixels(pair_grid(model, None, image, sort_by="channel", max_tiles=3, labels=False))
    chosen = pixels(pair_grid(model, None, image, channels=range(3), labels=False))
    assert few.shape[1] == chosen.shape[1]
    assert np.array_equal(few[: len(chosen)], chosen)
    assert (few[len(chosen) :] < WHITE).any()


def test_labels_of_pairs_that_are_not_drawn_may_be_given():
    image = torch.rand(3, 34, 34)
    few = pixels(pair_grid(network(), "0", image, sort_by="channel", max_tiles=1, labels=["a", "b", "c"]))
    alone = pixels(pair_grid(network(), "0", image, channels=0, labels=["a"]))
    assert np.array_equal(few[: len(alone)], alone)


def test_values_that_are_not_finite_are_visible_and_alone():
    image = torch.rand(3, 34, 34)
    image[0, 1, 1], image[0, 2, 2] = 0.0, 1.0
    clean = pixels(pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=3))
    image[0, 17, 17] = math.inf
    dirty = pixels(pair_grid(network(), "0", image, sort_by="channel", labels=False, nrow=3))
    ((_, drawn), *_) = split(dirty, 96, (96, 96), 3)
    assert tuple(drawn[49, 49]) == (0, 255, 0)
    expected = clean.copy()
    special = (dirty == [0, 255, 0]).all(2) | (dirty == [255, 0, 255]).all(2)
    expected[special] = dirty[special]
    green = (dirty[..., 0] == 0) & (dirty[..., 1] == 255) & (dirty[..., 2] == 0)
    assert green.sum() == 9 + 32 * 32  # one pixel of the map, and the middle of the green kernel
    assert np.array_equal(dirty, expected)


# The picture.


def test_photograph_is_taken_as_rgb_between_0_and_1():
    values = torch.randint(0, 256, (34, 40, 3), dtype=torch.uint8)
    picture = Image.fromarray(values.numpy())
    expected = pair_grid(network(), "0", values.movedim(2, 0) / 255)
    assert pair_grid(network(), "0", picture).tobytes() == expected.tobytes()
    gray = Image.fromarray(values[..., 0].numpy())
    expected = pair_grid(network(), "0", values[..., 0].expand(3, -1, -1) / 255)
    assert pair_grid(network(), "0", gray).tobytes() == expected.tobytes()


def test_preprocessing_makes_what_the_model_takes():
    picture = Image.new("RGB", (50, 50), (10, 20, 30))
    given = []

    def preprocess(image: Image.Image) -> torch.Tensor:
        given.append(image)
        return torch.linspace(0, 1, 3 * 34 * 34).reshape(1, 3, 34, 34)

    expected = pair_grid(network(), "0", preprocess(picture))
    given.clear()
    assert pair_grid(network(), "0", picture, preprocess=preprocess).tobytes() == expected.tobytes()
    assert given == [picture]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_photograph_is_drawn_by_models_of_other_precision(dtype):
    picture = Image.linear_gradient("L").resize((34, 34))
    sheet = pixels(pair_grid(network()[0].to(dtype), None, picture, sort_by="channel", labels=False, nrow=3))
    for _, drawn in split(sheet, 96, (96, 96), 3):
        assert (np.diff(drawn[:, 50, 0].astype(int)) >= 0).all()
        assert drawn[0, 50, 0] < 20
        assert drawn[-1, 50, 0] > 235


def test_image_is_not_changed():
    image = torch.rand(1, 3, 34, 34, requires_grad=True)
    before = image.detach().clone()
    pair_grid(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3)), None, image.detach())
    assert torch.equal(image, before)
    assert image.grad is None


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken on purpose")


# The model.


def test_a_run_in_training_mode_would_be_noticed():
    model = mixed_model(nn.BatchNorm2d(3))
    before = snapshot(model)
    model(torch.rand(1, 3, 34, 34))
    with pytest.raises(AssertionError, match=r"running_mean|num_batches|weight"):
        assert_as_before(model, before)


def test_model_and_random_numbers_are_left_as_they_were():
    model = mixed_model(nn.Sequential(nn.BatchNorm2d(3), Noisy()))
    before, state = snapshot(model), torch.get_rng_state()
    first = pair_grid(model, None, torch.rand(3, 34, 34, generator=torch.Generator().manual_seed(1)))
    assert_as_before(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = pair_grid(model, None, torch.rand(3, 34, 34, generator=torch.Generator().manual_seed(1)))
    assert first.tobytes() == again.tobytes()  # eval mode: no dropout, no batch statistics


def test_model_is_left_as_it_was_when_it_fails():
    model = mixed_model(Failing())
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(
        InvalidArgumentError, match=r"`image` must be what the model takes.*broken on purpose"
    ):
        pair_grid(model, None, torch.ones(3, 34, 34))
    assert_as_before(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_comes_after_the_layer_does_not_run():
    pair_grid(nn.Sequential(nn.Conv2d(3, 2, 3), Failing()), "0", torch.rand(3, 34, 34))


# What is refused.


IMAGE = torch.rand(3, 34, 34)


class Halving(nn.Conv2d):
    """Puts out fewer maps than it has kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, ::2]


@pytest.mark.parametrize(
    ("model", "image", "options", "message"),
    [
        (network(), torch.rand(2, 3, 34, 34), {}, r"one image .*, got shape \(2, 3, 34, 34\)"),
        (network(), torch.rand(34, 34), {}, r"one image .*, got shape \(34, 34\)"),
        (network(), torch.rand(3, 0, 34), {}, r"one image .*, got shape \(3, 0, 34\)"),
        (network(), IMAGE, {"channels": 3}, "`channels` must be indices from 0 to 2, got 3"),
        (network(), IMAGE, {"channels": []}, "`channels` must choose at least one"),
        (network(), IMAGE, {"nrow": 0}, "`nrow` must be at least 1, got 0"),
        (network(), IMAGE, {"max_tiles": 0}, "`max_tiles` must be at least 1, got 0"),
        (network(), IMAGE, {"labels": ["a"]}, "`labels` must be 3 strings, one per tile, got 1"),
        (network(), IMAGE, {"preprocess": lambda image: image[0]}, r"got shape \(34, 34\)"),
        (Halving(3, 4, 3), IMAGE, {}, "has 4 kernels and puts out 2 maps"),
    ],
)
def test_what_does_not_fit_raises(model, image, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pair_grid(model, None, image, **options)


@pytest.mark.parametrize(
    ("model", "image", "options", "message"),
    [
        (torch.rand(4, 3, 3, 3), IMAGE, {}, r"`model` must be a torch\.nn\.Module, got Tensor"),
        (network(), np.zeros((3, 34, 34)), {}, "`image` must be a tensor or a picture, got ndarray"),
        (network(), IMAGE, {"preprocess": lambda image: None}, "a tensor or a picture, got NoneType"),
        (network(), IMAGE, {"channels": [True]}, "`channels` must be an int or a list of ints"),
        (network(), IMAGE, {"nrow": 1.5}, r"`nrow` must be an int, got 1\.5"),
    ],
)
def test_what_has_another_type_raises_type_error(model, image, options, message):
    with pytest.raises(InvalidTypeError, match=message):
        pair_grid(model, None, image, **options)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("O", LayerNotFoundError, "no layer is named `O`"),
        ("1", InvalidArgumentError, r"`1` \(ReLU\) has no kernels; choose a convolution"),
        (nn.Conv2d, InvalidArgumentError, "`layer` must find one layer, got 2: `0`, `2`"),
    ],
)
def test_layer_that_cannot_be_drawn_raises(layer, error, message):
    with pytest.raises(error, match=message):
        pair_grid(network(), layer, IMAGE)


@pytest.mark.cuda
def test_photograph_goes_where_the_model_is():
    model = network()[0]
    picture = Image.linear_gradient("L").resize((34, 34))
    state = torch.cuda.get_rng_state()
    here, there = pixels(pair_grid(model, None, picture)), pixels(pair_grid(model.cuda(), None, picture))
    assert np.abs(here.astype(int) - there.astype(int)).max() <= 2
    assert torch.equal(torch.cuda.get_rng_state(), state)


# Order and figures.


class Three(nn.Module):
    """Convolutions with a blur, an edge and a colour kernel, in the order edge, colour, blur."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="replicate", bias=False)
        edge = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(3, 3, 3)
        colour = torch.zeros(3, 3, 3)
        colour[0, 1, 1], colour[2, 1, 1] = 1, -1
        with torch.no_grad():
            self.conv.weight.copy_(torch.stack([edge, colour, torch.full((3, 3, 3), 1 / 27)]))

    def forward(self, value):
        return self.conv(value)


@pytest.fixture
def scene():
    image = torch.zeros(3, 40, 40)
    image[:, :, 20:] = 1
    image[0, 10:30, 5:15] = 0.3
    return image


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("channel", [0, 1, 2]),
        (None, [2, 1, 0]),
        ("picture", [2, 1, 0]),
        ("edges", [0, 1, 2]),
        ("color", [1, 0, 2]),
    ],
)
def test_pairs_are_sorted_by_what_the_kernels_keep(scene, order, expected):
    sheet = pair_grid(Three(), None, scene, sort_by=order, labels=False, scale_each=True, nrow=3)
    by_hand = pair_grid(Three(), None, scene, channels=expected, labels=False, scale_each=True, nrow=3)
    assert sheet.tobytes() == by_hand.tobytes()


def test_most_telling_pairs_are_those_that_stay(scene):
    few = pixels(pair_grid(Three(), None, scene, labels=False, max_tiles=1, scale_each=True))
    first = pixels(pair_grid(Three(), None, scene, labels=False, channels=2, scale_each=True))
    assert np.array_equal(few[: first.shape[0], : first.shape[1]], first)


def test_own_labels_go_with_their_pairs(scene):
    labelled = pair_grid(Three(), None, scene, labels=["a", "b", "c"], sort_by="picture")
    by_hand = pair_grid(Three(), None, scene, labels=["c", "b", "a"], channels=[2, 1, 0])
    assert labelled.tobytes() == by_hand.tobytes()


def test_unknown_order_is_refused(scene):
    with pytest.raises(InvalidArgumentError, match="`sort_by` must be"):
        pair_grid(Three(), None, scene, sort_by="size")


def maps_of(kernels, image):
    return F.conv2d(image[None], kernels, padding="same")[0]


def test_picture_is_numpys_correlation_with_luminance():
    image = torch.rand(3, 20, 30)
    kernels = torch.randn(5, 3, 3, 3)
    maps = maps_of(kernels, image)
    luminance = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(np.float64), 1)
    expected = [abs(np.corrcoef(m.ravel(), luminance.ravel())[0, 1]) for m in maps.numpy().astype(np.float64)]
    assert measure_patterns(kernels, maps, image).picture.tolist() == pytest.approx(expected, abs=1e-6)


def test_colour_share_is_the_energy_off_the_gray_axis():
    gray = torch.ones(3, 2, 2)
    opponent = torch.stack([torch.ones(2, 2), -torch.ones(2, 2), torch.zeros(2, 2)])
    one_channel = torch.stack([torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)])
    kernels = torch.stack([gray, opponent, one_channel, torch.zeros(3, 2, 2)])
    found = measure_patterns(kernels, torch.rand(4, 5, 5), torch.rand(3, 5, 5))
    assert found.color.tolist() == pytest.approx([0, 1, 2 / 3, 0], abs=1e-6)


def test_edge_kernels_and_colour_kernels_differ_as_they_should():
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1
    image[0, 8:24, 8:24] += 0.5
    blur = torch.full((3, 3, 3), 1 / 27)
    edge = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(3, 3, 3)
    kernels = torch.stack([blur, edge])
    found = measure_patterns(kernels, maps_of(kernels, image)[:, 1:-1, 1:-1], image[:, 1:-1, 1:-1])
    assert found.picture[0] > 0.9 > 0.5 > found.picture[1]
    assert found.edges[1] > 0.7 > found.edges[0]


def test_constant_map_correlates_with_nothing():
    found = measure_patterns(torch.zeros(1, 3, 3, 3), torch.zeros(1, 8, 8), torch.rand(3, 16, 16))
    assert found.picture.tolist() == [0]
    assert found.edges.tolist() == [0]


def test_other_than_three_channels_have_no_colour():
    found = measure_patterns(torch.rand(2, 1, 3, 3), torch.rand(2, 8, 8), torch.rand(1, 16, 16))
    assert found.color.isnan().all()
    assert found.picture.isfinite().all()


def test_numbers_of_kernels_and_maps_must_agree():
    with pytest.raises(ValueError, match="got 2 kernels and 3 maps"):
        measure_patterns(torch.rand(2, 3, 3, 3), torch.rand(3, 8, 8), torch.rand(3, 8, 8))


def test_pairs_go_to_a_file(tmp_path):
    image = torch.rand(3, 34, 34)
    path = save_pair_grid(network(), "0", image, tmp_path / "new" / "pairs.png", sort_by="channel", nrow=2)
    assert path == tmp_path / "new" / "pairs.png"
    with Image.open(path) as stored:
        expected = pair_grid(network(), "0", image, sort_by="channel", nrow=2)
        assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(expected))


def test_a_sheet_that_would_be_too_large_is_refused_before_it_is_drawn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidArgumentError, match=r"the sheet would have .* choose fewer tiles"):
        pair_grid(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", torch.rand(3, 12, 12), channels=[0, 1] * 20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kilobytes
