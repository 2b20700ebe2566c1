"""One step uphill: against torch.optim, Keras' rule in float64, and at scales float32 cannot square."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchlens_viz.ascent.optimizer import Adam, Smoothing, as_it_is, normalised


def climb(adam, gradients, steps=None):
    """Feed gradients (T, N, ...) to Adam; images may stand at different steps."""
    mean, square = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    place = torch.zeros_like(gradients[0])
    for time, gradient in enumerate(gradients):
        step = torch.full((len(gradient),), time) if steps is None else steps + time
        place = place + adam.change(gradient, step, mean, square)
    return place


def test_adam_is_that_of_torch():
    gradients = torch.randn(30, 3, 2, 4, 5)
    result = climb(Adam(0.02, like_keras=False), gradients)
    parameter = torch.zeros(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([parameter], lr=0.02, maximize=True)
    for gradient in gradients:
        parameter.grad = gradient.double()
        optimiser.step()
    torch.testing.assert_close(result.double(), parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_adam_like_keras_adds_its_epsilon_outside_the_correction(size):
    gradients = size * torch.randn(20, 2, 7)
    result = climb(Adam(2.5, like_keras=True), gradients)
    place, mean, square = (np.zeros((2, 7)) for _ in range(3))
    for time, gradient in enumerate(gradients.double().numpy(), start=1):
        alpha = 2.5 * np.sqrt(1 - 0.999**time) / (1 - 0.9**time)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        place = place + alpha * mean / (np.sqrt(square) + 1e-7)
    np.testing.assert_allclose(result.numpy(), place, rtol=1e-4, atol=1e-4)


def test_images_at_different_steps_are_corrected_each_by_its_own():
    gradient, zeros = torch.ones(2, 4), torch.zeros(2, 4)
    change = Adam(1.0, like_keras=False).change(gradient, torch.tensor([0, 9]), zeros.clone(), zeros.clone())
    torch.testing.assert_close(change[0], torch.ones(4))
    expected = (0.1 / (1 - 0.9**10)) / np.sqrt(0.001 / (1 - 0.999**10))
    torch.testing.assert_close(change[1], torch.full((4,), float(expected)))


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e-37, 1e30])
def test_gradients_of_any_size_come_out_with_unit_root_mean_square(size):
    gradient = torch.randn(3, 2, 5, 5).double()
    slope = normalised((gradient * size).float())
    expected = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(slope.gradient.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.peak.double(), size * gradient.abs().amax((1, 2, 3)), rtol=1e-6, atol=0)


def test_no_gradient_stays_none_and_one_that_is_not_finite_spoils_its_own_image_alone():
    gradient = torch.randn(4, 6)
    gradient[1] = 0
    gradient[2, 3] = torch.nan
    gradient[3, 0] = torch.inf
    slope = normalised(gradient)
    assert slope.gradient[1].tolist() == [0] * 6
    assert slope.peak[1] == 0
    assert slope.peak.isfinite().tolist() == [True, True, False, False]
    assert slope.gradient[:2].isfinite().all()
    plain = as_it_is(gradient)
    assert plain.gradient is gradient
    assert plain.peak.isfinite().tolist() == [True, True, False, False]


def test_smoothing_touches_only_what_moves_and_blurs_only_when_due():
    pixels = torch.rand(3, 2, 9, 9)
    kept = pixels.clone()
    smoothing = Smoothing(decay=0.25, blur=1.0, every=4, middle=0.5)
    smoothing.apply_(pixels, torch.tensor([3, 2, 3]), torch.tensor([False, True, True]))
    assert torch.equal(pixels[0], kept[0])
    decayed = kept + 0.25 * (0.5 - kept)
    torch.testing.assert_close(pixels[1], decayed[1])
    taps = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    taps /= taps.sum()
    image = decayed[2].double().numpy()
    padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode="reflect")
    rows = sum(tap * padded[:, i : i + 9] for i, tap in enumerate(taps))
    expected = sum(tap * rows[:, :, i : i + 9] for i, tap in enumerate(taps))
    np.testing.assert_allclose(pixels[2].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(9,), (5, 12), (4, 9, 12)])
def test_a_blur_goes_along_every_axis_as_far_as_the_image_does(shape):
    pixels = torch.rand(2, 3, *shape)
    expected = pixels.double().numpy()
    Smoothing(decay=0, blur=1.5, every=1, middle=0.5).apply_(pixels, torch.zeros(2), torch.ones(2).bool())
    for axis, size in enumerate(shape, start=2):
        reach = min(5, size - 1)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / 1.5) ** 2)
        widths = [(0, 0)] * expected.ndim
        widths[axis] = (reach, reach)
        padded = np.pad(expected, widths, mode="reflect")
        shifted = [np.take(padded, range(n, n + size), axis) for n in range(len(taps))]
        expected = sum(tap * part for tap, part in zip(taps / taps.sum(), shifted, strict=True))
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (2, 3), (1,), (1, 2, 3)])
def test_images_smaller_than_the_blur_are_blurred_as_far_as_they_go(shape):
    pixels = torch.full((1, 1, *shape), 0.3)
    Smoothing(decay=0, blur=50.0, every=1, middle=0.5).apply_(pixels, torch.tensor([0]), torch.tensor([True]))
    torch.testing.assert_close(pixels, torch.full((1, 1, *shape), 0.3))
