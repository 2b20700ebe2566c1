"""`maximize`: closed forms, a float64 port of Keras, plain autograd; nothing hangs on what shares a batch."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from torchlens_viz import objectives
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.parametrization import Fourier, Pixels
from torchlens_viz.ascent.transforms import Transforms
from torchlens_viz.errors import (
    CaptureError,
    CaptureMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotFoundError,
)

ROBUST = Transforms(jitter=0.05, scale=(0.9, 1.1), rotate=10.0, pad=0.05, noise=0.02)


def net(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bias), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(inplace=True)
    ).eval()


def run(model=None, layer="2", channels=None, **options):
    size = {} if "image" in options else {"size": 12}
    options = {**size, "steps": 10, "precision": "float32", **options}
    return maximize(net() if model is None else model, layer, channels, **options)


def same(left, right, *, atol=1e-4):
    """Say that two results are the same to the tolerance that batches of other sizes leave in float32."""
    assert left.channels.tolist() == right.channels.tolist()
    assert left.status == right.status
    torch.testing.assert_close(left.images, right.images, rtol=0, atol=atol)
    torch.testing.assert_close(left.scores, right.scores, rtol=1e-4, atol=atol)
    torch.testing.assert_close(left.history, right.history, rtol=1e-4, atol=atol, equal_nan=True)
    torch.testing.assert_close(left.means, right.means, rtol=1e-4, atol=atol)


# The best image of a linear layer on [0, 1] is known: 1 where the gradient is positive, else 0.


class Signal(nn.Module):
    """Rows of an image as signals in time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(3, 4, 5, stride=2)

    def forward(self, image):
        return self.layer(image.flatten(2))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 12 * 12, 4)

    def forward(self, image):
        return self.layer(image.flatten(1))


LINEAR = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "no bias": lambda: nn.Conv2d(3, 4, 3, bias=False),
    "stride": lambda: nn.Conv2d(3, 4, 3, stride=2),
    "padding": lambda: nn.Conv2d(3, 4, 5, padding=2),
    "dilation": lambda: nn.Conv2d(3, 4, 3, dilation=2),
    "groups": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "one pixel": lambda: nn.Conv2d(3, 4, 1),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
    "signal": Signal,
    "dense": Dense,
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LINEAR)
def test_the_best_image_of_a_linear_layer_is_reached(kind, precision):
    model = LINEAR[kind]().eval()
    name = "layer" if hasattr(model, "layer") else ""
    result = run(model, name, steps=40, precision=precision)

    exact = copy.deepcopy(model).double()
    image = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64, requires_grad=True)
    for place, channel in enumerate(result.channels.tolist()):
        gray = exact(image)[0, channel].mean()
        (slope,) = torch.autograd.grad(gray, image)
        best = exact((slope > 0).double())[0, channel].mean()
        reached = exact(result.images[place][None].double())[0, channel].mean()
        assert (reached - gray) / (best - gray) >= 0.99
        assert result.scores[place].item() == pytest.approx(reached.item(), rel=1e-5, abs=1e-6)
    assert result.images.min() == 0
    assert result.images.max() == 1


def test_a_network_of_nothing_but_convolutions_reaches_its_best_image_too():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.AvgPool2d(2), nn.Conv2d(6, 4, 2)).eval()
    result = run(model, "2", steps=40)
    image = torch.full((1, 3, 12, 12), 0.5, requires_grad=True)
    for place in range(4):
        gray = model(image)[0, place].mean()
        (slope,) = torch.autograd.grad(gray, image)
        best = model((slope > 0).float())[0, place].mean()
        assert (result.scores[place] - gray) / (best - gray) >= 0.99


# Scores, means and ranks are those of a plain forward pass.


def test_scores_and_means_are_those_of_the_network_on_the_images():
    model = net()
    result = run(model, "3")
    maps = F.relu(model[2](F.relu(model[0](result.images.double().float()))))
    means = maps.mean((2, 3)).detach()
    torch.testing.assert_close(result.means, means)
    torch.testing.assert_close(result.scores, means.diagonal())


