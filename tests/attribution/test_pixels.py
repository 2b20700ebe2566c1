"""Gradients at the pixels: by hand, and beside captum."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchlens_viz import explain
from torchlens_viz.errors import InvalidArgumentError


class Functional(nn.Module):
    """A network that calls its ReLUs as it is told to."""

    def __init__(self, relus: list) -> None:
        super().__init__()
        self.relus = relus
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in relus)
        self.head = nn.Linear(2 * 36, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for conv, relu in zip(self.convs, self.relus, strict=True):
            images = relu(conv(images))
        return self.head(images.flatten(1))


WAYS = [
    F.relu,
    torch.relu,
    lambda x: F.relu(x, inplace=True),
    torch.relu_,
    lambda x: x.relu_(),
    lambda x: x.clamp(min=0),
    lambda x: torch.clamp_(x, 0),
    nn.ReLU(inplace=True),
]


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 4),
    ).eval()


def test_guided_relus_are_found_however_they_are_called():
    torch.manual_seed(2)
    functional = Functional(WAYS)
    modular = Functional([nn.ReLU() for _ in WAYS])
    modular.load_state_dict(functional.state_dict())
    image, gradients = torch.rand(1, 2, 6, 6), []
    handles = [
        relu.register_full_backward_hook(lambda module, taken, given: (taken[0].clamp(min=0),))
        for relu in modular.relus
    ]
    leaf = image.clone().requires_grad_()
    (expected,) = torch.autograd.grad(modular(leaf)[0, 1], leaf)
    for handle in handles:
        handle.remove()
    gradients = explain(functional, image, 1, method="guided").heatmaps
    plain = explain(functional, image, 1, method="gradient").heatmaps
    torch.testing.assert_close(gradients, expected.abs().amax(1))
    assert not torch.allclose(gradients, plain)


def test_guided_relus_are_found_in_what_checkpointing_runs_again(net):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net[2:](checkpoint(self.net[:2], images, use_reentrant=False))

    images = torch.rand(2, 3, 8, 8)
    found = explain(Checkpointed(), images, 1, method="guided").heatmaps
    assert torch.equal(found, explain(net, images, 1, method="guided").heatmaps)


def test_guided_by_hand_with_an_upper_limit():
    net = nn.Sequential(nn.ReLU6(), nn.Flatten(), nn.Linear(4, 1, bias=False))
    net[2].weight.data = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    image = torch.tensor([[[[3.0, 3.0], [-3.0, 7.0]]]])  # passes; a negative gradient; off; beyond six
    assert explain(net, image, 0, method="guided").heatmaps.tolist() == [[[1.0, 0.0], [0.0, 0.0]]]
    assert explain(net, image, 0, method="gradient").heatmaps.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.GELU(), "gelu"), (nn.SiLU(), "silu"), (nn.LeakyReLU(), "leaky_relu"), (nn.Hardswish(), "hardswish")],
)
def test_guided_is_refused_where_it_is_not_defined(activation, name):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), activation, nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(
        InvalidArgumentError, match=rf'`method="guided"` says what passes a ReLU, .* `1` .* applies {name}'
    ):
        explain(net, torch.rand(1, 4, 4), method="guided")


def test_guided_is_refused_without_any_relu():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(InvalidArgumentError, match='of which this network runs none; use "gradient"'):
        explain(net, torch.rand(1, 4, 4), method="guided")


def test_the_gradient_of_a_linear_network_is_its_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5))
    found = explain(net, torch.rand(2, 3, 4), 3, method="gradient").heatmaps
    torch.testing.assert_close(found[0], net[1].weight[3].detach().view(2, 3, 4).abs().amax(0))
    smooth = explain(net, torch.rand(2, 3, 4), 3, method="smoothgrad", samples=3).heatmaps
    torch.testing.assert_close(smooth, found)


def test_integrated_gradients_sum_to_the_difference_from_zeros(net):
    images = torch.rand(2, 3, 8, 8)
    found = explain(net, images, [0, 3], method="integrated_gradients", samples=200)
    with torch.no_grad():
        scores, zero = net(images), net(torch.zeros(1, 3, 8, 8))[0]
    expected = torch.stack([scores[0, 0] - zero[0], scores[1, 3] - zero[3]])
    torch.testing.assert_close(found.heatmaps.sum((1, 2)), expected, rtol=1e-2, atol=1e-3)
    assert (found.heatmaps < 0).any()


@pytest.mark.parametrize("is_function", [False, True])
def test_integrated_gradients_agree_with_captum(net, is_function):
    attr = pytest.importorskip("captum.attr")
    images = torch.rand(3, 3, 8, 8)
    theirs = attr.IntegratedGradients(net).attribute(images, target=2).sum(1)
    target = (lambda output: output[:, 2]) if is_function else 2
    found = explain(net, images, target, method="integrated_gradients").heatmaps
    torch.testing.assert_close(found, theirs.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_gradient_and_guided_agree_with_captum(net):
    attr = pytest.importorskip("captum.attr")
    images, classes = torch.rand(2, 3, 8, 8), torch.tensor([1, 3])
    found = explain(net, images, classes, method="gradient").heatmaps
    torch.testing.assert_close(found, attr.Saliency(net).attribute(images, target=classes).amax(1))
    theirs = attr.GuidedBackprop(net).attribute(images, target=classes)
    torch.testing.assert_close(
        explain(net, images, classes, method="guided").heatmaps, theirs.abs().amax(1).detach()
    )


def test_smoothgrad_agrees_with_captum_given_the_same_noise(net, monkeypatch):
    attr = pytest.importorskip("captum.attr")
    tunnel = pytest.importorskip("captum.attr._core.noise_tunnel")
    image, samples, noise, seed = torch.rand(1, 3, 8, 8), 6, 0.2, 4
    spread = noise * (image.max() - image.min())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat([torch.randn(image.shape, generator=generator) for _ in range(samples)])
    monkeypatch.setattr(tunnel.torch, "normal", lambda mean, std: drawn * spread)
    theirs = attr.NoiseTunnel(attr.Saliency(net)).attribute(
        image, nt_type="smoothgrad", nt_samples=samples, stdevs=float(spread), target=1, abs=False
    )
    monkeypatch.undo()
    found = explain(net, image, 1, method="smoothgrad", samples=samples, noise=noise, seed=seed).heatmaps
    torch.testing.assert_close(found, theirs.abs().amax(1), rtol=1e-4, atol=1e-7)


def test_smoothgrad_is_the_same_for_the_same_seed_and_whatever_is_explained_beside(net):
    images = torch.rand(2, 3, 8, 8)
    first = explain(net, images, 1, method="smoothgrad", seed=3).heatmaps
    assert torch.equal(first, explain(net, images, 1, method="smoothgrad", seed=3).heatmaps)
    assert not torch.equal(first, explain(net, images, 1, method="smoothgrad").heatmaps)
    by_function = explain(net, images, lambda output: output[:, 1], method="smoothgrad", seed=3).heatmaps
    torch.testing.assert_close(by_function, first, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "integrated_gradients", "guided"])
def test_a_network_that_detaches_is_refused(method):
    class Detaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images).relu().detach().mean((2, 3))

    with pytest.raises(InvalidArgumentError, match="no gradient leads from the score to the image"):
        explain(Detaches(), torch.rand(1, 6, 6), method=method)
