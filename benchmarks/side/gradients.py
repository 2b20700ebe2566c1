"""Claims of what goes back through a network: maximize, explain, project."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

from benchmarks.side.limits import Limit, flop
from benchmarks.side.timing import Claim, Pair, Setting
from torchlens_viz import explain, maximize, project
from torchlens_viz.backprop.device import resolve_precision

CHANNELS = 8
STEPS = 12
THEIR_STEPS = 2
CROPS = 6  # Horama's default: the network sees six crops of one image at each step
FIXED = (
    "each call copies the network's modules and finds its receptive fields, whatever the batch, and the way "
    "back to the layer comes on top"
)


def vgg_features(setting: Setting) -> nn.Module:
    """Return VGG16 without its dense layers, random weights."""
    layers = OrderedDict(features=make_layers(cfgs["D"]))
    return nn.Sequential(layers).eval().requires_grad_(False).to(setting.device)


def forward_flop(layers: nn.Module, side: int) -> float:
    """Return the floating-point operations of the convolutions for one image; its gradient takes as many."""
    total, image = 0.0, torch.zeros(1, 3, side, side, device="meta")
    for layer in copy.deepcopy(layers).to("meta"):
        image = layer(image)
        if isinstance(layer, nn.Conv2d):
            total += 2.0 * layer.weight.numel() * image.shape[2] * image.shape[3]
    return total


def maximizing(peer: Callable[[nn.Module, int, Setting], Callable[[], object]]) -> Callable[[Setting], Pair]:
    """Compare whole calls, 8 channels; peers take one channel and fewer steps, and are scaled up."""

    def build(setting: Setting) -> Pair:
        layer, side = (7, 112) if setting.is_quick else (14, 224)
        model = vgg_features(setting)
        theirs = peer(copy.deepcopy(model), layer, setting)
        needed = 2 * forward_flop(model.features[: layer + 1], side) * CHANNELS * STEPS
        dtype = resolve_precision("auto", setting.device)
        return Pair(
            lambda: maximize(model, f"features.{layer}", range(CHANNELS), size=side, steps=STEPS),
            theirs,
            share=1 / STEPS if peer is bare_passes else THEIR_STEPS / (CHANNELS * STEPS),
            limit=flop(needed, dtype),
            note=f"vgg16 `features.{layer}`, {side} pixels, 8 channels, {STEPS} steps, theirs scaled up; "
            "ours with its final evaluation in float32",
            gap="convolutions do not reach the rate of a large matrix product, and pooling, ReLU and the "
            "step move bytes: forward and backward passes alone, in another row, reach little more",
        )

    return build


def plain_ascent(model: nn.Module, layer: int, setting: Setting) -> Callable[[], object]:
    cut, side = model.features[: layer + 1], 112 if setting.is_quick else 224
    start = torch.rand(1, 3, side, side, device=setting.device)

    def run() -> None:
        image = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([image], lr=0.05)
        for _ in range(THEIR_STEPS):
            optimiser.zero_grad()
            (-cut(image)[:, 0].mean()).backward()
            optimiser.step()

    return run


def bare_passes(model: nn.Module, layer: int, setting: Setting) -> Callable[[], object]:
    """One step of all channels, without anything but the network: forward, and back to the images."""
    dtype, side = resolve_precision("auto", setting.device), 112 if setting.is_quick else 224
    cut = model.features[: layer + 1].to(dtype=dtype, memory_format=torch.channels_last)
    images = torch.rand(CHANNELS, 3, side, side, device=setting.device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    return lambda: torch.autograd.grad(cut(images).float().sum(), images)


def by_lucent(model: nn.Module, layer: int, setting: Setting) -> Callable[[], object]:
    from lucent.optvis import param, render

    side = 112 if setting.is_quick else 224

    def run() -> None:
        render.render_vis(
            model,
            f"features_{layer}:0",
            lambda: param.image(side),
            thresholds=(THEIR_STEPS,),
            fixed_image_size=side,
            progress=False,
            show_image=False,
        )
        for module in model.modules():  # it leaves its hooks behind
            module._forward_hooks.clear()

    return run


def by_horama(model: nn.Module, layer: int, setting: Setting) -> Callable[[], object]:
    from horama import fourier

    cut, side = model.features[: layer + 1], 112 if setting.is_quick else 224
    return lambda: fourier(
        lambda images: cut(images)[:, 0].mean(),
        total_steps=THEIR_STEPS,
        image_size=side,
        crops_per_iteration=CROPS,
        device=str(setting.device),
    )


def resnet(setting: Setting) -> tuple[nn.Module, torch.Tensor]:
    name, side, batch = ("resnet18", 112, 4) if setting.is_quick else ("resnet50", 224, 8)
    model = models.get_model(name, weights=None).eval().to(setting.device)
    return model, torch.rand(batch, 3, side, side, device=setting.device)


def explaining(setting: Setting) -> Pair:
    model, images = resnet(setting)
    bare = torch.inference_mode()(lambda: model(images))
    limit = Limit("a bare forward pass", is_theirs=True)
    return Pair(
        lambda: explain(model, images, 3, method="gradcam", layer="layer4"),
        bare,
        limit=limit,
        note=f"{len(images)} images of {images.shape[-1]} pixels",
        gap=FIXED,
    )


def explaining_beside_grad_cam(method: str, peer: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        model, images = resnet(setting)
        twin = copy.deepcopy(model)

        def theirs() -> object:
            with contextlib.redirect_stderr(io.StringIO()):
                with getattr(pytorch_grad_cam, peer)(twin, [twin.layer4]) as cam:
                    return cam(images, [ClassifierOutputTarget(3)] * len(images))

        bare = torch.inference_mode()(lambda: model(images))
        return Pair(
            lambda: explain(model, images, 3, method=method, layer="layer4"),
            theirs,
            limit=Limit("a bare forward pass", work=bare),
            gap=FIXED,
        )

    return build


def projecting(rule: str, kind: str) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        from captum import attr

        layer, side, channels, few = (5, 112, 16, 2) if setting.is_quick else (10, 224, 64, 4)
        model = vgg_features(setting)
        twin = copy.deepcopy(model)
        for module in twin.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # which captum cannot hook
        method = getattr(attr, kind)(twin, twin.features[layer])
        image = torch.rand(1, 3, side, side, device=setting.device)

        def ours() -> object:
            return project(model, f"features.{layer}", image, range(channels), rule=rule)

        found = ours()
        places = [(channel, *found.positions[channel].tolist()) for channel in range(few)]

        def theirs() -> object:
            return [method.attribute(image, place) for place in places]

        for own, other in zip(found.images, theirs(), strict=False):
            if (own.cpu() - other[0].cpu()).norm() > 1e-3 * other.norm().cpu():
                raise AssertionError("the projections differ")
        return Pair(
            ours,
            theirs,
            share=few / channels,
            limit=Limit("a forward pass up to the layer", work=lambda: model.features[: layer + 1](image)),
            note=f"vgg16 `features.{layer}`, {side} pixels, {channels} channels, theirs {few} and scaled up",
            gap="the limit leaves out the way back, which each of the channels needs",
        )

    return build


STEP = "`maximize`, per channel and step"
CAM = "`explain`, gradcam, `layer4`"
CLAIMS = [
    Claim("maximize_plain", STEP, "a plain loop, one channel, Adam", maximizing(plain_ascent)),
    Claim("maximize_bare", STEP, "forward and backward passes alone, same type", maximizing(bare_passes)),
    Claim("maximize_lucent", STEP, "lucent `render_vis`", maximizing(by_lucent), "lucent"),
    Claim("maximize_horama", STEP, "Horama `fourier`, six crops a step", maximizing(by_horama), "horama"),
    Claim("explain_bare", CAM, "a bare forward pass", explaining),
    Claim(
        "explain_gradcam",
        CAM,
        "grad-cam `GradCAM`",
        explaining_beside_grad_cam("gradcam", "GradCAM"),
        "pytorch_grad_cam",
    ),
    Claim(
        "explain_layercam",
        "`explain`, layercam, `layer4`",
        "grad-cam `LayerCAM`",
        explaining_beside_grad_cam("layercam", "LayerCAM"),
        "pytorch_grad_cam",
    ),
    Claim(
        "project_deconvnet",
        "`project`, deconvnet",
        "captum `NeuronDeconvolution`, one by one",
        projecting("deconvnet", "NeuronDeconvolution"),
        "captum",
    ),
    Claim(
        "project_guided",
        "`project`, guided",
        "captum `NeuronGuidedBackprop`, one by one",
        projecting("guided", "NeuronGuidedBackprop"),
        "captum",
    ),
]