def test_a_convolution_is_taken_before_its_in_place_relu_and_the_relu_by_its_own_name():
    model = net()
    with torch.no_grad():
        model[2].bias -= 0.3
    before, after = run(model, "2", 1), run(model, "3", 1)
    torch.testing.assert_close(before.scores, model[:3](before.images)[:, 1].mean((1, 2)).detach())
    torch.testing.assert_close(after.scores, model(after.images)[:, 1].mean((1, 2)).detach())
    assert before.means.min() < 0 <= after.means.min()


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("mean", lambda maps: maps.mean((1, 2))),
        ("max", lambda maps: maps.amax((1, 2))),
        ("center", lambda maps: maps[:, 4, 4]),
        (objectives.neuron(position=[0, 7]), lambda maps: maps[:, 0, 7]),
        (lambda scene: scene.activation()[:, 3].square().mean((1, 2)), None),
    ],
)
def test_an_objective_is_scored_as_it_says(objective, value):
    model = net()
    result = run(model, "2", [3, 3], objective=objective)
    maps = model[:3](result.images).detach()[:, 3]
    expected = maps.square().mean((1, 2)) if value is None else value(maps)
    torch.testing.assert_close(result.scores, expected)
    assert (result.scores > result.history[:, 0]).all()


def test_the_history_is_that_of_plain_autograd():
    # The whole rule by hand, for one image: gradient of unit root mean square, Adam, clipped to [0, 1].
    model, steps = net().double(), 12
    start = torch.rand(3, 12, 12)
    result = run(net(), "2", 4, image=start, steps=steps, lr=0.03)
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
    result = run(model, "", 0, image=start, steps=2, lr=0.01, decay=0.1, blur=0.8, blur_every=2)
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
    model = net()
    with torch.no_grad():
        model[2].bias += 12
    result = run(model, "3", method="classic", lr=rate, threshold=threshold, steps=20, seed=42, batch_size=3)
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
    result = run(method="classic", seed=42, steps=1, lr=1e-6)
    expected = np.random.RandomState(42).random_sample((12, 12, 3)) * 20 + 128
    for image in result.images:
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-4)
    assert result.limits == (0.0, 255.0)
    far = run(method="classic", seed=42, steps=10, lr=50.0)
    assert far.images.min() < 0
    assert far.images.max() > 255


def test_the_epsilon_of_keras_stands_outside_the_correction_for_bias():
    # With gradients near epsilon the two differ by much; here the image moves by lr * g / (g + eps / root).
    model = nn.Conv2d(3, 1, 3, bias=False).eval()
    with torch.no_grad():
        model.weight.fill_(1e-6)
    result = run(model, "", 0, method="classic", seed=1, steps=1, lr=2.0)
    image, _ = keras(copy.deepcopy(model).double(), 0, seed=1, rate=2.0, steps=1)
    start = np.random.RandomState(1).random_sample((12, 12, 3)) * 20 + 128
    moved = (image[0] - torch.from_numpy(start).permute(2, 0, 1)).max().item()
    assert moved < 1.5
    np.testing.assert_allclose(result.images[0].numpy(), image[0].numpy(), atol=1e-4)


# What shares a batch changes nothing.

