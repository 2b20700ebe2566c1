"""Where images enter a network: its first layer to run, and how many channels and axes they have."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torchlens_viz import maximize
from torchlens_viz.models.calls import called_with
from torchlens_viz.models.kernels import entry_of, image_axes, image_channels, kernels_of
from torchlens_viz.models.layers import first_layer


class DecoderFirst(nn.Module):
    """Defines what runs last before what runs first."""

    def __init__(self, latent=8):
        super().__init__()
        self.decoder, self.encoder = nn.ConvTranspose2d(latent, 3, 2, 2), nn.Conv2d(3, latent, 3, 2, 1)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


class TakesTwo(DecoderFirst):
    def forward(self, x, y):
        return super().forward(x) + y


class Quarters(nn.Module):
    """Makes four images of every other row and column, as focus layers do."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(
            torch.cat([x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)], 1)
        )


class Mixed(Quarters):
    def forward(self, x):
        return self.convolution(x.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "name", "channels"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "0", 3),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), "0", 1),
        (nn.Sequential(nn.Conv2d(13, 4, 3), nn.Conv2d(4, 4, 3)), "0", 13),
        (DecoderFirst(), "encoder", 3),
        (DecoderFirst(latent=4), "encoder", 3),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)), "1", 3),
        (nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, 4, 3)), "1", 1),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 8, 3)), "1", 1),
        (
            nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 3, 3), nn.Conv2d(3, 3, 1)),
            "1",
            1,
        ),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(8, 4, 3)), "1", 2),
        (nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 4, 3)), "1", 4),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)), "0", 4),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(7, 2)), "0", 2),
        (Quarters(nn.Conv2d(4, 8, 3)), "convolution", 1),
        (Quarters(nn.Conv2d(12, 8, 3)), "convolution", 3),
        (Mixed(nn.Conv2d(1, 4, 3)), "convolution", 1),  # takes any number
        (nn.Sequential(nn.PixelUnshuffle(2), parametrizations.weight_norm(nn.Conv2d(12, 4, 3))), "1", 3),
        (nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(7, 2)), "0", 6),  # of another size
        (TakesTwo(), "decoder", 8),  # cannot be tried, so that the order of definition counts
    ],
)
def test_images_enter_at_the_first_convolution_to_run(model, name, channels):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    entry = entry_of(model)
    assert (entry.layer.name, entry.channels) == (name, channels)
    assert image_channels(model) == channels
    assert kernels_of(model).name == name
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert model.training


def test_looking_for_it_draws_no_random_numbers():
    class Noisy(Quarters):
        def forward(self, x):
            return super().forward(
                x
                + torch.rand(x.shape, device=x.device)
                + torch.rand(1).item()
                + random.random()
                + np.random.rand()
            )

    model = Noisy(nn.Conv2d(4, 8, 3))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    assert image_channels(model) == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[2]) == before[1:]


class Of(nn.Module):
    """A network that makes something else of its input before its convolution."""

    def __init__(self, convolution, change):
        super().__init__()
        self.convolution, self.change = convolution, change

    def forward(self, x):
        return self.convolution(self.change(x))


@pytest.mark.parametrize(
    ("model", "channels", "axes"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3)), 1, 2),
        (nn.Sequential(nn.Conv1d(12, 4, 7), nn.Conv1d(4, 2, 3)), 12, 1),
        (nn.Sequential(nn.Conv1d(1, 4, 80, 16)), 1, 1),
        (nn.Sequential(nn.ConvTranspose1d(2, 4, 3)), 2, 1),
        (nn.Sequential(nn.Conv3d(1, 3, 3), nn.Conv3d(3, 4, 3)), 1, 3),
        (nn.Sequential(parametrizations.weight_norm(nn.Conv3d(3, 4, 3))), 3, 3),
        (Of(nn.Conv3d(3, 4, (1, 3, 3)), lambda x: x.unsqueeze(2) if x.ndim == 4 else 1 / 0), 3, 2),
        (Of(nn.Conv3d(1, 4, 3), lambda x: x.unsqueeze(1)), 3, 2),
        (Of(nn.Conv1d(3, 4, 3), lambda x: x.flatten(2) if x.ndim == 4 else 1 / 0), 3, 2),
    ],
    ids=str,
)
def test_the_first_convolution_says_how_many_axes_images_have_unless_they_become_others(
    model, channels, axes
):
    assert (image_channels(model), image_axes(model)) == (channels, axes)


