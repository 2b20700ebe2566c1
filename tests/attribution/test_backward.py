"""Networks through which no gradient can be taken are refused in one message, wherever one is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchlens_viz import explain, maximize, project, survey
from torchlens_viz.errors import CaptureMemoryError, InvalidArgumentError


class Fails(torch.autograd.Function):
    """Has no way back."""

    @staticmethod
    def forward(context, maps):
        return 2 * maps

    @staticmethod
    def backward(context, *gradients):
        raise ValueError("not written yet")


class Exhausts(Fails):
    """Runs out of memory on the way back."""

    @staticmethod
    def backward(context, *gradients):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Middle(nn.Module):
    """A network with something in its middle."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.middle = middle

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.conv(images)).mean((2, 3)))


def over_what_is_needed(maps: torch.Tensor) -> torch.Tensor:
    maps = maps.sigmoid()  # whose gradient needs what it put out
    maps += 1
    return maps


NO_WAY_BACK = [
    (over_what_is_needed, r"the model writes in place .* write `x = x \+ y` for `x \+= y` there"),
    (Fails.apply, r"without a gradient \(ValueError: not written yet\); replace it"),
    (lambda maps: checkpoint(torch.relu, maps, use_reentrant=True), "switch checkpointing off in the model"),
]
WAYS = {
    "pixels": lambda net, images: explain(net, images, 1, method="gradient"),
    "maps": lambda net, images: explain(net, images, 1, method="hirescam", layer="conv"),
    "units": lambda net, images: project(net, "head", images, [1], rule="gradient"),
    "ascent": lambda net, images: maximize(net, "head", [1], size=8, steps=1, precision="float32"),
    "relevance": lambda net, images: survey(
        net, [images], "conv", target=lambda output, batch: output[:, 1], progress=False
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("middle", "message"), NO_WAY_BACK)
def test_no_way_back_is_said_in_one_message(way, middle, message):
    with pytest.raises(InvalidArgumentError, match=message):
        WAYS[way](Middle(middle), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("middle", [middle for middle, _ in NO_WAY_BACK])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_methods_without_gradients_need_no_way_back(middle):
    images = torch.rand(1, 3, 8, 8)
    for method in ("ablationcam", "eigencam"):
        assert explain(Middle(middle), images, 1, method=method, layer="conv").heatmaps.shape == (1, 8, 8)


@pytest.mark.parametrize("method", ["gradient", "hirescam"])
def test_memory_that_runs_out_on_the_way_back_is_told_as_such(method):
    layer = None if method == "gradient" else "conv"
    with pytest.raises(CaptureMemoryError, match="explain fewer images at a time"):
        explain(Middle(Exhausts.apply), torch.rand(1, 3, 8, 8), 1, method=method, layer=layer)