WAYS = {
    "plain": {},
    "robust": {"transforms": ROBUST},
    "threshold": {"threshold": 0.02, "steps": 14},
    "fourier": {"parametrization": "fourier", "transforms": "classic"},
    "maco": {"parametrization": "maco"},
    "all of it": {"transforms": "robust", "threshold": 0.01, "decay": 0.01, "blur": 0.5, "frames": 3},
    "classic": {"method": "classic", "threshold": 6.0, "lr": 10.0},
    "max": {"objective": "max"},
    "regularised": {"objective": objectives.channel() - 0.5 * objectives.total_variation()},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_alone_and_among_others(way):
    options = WAYS[way]
    atol = 0.02 if way == "classic" else 1e-4  # its pixels are numbers up to 255
    together = run(batch_size=7, **options)
    assert ("threshold" in together.status) == ("threshold" in options)
    for size in (1, 2, 3):
        same(run(batch_size=size, **options), together, atol=atol)
    same(run(batch_size="auto", **options), together, atol=atol)
    for channel in (0, 5):
        alone = run(channels=channel, **options)
        torch.testing.assert_close(alone.images[0], together.images[channel], rtol=0, atol=atol)
        assert alone.status[0] == together.status[channel]


def test_channels_that_stop_make_room_for_the_next_at_once():
    sizes = []

    def note(images):
        sizes.append(len(images))
        return images

    result = run(threshold=0.0, steps=40, lr=0.01, batch_size=2, preprocess=note)
    lengths = (~result.history.isnan()).sum(1).tolist()
    assert len(set(lengths)) > 2
    in_ascent = [size for size in sizes if size == 2]
    assert 2 * len(in_ascent) >= sum(lengths) - max(lengths)


def test_the_order_of_the_channels_changes_nothing():
    forth, back = run(channels=[0, 2, 5], batch_size=2), run(channels=[5, 2, 0], batch_size=2)
    torch.testing.assert_close(forth.images, back.images.flip(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(forth.scores, back.scores.flip(0), rtol=1e-4, atol=1e-5)


def test_a_channel_named_twice_gets_two_images_and_each_is_reproducible():
    first, again = run(channels=[4, 1, 4]), run(channels=[4, 4])
    assert (first.images[0] - first.images[2]).abs().max() > 0.1
    torch.testing.assert_close(first.images[[0, 2]], again.images, rtol=0, atol=1e-4)
    assert torch.equal(run(channels=[4, 4]).images, again.images)
    assert (run(channels=[4, 4], seed=1).images - again.images).abs().max() > 0.1


@pytest.mark.parametrize("channels", [range(2, 5), torch.tensor([2, 3, 4]), (2, 3, 4), np.arange(2, 5)])
def test_channels_are_any_sequence_of_numbers(channels):
    assert run(channels=channels, steps=1).channels.tolist() == [2, 3, 4]


def test_images_named_together_grow_unlike_by_diversity():
    def likeness(result):
        maps = net()[:3](result.images).flatten(2)
        gram = F.normalize((maps @ maps.mT).flatten(1), dim=1)
        return (gram @ gram.T).fill_diagonal_(0).sum().item() / 6

    alike = run(channels=[2, 2, 2], steps=30)
    goal = objectives.channel() + 10 * objectives.diversity()
    apart = run(channels=[2, 2, 2], steps=30, objective=goal, batch_size=2)
    assert likeness(apart) < likeness(alike) - 0.05


def test_dreaming_makes_one_image_of_no_channel_in_particular():
    result = run(objective=objectives.deepdream(), steps=20)
    assert result.images.shape == (1, 3, 12, 12)
    assert not result.names_channels
    assert result.ranks.tolist() == [-1]
    expected = net()[:3](result.images).square().mean()
    assert result.scores.item() == pytest.approx(expected.item(), rel=1e-5)


# The shortcut for linear layers is the long way round.


@pytest.mark.parametrize(
    "last",
    [
        lambda: nn.Conv2d(6, 5, 3),
        lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(6, 5, 4, stride=3, padding=1, bias=False),
        lambda: nn.ConvTranspose2d(6, 5, 3, stride=2),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(600, 5)),
    ],
)
@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            objectives.channel(),
            lambda s: (
                s.activation()[torch.arange(len(s.channels)), s.channels].reshape(len(s.channels), -1).mean(1)
            ),
        ),
        (
            2 * objectives.channel(3) - objectives.channel() + 0.5,
            lambda s: (
                2 * s.activation()[:, 3].reshape(len(s.channels), -1).mean(1)
                - s.activation()[torch.arange(len(s.channels)), s.channels]
                .reshape(len(s.channels), -1)
                .mean(1)
                + 0.5
            ),
        ),
        (
            objectives.direction([1.0, -2.0, 0.5, 0.0, 1.0]),
            lambda s: (
                s.activation().reshape(len(s.channels), 5, -1).mean(2)
                @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
            ),
        ),
    ],
)
def test_the_shortcut_for_linear_layers_gives_what_the_whole_layer_gives(last, short, long):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), last()).eval()
    name = "2.1" if isinstance(model[2], nn.Sequential) else "2"
    assert short.is_linear
    options = {"objective": short, "channels": [1, 4]}
    quick, slow = run(model, name, **options), run(model, name, **{**options, "objective": long})
    torch.testing.assert_close(quick.images, slow.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(quick.history, slow.history, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quick.scores, slow.scores, rtol=1e-4, atol=1e-5)


def test_the_shortcut_is_not_taken_where_something_else_stands_behind_the_layer():
    model = net()
    handle = model[2].register_forward_hook(lambda module, args, output: output.square())
    patched = net()
    patched[2].forward = lambda x, layer=patched[2]: nn.Conv2d.forward(layer, x).square()
    for each in (model, patched):
        result = run(each, "2", 1)
        expected = net()[:3](result.images)[:, 1].square().mean((1, 2))
        torch.testing.assert_close(result.scores, expected.detach())
        torch.testing.assert_close(result.history[0, 0] < result.scores[0], torch.tensor(True))
    handle.remove()


# Statuses and their evidence.


def test_an_image_stops_after_the_step_at_which_it_passes_the_threshold():
    free = run(channels=2, steps=20, lr=0.01)
    threshold = free.history[0, 8].item() + 1e-4
    result = run(channels=2, steps=20, lr=0.01, threshold=threshold)
    assert result.status == ("threshold",)
    passed = int((free.history[0] > threshold).nonzero()[0])
    torch.testing.assert_close(result.history[0, : passed + 1], free.history[0, : passed + 1])
    assert result.history[0, passed + 1 :].isnan().all()
    assert result.evidence[0] == f"passed {threshold:g} at step {passed + 1}"
    # It moved once more, after the score that passed was taken.
    assert result.scores[0].item() == pytest.approx(free.history[0, passed + 1].item(), rel=1e-5)


def test_an_image_that_still_gains_ends_with_its_steps_and_one_at_its_best_is_stalled():
    assert run(nn.Conv2d(3, 1, 3).eval(), "", steps=8, lr=0.001).status == ("steps",)
    done = run(nn.Conv2d(3, 1, 3).eval(), "", steps=60)
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

    broken, fine = run(objective=breaks, steps=20), run(objective=whole, steps=20)
    assert [each == "nonfinite" for each in broken.status] == [place == 3 for place in range(7)]
    others = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(broken.images[others], fine.images[others], rtol=0, atol=1e-4)
    assert broken.images.isfinite().all()
    last = int((~broken.history[3].isnan()).sum()) - (1 if bad == torch.inf else 0)
    torch.testing.assert_close(broken.history[3, :last], fine.history[3, :last])
    assert "not finite after" in broken.evidence[3]


def test_a_network_that_gives_nan_from_the_start_leaves_the_start():
    model = net()
    with torch.no_grad():
        model[2].bias[4] = torch.nan
    result = run(model, "2")
    assert result.status[4] == "nonfinite"
    assert result.status.count("nonfinite") == 1
    assert result.history[4].isnan().all()
    assert result.images[4].mean().item() == pytest.approx(0.5, abs=0.02)


# Images of other kinds.


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("by", ["pixels", "fourier", "maco"])
def test_images_have_as_many_channels_as_the_network_takes_and_any_proportions(channels, by):
    model = nn.Sequential(nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    result = run(model, "2", [0, 3], size=(9, 14), parametrization=by, transforms="robust")
    assert result.images.shape == (2, channels, 9, 14)
    expected = model(result.images)[[0, 1], [0, 3]].mean((1, 2)).detach()
    torch.testing.assert_close(result.scores, expected)
    assert 0 <= result.images.min() <= result.images.max() <= 1


@pytest.mark.parametrize(
    "image", [torch.rand(3, 10, 13), torch.rand(1, 3, 10, 13), torch.rand(3, 10, 13).half()]
)
def test_an_image_to_begin_from_gives_the_size(image):
    before = image.clone()
    result = run(channels=[1, 2], image=image, steps=1, lr=1e-6)
    assert torch.equal(image, before)
    for each in result.images:
        torch.testing.assert_close(each, image.reshape(3, 10, 13).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({}, 0, 1), ({"parametrization": Pixels(low=-1, high=1)}, -1, 1), ({"method": "classic"}, 0, 255)],
)
def test_a_picture_to_begin_from_fills_the_range_of_the_pixels(options, low, high):
    picture = Image.new("L", (6, 7), 51)
    result = run(channels=0, image=picture, steps=1, lr=1e-6, **options)
    torch.testing.assert_close(
        result.images, torch.full((1, 3, 7, 6), low + (high - low) / 5), rtol=0, atol=1e-4
    )


def test_tokens_count_their_channels_in_the_last_dimension():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 5, 4, stride=4)
            self.mix = nn.Linear(5, 6)

        def forward(self, x):
            return self.mix(self.patches(x).flatten(2).mT)

    model = Tokens().eval()
    result = run(model, "mix", channel_dim=-1, steps=40)
    assert result.channels.tolist() == list(range(6))
    torch.testing.assert_close(result.means, model(result.images).mean(1).detach())
    image = torch.full((1, 3, 12, 12), 0.5, requires_grad=True)
    for place in range(6):
        gray = model(image)[0, :, place].mean()
        (slope,) = torch.autograd.grad(gray, image)
        best = model((slope > 0).float())[0, :, place].mean()
        assert (result.scores[place] - gray) / (best - gray) >= 0.99


