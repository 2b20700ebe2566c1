"""The networks of the suite: how each is built without a download, and a small input for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torchvision import models


def image(size: int, batch: int = 1) -> Callable[[], tuple]:
    return lambda: (torch.randn(batch, 3, size, size),)


def photos() -> tuple:
    return ([torch.rand(3, 64, 48), torch.rand(3, 48, 64)],)


def frames() -> tuple:
    return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)


def video() -> tuple:
    return (torch.randn(1, 3, 4, 32, 32),)


# What building a quantised torchvision model says about PyTorch's plans for quantisation, and about an
# observer that a model in eval mode never reaches.
QUANTISATION_WARNINGS = (
    "torch.ao.quantization is deprecated",
    "torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor creation functions",
    "must run observer before calling calculate_qparams",
)


@dataclass(frozen=True)
class Network:
    """One entry of the catalogue.

    `convolutions`, `calls` and `overwritten` say how many convolutions the network has, how often they run in
    one pass in eval mode, and how many of those outputs a later in-place operation writes over.
    """

    name: str
    inputs: Callable[[], tuple]
    convolutions: int
    calls: int
    overwritten: int
    options: dict = field(default_factory=dict)
    engine: str | None = None
    slow: bool = False

    def build(self) -> nn.Module:
        if self.engine is None:
            return self._build()
        if self.engine not in torch.backends.quantized.supported_engines:
            pytest.skip(f"this build of PyTorch has no {self.engine} engine for quantised layers")
        before = torch.backends.quantized.engine
        try:
            with warnings.catch_warnings():
                for message in QUANTISATION_WARNINGS:
                    warnings.filterwarnings("ignore", message)
                return self._build()
        finally:
            torch.backends.quantized.engine = before  # torchvision sets it for the whole process

    def _build(self) -> nn.Module:
        torch.manual_seed(0)
        return models.get_model(self.name, weights=None, **self.options).eval()


UNSET: dict = {"init_weights": False}
NO_BACKBONE: dict = {"weights_backbone": None}
DETECTOR: dict = {"weights_backbone": None, "min_size": 64, "max_size": 96}
FEW_BOXES: dict = DETECTOR | {"box_detections_per_img": 4}
INT8: dict = {"quantize": True}

NETWORKS = [
    # Classification.
    Network("alexnet", image(64), 5, 5, 5),
    Network("vgg11", image(32), 8, 8, 8),
    Network("vgg11_bn", image(32), 8, 8, 0),
    Network("squeezenet1_0", image(32), 26, 26, 26),
    Network("resnet18", image(32), 20, 20, 0),
    Network("resnet50", image(32), 53, 53, 0),
    Network("resnext50_32x4d", image(32), 53, 53, 0),
    Network("densenet121", image(32), 120, 120, 0),
    Network("mobilenet_v2", image(32), 52, 52, 0),
    Network("mobilenet_v3_small", image(32), 52, 52, 0),
    Network("efficientnet_b0", image(32), 81, 81, 16),
    Network("shufflenet_v2_x0_5", image(32), 56, 56, 0),
    Network("mnasnet0_5", image(32), 52, 52, 0),
    Network("regnet_x_400mf", image(32), 71, 71, 0),
    Network("convnext_tiny", image(32), 22, 22, 0),
    Network("googlenet", image(64), 59, 57, 0, UNSET),
    Network("inception_v3", image(75), 96, 94, 0, UNSET),
    Network("vit_b_16", image(32), 1, 1, 0, {"image_size": 32}),
    Network("swin_t", image(32), 1, 1, 0),
    Network("maxvit_t", image(224), 61, 61, 0, slow=True),
    # Detection: one head runs at several scales.
    Network("fcos_resnet50_fpn", photos, 72, 116, 0, DETECTOR),
    Network("retinanet_resnet50_fpn", photos, 71, 111, 40, DETECTOR),
    Network("fasterrcnn_mobilenet_v3_large_320_fpn", photos, 69, 75, 3, DETECTOR),
    Network("maskrcnn_resnet50_fpn", photos, 70, 82, 10, FEW_BOXES),
    Network("keypointrcnn_resnet50_fpn", photos, 73, 85, 13, FEW_BOXES),
    Network("ssdlite320_mobilenet_v3_large", photos, 98, 98, 0, NO_BACKBONE | {"topk_candidates": 4}),
    # Segmentation.
    Network("fcn_resnet50", image(64), 55, 55, 0, NO_BACKBONE),
    Network("deeplabv3_mobilenet_v3_large", image(64), 70, 70, 0, NO_BACKBONE),
    Network("lraspp_mobilenet_v3_large", image(64), 66, 66, 0, NO_BACKBONE),
    # Optical flow: the update block runs 12 times. Video.
    Network("raft_small", frames, 53, 152, 79),
    Network("raft_large", frames, 47, 212, 84, slow=True),
    Network("r3d_18", video, 20, 20, 0),
    # Quantised: no module is an instance of nn.Conv2d.
    Network("quantized_mobilenet_v2", image(32), 52, 52, 0, INT8, "qnnpack"),
    Network("quantized_mobilenet_v3_large", image(32), 62, 62, 0, INT8, "qnnpack"),
    Network("quantized_resnet18", image(32), 20, 20, 0, INT8, "fbgemm"),
    Network("quantized_resnet50", image(32), 53, 53, 0, INT8, "fbgemm"),
    Network("quantized_shufflenet_v2_x0_5", image(64), 56, 56, 0, INT8, "fbgemm"),
    Network("quantized_googlenet", image(64), 59, 57, 0, INT8 | UNSET, "fbgemm"),
    Network("quantized_inception_v3", image(75), 96, 94, 0, INT8 | UNSET, "fbgemm"),
    Network("quantized_resnext101_32x8d", image(32), 104, 104, 0, INT8, "fbgemm", slow=True),
]


def parameters(*names: str) -> list:
    """Return the named networks, or all, as parameters of a test."""
    chosen = [network for network in NETWORKS if not names or network.name in names]
    assert not names or len(chosen) == len(names)
    return [
        pytest.param(network, id=network.name, marks=[pytest.mark.slow] if network.slow else [])
        for network in chosen
    ]
