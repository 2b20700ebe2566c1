"""Parametrisations: what their parameters stand for, by numpy's transforms, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchlens_viz.ascent.fourier import FixedSpectrum, Fourier
from torchlens_viz.ascent.options import parametrization_of
from torchlens_viz.ascent.parametrization import Parametrization, Pixels
from torchlens_viz.errors import InvalidArgumentError

SIZES = [(8, 8), (7, 9), (6, 11), (1, 5), (5, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 3.0), (0.0, 255.0)])
def test_pixels_begin_about_the_middle_and_are_clipped_to_their_limits(low, high):
    by = Pixels(low=low, high=high)
    start = by.start(3, (64, 64), generator(), None)
    assert start.mean().item() == pytest.approx((low + high) / 2, abs=0.01 * (high - low))
    assert start.std().item() == pytest.approx(0.02 * (high - low), rel=0.05)
    wild = 10 * (high - low) * torch.randn(2, 3, 4, 4)
    kept = wild.clone()
    by.confine_(wild)
    assert torch.equal(wild, kept.clamp(low, high))
    assert by.decode(wild, (4, 4)) is wild
    assert by.learning_rate == pytest.approx(0.05 * (high - low))


def test_pixels_without_limits_are_left_as_they_are():
    by = Pixels(low=None, high=None)
    wild = 100 * torch.randn(1, 2, 3, 3)
    kept = wild.clone()
    by.confine_(wild)
    assert torch.equal(wild, kept)


def test_uniform_pixels_are_those_of_numpy():
    start = Pixels(low=None, high=None, uniform=(128, 148)).start(3, (5, 7), generator(42), None)
    np.random.seed(42)
    expected = np.random.random((1, 5, 7, 3)) * 20 + 128
    np.testing.assert_allclose(start.permute(1, 2, 0).numpy(), expected[0], rtol=1e-6)


@pytest.mark.parametrize("size", [(7,), (3, 4, 5)])
def test_uniform_pixels_of_signals_and_volumes_are_those_of_numpy(size):
    start = Pixels(low=None, high=None, uniform=(-1, 1)).start(2, size, generator(42), None)
    np.random.seed(42)
    expected = np.moveaxis(np.random.random((*size, 2)) * 2 - 1, -1, 0)
    np.testing.assert_allclose(start.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("by", [Pixels(), Fourier(), FixedSpectrum()], ids=lambda by: type(by).__name__)
def test_noise_hangs_on_the_stream_of_random_numbers_alone(by):
    first, again, other = (by.start(3, (6, 6), generator(seed), None) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decorrelate", [False, True])
@pytest.mark.parametrize("limits", [(0.0, 1.0), (-3.0, 5.0), (None, None)])
def test_an_image_comes_back_from_its_fourier_coefficients(size, decorrelate, limits):
    by = Fourier(decorrelate=decorrelate, low=limits[0], high=limits[1])
    low, width = limits[0] or 0.0, by.width
    image = low + width * (0.02 + 0.96 * torch.rand(3, *size))
    again = by.decode(by.start(3, size, generator(), image)[None], size)[0]
    torch.testing.assert_close(again, image, rtol=0, atol=2e-4 * width)


def test_black_and_white_come_back_to_a_thousandth():
    image = (torch.rand(3, 9, 8) > 0.5).float()
    again = Fourier().decode(Fourier().start(3, (9, 8), generator(), image)[None], (9, 8))[0]
    torch.testing.assert_close(again, image, rtol=0, atol=1.1e-3)


ALL_SIZES = [(8,), (9,), (8, 8), (7, 9), (6, 11), (4, 6, 8), (5, 4, 7)]


def frequencies(size):
    """The frequency of every coefficient that numpy has for real numbers of that size."""
    along = [np.fft.fftfreq(length) for length in size[:-1]] + [np.fft.rfftfreq(size[-1])]
    return np.sqrt(sum(part**2 for part in np.meshgrid(*along, indexing="ij")))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize("decay", [None, 0.7])
def test_fourier_coefficients_stand_for_what_numpy_makes_of_them(channels, size, decay):
    by = Fourier(decorrelate=False, decay=decay)
    coefficients = 5 * torch.randn(2, channels, *size[:-1], size[-1] // 2 + 1, 2)
    power = len(size) / 2 if decay is None else decay
    scale = np.maximum(frequencies(size), 1 / max(size)) ** -power / 4
    spectrum = (coefficients[..., 0] + 1j * coefficients[..., 1]).numpy().astype(np.complex128) * scale
    waves = np.fft.irfftn(spectrum, s=size, axes=range(2, 2 + len(size)), norm="ortho")
    expected = 1 / (1 + np.exp(-waves))
    np.testing.assert_allclose(by.decode(coefficients, size).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8,), (9,), (4, 6, 8), (5, 4, 7), (1, 1, 5)])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_signals_and_volumes_come_back_from_their_coefficients(size, channels):
    image = 0.02 + 0.96 * torch.rand(channels, *size)
    again = Fourier().decode(Fourier().start(channels, size, generator(), image)[None], size)[0]
    torch.testing.assert_close(again, image, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(4096,), (256, 256), (64, 64, 64)])
@pytest.mark.parametrize("kind", [Fourier, FixedSpectrum])
def test_every_octave_of_frequencies_has_the_same_energy(size, kind):
    by = kind(low=None, high=None)
    waves = by.decode(by.start(1, size, generator(), None)[None], size)[0, 0].double().numpy()
    energy = np.abs(np.fft.rfftn(waves)) ** 2
    energy[..., 1:-1] *= 2  # the other half of the spectrum is their mirror image
    octaves = np.floor(np.log2(np.maximum(frequencies(size), 1e-9) / 0.5)).astype(int)
    per_octave = [energy[octaves == octave].sum() for octave in (-3, -2, -1)]
    assert max(per_octave) / min(per_octave) < 1.4  # 2 and 4 if all went by 1/f

    if kind is Fourier and len(size) != 2:
        other = Fourier(low=None, high=None, decay=1.0)
        waves = other.decode(other.start(1, size, generator(), None)[None], size)[0, 0].double().numpy()
        energy = np.abs(np.fft.rfftn(waves)) ** 2
        per_octave = [energy[octaves == octave].sum() for octave in (-3, -1)]
        assert max(per_octave) / min(per_octave) > 3


def test_noise_is_as_strong_in_signals_and_volumes_as_in_images():
    by = Fourier(low=None, high=None, decorrelate=False)
    deviations = [
        by.decode(by.start(1, size, generator(), None)[None], size).std().item()
        for size in ((4096,), (64, 64), (16, 16, 16))
    ]
    assert max(deviations) / min(deviations) < 2.5


def test_colours_are_mixed_as_in_natural_images():
    # The published square root of their covariance, over its largest column norm.
    root = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    root /= np.linalg.norm(root, axis=0).max()
    coefficients = torch.randn(1, 3, 6, 4, 2)
    plain = Fourier(decorrelate=False, low=None, high=None).decode(coefficients, (6, 6))[0].double().numpy()
    mixed = Fourier(low=None, high=None).decode(coefficients, (6, 6))[0].numpy()
    np.testing.assert_allclose(mixed, np.einsum("ij,jhw->ihw", root, plain), atol=1e-5)


@pytest.mark.parametrize("kind", [Fourier, FixedSpectrum])
def test_colours_are_mixed_for_three_channels_only(kind):
    by, plain = kind(decorrelate=True), kind(decorrelate=False)
    parameters = plain.start(4, (6, 6), generator(), None)[None]
    with pytest.raises(InvalidArgumentError, match="`decorrelate` must be False for images of other than 3"):
        by.decode(parameters, (6, 6))
    left, right = kind(), kind(decorrelate=False)
    start = left.start(4, (6, 6), generator(), None)[None]
    assert torch.equal(left.decode(start, (6, 6)), right.decode(start, (6, 6)))


@pytest.mark.parametrize("kind", [Fourier, FixedSpectrum])
def test_colours_are_mixed_in_every_frame_of_a_clip_and_never_in_signals(kind):
    by = kind(low=None, high=None)
    clip = by.start(3, (4, 6, 6), generator(), None)[None]
    mixed, plain = (
        each.decode(clip, (4, 6, 6)) for each in (by, kind(low=None, high=None, decorrelate=False))
    )
    root = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    root /= np.linalg.norm(root, axis=0).max()
    np.testing.assert_allclose(mixed[0], np.einsum("ij,jdhw->idhw", root, plain[0].double()), atol=1e-5)
    signal = by.start(3, (9,), generator(), None)[None]
    assert torch.equal(
        by.decode(signal, (9,)), kind(low=None, high=None, decorrelate=False).decode(signal, (9,))
    )
    with pytest.raises(InvalidArgumentError, match="`decorrelate` must be False for signals"):
        kind(decorrelate=True).decode(signal, (9,))


@pytest.mark.parametrize("kind", [Fourier, FixedSpectrum])
@pytest.mark.parametrize("limits", [(0.0, 1.0), (-1.0, 4.0)])
def test_spectra_stand_for_images_within_the_limits_whatever_they_are(kind, limits):
    by = kind(low=limits[0], high=limits[1])
    images = by.decode(100 * by.start(3, (7, 8), generator(), None)[None], (7, 8))
    assert limits[0] <= images.min() < images.max() <= limits[1]
    assert images.isfinite().all()


@pytest.mark.parametrize("size", [(8,), (11,), (8, 8), (9, 7), (6, 11), (4, 6, 8), (5, 3, 7)])
def test_a_fixed_spectrum_keeps_its_magnitudes_one_over_the_frequency_whatever_the_phases(size):
    by = FixedSpectrum(low=None, high=None, decorrelate=False)
    for seed in (1, 2):
        waves = by.decode(by.start(1, size, generator(seed), None)[None], size)[0, 0].double().numpy()
        assert waves.std(ddof=1) == pytest.approx(by.contrast, rel=1e-4)
        assert waves.mean() == pytest.approx(0.0, abs=1e-5)
        spectrum = np.abs(np.fft.rfftn(waves))
        ratio = (spectrum * frequencies(size) ** (len(size) / 2)).flatten()[1:]  # all but the mean
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)


def test_a_fixed_spectrum_takes_the_phases_of_an_image():
    by = FixedSpectrum(decorrelate=False)
    image = 0.2 + 0.6 * torch.rand(1, 8, 8)
    made = by.decode(by.start(1, (8, 8), generator(), image)[None], (8, 8))[0]
    logits, phases = torch.logit(image).double().numpy(), np.angle
    given, found = np.fft.rfft2(logits[0]), np.fft.rfft2(torch.logit(made)[0].double().numpy())
    own_mirror = np.zeros((8, 5), bool)  # real, for which the phase of an image has no say but its sign
    own_mirror[[0, 0, 4, 4], [0, 4, 0, 4]] = True
    np.testing.assert_allclose(phases(given)[~own_mirror], phases(found)[~own_mirror], atol=1e-3)


@pytest.mark.parametrize("by", [Fourier(), FixedSpectrum()], ids=lambda by: type(by).__name__)
def test_gradients_reach_every_coefficient_of_every_image_alone(by):
    parameters = torch.stack([by.start(3, (7, 9), generator(seed), None) for seed in (1, 2)]).requires_grad_()
    weight = torch.randn(3, 7, 9)
    (by.decode(parameters, (7, 9))[0] * weight).sum().backward()
    assert (parameters.grad[0] != 0).float().mean() > 0.9
    assert (parameters.grad[1] == 0).all()


def test_names_stand_for_parametrisations():
    assert [type(parametrization_of(name)) for name in ("pixels", "fourier", "maco")] == [
        Pixels,
        Fourier,
        FixedSpectrum,
    ]
    own = Fourier(sd=1.0)
    assert parametrization_of(own) is own
    with pytest.raises(
        InvalidArgumentError, match="`parametrization` must be one of 'pixels', 'fourier', 'maco'"
    ):
        parametrization_of("fft")


@pytest.mark.parametrize("kind", [Pixels, Fourier, FixedSpectrum])
@pytest.mark.parametrize(
    ("low", "high", "match"),
    [
        (0.0, None, "`low` and `high` must be given both or neither"),
        (None, 1.0, "`low` and `high` must be given both or neither"),
        (1.0, 1.0, "`low` must be below `high` and both finite, got 1.0 and 1.0"),
        (0.0, float("inf"), "`low` must be below `high` and both finite"),
        (float("nan"), 1.0, "`low` must be below `high` and both finite"),
    ],
)
def test_limits_that_cannot_be_are_refused(kind: type[Parametrization], low, high, match):
    with pytest.raises(InvalidArgumentError, match=match):
        kind(low=low, high=high)