def test_logits_are_maximised_by_the_name_of_the_last_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)
    )
    result = run(model.eval(), "4", steps=20)
    torch.testing.assert_close(result.means, model(result.images).detach())
    torch.testing.assert_close(result.scores, model(result.images).diagonal().detach())
    assert (result.scores > result.history[:, 0]).all()


def test_preprocessing_stands_between_the_image_and_the_network():
    model, mean, sd = (
        net(),
        torch.tensor([0.4, 0.5, 0.3]).view(3, 1, 1),
        torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1),
    )
    whitened = run(model, "2", 3, preprocess=lambda x: (x - mean) / sd)
    torch.testing.assert_close(
        whitened.scores, model[:3]((whitened.images - mean) / sd)[:, 3].mean((1, 2)).detach()
    )
    folded = net()  # the same, by other weights
    with torch.no_grad():
        folded[0].bias -= (folded[0].weight * (mean / sd)).sum((1, 2, 3))
        folded[0].weight /= sd
    same(run(folded, "2", 3), whitened, atol=1e-3)


def test_references_give_what_is_usual():
    torch.manual_seed(1)
    real = torch.rand(5, 3, 12, 12)
    result = run(references=real)
    torch.testing.assert_close(result.reference_means, net()[:3](real).mean((2, 3)).detach())
    usual = result.reference_means.double().numpy()
    scores = (result.means.double().numpy() - usual.mean(0)) / usual.std(0, ddof=1)
    np.testing.assert_allclose(result.z_means.numpy(), scores, rtol=1e-3)
    ranks = [(row > row[place]).sum() for place, row in enumerate(scores)]
    assert result.z_ranks.tolist() == ranks


