"""`maximize`: closed forms, plain forward passes; nothing hangs on what shares a batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.nets import ascend, same_ascent, small_net
from torchlens_viz import objectives
from torchlens_viz.ascent.method import Normalized
from torchlens_viz.ascent.parametrization import Pixels
from torchlens_viz.ascent.transforms import Transforms

ROBUST = Transforms(jitter=0.05, scale=(0.9, 1.1), rotate=10.0, pad=0.05, noise=0.02)


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
    result = ascend(model, name, size=(12, 12), steps=40, precision=precision)
    assert result.images.shape[1:] == (3, 12, 12)

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
    result = ascend(model, "2", steps=40)
    image = torch.full((1, 3, 12, 12), 0.5, requires_grad=True)
    for place in range(4):
        gray = model(image)[0, place].mean()
        (slope,) = torch.autograd.grad(gray, image)
        best = model((slope > 0).float())[0, place].mean()
        assert (result.scores[place] - gray) / (best - gray) >= 0.99


# Scores, means and ranks are those of a plain forward pass.


def test_scores_and_means_are_those_of_the_network_on_the_images():
    model = small_net()
    result = ascend(model, "3")
    maps = F.relu(model[2](F.relu(model[0](result.images.double().float()))))
    means = maps.mean((2, 3)).detach()
    torch.testing.assert_close(result.means, means)
    torch.testing.assert_close(result.scores, means.diagonal())


def test_a_convolution_is_taken_before_its_in_place_relu_and_the_relu_by_its_own_name():
    model = small_net()
    with torch.no_grad():
        model[2].bias -= 0.3
    before, after = ascend(model, "2", 1), ascend(model, "3", 1)
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
    model = small_net()
    result = ascend(model, "2", [3, 3], objective=objective)
    maps = model[:3](result.images).detach()[:, 3]
    expected = maps.square().mean((1, 2)) if value is None else value(maps)
    torch.testing.assert_close(result.scores, expected)
    assert (result.scores > result.history[:, 0]).all()


# What shares a batch changes nothing.


WAYS = {
    "plain": {},
    "robust": {"transforms": ROBUST},
    "threshold": {"threshold": 0.02, "steps": 14},
    "fourier": {"parametrization": "fourier", "transforms": "gentle"},
    "maco": {"parametrization": "maco"},
    "all of it": {
        "transforms": "robust",
        "threshold": 0.01,
        "parametrization": Pixels(decay=0.01, blur=0.5),
        "method": Normalized(frames=3),
    },
    "classic": {"method": "classic", "threshold": 6.0, "lr": 10.0},
    "max": {"objective": "max"},
    "regularised": {"objective": objectives.channel() - 0.5 * objectives.total_variation()},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_alone_and_among_others(way):
    options = WAYS[way]
    atol = 0.02 if way == "classic" else 1e-4  # its pixels are numbers up to 255
    together = ascend(batch_size=7, **options)
    assert ("threshold" in together.status) == ("threshold" in options)
    for size in (1, 2, 3):
        same_ascent(ascend(batch_size=size, **options), together, atol=atol)
    same_ascent(ascend(batch_size="auto", **options), together, atol=atol)
    for channel in (0, 5):
        alone = ascend(channels=channel, **options)
        torch.testing.assert_close(alone.images[0], together.images[channel], rtol=0, atol=atol)
        assert alone.status[0] == together.status[channel]


def test_channels_that_stop_make_room_for_the_next_at_once():
    sizes = []

    def note(images):
        sizes.append(len(images))
        return images

    result = ascend(threshold=0.0, steps=40, lr=0.01, batch_size=2, preprocess=note)
    lengths = (~result.history.isnan()).sum(1).tolist()
    assert len(set(lengths)) > 2
    in_ascent = [size for size in sizes if size == 2]
    assert 2 * len(in_ascent) >= sum(lengths) - max(lengths)


def test_the_order_of_the_channels_changes_nothing():
    forth, back = ascend(channels=[0, 2, 5], batch_size=2), ascend(channels=[5, 2, 0], batch_size=2)
    torch.testing.assert_close(forth.images, back.images.flip(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(forth.scores, back.scores.flip(0), rtol=1e-4, atol=1e-5)


def test_a_channel_named_twice_gets_two_images_and_each_is_reproducible():
    first, again = ascend(channels=[4, 1, 4]), ascend(channels=[4, 4])
    assert (first.images[0] - first.images[2]).abs().max() > 0.1
    torch.testing.assert_close(first.images[[0, 2]], again.images, rtol=0, atol=1e-4)
    assert torch.equal(ascend(channels=[4, 4]).images, again.images)
    assert (ascend(channels=[4, 4], seed=1).images - again.images).abs().max() > 0.1


@pytest.mark.parametrize("channels", [range(2, 5), torch.tensor([2, 3, 4]), (2, 3, 4), np.arange(2, 5)])
def test_channels_are_any_sequence_of_numbers(channels):
    assert ascend(channels=channels, steps=1).channels.tolist() == [2, 3, 4]


def test_images_named_together_grow_unlike_by_diversity():
    def likeness(result):
        maps = small_net()[:3](result.images).flatten(2)
        gram = F.normalize((maps @ maps.mT).flatten(1), dim=1)
        return (gram @ gram.T).fill_diagonal_(0).sum().item() / 6

    alike = ascend(channels=[2, 2, 2], steps=30)
    goal = objectives.channel() + 10 * objectives.diversity()
    apart = ascend(channels=[2, 2, 2], steps=30, objective=goal, batch_size=2)
    assert likeness(apart) < likeness(alike) - 0.05


def test_dreaming_makes_one_image_of_no_channel_in_particular():
    result = ascend(objective=objectives.deepdream(), steps=20)
    assert result.images.shape == (1, 3, 12, 12)
    assert not result.names_channels
    assert result.ranks.tolist() == [-1]
    expected = small_net()[:3](result.images).square().mean()
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
    quick, slow = ascend(model, name, **options), ascend(model, name, **{**options, "objective": long})
    torch.testing.assert_close(quick.images, slow.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(quick.history, slow.history, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quick.scores, slow.scores, rtol=1e-4, atol=1e-5)


def test_the_shortcut_is_not_taken_where_something_else_stands_behind_the_layer():
    patched = small_net()
    patched[2].forward = lambda x, layer=patched[2]: nn.Conv2d.forward(layer, x).square()
    result = ascend(patched, "2", 1)
    expected = small_net()[:3](result.images)[:, 1].square().mean((1, 2))
    torch.testing.assert_close(result.scores, expected.detach())
    torch.testing.assert_close(result.history[0, 0] < result.scores[0], torch.tensor(True))


# Images of other kinds.


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("by", ["pixels", "fourier", "maco"])
def test_images_have_as_many_channels_as_the_network_takes_and_any_proportions(channels, by):
    model = nn.Sequential(nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    result = ascend(model, "2", [0, 3], size=(9, 14), parametrization=by, transforms="robust")
    assert result.images.shape == (2, channels, 9, 14)
    expected = model(result.images)[[0, 1], [0, 3]].mean((1, 2)).detach()
    torch.testing.assert_close(result.scores, expected)
    assert 0 <= result.images.min() <= result.images.max() <= 1


@pytest.mark.parametrize(
    "image", [torch.rand(3, 10, 13), torch.rand(1, 3, 10, 13), torch.rand(3, 10, 13).half()]
)
def test_an_image_to_begin_from_gives_the_size(image):
    before = image.clone()
    result = ascend(channels=[1, 2], image=image, steps=1, lr=1e-6)
    assert torch.equal(image, before)
    for each in result.images:
        torch.testing.assert_close(each, image.reshape(3, 10, 13).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({}, 0, 1), ({"parametrization": Pixels(low=-1, high=1)}, -1, 1), ({"method": "classic"}, 0, 255)],
)
def test_a_picture_to_begin_from_fills_the_range_of_the_pixels(options, low, high):
    picture = Image.new("L", (6, 7), 51)
    result = ascend(channels=0, image=picture, steps=1, lr=1e-6, **options)
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
    result = ascend(model, "mix", channel_dim=-1, steps=40)
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
    result = ascend(model.eval(), "4", steps=20)
    torch.testing.assert_close(result.means, model(result.images).detach())
    torch.testing.assert_close(result.scores, model(result.images).diagonal().detach())
    assert (result.scores > result.history[:, 0]).all()


def test_preprocessing_stands_between_the_image_and_the_network():
    model, mean, sd = (
        small_net(),
        torch.tensor([0.4, 0.5, 0.3]).view(3, 1, 1),
        torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1),
    )
    whitened = ascend(model, "2", 3, preprocess=lambda x: (x - mean) / sd)
    torch.testing.assert_close(
        whitened.scores, model[:3]((whitened.images - mean) / sd)[:, 3].mean((1, 2)).detach()
    )
    folded = small_net()  # the same, by other weights
    with torch.no_grad():
        folded[0].bias -= (folded[0].weight * (mean / sd)).sum((1, 2, 3))
        folded[0].weight /= sd
    same_ascent(ascend(folded, "2", 3), whitened, atol=1e-3)


def test_references_give_what_is_usual():
    torch.manual_seed(1)
    real = torch.rand(5, 3, 12, 12)
    result = ascend(method=Normalized(references=real))
    torch.testing.assert_close(result.reference_means, small_net()[:3](real).mean((2, 3)).detach())
    usual = result.reference_means.double().numpy()
    scores = (result.means.double().numpy() - usual.mean(0)) / usual.std(0, ddof=1)
    np.testing.assert_allclose(result.z_means.numpy(), scores, rtol=1e-3)
    ranks = [(row > row[place]).sum() for place, row in enumerate(scores)]
    assert result.z_ranks.tolist() == ranks


def interrupt_after(calls):
    count = [0]

    def preprocess(images):
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return images

    return preprocess


# Ways to be stopped.


def test_an_interruption_returns_what_is_finished():
    whole = ascend(batch_size=2)
    cut = ascend(batch_size=2, preprocess=interrupt_after(30))
    assert 0 < len(cut.channels) < 7
    assert cut.channels.tolist() == list(range(len(cut.channels)))
    torch.testing.assert_close(cut.images, whole.images[: len(cut.channels)], rtol=0, atol=1e-5)


def test_an_interruption_before_anything_is_finished_is_passed_on():
    with pytest.raises(KeyboardInterrupt):
        ascend(batch_size=2, preprocess=interrupt_after(5))
