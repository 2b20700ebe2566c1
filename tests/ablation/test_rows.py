"""Copies of a batch from a layer on are those of a batch that was repeated from the start, or refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from torchlens_viz.ablation.rewrite import NOTHING, Rewritten
from torchlens_viz.errors import ModelFailedError
from torchlens_viz.models.layers import select_one

NETWORKS = {
    "resnet18": "layer2.0.conv1",
    "densenet121": "features.denseblock2.denselayer3.conv1",
    "squeezenet1_1": "features.6.squeeze",
    "mobilenet_v3_small": "features.4.block.2.fc1",
    "shufflenet_v2_x0_5": "stage3.1.branch2.0",
    "googlenet": "inception3a.branch2.0",
    "vgg11_bn": "features.15",
    "efficientnet_b0": "features.3.0.block.0",
}


def outputs(model: nn.Module, layer: str, batch: torch.Tensor, way: str) -> list[torch.Tensor]:
    rewritten = Rewritten(model, select_one(model, layer), None)
    rewritten.look((batch,), {})
    rewritten._ways = [getattr(rewritten, way)]
    return rewritten.outputs((batch,), {}, torch.tensor([NOTHING, 1, 0]), torch.zeros_like)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision_go_on_with_copies(name):
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, num_classes=5, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    batch = torch.randn(6, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        model(batch)  # so that no layer dies away, as in an untrained network
    model.eval()
    batch = batch[:2]
    found = outputs(model, NETWORKS[name], batch, "_from_there")
    expected = outputs(model, NETWORKS[name], batch, "_in_rows")
    with torch.no_grad():
        torch.testing.assert_close(found[0], model(batch), rtol=1e-7, atol=1e-10)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    assert (found[0] - found[1]).abs().max() > 1e-6 * found[0].abs().max()


class After(nn.Module):
    """Does something with what the layer puts out, and with what was there before."""

    def __init__(self, work):
        super().__init__()
        self.layer, self.before = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.work = work

    def forward(self, images):
        before = self.before(images)
        return self.work(self.layer(images), before)


REFUSED = {
    "mean over the batch": lambda maps, before: maps - maps.mean(0, keepdim=True),
    "the batch turned": lambda maps, before: maps.flip(0),
    "the batch in another place": lambda maps, before: maps.transpose(0, 1),
    "the batch as one row": lambda maps, before: maps.reshape(1, -1),
    "two tensors of the copies multiplied": lambda maps, before: maps.flatten(1) @ maps.flatten(1).T,
    "in place on what came before": lambda maps, before: before.add_(maps),
    "batch statistics": lambda maps, before: nn.functional.batch_norm(maps, None, None, training=True),
    "instance statistics": lambda maps, before: nn.functional.instance_norm(maps),
    "a value that decides": lambda maps, before: maps if float(maps.sum()) > 0 else -maps,
    "what came before, turned": lambda maps, before: maps + before.transpose(0, 1).transpose(0, 1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_may_mix_the_rows_is_refused(what):
    with pytest.raises(ModelFailedError, match=r"\(CannotRepeatError\)"):
        outputs(After(REFUSED[what]).eval(), "layer", torch.randn(2, 3, 4, 4), "_from_there")


KNOWN = {
    "what came before": lambda maps, before: maps * before.mean((2, 3), keepdim=True),
    "joined": lambda maps, before: torch.cat([before, maps.relu_()], 1),
    "in place on the copies": lambda maps, before: maps.mul_(before),
    "softmax over channels": lambda maps, before: maps.softmax(1),
    "positions in a row": lambda maps, before: maps.flatten(2).transpose(1, 2),
    "without the layer": lambda maps, before: before,
}


@pytest.mark.parametrize("what", KNOWN)
def test_what_treats_every_row_by_itself_goes_on(what):
    torch.manual_seed(0)
    model, batch = After(KNOWN[what]).eval(), torch.randn(2, 3, 4, 4)
    for ours, theirs in zip(
        outputs(model, "layer", batch, "_from_there"), outputs(model, "layer", batch, "_in_rows"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