# Ways to run out of memory, and to be stopped.


class Hungry(nn.Module):
    """Takes at most `most` images at a time."""

    def __init__(self, most, error, *, only_with_gradient=False):
        super().__init__()
        self.net = net()
        self.most, self.error, self.only_with_gradient = most, error, only_with_gradient

    def forward(self, x):
        if len(x) > self.most and (torch.is_grad_enabled() or not self.only_with_gradient):
            raise self.error
        return self.net(x)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_where_memory_runs_out_the_batch_is_halved_to_the_same_result(error):
    expected = run(batch_size=1)
    for most in (1, 2, 3):
        model = Hungry(most, error)
        same(run(model, "net.2", batch_size=7), expected)


def test_no_image_is_lost_where_memory_runs_out_as_they_begin(monkeypatch):
    from torchlens_viz.backprop.scorer import Scorer

    whole = Scorer.sensitivity

    def hungry(self, images, channels):
        if len(channels) > 1:
            raise MemoryError
        return whole(self, images, channels)

    expected = run(threshold=0.02, batch_size=1)
    monkeypatch.setattr(Scorer, "sensitivity", hungry)
    same(run(threshold=0.02, batch_size=7), expected)


@pytest.mark.parametrize("only_with_gradient", [False, True])
@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_where_not_even_one_image_has_room_the_error_says_so(batch_size, only_with_gradient):
    model = Hungry(0, ERRORS[0], only_with_gradient=only_with_gradient)
    with pytest.raises(CaptureMemoryError, match="choose a smaller `size`, an earlier layer"):
        run(model, "net.2", batch_size=batch_size)


