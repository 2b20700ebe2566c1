"""Moving tensors to the host: bounded, in order, and never handed out before they are complete."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlens_viz import capture
from torchlens_viz.hooks.retention import Transfers


class SlowLane:
    """A lane on which a copy happens no earlier than somebody waits for it, as on a busy device."""

    def __init__(self):
        self.waited_for = []

    def stage(self, like):
        return torch.full_like(like, -1)

    def copy(self, source, staging):
        lane, number = self, float(source.flatten()[0])

        class Event:
            def synchronize(self):
                lane.waited_for.append(number)
                staging.copy_(source)

        return Event()


def test_values_are_there_after_finish_and_in_the_order_sent():
    lane = SlowLane()
    transfers = Transfers(lane, limit=10**6)
    sent = [torch.full((2, 3), float(number)) for number in range(4)]
    arrived = [transfers.send(tensor) for tensor in sent]
    assert lane.waited_for == []
    transfers.finish()
    assert lane.waited_for == [0, 1, 2, 3]
    for actual, expected in zip(arrived, sent, strict=True):
        assert torch.equal(actual, expected)


def test_pinned_memory_is_bounded():
    lane = SlowLane()
    transfers = Transfers(lane, limit=3 * 4)  # three float32 numbers
    arrived = [transfers.send(torch.tensor([float(number)])) for number in range(5)]
    assert lane.waited_for == [0, 1]
    large = transfers.send(torch.full((100,), 7.0))
    assert lane.waited_for == [0, 1, 2, 3, 4]
    transfers.finish()
    assert torch.equal(torch.cat(arrived), torch.arange(5.0))
    assert (large == 7).all()


@pytest.mark.parametrize("read", ["inside", "after", "repr"])
def test_activations_are_never_read_before_they_are_complete(monkeypatch, read):
    from torchlens_viz.hooks import activations

    lane = SlowLane()
    monkeypatch.setattr(activations, "Transfers", lambda: Transfers(lane))
    monkeypatch.setattr("torchlens_viz.hooks.retention.travels", lambda tensor, device: device is not None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), capture(model, "*", device="cpu") as acts:
        model(image)
        assert lane.waited_for == []  # the forward pass waited for nothing
        if read == "inside":
            assert torch.equal(acts["0"], model[0](image))
        elif read == "repr":
            assert f"{model[0](image).min():.4g}" in repr(acts)
    assert torch.equal(acts.calls("0")[0], model[0](image).detach())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_cuda_activations_arrive_complete(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(True)) for _ in range(12)))
    model = model.cuda().eval()
    image = torch.randn(8, 64, 128, 128, device="cuda")
    with torch.no_grad(), capture(model, nn.Conv2d) as expected:
        model(image)
    for _ in range(5):
        with torch.no_grad(), capture(model, nn.Conv2d, device="cpu", dtype=dtype) as acts:
            model(image)
            model(image * 0)  # goes on computing while the first pass is under way
        for name in acts:
            value = expected[name] if dtype is None else expected[name].to(dtype)
            assert acts.calls(name)[0].device.type == "cpu"
            assert torch.equal(acts.calls(name)[0], value.cpu())


@pytest.mark.cuda
def test_offloading_does_not_wait_for_the_device_during_the_forward_pass():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True)).cuda()
    image = torch.randn(1, 3, 8, 8, device="cuda")
    model(image)
    with torch.no_grad(), capture(model, "*", device="cpu") as acts:
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(image)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(acts["1"], acts["0"].relu())
