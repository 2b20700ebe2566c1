"""Real architectures: explained right, or refused with the reason, and left as they were."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from tests.nets import assert_as_before, snapshot
from torchlens_viz import explain, receptive_field
from torchlens_viz.errors import InvalidArgumentError

# The last layer with maps, and for layercam those of each resolution.
CLASSIFIERS = {
    "resnet18": ("layer4", ("relu", "layer1", "layer2", "layer3", "layer4")),
    "vgg16": ("features", (*(f"features.{place}" for place in (3, 8, 15, 22, 29)), "features")),
    "densenet121": (
        "features",
        ("features.relu0", *(f"features.denseblock{place}" for place in (1, 2, 3)), "features"),
    ),
    "mobilenet_v3_small": ("features", ("features.0", "features.1", "features.3", "features.8", "features")),
    "googlenet": ("inception5b", ("conv1", "conv3", "inception3b", "inception4e", "inception5b")),
    "swin_t": ("permute", ("features.1", "features.3", "features.5", "permute")),
    "convnext_tiny": ("features", ("features.1", "features.3", "features.5", "features")),
}
CHANNELS_LAST = {"features.1", "features.3", "features.5"}


@pytest.fixture(autouse=True)
def _memory_goes_back() -> Iterator[None]:
    """Give the memory of large networks back to the system, since other tests look at how much there is."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"init_weights": True} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    return model.eval()


def by_hand(
    model: nn.Module, layer: str, images: torch.Tensor, target: int, *, last: bool
) -> tuple[torch.Tensor, float]:
    """HiResCAM's map at a layer, (N, h, w), by a hook and a full backward pass; and the size of its terms."""
    found = {}
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: found.update(maps=output * 1) or found["maps"]
    )
    with torch.enable_grad():
        score = model(images)[:, target].sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(score, found["maps"])
    terms = (gradient * found["maps"]).detach()
    dim = 3 if last else 1
    return terms.sum(dim).relu(), terms.abs().sum(dim).max().item()


def standing(model: nn.Module, layer: str, maps: np.ndarray) -> np.ndarray:
    """A map (h, w) in the pixels of (64, 96), by numpy's interpolation between its positions."""
    size = (64, 96)
    field = receptive_field(model, layer, (1, 3, *size))
    rows = np.array([field.center((place, 0))[0] for place in range(maps.shape[0])])
    columns = np.array([field.center((0, place))[1] for place in range(maps.shape[1])])
    across = np.stack([np.interp(np.arange(96), columns, row) for row in maps])
    return np.stack([np.interp(np.arange(64), rows, column) for column in across.T], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    model, images = built(name), torch.rand(2, 3, 64, 96)
    before = snapshot(model)
    layer, layers = CLASSIFIERS[name]
    found = explain(model, images, 7, method="hirescam")
    assert (found.layers, explain(model, images, 7).layers) == ((layer,), layers)
    assert not any("spread evenly" in note for note in found.notes)
    with torch.no_grad():
        scores = model(images)[:, 7]
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-6 * scores.abs().max().item())
    for each in (layer, layers[-2]):
        expected, terms = by_hand(model, each, images, 7, last="swin" in name and each in CHANNELS_LAST)
        heatmaps = explain(model, images, 7, method="hirescam", layer=each).heatmaps
        for heatmap, maps in zip(heatmaps, expected, strict=True):
            np.testing.assert_allclose(
                heatmap.numpy(), standing(model, each, maps.double().numpy()), rtol=0, atol=1e-5 * terms
            )
    assert_as_before(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "convnext_tiny"])
def test_guided_is_refused_for_other_activations_than_relu(name):
    with pytest.raises(InvalidArgumentError, match=r"says what passes a ReLU, .* applies "):
        explain(built(name), torch.rand(1, 3, 64, 64), method="guided")


@pytest.mark.slow
def test_a_vision_transformer_by_its_grid():
    torch.manual_seed(0)
    model = torchvision.models.vit_b_16(weights=None, image_size=64).eval()
    nn.init.normal_(model.heads.head.weight)  # zero as it is built
    images = torch.rand(2, 3, 64, 64)
    found = explain(model, images, 7, grid=(4, 4))
    assert found.layers == ("encoder.layers.encoder_layer_11.ln_1",)
    kept = {}
    handle = model.get_submodule(found.layers[0]).register_forward_hook(
        lambda module, args, output: kept.update(tokens=output)
    )
    score = model(images)[:, 7].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept["tokens"])
    tokens = (gradient.relu() * kept["tokens"]).sum(2)[:, 1:].relu().view(2, 1, 4, 4).detach()
    expected = nn.functional.interpolate(tokens, scale_factor=16, mode="bilinear")[:, 0]
    torch.testing.assert_close(found.heatmaps, expected, rtol=1e-3, atol=1e-5)
    assert explain(model, images, 7).layers == ("conv_proj",)


@pytest.mark.slow
def test_a_segmentation_by_the_mean_of_a_mask():
    torch.manual_seed(0)
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).eval()
    before, images = snapshot(model), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output = model(images)["out"][:, 3]
    mask = output > output.median()

    def target(output: dict[str, torch.Tensor]) -> torch.Tensor:
        return (output["out"][:, 3] * mask).mean((1, 2))

    found = explain(model, images, target, layer="backbone.layer4")
    torch.testing.assert_close(found.scores, (output * mask).mean((1, 2)), rtol=1e-4, atol=1e-6)
    assert found.heatmaps.any()
    assert found.targets is None
    assert_as_before(model, before)
    with pytest.raises(InvalidArgumentError, match=r"puts out a OrderedDict with the keys 'out'|keys 'out'"):
        explain(model, images, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_a_detection_by_the_score_of_its_best_box(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, min_size=64, max_size=96, score_thresh=0.0
    ).eval()
    before, images = snapshot(model), torch.rand(1, 3, 64, 96)

    def target(boxes: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.stack([each["scores"].max() for each in boxes])

    found = explain(model, images, target, layer=["backbone.body.layer3", "backbone.body.layer4"])
    with torch.no_grad():
        expected = target(model(images))
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-6)
    assert found.heatmaps.shape == (1, 64, 96)
    assert found.heatmaps.any()
    assert_as_before(model, before)
    with pytest.raises(InvalidArgumentError, match=r"must be a function where the model puts out a list"):
        explain(model, images, 0, layer="backbone.body.layer4")
    with pytest.raises(InvalidArgumentError, match=r"ran \d+ times; choose the block around"):
        explain(model, images, target, layer="head.classification_head.cls_logits")