def test_other_errors_of_the_network_are_not_taken_for_lack_of_memory():
    model = Hungry(1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        run(model, "net.2", batch_size=2)


def interrupt_after(calls):
    count = [0]

    def preprocess(images):
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return images

    return preprocess


def test_an_interruption_returns_what_is_finished():
    whole = run(batch_size=2)
    cut = run(batch_size=2, preprocess=interrupt_after(30))
    assert 0 < len(cut.channels) < 7
    assert cut.channels.tolist() == list(range(len(cut.channels)))
    torch.testing.assert_close(cut.images, whole.images[: len(cut.channels)], rtol=0, atol=1e-5)


def test_an_interruption_before_anything_is_finished_is_passed_on():
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2, preprocess=interrupt_after(5))


# Bad input.

VALUE, TYPE = InvalidArgumentError, InvalidTypeError


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer": "9"}, LayerNotFoundError, "no layer is named `9`"),
        ({"layer": nn.Conv2d}, VALUE, "`layer` must find one layer, got 2"),
        ({"channels": 7}, VALUE, "`channels` must be indices from 0 to 6, got 7"),
        ({"channels": [0, -1]}, VALUE, "`channels` must be indices from 0 to 6, got -1"),
        ({"channels": []}, VALUE, "`channels` must choose at least one"),
        ({"channels": "a"}, TYPE, "`channels` must be an int or a list of ints"),
        ({"size": 0}, VALUE, "`size` must be a number of pixels or"),
        ({"size": 1.5}, VALUE, "`size` must be a number of pixels or"),
        ({"size": (4, 5, 6)}, VALUE, "`size` must be a number of pixels or"),
        ({"size": 2}, VALUE, r"cannot take images of shape \(3, 2, 2\).*choose another `size`"),
        ({"steps": 0}, VALUE, "`steps` must be at least 1, got 0"),
        ({"steps": 2.0}, TYPE, "`steps` must be an int, got 2.0"),
        ({"steps": True}, TYPE, "`steps` must be an int, got True"),
        ({"restarts": -1}, VALUE, "`restarts` must be at least 0, got -1"),
        ({"frames": 0}, VALUE, "`frames` must be at least 1, got 0"),
        ({"batch_size": 0}, VALUE, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": "all"}, TYPE, "`batch_size` must be an int, got 'all'"),
        ({"lr": 0}, VALUE, "`lr` must be positive and finite, got 0"),
        ({"lr": float("nan")}, VALUE, "`lr` must be positive and finite, got nan"),
        ({"lr": "fast"}, TYPE, "`lr` must be a number, got 'fast'"),
        ({"threshold": float("inf")}, VALUE, "`threshold` must be finite, got inf"),
        ({"threshold": "high"}, TYPE, "`threshold` must be a number, got 'high'"),
        ({"seed": "42"}, TYPE, "`seed` must be an int, got '42'"),
        ({"seed": -1, "method": "classic"}, VALUE, "`seed` must be from 0 to 2"),
        ({"method": "keras"}, VALUE, '`method` must be "normalized" or "classic"'),
        ({"method": "classic", "transforms": "robust"}, VALUE, "has neither `parametrization`"),
        ({"method": "classic", "parametrization": "maco"}, VALUE, "has neither `parametrization`"),
        ({"parametrization": "pixel"}, VALUE, "`parametrization` must be one of 'pixels'"),
        ({"transforms": "strong"}, VALUE, "`transforms` must be one of 'none'"),
        ({"objective": "median"}, VALUE, "`objective` must be one of 'mean'"),
        ({"objective": objectives.channel(9)}, VALUE, "`channel` must be an index from 0 to 6"),
        ({"objective": objectives.neuron(position=(9, 0))}, VALUE, "`position` must lie in maps"),
        ({"objective": objectives.direction([1.0])}, VALUE, "a weight for each of the layer's 7"),
        ({"objective": objectives.diversity()}, VALUE, "needs channels that are named several"),
        (
            {"objective": objectives.channel() + objectives.diversity(), "channels": [1, 2]},
            VALUE,
            "needs channels that are named several",
        ),
        ({"objective": lambda s: s.activation().mean()}, VALUE, "must give one number per image"),
        ({"objective": lambda s: s.channels.float()}, VALUE, "has no gradient path to the image"),
        ({"objective": objectives.channel(layer="x")}, LayerNotFoundError, "no layer is named `x`"),
        ({"precision": "float16"}, VALUE, '`precision` must be "auto", "float32" or "bfloat16"'),
        ({"decay": 1.0}, VALUE, "`decay` must be from 0 to below 1"),
        ({"blur": -1.0}, VALUE, "`blur` from 0 to 100"),
        ({"blur": 1.0, "parametrization": "fourier"}, VALUE, "`decay` and `blur` work on pixels"),
        ({"image": torch.full((3, 12, 12), 2.0)}, VALUE, "`image` must have values from 0 to 1"),
        ({"image": torch.full((3, 12, 12), torch.nan)}, VALUE, "`image` must hold finite values"),
        ({"image": torch.rand(12, 12)}, VALUE, "`image` must be one image"),
        ({"image": "cat.png"}, TYPE, "`image` must be a tensor or a picture"),
        ({"image": torch.rand(4, 12, 12)}, VALUE, r"cannot take images of shape \(4, 12, 12\)"),
        ({"references": torch.rand(3, 12, 12)}, VALUE, r"`references` must be images \(R, 3, 12"),
        ({"references": [1]}, VALUE, r"`references` must be images \(R, 3, 12, 12\), got list"),
        (
            {"references": torch.randn(2, 3, 12, 12)},
            VALUE,
            "`references` must have values from 0 to 1, as before `preprocess`",
        ),
        ({"channel_dim": 0}, VALUE, "`channel_dim` must be a dimension after the first"),
        ({"channel_dim": 4}, VALUE, "`channel_dim` must be a dimension after the first"),
        ({"preprocess": lambda x: x.detach()}, VALUE, "has no gradient path to the image"),
        ({"preprocess": lambda x: x[0, 0, 0]}, VALUE, "`preprocess` must make a batch of a batch"),
        (
            {"preprocess": lambda x: x[:, :2]},
            VALUE,
            r"cannot take images of shape \(3, 12, 12\) \(after `preprocess`, \(2, 12, 12\)\)",
        ),
        (
            {"parametrization": Fourier(decorrelate=True), "image": torch.rand(1, 12, 12)},
            VALUE,
            "cannot take images|`decorrelate` must be False",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        run(**options)


def test_only_modules_are_maximised():
    with pytest.raises(InvalidTypeError, match=r"`model` must be an nn.Module, got function"):
        maximize(lambda x: x, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(net(), torch.rand(1, 3, 12, 12))
    with pytest.raises(CaptureError, match="the model is TorchScript"):
        maximize(traced, "0")


def test_a_layer_that_does_not_run_is_refused():
    model = net()
    model.add_module("unused", nn.Conv2d(3, 3, 1))
    model.forward = lambda x: model[0](x)
    with pytest.raises(CaptureError, match="`unused` does not run on this input"):
        run(model, "unused")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: (x, x), "a tuple"),
        (lambda x: x.mean((1, 2, 3)), "float32 of shape"),
        (lambda x: x.long(), "int64 of shape"),
    ],
)
def test_a_layer_must_put_out_one_tensor_with_channels(make, kind):
    class Odd(nn.Module):
        def forward(self, x):
            return make(x)

    with pytest.raises(InvalidArgumentError, match=f"`layer` must put out one tensor .*got {kind}"):
        run(nn.Sequential(nn.Conv2d(3, 2, 3), Odd()), "1")


def test_a_layer_that_folds_windows_into_the_batch_is_refused():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3 * 6 * 6, 5)

        def forward(self, x):
            return self.dense(F.unfold(x, 6, stride=6).mT.flatten(0, 1))

    with pytest.raises(InvalidArgumentError, match=r"one row per image.*shape \(4, 5\) from `dense`"):
        run(Windows(), "dense")
