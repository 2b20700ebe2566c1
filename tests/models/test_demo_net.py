from __future__ import annotations

import importlib.resources
import pickle
import sys

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

from torchlens_viz.errors import InvalidArgumentError, MissingDependencyError
from torchlens_viz.models.demo_net import (
    DEMO_CLASSES,
    DEMO_PHOTOGRAPHS,
    DemoNet,
    load_demo_net,
    normalize,
    preprocess,
)

STORED = importlib.resources.files("torchlens_viz").joinpath("models/demo_net.safetensors")


@pytest.fixture(scope="module")
def demo_net() -> DemoNet:
    return load_demo_net()


@pytest.fixture
def random_net() -> DemoNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DemoNet().eval()


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor]:
    """Evenly spaced patches of the right-most fifth of every photograph, in every quarter turn."""
    patches, labels = [], []
    for index, name in enumerate(DEMO_PHOTOGRAPHS):
        picture = preprocess(Image.fromarray(getattr(skimage.data, name)()))[0]
        strip = picture[..., round(picture.shape[-1] * 4 / 5) :]
        for row in np.linspace(0, strip.shape[-2] - 64, 5).astype(int):
            for column in np.linspace(0, strip.shape[-1] - 64, 2).astype(int):
                patch = strip[:, row : row + 64, column : column + 64]
                for turn in range(4):
                    patches.append(torch.rot90(patch, turn, dims=(-2, -1)))
                    labels.append(4 * index + turn)
    return torch.stack(patches), torch.tensor(labels)


@torch.inference_mode()
def accuracies(model: nn.Module, held_out: tuple[Tensor, Tensor]) -> tuple[float, float]:
    patches, labels = held_out
    guesses = model(patches).argmax(1)
    right_class = (guesses == labels).float().mean().item()
    right_photograph = (guesses // 4 == labels // 4).float().mean().item()
    return right_class, right_photograph


def smoothness(kernels: Tensor) -> Tensor:
    """Share of each kernel's energy left after a 3 x 3 mean: about 1/9 for noise, 1 for a flat kernel."""
    blurred = nn.functional.avg_pool2d(kernels, 3, stride=1)
    return blurred.square().mean((1, 2, 3)) / kernels.square().mean((1, 2, 3))


def orientations(kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Coherence of each gray kernel's structure tensor, 0 (no direction) to 1, and its angle in degrees."""
    gray = kernels.mean(1)
    across = gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2]
    down = gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]
    xx, yy, xy = (product.sum((1, 2)) for product in (across * across, down * down, across * down))
    coherence = torch.hypot(xx - yy, 2 * xy) / (xx + yy)
    return coherence, torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy)) % 180


def oriented_edges_per_sector(kernels: Tensor) -> list[int]:
    """Count smooth kernels with one clear direction in four sectors of 45 degrees, the first about 0."""
    coherence, angle = orientations(kernels)
    sector = ((angle + 22.5) % 180 // 45).long()
    return sector[(coherence > 0.5) & (smoothness(kernels) > 0.2)].bincount(minlength=4).tolist()


def colour_blobs(kernels: Tensor) -> int:
    """Count kernels with 30 % or more of their energy in one constant colour (gray does not count)."""
    colour = (kernels - kernels.mean(1, keepdim=True)).mean((2, 3))
    share = colour.square().sum(1) * kernels[0, 0].numel() / kernels.square().sum((1, 2, 3))
    return int((share >= 0.3).sum())


def test_the_stored_weights_are_half_precision_and_under_one_megabyte() -> None:
    from safetensors.torch import load

    stored = STORED.read_bytes()
    assert 500_000 < len(stored) < 1_000_000
    assert {tensor.dtype for tensor in load(stored).values()} == {torch.float16}


def test_the_loaded_parameters_equal_the_stored_ones_in_float32(demo_net: DemoNet) -> None:
    from safetensors.torch import load

    stored = load(STORED.read_bytes())
    loaded = demo_net.state_dict()
    assert set(loaded) == set(stored)
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, stored[name].float()), name


