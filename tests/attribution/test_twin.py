"""What a layer puts out is taken out and put back, and the network goes on as it does by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlens_viz import explain
from torchlens_viz.errors import InvalidArgumentError


class Between(nn.Module):
    """A convolution, a layer that may put out what it took, and what a function makes of both."""

    def __init__(self, layer: nn.Module, function) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 3)
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        taken = self.first(images)
        return self.last(self.function(taken, self.layer(taken))).mean((2, 3))


class Half(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps[:, ::2]


def write_to_given(taken, given):
    given.relu_()
    return taken


def write_to_taken(taken, given):
    taken.relu_()
    return given[:, [0, 0, 1, 1]] if given.shape[1] == 2 else given


METHODS = ("hirescam", "ablationcam", "eigencam")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(), Half()])
@pytest.mark.parametrize("function", [write_to_given, write_to_taken])
def test_a_layer_whose_memory_is_shared_and_written_to_is_refused(function, layer, method):
    torch.manual_seed(0)
    net = Between(layer, function).eval()
    with pytest.raises(InvalidArgumentError, match="`layer` puts out memory that it took, and the model"):
        explain(net, torch.randn(2, 3, 8, 8), 1, method=method, layer="layer")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (nn.Identity(), lambda taken, given: taken + given),
        (nn.Identity(), lambda taken, given: given.relu_()),
        (nn.ReLU(inplace=True), lambda taken, given: taken + given),
        (nn.ReLU(inplace=True), lambda taken, given: given.add_(1)),
        (nn.Conv2d(4, 4, 1), lambda taken, given: taken.relu_() + given.relu_()),
        (Half(), lambda taken, given: given.repeat(1, 2, 1, 1).add_(taken)),
    ],
)
def test_sharing_that_changes_nothing_is_no_trouble(layer, function, method):
    torch.manual_seed(0)
    net, images = Between(layer, function).eval(), torch.randn(2, 3, 8, 8)
    found = explain(net, images, 1, method=method, layer="layer")
    with torch.no_grad():
        torch.testing.assert_close(found.scores, net(images)[:, 1])
    if method == "hirescam" and isinstance(layer, nn.Identity):
        gradient = torch.func.grad(lambda maps: net.last(function(taken, maps * 1)).mean((2, 3))[:, 1].sum())
        taken = net.first(images).detach()
        expected = (gradient(taken.clone()) * taken).sum(1).relu()
        torch.testing.assert_close(found.heatmaps[:, 1:7, 1:7], expected)