def with_coordinates(x):
    rows = torch.linspace(-1, 1, x.shape[2], device=x.device)[:, None].expand(1, 1, *x.shape[2:])
    columns = torch.linspace(-1, 1, x.shape[3], device=x.device).expand(1, 1, *x.shape[2:])
    return torch.cat([x, rows.expand(len(x), -1, -1, -1), columns.expand(len(x), -1, -1, -1)], 1)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Pair(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner(torch.cat([x, y], 1))


class Unused(nn.Module):
    """Defines a convolution that takes three channels first, and never runs it."""

    def __init__(self, channels):
        super().__init__()
        self.aside, self.stem = nn.Conv2d(3, 4, 1), nn.Conv2d(channels, 4, 3)

    def forward(self, x):
        return self.stem(x)


class Chosen(nn.Module):
    """Chooses channels of its images by their place."""

    def __init__(self, first, second, parts):
        super().__init__()
        self.first, self.second, self.parts = nn.Conv2d(first, 4, 3), nn.Conv2d(second, 4, 3), parts

    def forward(self, x):
        one, other = self.parts(x)
        return self.first(one) + self.second(other).mean((2, 3), keepdim=True)


class Masked(Unused):
    """Adds the sum of its last channel, which of no channel would be zero."""

    def forward(self, x):
        return self.aside(x[:, :3]) + x[:, 3:4].sum(1, keepdim=True)


class Coordinates(nn.Conv2d):
    def __init__(self, channels, out):
        super().__init__(channels + 2, out, 3)

    def forward(self, x):
        return super().forward(with_coordinates(x))


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (Of(nn.Conv2d(3, 4, 3), with_coordinates), 1),
        (Of(nn.Conv2d(5, 4, 3), with_coordinates), 3),
        (Of(nn.Conv2d(14, 4, 3), with_coordinates), 12),
        (Of(nn.Conv2d(4, 4, 3), with_coordinates), 2),
        (nn.Sequential(Coordinates(1, 4), nn.ReLU()), 1),
        (nn.Sequential(Coordinates(3, 4), nn.ReLU()), 3),
        (Unused(1), 1),
        (Unused(4), 4),
        (Unused(13), 13),
        (DecoderFirst(latent=3), 3),
        (Of(nn.Conv2d(3, 4, 3), lambda x: x.repeat(1, 3, 1, 1)), 1),
        (Of(nn.Conv2d(3, 4, 3), lambda x: x[:, :3] * x[:, 3:4]), 4),
        (Of(nn.Conv2d(3, 4, 3), lambda x: x[:, :-1]), 4),
        (Of(nn.Conv2d(3, 4, 3), lambda x: x[:, [2, 1, 0]]), 3),
        (Chosen(3, 1, lambda x: (x[:, :3], x[:, 3:])), 4),
        (Chosen(1, 3, lambda x: (x[:, 3:], x[:, :3])), 4),
        (Chosen(3, 3, lambda x: (x[:, :3], x[:, 3:])), 6),
        (Chosen(3, 3, lambda x: x.chunk(2, 1)), 6),
        (Chosen(3, 2, lambda x: x.split([3, 2], 1)), 5),
        (Chosen(3, 1, lambda x: (x[..., :3, :, :], x[..., 3:, :, :])), 4),
        (Masked(1), 4),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(52, 4, 3)), 13),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 1),
        (nn.Sequential(nn.Unfold(8, stride=8), Transposed(), nn.Linear(64, 4)), 1),
        (nn.Sequential(nn.Unfold(8, stride=8), Transposed(), nn.Linear(192, 4)), 3),
    ],
    ids=str,
)
def test_an_image_has_as_many_channels_as_the_network_takes(model, channels):
    assert image_channels(model) == channels
    assert image_axes(model) == 2


def test_a_second_image_beside_the_first_is_not_counted():
    both = Of(nn.Conv2d(6, 4, 3), lambda x: x)
    model = called_with(Pair(both), (None, torch.rand(1, 3, 64, 64)))
    assert image_channels(model) == 3


def test_what_is_maximised_has_the_channels_that_the_network_takes():
    found = maximize(Of(nn.Conv2d(3, 4, 3), with_coordinates), "convolution", [0], steps=2, size=16)
    assert found.images.shape == (1, 1, 16, 16)


def test_networks_without_a_convolution_take_images_of_three_channels():
    assert image_channels(nn.Linear(3, 4)) == 3
    assert image_axes(nn.Linear(3, 4)) == 2


def test_an_image_that_is_made_has_the_channels_that_enter():
    for inputs, channels in ((4, 1), (12, 3)):
        found = maximize(
            nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(inputs, 2, 3)), "1", [0], size=16, steps=1
        )
        assert found.images.shape == (1, channels, 16, 16)


class Directly(nn.Module):
    """Counts its passes, and hands its input to a convolution that is defined last."""

    def __init__(self, before=lambda x: x):
        super().__init__()
        self.decoder, self.before, self.passes, self.seen = nn.Conv2d(6, 3, 1), before, 0, []
        self.encoder = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU())

    def forward(self, x):
        self.passes += 1
        self.seen.append(x)
        return self.decoder(self.encoder(self.before(x)))


def test_the_convolution_that_is_handed_the_input_is_told_without_running_anything():
    net = Directly()
    assert first_layer(net) is net.encoder[0]
    assert entry_of(net)[1:] == (1, 2)
    assert (net.passes, net.seen) == (0, [])


@pytest.mark.parametrize(
    "before", [lambda x: x / 2, lambda x: x[:, :1], lambda x: x if x.ndim == 4 else x[None], torch.relu, len]
)
def test_where_anything_comes_before_it_a_trial_has_to_say_it(before):
    net = Directly(before)
    assert first_layer(net) is None
    assert (net.passes, net.seen) == (0, [])


def test_hooks_of_the_callers_hear_of_no_trial():
    net, heard = Directly(), []
    net.encoder.register_forward_pre_hook(lambda module, given: heard.append(given))
    assert first_layer(net) is None
    assert heard == []
