"""Transforms: against shifts by slicing and against resampling by hand in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torchlens_viz.ascent.transforms import Transforms, transforms_of
from torchlens_viz.errors import InvalidArgumentError

STILL = [0.5, 0.5, 0.5, 0.5, 0.5]  # the middle of every range


def reflected(place: float, size: int) -> float:
    """Mirror a coordinate in pixels at the edges of the image, as often as needed, then clip to centres."""
    place = abs((place + 0.5) % (2 * size))
    return min(max(min(place, 2 * size - place) - 0.5, 0), size - 1)


def sampled(image: np.ndarray, row: float, column: float, gray: float | None) -> np.ndarray:
    """Interpolate between four pixels; beyond the border is `gray`, or with None the reflection."""
    height, width = image.shape[1:]
    if gray is None:
        row, column = reflected(row, height), reflected(column, width)
    top, left = math.floor(row), math.floor(column)
    total = np.zeros(len(image))
    for r in (top, top + 1):
        for c in (left, left + 1):
            share = (1 - abs(row - r)) * (1 - abs(column - c))
            inside = 0 <= r < height and 0 <= c < width
            if inside or gray is not None:
                total += share * (image[:, r, c] if inside else gray)
    return total


def moved(image, *, angle=0.0, zoom=1.0, shift=(0.0, 0.0), gray=None):
    """Turn by `angle` about the middle, show `zoom` times the field of view, `shift` (x, y) pixels off."""
    _, height, width = image.shape
    made = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row - (height - 1) / 2, column - (width - 1) / 2
            source_x = zoom * (math.cos(angle) * x - math.sin(angle) * y) + shift[0]
            source_y = zoom * (math.sin(angle) * x + math.cos(angle) * y) + shift[1]
            made[:, row, column] = sampled(
                image, source_y + (height - 1) / 2, source_x + (width - 1) / 2, gray
            )
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 2, 10, 16)


def placed(transforms, images, numbers, gray=0.5):
    return transforms.place(images, torch.tensor(numbers, dtype=torch.float32), gray)


def test_without_transforms_images_are_the_very_same(images):
    for still in (Transforms(), transforms_of("none"), transforms_of(None), Transforms(noise=0.3)):
        assert not still.moves
        assert placed(still, images, [STILL] * 3) is images


def test_the_middle_of_every_range_leaves_images_where_they_are(images):
    still = Transforms(jitter=0.2, rotate=20, scale=(0.9, 1.1))
    torch.testing.assert_close(placed(still, images, [STILL] * 3), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("columns", "rows"), [(0, 0), (3, 0), (-4, 0), (0, 2), (5, -5)])
def test_a_shift_by_whole_pixels_is_a_slice_of_the_mirrored_image(images, columns, rows):
    jitter = 0.5
    numbers = [*STILL[:3], 0.5 + columns / 16 / jitter / 2, 0.5 + rows / 10 / jitter / 2]
    result = placed(Transforms(jitter=jitter), images, [numbers] * 3)
    mirrored = np.pad(images.numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)), mode="symmetric")
    expected = mirrored[:, :, 5 + rows : 15 + rows, 5 + columns : 21 + columns]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("degrees", [-30.0, 12.0, 90.0])
def test_a_turn_is_one_of_pixels_not_of_a_stretched_square(images, degrees):
    numbers = [0.5 + degrees / 360, *STILL[1:]]
    result = placed(Transforms(rotate=180), images, [numbers] * 3)
    expected = [moved(image.double().numpy(), angle=math.radians(degrees)) for image in images]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


def test_a_half_turn_is_a_flip_both_ways(images):
    result = placed(Transforms(rotate=180), images, [[1.0, *STILL[1:]]] * 3)
    torch.testing.assert_close(result, images.flip(2, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [0.0, 0.25, 1.0])
def test_scale_enlarges_about_the_middle(images, number):
    result = placed(Transforms(scale=(0.8, 1.6)), images, [[0.5, number, 0.5, 0.5, 0.5]] * 3)
    zoom = 1 / (0.8 + 0.8 * number)
    expected = [moved(image.double().numpy(), zoom=zoom) for image in images]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


def test_a_crop_shows_a_window_up_to_the_borders(images):
    crop = Transforms(crop=(0.5, 0.5))
    for corner, shift in (((0.0, 0.0), (-4.0, -2.5)), ((1.0, 1.0), (4.0, 2.5)), ((1.0, 0.5), (4.0, 0.0))):
        result = placed(crop, images, [[*STILL[:3], *corner]] * 3)
        expected = [moved(image.double().numpy(), zoom=0.5, shift=shift) for image in images]
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


def test_padding_shows_the_whole_image_in_a_frame_of_gray(images):
    result = placed(Transforms(pad=0.25), images, [STILL] * 3, gray=0.3)
    expected = [moved(image.double().numpy(), zoom=1.5, gray=0.3) for image in images]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)
    torch.testing.assert_close(result[:, :, 0], torch.full_like(result[:, :, 0], 0.3))


def test_all_of_them_together_are_one_map_of_places(images):
    everything = Transforms(jitter=0.1, scale=(0.8, 1.2), rotate=40, pad=0.1, crop=(0.6, 1.0))
    numbers = torch.rand(3, 5)
    result = everything.place(images, numbers, 0.5)
    for image, made, (turn, size, cut, right, down) in zip(
        images, result, numbers.double().tolist(), strict=True
    ):
        window = 0.6 + 0.4 * cut
        reach = 2 * 0.1 + 1 - window
        expected = moved(
            image.double().numpy(),
            angle=math.radians(40) * (2 * turn - 1),
            zoom=window * 1.2 / (0.8 + 0.4 * size),
            shift=((2 * right - 1) * reach * 8, (2 * down - 1) * reach * 5),
            gray=0.5,
        )
        np.testing.assert_allclose(made.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("samples", [0, 3, -5])
def test_a_signal_is_shifted_by_a_slice_of_its_mirror_image(samples):
    signals = torch.rand(2, 4, 20)
    result = placed(Transforms(jitter=0.5), signals, [[*STILL[:3], 0.5 + samples / 20]] * 2)
    mirrored = np.pad(signals.numpy(), ((0, 0), (0, 0), (5, 5)), mode="symmetric")
    np.testing.assert_allclose(result.numpy(), mirrored[:, :, 5 + samples : 25 + samples], atol=1e-5)


@pytest.mark.parametrize("pad", [0.0, 0.3])
def test_a_signal_is_stretched_about_its_middle(pad):
    signals = torch.rand(1, 1, 21)
    transforms = Transforms(scale=(0.8, 1.6), pad=pad)
    result = placed(transforms, signals, [[0.5, 0.5, 0.5, 0.5]], gray=0.25)[0, 0].numpy()
    places = (np.arange(21) - 10) * (1 + 2 * pad) / 1.2 + 10
    expected = np.interp(places, np.arange(21), signals[0, 0].numpy())
    inside = (places >= 0) & (places <= 20)
    np.testing.assert_allclose(result[inside], expected[inside], atol=1e-5)
    assert inside.all() == (pad == 0)
    np.testing.assert_allclose(result[(places < -1) | (places > 21)], 0.25, atol=1e-6)


@pytest.mark.parametrize("shifts", [(0, 0, 0), (2, 0, -1), (-3, 1, 2)])
def test_a_volume_is_shifted_along_all_axes(shifts):
    volumes, sizes = torch.rand(2, 2, 6, 8, 10), (6, 8, 10)
    numbers = [0.5 + shift / size for shift, size in zip(shifts, sizes, strict=True)]
    result = placed(Transforms(jitter=0.5), volumes, [[*STILL[:3], *numbers[::-1]]] * 2)
    mirrored = np.pad(volumes.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3), (3, 3)), mode="symmetric")
    cut = [slice(3 + shift, 3 + shift + size) for shift, size in zip(shifts, sizes, strict=True)]
    np.testing.assert_allclose(result.numpy(), mirrored[:, :, *cut], atol=1e-5)


def test_a_volume_is_turned_slice_by_slice_and_scaled_along_all_axes():
    volumes = torch.rand(2, 3, 5, 9, 12)
    numbers = torch.rand(2, 6)
    turned = Transforms(rotate=60).place(volumes, numbers, 0.5)
    for depth in range(5):
        plane = Transforms(rotate=60).place(volumes[:, :, depth], numbers[:, :5], 0.5)
        torch.testing.assert_close(turned[:, :, depth], plane, rtol=0, atol=1e-5)
    scaled = Transforms(scale=(0.5, 2.0)).place(volumes, numbers, 0.5)
    for axis, size in ((2, 5), (3, 9), (4, 12)):  # what changes along one axis alone
        wave = torch.sin(torch.arange(size) * 0.7).view([-1 if each == axis else 1 for each in range(5)])
        made = Transforms(scale=(0.5, 2.0)).place(wave.expand(2, 1, 5, 9, 12), numbers, 0.5)
        line = made.movedim(axis, 2).flatten(3)[..., 0][:, 0].double().numpy()
        for row, number in zip(line, numbers[:, 1].double().tolist(), strict=True):
            places = (np.arange(size) - (size - 1) / 2) / (0.5 + 1.5 * number) + (size - 1) / 2
            mirror = [reflected(place, size) for place in places]
            expected = np.interp(mirror, np.arange(size), wave.flatten().double().numpy())
            np.testing.assert_allclose(row, expected, atol=1e-4)
    assert scaled.shape == volumes.shape


def test_named_transforms_do_not_turn_signals():
    for name in ("gentle", "robust"):
        assert transforms_of(name, 1).rotate == 0
        assert transforms_of(name, 1).jitter == transforms_of(name).jitter
        assert transforms_of(name, 3) == transforms_of(name)


def test_each_image_is_placed_by_its_own_numbers_alone(images):
    numbers = torch.rand(3, 5)
    robust = transforms_of("robust")
    together = robust.place(images, numbers, 0.5)
    for place in range(3):
        alone = robust.place(images[place : place + 1], numbers[place : place + 1], 0.5)
        torch.testing.assert_close(alone[0], together[place], rtol=0, atol=1e-6)


def test_numbers_are_uniform_and_those_of_their_stream():
    first, again = (Transforms(jitter=0.1).numbers(2000, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (2000, 5)
    shapes = [tuple(Transforms().numbers(7, torch.Generator(), axes).shape) for axes in (1, 3)]
    assert shapes == [(7, 4), (7, 6)]
    assert 0 <= first.min() < 0.001
    assert 0.999 < first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)


def test_presets_are_what_they_say():
    assert transforms_of("gentle") == Transforms(jitter=0.02, rotate=1.0)
    assert transforms_of("robust").moves
    assert transforms_of("robust").noise > 0
    own = Transforms(pad=0.1)
    assert transforms_of(own) is own
    with pytest.raises(InvalidArgumentError, match="`transforms` must be one of 'none', 'gentle', 'robust'"):
        transforms_of("medium")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"jitter": -0.1}, "`jitter` must be from 0 to 1, got -0.1"),
        ({"jitter": 1.5}, "`jitter` must be from 0 to 1, got 1.5"),
        ({"rotate": 181}, "`rotate` must be from 0 to 180, got 181"),
        ({"pad": 2}, "`pad` must be from 0 to 1, got 2"),
        ({"noise": float("nan")}, "`noise` must be from 0 to 1, got nan"),
        (
            {"scale": (1.1, 0.9)},
            r"`scale` must be \(low, high\) with 0.1 <= low <= high <= 10, got \(1.1, 0.9\)",
        ),
        ({"scale": (0.0, 1.0)}, r"`scale` must be \(low, high\)"),
        ({"crop": (0.5, 1.5)}, r"`crop` must be \(low, high\) with 0.1 <= low <= high <= 1,"),
    ],
)
def test_ranges_that_cannot_be_are_refused(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Transforms(**options)
