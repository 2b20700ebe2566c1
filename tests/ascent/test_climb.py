"""The climb: plain autograd, a float64 port of Keras, and when and why it ends."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import ascend, small_net
from torchlens_viz.ascent.parametrization import Pixels

# The steps are those of plain autograd and of numpy.


def test_the_history_is_that_of_plain_autograd():
    # The whole rule by hand, for one image: gradient of unit root mean square, Adam, clipped to [0, 1].
    model, steps = small_net().double(), 12
    start = torch.rand(3, 12, 12)
    result = ascend(small_net(), "2", 4, image=start, steps=steps, lr=0.03)
    image = start.double()[None].clone()
    mean, square = torch.zeros_like(image), torch.zeros_like(image)
    history = []
    for step in range(1, steps + 1):
        image.requires_grad_()
        score = model[:3](image)[0, 4].mean()
        (gradient,) = torch.autograd.grad(score, image)
        history.append(score.item())
        gradient = gradient / gradient.square().mean().sqrt()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        image = (image.detach() + 0.03 * ratio).clamp(0, 1)
    torch.testing.assert_close(
        result.history[0].double(), torch.tensor(history).double(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(result.images.double(), image, rtol=0, atol=1e-4)


def test_decay_and_blur_are_those_of_numpy():
    model, start = nn.Conv2d(1, 1, 3, bias=False).eval(), torch.rand(1, 9, 10)
    smooth = Pixels(decay=0.1, blur=0.8, blur_every=2)
    result = ascend(model, "", 0, image=start, steps=2, lr=0.01, parametrization=smooth)
    image = start[0].double().numpy().copy()
    (slope,) = torch.autograd.grad(model(x := torch.zeros(1, 1, 9, 10, requires_grad=True)).mean(), x)
    gradient = slope[0, 0].double().numpy()
    gradient = gradient / np.sqrt((gradient**2).mean())
    taps = np.exp(-0.5 * (np.arange(-2, 3) / 0.8) ** 2)
    taps /= taps.sum()
    for step in range(2):
        image = image + 0.01 * gradient / (np.abs(gradient) + 1e-8)  # Adam, where the gradient stays the same
        image += 0.1 * (0.5 - image)
        if step == 1:
            padded = np.pad(image, 2, mode="reflect")
            rows = sum(tap * padded[i : i + 9] for i, tap in enumerate(taps))
            image = sum(tap * rows[:, i : i + 10] for i, tap in enumerate(taps))
        image = image.clip(0, 1)
    np.testing.assert_allclose(result.images[0, 0].numpy(), image, atol=1e-5)


# The recipe of Keras.


def keras(model, channel, *, seed, rate, steps, threshold=None, size=12):
    """Do in float64 what reference E does, with Keras' Adam as its source has it."""
    image = np.random.RandomState(seed).random_sample((1, size, size, 3)) * 20 + 128
    image = torch.from_numpy(image).permute(0, 3, 1, 2)
    mean, square = torch.zeros_like(image), torch.zeros_like(image)
    history = []
    for step in range(1, steps + 1):
        image = image.detach().requires_grad_()
        loss = model(image)[0, channel].mean()
        (gradient,) = torch.autograd.grad(-loss, image)
        history.append(loss.item())
        alpha = rate * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        mean = mean + (gradient - mean) * 0.1
        square = square + (gradient**2 - square) * 0.001
        image = image.detach() - alpha * mean / (square.sqrt() + 1e-7)
        if threshold is not None and loss > threshold:
            break
    return image, history


@pytest.mark.parametrize(("rate", "threshold"), [(2.5, None), (15.5, 25.0)])
def test_classic_is_keras_in_float64(rate, threshold):
    model = small_net()
    with torch.no_grad():
        model[2].bias += 12
    result = ascend(
        model, "3", method="classic", lr=rate, threshold=threshold, steps=20, seed=42, batch_size=3
    )
    exact = copy.deepcopy(model).double()
    stopped = dead = 0
    for place in range(7):
        image, history = keras(exact, place, seed=42, rate=rate, steps=20, threshold=threshold)
        if history[0] == 0:
            assert result.status[place] == "dead"
            dead += 1
            continue
        own = result.history[place]
        assert (~own.isnan()).sum() == len(history)
        np.testing.assert_allclose(own[: len(history)], history, rtol=2e-5, atol=1e-4)
        np.testing.assert_allclose(result.images[place].numpy(), image[0].numpy(), atol=2e-2)
        assert own[len(history) :].isnan().all()
        stopped += len(history) < 20
        assert (result.status[place] == "threshold") == (threshold is not None and max(history) > threshold)
    assert (stopped > 1) == (threshold is not None)
    assert dead < 3


