"""`capture` of every convolution against a bare forward pass, hooks written by hand, and its peers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from torchlens_viz import capture

ROUNDS = 15
SLOW_ROUNDS = 5

# A rival takes a model and the layers to record, by name; it returns what runs a forward pass and records.


def bare(model, convolutions):
    return model


def by_hand(model, convolutions):
    def forward(batch):
        kept = []
        handles = [
            module.register_forward_hook(lambda _m, _i, output: kept.append(output.detach().clone()))
            for module in convolutions.values()
        ]
        try:
            model(batch)
        finally:
            for handle in handles:
                handle.remove()

    return forward


def torchvision_fx(model, convolutions):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, list(convolutions))


def captum(model, convolutions):
    attr = pytest.importorskip("captum.attr")
    return attr.LayerActivation(model, list(convolutions.values())).attribute


def timm(model, convolutions):
    hooks = pytest.importorskip("timm.models").FeatureHooks(list(convolutions), model.named_modules())

    def forward(batch):
        model(batch)
        return hooks.get_output(batch.device)

    return forward


def torchextractor(model, convolutions):
    return pytest.importorskip("torchextractor").Extractor(model, list(convolutions))


def torchlens(model, convolutions):
    trace = pytest.importorskip("torchlens").trace
    return lambda batch: trace(model, batch)


def nnsight(model, convolutions):
    traced = pytest.importorskip("nnsight").NNsight(model)
    paths = [f"model.{name}" for name in convolutions]

    def forward(batch):
        with traced.trace(batch) as tracer:
            cache = tracer.cache(modules=paths)
        return cache  # noqa: RET504 - what stands in the block runs elsewhere

    return forward


RIVALS = {
    "hand_written_hooks": (by_hand, True, ">= 0.98", "hooks that detach and clone"),
    "a_bare_forward_pass": (bare, True, "", "records nothing"),
    "a_bare_forward_pass, copy='lazy'": (bare, "lazy", "", "records nothing"),
    "torchvision": (torchvision_fx, True, "", "keeps references"),
    "timm": (timm, True, "", "keeps references"),
    "torchextractor": (torchextractor, True, "", "keeps references"),
    "captum": (captum, True, "", "clones"),
    "nnsight": (nnsight, True, "", "keeps references"),
    "torchlens": (torchlens, True, "", "records every operation"),
}


@pytest.mark.filterwarnings("default")  # what a peer warns of is not ours to mend
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_capture_batch_4_against(versus, name, rival):
    make, how, target, note = RIVALS[rival]
    batch = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = models.get_model(name, weights=None).eval()
    other = copy.deepcopy(model)  # of its own: some peers leave hooks or wrappers in the model
    chosen = {label: module for label, module in other.named_modules() if isinstance(module, nn.Conv2d)}
    run = make(other, chosen)

    @torch.no_grad()
    def ours():
        with capture(model, nn.Conv2d, copy=how) as acts:
            model(batch)
        return acts

    @torch.no_grad()
    def theirs():
        return run(batch)

    versus(ours, theirs, target=target, rounds=SLOW_ROUNDS if make is torchlens else ROUNDS, note=note)
