"""Gradient ascent on VGG16, 224 pixels, 8 channels of `features.14`: time per channel and step.

Everybody runs with the same seeded random weights. Ours are whole calls of `maximize`, the final evaluation
in float32 included. The floor is the arithmetic of the convolutions: one forward pass and the gradient with
respect to its input.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model, vgg16

from torchlens_viz import maximize
from torchlens_viz.backprop.device import autocasting, isolated, resolve_precision
from torchlens_viz.backprop.network import Cut, shadow_of

LAYER = 14
CHANNELS = range(8)
SIZE = 224
STEPS = 12
THEIR_STEPS = 2
HORAMA_CROPS = 6  # its default: the network sees six crops of one image at each step
ROUNDS = 5


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vgg16(weights=None).eval()


@pytest.fixture
def ours(network):
    def run():
        maximize(network, f"features.{LAYER}", CHANNELS, size=SIZE, steps=STEPS)

    return run


def share(channels: int, steps: int) -> float:
    """Which part of our channel-steps so many are."""
    return channels * steps / (len(CHANNELS) * STEPS)


def test_maximize_plain_port(versus, network, ours):
    """Against a straight port of the reference: the net cut at the layer, one channel, `loss.backward()`."""
    cut = network.features[: LAYER + 1]
    image = 128 + 20 * torch.rand(1, 3, SIZE, SIZE)

    def theirs():
        moving = image.clone().requires_grad_()
        optimizer = torch.optim.Adam([moving], lr=2.5)
        for _ in range(THEIR_STEPS):
            optimizer.zero_grad()
            (-cut(moving)[:, 0].mean()).backward()
            optimizer.step()

    versus(ours, theirs, target=">= 8", rounds=ROUNDS, share=share(1, THEIR_STEPS))
    network.zero_grad(set_to_none=True)


def test_maximize_lucent(versus, network, ours):
    render = pytest.importorskip("lucent.optvis.render")

    def theirs():
        options = {"show_image": False, "progress": False, "thresholds": (THEIR_STEPS,)}
        render.render_vis(network, f"features_{LAYER}:0", **options)

    versus(ours, theirs, target=">= 12", rounds=ROUNDS, share=share(1, THEIR_STEPS))
    network.zero_grad(set_to_none=True)
    for module in network.modules():  # it leaves its hooks behind
        module._forward_hooks.clear()


def test_maximize_horama(versus, network, ours):
    horama = pytest.importorskip("horama")
    cut = network.features[: LAYER + 1]

    def theirs():
        horama.fourier(
            lambda images: cut(images)[:, 0].mean(),
            total_steps=1,
            image_size=SIZE,
            crops_per_iteration=HORAMA_CROPS,
            device="cpu",
        )

    note = f"its {HORAMA_CROPS} crops count as one step"
    versus(ours, theirs, target="-", rounds=ROUNDS, share=share(1, 1), note=note)
    network.zero_grad(set_to_none=True)


def test_maximize_against_the_rate_of_matrix_products(versus, network, ours):
    """Theirs is the time that the arithmetic alone would take at the machine's own rate in bfloat16."""
    side = 4096
    left, right = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
    needed = 2 * arithmetic(network.features[:LAYER]) * len(CHANNELS) * STEPS
    products = 2 * side**3

    def theirs():
        left @ right

    note = f"{needed / len(CHANNELS) / STEPS / 1e9:.1f} GFLOP per channel and step"
    versus(ours, theirs, target=">= 0.6", rounds=ROUNDS, share=products / needed, note=note)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("vgg16", "features.14"), ("resnet18", "layer3.0.conv1"), ("mobilenet_v2", "features.10.conv.0.0")],
)
def test_maximize_compiled(versus, name, layer):
    """Ours is the network's share of a step as it is, theirs the same through `torch.compile`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_precision("auto", device)
    with isolated(device):
        torch.manual_seed(0)
        model = get_model(name, weights=None).eval().to(device)
        images = torch.rand(len(CHANNELS), 3, SIZE, SIZE, device=device, requires_grad=True)
        given = images.clone(memory_format=torch.channels_last)

        def stepping(is_compiled):
            cut = Cut(shadow_of(model, dtype=dtype), [layer], io="input", is_compiled=is_compiled)

            def step():
                with autocasting(device, dtype):
                    taken = cut(given)[layer]
                return torch.autograd.grad(taken.float().sum(), images, retain_graph=True)

            return step

        versus(stepping(False), stepping(True), target="-", note="theirs is ours, compiled")


def arithmetic(layers: nn.Sequential) -> float:
    """Return the floating-point operations of one image's forward pass; its gradient takes as many."""
    image, total = torch.zeros(1, 3, SIZE, SIZE, device="meta"), 0.0
    for layer in layers:
        image = _meta(layer, image) if isinstance(layer, nn.Conv2d) else layer(image)
        if isinstance(layer, nn.Conv2d):
            total += 2.0 * layer.weight.numel() * image.shape[2] * image.shape[3]
    return total


def _meta(layer: nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv2d(
        image, layer.weight.to("meta"), stride=layer.stride, padding=layer.padding
    )