def test_the_loaded_network_is_in_eval_mode_and_can_be_trained_further() -> None:
    model = load_demo_net()
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model(torch.zeros(1, 3, 64, 64)).sum().backward()
    assert model.classifier.bias.grad is not None


def test_two_loaded_networks_share_no_memory() -> None:
    first, second = load_demo_net(), load_demo_net()
    with torch.no_grad():
        first.features[0].weight.zero_()
    assert second.features[0].weight.abs().sum() > 0


def test_loading_leaves_the_random_state_and_the_defaults_alone() -> None:
    before = torch.get_rng_state()
    load_demo_net()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.empty(0).device.type == "cpu"
    DemoNet()  # the guard: drawing weights does move the generator
    assert not torch.equal(torch.get_rng_state(), before)


def test_loading_ignores_the_callers_default_dtype_and_device() -> None:
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            model = load_demo_net()
            pixels = preprocess(Image.new("RGB", (2, 2), "white"))
    finally:
        torch.set_default_dtype(dtype)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert (pixels.dtype, pixels.device.type) == (torch.float32, "cpu")


def test_a_network_loaded_in_inference_mode_can_be_used_outside_it() -> None:
    with torch.inference_mode():
        model = load_demo_net()
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_missing_safetensors_names_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match=r'python -m pip install "torchlens_viz\[demo\]"'):
        load_demo_net()


def test_the_network_survives_pickling(demo_net: DemoNet) -> None:
    x = torch.linspace(-2, 2, 3 * 40 * 40).view(1, 3, 40, 40)
    assert torch.equal(pickle.loads(pickle.dumps(demo_net))(x), demo_net(x))


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((31, 31), ((7, 7), (3, 3), (1, 1))),
        ((64, 64), ((15, 15), (7, 7), (3, 3))),
        ((224, 224), ((55, 55), (27, 27), (13, 13))),
        ((300, 451), ((74, 112), (36, 55), (17, 27))),
    ],
)
def test_the_convolutions_put_out_maps_of_the_documented_size(
    demo_net: DemoNet, size: tuple[int, int], sides: tuple[tuple[int, int], ...]
) -> None:
    x = torch.zeros(1, 3, *size)
    shapes = []
    for layer in demo_net.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            shapes.append(tuple(x.shape))
    assert shapes == [(1, channels, *side) for channels, side in zip((64, 96, 128), sides, strict=True)]


def test_layers_bear_the_names_of_alexnet() -> None:
    named = {name: type(module).__name__ for name, module in DemoNet().features.named_children()}
    assert [name for name, kind in named.items() if kind == "Conv2d"] == ["0", "3", "6"]
    assert [name for name, kind in named.items() if kind == "ReLU"] == ["1", "4", "7"]


def test_every_class_is_a_photograph_in_one_of_four_turns(demo_net: DemoNet) -> None:
    assert len(set(DEMO_CLASSES)) == len(DEMO_CLASSES) == 4 * len(DEMO_PHOTOGRAPHS) == 48
    assert DEMO_CLASSES[:2] == ("astronaut, upright", "astronaut, turned 90°")
    assert demo_net.classifier.out_features == 48


def test_a_whole_photograph_is_recognised_in_every_turn(demo_net: DemoNet) -> None:
    photograph = preprocess(Image.fromarray(skimage.data.astronaut()))
    turned = torch.cat([torch.rot90(photograph, turn, dims=(-2, -1)) for turn in range(4)])
    with torch.inference_mode():
        guesses = demo_net(turned).argmax(1).tolist()
    assert [DEMO_CLASSES[guess] for guess in guesses] == list(DEMO_CLASSES[:4])


def test_held_out_patches_are_recognised_far_above_chance(
    demo_net: DemoNet, held_out: tuple[Tensor, Tensor]
) -> None:
    right_class, right_photograph = accuracies(demo_net, held_out)
    assert right_class > 0.3  # chance: 1 in 48
    assert right_photograph > 0.8  # chance: 1 in 12


