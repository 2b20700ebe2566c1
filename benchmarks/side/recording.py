"""Claims of capture, survey and monitor: what looking at a network adds to running it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn
from torchvision import models

from benchmarks.side.findings import EIGHT
from benchmarks.side.limits import Limit
from benchmarks.side.timing import Claim, Pair, Setting
from torchlens_viz import Monitor, RunningStats, capture, survey
from torchlens_viz.models.demo_net import DemoNet

EVERY = 100
Run = Callable[[torch.Tensor], object]


def network(setting: Setting, name: str | None = None) -> tuple[nn.Module, torch.Tensor]:
    """Return the network to look at and a batch of four."""
    usual, side = ("resnet18", 112) if setting.is_quick else ("resnet50", 224)
    model = models.get_model(name or usual, weights=None).eval().to(setting.device)
    return model, torch.randn(4, 3, side, side, device=setting.device)


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def by_hand(model: nn.Module) -> Run:
    chosen = convolutions(model).values()

    def forward(batch: torch.Tensor) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _m, _i, output: kept.append(output.detach().clone()))
            for module in chosen
        ]
        try:
            model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    return forward


def by_torchvision(model: nn.Module) -> Run:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, list(convolutions(model)))


def by_torchextractor(model: nn.Module) -> Run:
    from torchextractor import Extractor

    return Extractor(model, list(convolutions(model)))


def by_torchlens(model: nn.Module) -> Run:
    from torchlens import trace

    return lambda batch: trace(model, batch)


def by_captum(model: nn.Module) -> Run:
    from captum.attr import LayerActivation

    return LayerActivation(model, list(convolutions(model).values())).attribute


def by_timm(model: nn.Module) -> Run:
    from timm.models import FeatureHooks

    hooks = FeatureHooks(list(convolutions(model)), model.named_modules())

    def forward(batch: torch.Tensor) -> object:
        model(batch)
        return hooks.get_output(batch.device)

    return forward


def by_nnsight(model: nn.Module) -> Run:
    from nnsight import NNsight

    traced, paths = NNsight(model), [f"model.{name}" for name in convolutions(model)]

    def forward(batch: torch.Tensor) -> object:
        with traced.trace(batch) as tracer:
            cache = tracer.cache(modules=paths)
        return cache  # noqa: RET504 - what stands in the block runs elsewhere

    return forward


def capturing(
    peer: Callable[[nn.Module], Run], name: str | None = None, **how: Any
) -> Callable[[Setting], Pair]:
    """Record all convolutions, entering and leaving included, against a peer; the limit is running bare."""

    def build(setting: Setting) -> Pair:
        return recorded(*network(setting, name), peer, **how)

    return build


def capturing_small_layers(setting: Setting) -> Pair:
    """Record a hundred layers that take no time themselves, so that the cost of a call shows."""
    chain = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(100))).eval().to(setting.device)
    pair = recorded(chain, torch.randn(1, 1, 4, 4, device=setting.device), by_hand)
    pair.note = "one call, entering and leaving included; the layers themselves take next to no time"
    pair.gap = (
        "a hook is registered, called and removed for each layer, and looks at type, thread, structure and "
        "place of the channels before it clones"
    )
    return pair


def recorded(model: nn.Module, batch: torch.Tensor, peer: Callable[[nn.Module], Run], **how: Any) -> Pair:
    run = peer(copy.deepcopy(model))  # of its own: some peers leave hooks or wrappers in the model

    @torch.no_grad()
    def ours() -> object:
        with capture(model, nn.Conv2d, **how) as acts:
            model(batch)
        return acts

    bare = torch.no_grad()(lambda: model(batch))
    return Pair(ours, torch.no_grad()(lambda: run(batch)), limit=Limit("a bare forward pass", work=bare))


def gathering(setting: Setting) -> Pair:
    model, batch = network(setting)

    @torch.inference_mode()
    def ours() -> None:
        with capture(model, nn.Conv2d, reduce=RunningStats):
            model(batch)

    bare = torch.inference_mode()(lambda: model(batch))
    return Pair(ours, bare, limit=Limit("a bare forward pass", is_theirs=True), gap=EIGHT)


def surveying(batch: int) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        side, images = (112, 64) if setting.is_quick else (224, 512)
        model = models.resnet18(weights=None).eval().to(setting.device)
        data = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)

        def loader() -> Iterator[torch.Tensor]:
            for part in data.split(batch):
                yield part.to(setting.device).float() / 255

        @torch.inference_mode()
        def bare() -> None:
            for part in loader():
                model(part)

        return Pair(
            lambda: survey(model, loader(), nn.Conv2d, progress=False),
            bare,
            limit=Limit("the bare loop", is_theirs=True),
            note=f"{images} images of {side} x {side}; the first few hundred cost more",
            gap=EIGHT,
        )

    return build


@contextmanager
def monitoring(setting: Setting) -> Iterator[Pair]:
    net = DemoNet().to(setting.device)
    batch = 16 if setting.is_quick else 64
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, 64, 64, device=setting.device)
    labels = torch.randint(48, (batch,), device=setting.device)
    number = count()

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimiser.step()

    def on() -> None:
        for _ in range(EVERY):
            step()
            monitor.step(next(number))

    def off() -> None:
        for _ in range(EVERY):
            step()

    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(net, folder, probe=images[:4], every=EVERY, alarm=None)
        yield Pair(
            on,
            off,
            limit=Limit("the bare steps", is_theirs=True),
            note=f"steps of {batch} images, a probe of 4",
        )
        monitor.close()


ALL = "`capture` of all convolutions, batch 4"
CLAIMS = [
    Claim("capture_hooks", ALL, "hooks by hand, `detach().clone()`", capturing(by_hand)),
    Claim(
        "capture_vgg16",
        "`capture` of VGG16's convolutions, batch 4",
        "hooks by hand",
        capturing(by_hand, "vgg16"),
    ),
    Claim(
        "capture_lazy", '`capture(copy="lazy")`, batch 4', "hooks by hand", capturing(by_hand, copy="lazy")
    ),
    Claim("capture_calls", "`capture` of 100 tiny layers", "hooks by hand", capturing_small_layers),
    Claim("capture_torchvision", ALL, "torchvision (references)", capturing(by_torchvision)),
    Claim(
        "capture_torchextractor",
        ALL,
        "torchextractor (references)",
        capturing(by_torchextractor),
        "torchextractor",
    ),
    Claim("capture_torchlens", ALL, "torchlens (every operation)", capturing(by_torchlens), "torchlens"),
    Claim("capture_captum", ALL, "captum (clones)", capturing(by_captum), "captum"),
    Claim("capture_timm", ALL, "timm (references)", capturing(by_timm), "timm"),
    Claim("capture_nnsight", ALL, "nnsight (references)", capturing(by_nnsight), "nnsight"),
    Claim("capture_stats", "`capture(reduce=RunningStats)`, batch 4", "a bare forward pass", gathering),
    Claim("survey_16", "`survey`, statistics and top 9, batches of 16", "the bare loop", surveying(16)),
    Claim("survey_32", "`survey`, statistics and top 9, batches of 32", "the bare loop", surveying(32)),
    Claim("monitor", "100 training steps, one logged by `Monitor`", "the same without", monitoring),
]
