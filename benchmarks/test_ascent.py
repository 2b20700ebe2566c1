"""The network's share of a step of `maximize`, as it is and through `torch.compile`.

`python -m benchmarks --only maximize` has whole calls against plain loops and peers.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.models import get_model

from torchlens_viz.backprop.device import autocasting, isolated, resolve_precision
from torchlens_viz.backprop.network import Cut, shadow_of

IMAGES, SIZE = 8, 224


@pytest.mark.parametrize(
    ("name", "layer"),
    [("vgg16", "features.14"), ("resnet18", "layer3.0.conv1"), ("mobilenet_v2", "features.10.conv.0.0")],
)
def test_maximize_compiled(versus, name, layer):
    """Ours is the network's share of a step as it is, theirs the same through `torch.compile`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_precision("auto", device)
    with isolated(device):
        torch.manual_seed(0)
        model = get_model(name, weights=None).eval().to(device)
        images = torch.rand(IMAGES, 3, SIZE, SIZE, device=device, requires_grad=True)
        given = images.clone(memory_format=torch.channels_last)

        def stepping(is_compiled):
            cut = Cut(shadow_of(model, dtype=dtype), [layer], io="input", is_compiled=is_compiled)

            def step():
                with autocasting(device, dtype):
                    taken = cut(given)[layer]
                return torch.autograd.grad(taken.float().sum(), images, retain_graph=True)

            return step

        versus(stepping(False), stepping(True), target="-", note="theirs is ours, compiled")