def test_random_weights_stay_near_chance(random_net: DemoNet, held_out: tuple[Tensor, Tensor]) -> None:
    right_class, right_photograph = accuracies(random_net, held_out)
    assert right_class < 0.1
    assert right_photograph < 0.25


def test_the_first_layer_has_oriented_edges_in_every_direction_and_colour_blobs(demo_net: DemoNet) -> None:
    kernels = demo_net.features[0].weight.detach()
    per_sector = oriented_edges_per_sector(kernels)
    assert min(per_sector) >= 3
    assert sum(per_sector) >= 24
    assert colour_blobs(kernels) >= 5


def test_random_kernels_have_neither_oriented_edges_nor_colour_blobs(random_net: DemoNet) -> None:
    kernels = random_net.features[0].weight.detach()
    assert sum(oriented_edges_per_sector(kernels)) == 0
    assert colour_blobs(kernels) == 0


def test_the_measures_find_a_planted_edge_and_a_planted_blob() -> None:
    ramp = torch.linspace(-1, 1, 11)
    vertical_edge = ramp.sign().expand(3, 11, 11)
    blob = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1).expand(3, 11, 11) + 0.1 * vertical_edge
    assert oriented_edges_per_sector(vertical_edge[None]) == [1, 0, 0, 0]
    assert oriented_edges_per_sector(vertical_edge.mT[None]) == [0, 0, 1, 0]
    assert colour_blobs(vertical_edge[None]) == 0
    assert colour_blobs(blob[None]) == 1


def test_the_dead_channels_are_those_on_the_model_card(demo_net: DemoNet) -> None:
    peaks: dict[str, list[Tensor]] = {"1": [], "4": []}
    with torch.inference_mode():
        for name in DEMO_PHOTOGRAPHS:
            x = preprocess(Image.fromarray(getattr(skimage.data, name)()[:512, :512]))
            for layer_name, layer in demo_net.features[:5].named_children():
                x = layer(x)
                if layer_name in peaks:
                    peaks[layer_name].append(x.amax((0, 2, 3)))
    dead = {name: (torch.stack(of).amax(0) == 0).nonzero().flatten().tolist() for name, of in peaks.items()}
    assert dead == {"1": [], "4": [11, 21, 44, 50]}


def test_pixels_are_normalised_to_two_either_side_of_zero() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 51, 0))
    x = preprocess(image)
    assert x.shape == (1, 3, 2, 3)
    assert x[0, :, 0, 0].tolist() == [-2, -2, -2]
    torch.testing.assert_close(x[0, :, 1, 2], torch.tensor([2.0, -1.2, -2.0]))


def test_gray_is_repeated_and_transparency_dropped() -> None:
    gray = preprocess(Image.new("L", (2, 2), 255))
    clear = preprocess(Image.new("RGBA", (2, 2), (255, 255, 255, 0)))
    assert torch.equal(gray, torch.full((1, 3, 2, 2), 2.0))
    assert torch.equal(clear, gray)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_a_picture_of_more_than_eight_bits_is_refused(mode: str) -> None:
    with pytest.raises(InvalidArgumentError, match="`image` must have 8 bits a channel"):
        preprocess(Image.new(mode, (4, 4)))


def test_normalize_keeps_dtype_and_gradient() -> None:
    pixels = torch.full((2, 3, 4, 5), 0.25, dtype=torch.float64, requires_grad=True)
    normalize(pixels).sum().backward()
    assert torch.equal(normalize(pixels), torch.full((2, 3, 4, 5), -1.0, dtype=torch.float64))
    assert torch.equal(pixels.grad, torch.full((2, 3, 4, 5), 4.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 4, 4), torch.zeros(3, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]
)
def test_normalize_refuses_what_is_not_a_floating_point_rgb_image(images: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="must be floating point"):
        normalize(images)