def test_every_channel_of_classic_begins_from_the_same_image_unclipped_and_in_units_of_255():
    result = ascend(method="classic", seed=42, steps=1, lr=1e-6)
    expected = np.random.RandomState(42).random_sample((12, 12, 3)) * 20 + 128
    for image in result.images:
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-4)
    assert result.limits == (0.0, 255.0)
    far = ascend(method="classic", seed=42, steps=10, lr=50.0)
    assert far.images.min() < 0
    assert far.images.max() > 255


def test_the_epsilon_of_keras_stands_outside_the_correction_for_bias():
    # With gradients near epsilon the two differ by much; here the image moves by lr * g / (g + eps / root).
    model = nn.Conv2d(3, 1, 3, bias=False).eval()
    with torch.no_grad():
        model.weight.fill_(1e-6)
    result = ascend(model, "", 0, method="classic", seed=1, steps=1, lr=2.0)
    image, _ = keras(copy.deepcopy(model).double(), 0, seed=1, rate=2.0, steps=1)
    start = np.random.RandomState(1).random_sample((12, 12, 3)) * 20 + 128
    moved = (image[0] - torch.from_numpy(start).permute(2, 0, 1)).max().item()
    assert moved < 1.5
    np.testing.assert_allclose(result.images[0].numpy(), image[0].numpy(), atol=1e-4)


# Statuses and their evidence.


def test_an_image_stops_after_the_step_at_which_it_passes_the_threshold():
    free = ascend(channels=2, steps=20, lr=0.01)
    threshold = free.history[0, 8].item() + 1e-4
    result = ascend(channels=2, steps=20, lr=0.01, threshold=threshold)
    assert result.status == ("threshold",)
    passed = int((free.history[0] > threshold).nonzero()[0])
    torch.testing.assert_close(result.history[0, : passed + 1], free.history[0, : passed + 1])
    assert result.history[0, passed + 1 :].isnan().all()
    assert result.evidence[0] == f"passed {threshold:g} at step {passed + 1}"
    # It moved once more, after the score that passed was taken.
    assert result.scores[0].item() == pytest.approx(free.history[0, passed + 1].item(), rel=1e-5)


def test_an_image_that_still_gains_ends_with_its_steps_and_one_at_its_best_is_stalled():
    assert ascend(nn.Conv2d(3, 1, 3).eval(), "", steps=8, lr=0.001).status == ("steps",)
    done = ascend(nn.Conv2d(3, 1, 3).eval(), "", steps=60)
    assert done.status == ("stalled",)
    assert "in the last 15 of 60 steps" in done.evidence[0]
    assert not done.history.isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_stops_its_image_alone(bad):
    def breaks(scene):
        values = scene.activation()[torch.arange(len(scene.channels)), scene.channels].mean((1, 2))
        return values + torch.where((scene.channels == 3) & (values > 0.01), bad, 0.0)

    def whole(scene):
        return scene.activation()[torch.arange(len(scene.channels)), scene.channels].mean((1, 2))

    broken, fine = ascend(objective=breaks, steps=20), ascend(objective=whole, steps=20)
    assert [each == "nonfinite" for each in broken.status] == [place == 3 for place in range(7)]
    others = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(broken.images[others], fine.images[others], rtol=0, atol=1e-4)
    assert broken.images.isfinite().all()
    last = int((~broken.history[3].isnan()).sum()) - (1 if bad == torch.inf else 0)
    torch.testing.assert_close(broken.history[3, :last], fine.history[3, :last])
    assert "not finite after" in broken.evidence[3]


def test_a_network_that_gives_nan_from_the_start_leaves_the_start():
    model = small_net()
    with torch.no_grad():
        model[2].bias[4] = torch.nan
    result = ascend(model, "2")
    assert result.status[4] == "nonfinite"
    assert result.status.count("nonfinite") == 1
    assert result.history[4].isnan().all()
    assert result.images[4].mean().item() == pytest.approx(0.5, abs=0.02)
