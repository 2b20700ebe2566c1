"""`explain` against the bare forward pass and the grad-cam package, on the last stage of ResNet-50."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
import torchvision

from torchlens_viz import explain

LAYER, IMAGES = "layer4", 8


@pytest.fixture(scope="module")
def resnet50() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(IMAGES, 3, 224, 224)


@pytest.mark.parametrize("layer", [LAYER, None])
def test_explaining_beside_the_bare_forward_with_the_layer(resnet50, images, versus, layer):
    def bare() -> torch.Tensor:
        with torch.inference_mode():
            return resnet50(images)

    # The forward pass stands in the place of ours, so that the ratio says how many of it `explain` takes.
    versus(
        bare,
        lambda: explain(resnet50, images, 3, method="gradcam", layer=layer),
        target="<= 1.15",
        note=f"explain(layer={layer!r}) / bare forward",
        rounds=9,
    )


@pytest.mark.parametrize(
    ("method", "peer", "share"),
    [
        ("gradcam", "GradCAM", 1.0),
        ("gradcam++", "GradCAMPlusPlus", 1.0),
        ("hirescam", "HiResCAM", 1.0),
        ("layercam", "LayerCAM", 1.0),
        ("eigencam", "EigenCAM", 1.0),
        ("ablationcam", "AblationCAM", 1.0),
    ],
)
def test_explaining_beside_grad_cam_by(resnet50, images, versus, method, peer, share):
    peers = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    shown = images[:1] if method == "ablationcam" else images

    def theirs() -> object:
        with contextlib.redirect_stderr(io.StringIO()):
            with getattr(peers, peer)(resnet50, [resnet50.layer4]) as cam:
                return cam(shown, [targets.ClassifierOutputTarget(3)] * len(shown))

    versus(
        lambda: explain(resnet50, shown, 3, method=method, layer=LAYER),
        theirs,
        target=">= 2",
        rounds=1 if method == "ablationcam" else 5,
        share=share,
    )
