"""What becomes of a recorded tensor: its channels, type and device, a statistic of it, a limit on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.nets import Catches, Gives, assert_statistics_right, hook_count, seeded
from torchlens_viz import RunningStats, capture
from torchlens_viz.errors import CaptureError, CaptureMemoryError
from torchlens_viz.hooks.retention import Transfers

# Options.


def test_dtype_device_channels_and_reduce(net, x):
    with torch.no_grad():
        expected = net.conv1(x)
    with torch.no_grad(), capture(net, "conv1", dtype=torch.float16) as acts:
        net(x)
    assert torch.equal(acts["conv1"], expected.half())
    with torch.no_grad(), capture(net, "conv1", channels=[2, 0]) as acts:
        net(x)
    assert torch.equal(acts["conv1"], expected[:, [2, 0]])
    with torch.no_grad(), capture(net, "conv1", reduce=lambda t: t[:, 0]) as acts:
        net(x)
    assert torch.equal(acts["conv1"], expected[:, 0])
    with torch.no_grad(), capture(net, "conv1", device="meta") as acts:
        net(x)
    assert acts["conv1"].is_meta
    assert acts["conv1"].shape == expected.shape


def test_integers_keep_their_dtype():
    model = nn.Sequential(Gives(lambda t: t.long()))
    with capture(model, "0", dtype=torch.float16) as acts:
        model(torch.ones(2))
    assert acts["0"].dtype == torch.int64


def test_memory_limit_stops_before_the_copy_that_would_pass_it(net, x):
    fits = 2 * 4 * 6 * 6 * 4
    with pytest.raises(CaptureMemoryError, match=r"`conv2` needs 640 bytes, 1,152 are held .* is 1,791"):
        with capture(net, nn.Conv2d, max_bytes=fits + 639) as acts:
            net(x)
    assert list(acts) == ["conv1"]
    assert hook_count(net) == 0
    with capture(net, nn.Conv2d, max_bytes=fits + 640) as acts:
        net(x)
        acts.clear()
        net(x)
    assert len(acts) == 2


def test_an_error_that_the_model_catches_is_raised_at_the_end_of_the_block():
    model = Catches()
    with pytest.raises(CaptureMemoryError, match=r"`second` needs 4 bytes, 4 are held"):
        with torch.no_grad(), capture(model, nn.Conv2d, max_bytes=7):
            model(torch.ones(1, 1, 1, 1))
    assert hook_count(model) == 0


def test_channels_out_of_range_name_the_layer(net, x):
    with pytest.raises(
        ValueError, match=r"`channels` must be below 4 for `conv1`, got 4 \(shape \(2, 4, 6, 6\)"
    ):
        with capture(net, "conv1", channels=4):
            net(x)
    assert hook_count(net) == 0


# On a device.


@pytest.mark.cuda
def test_cuda_capture_is_exact_and_offloads_complete_tensors(net, x):
    net, x = net.cuda(), x.cuda()
    with torch.no_grad(), capture(net, nn.Conv2d) as acts:
        net(x)
    assert acts["conv1"].is_cuda
    with torch.no_grad():
        torch.testing.assert_close(acts["conv1"], net.conv1(x), rtol=0, atol=0)
    with torch.no_grad(), capture(net, nn.Conv2d, device="cpu", channels=[1]) as moved:
        net(x)
    assert torch.equal(moved["conv1"], acts["conv1"][:, [1]].cpu())


@pytest.mark.cuda
def test_cuda_capture_does_not_wait_for_the_device(net, x):
    net, x = net.cuda(), x.cuda()
    net(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad(), capture(net, "*", io="both"):
            net(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


# In a capture.


@pytest.fixture
def narrow_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).eval()


def test_capture_gathers_over_all_calls_and_keeps_no_activation(narrow_net):
    batches = [seeded(2, 3, 8, 8).float(), seeded(3, 3, 9, 7).float() + 1]
    with torch.no_grad(), capture(narrow_net, ["0", "1"], reduce=RunningStats) as acts:
        narrow_net(batches[0])
        held = acts._held_bytes
        assert_statistics_right(
            acts["0"], narrow_net[0](batches[0]).transpose(0, 1).flatten(1).T
        )  # a call of its own
        for batch in batches[1:] * 5:
            narrow_net(batch)
    seen = [narrow_net[0](batch).detach() for batch in [batches[0], batches[0], *batches[1:] * 5]]
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in seen], 1).T
    # The call after the first one was caught by the hook too, so that it is in the later reading alone.
    assert_statistics_right(acts["0"], flat)
    assert len(acts.calls("0")) == 1
    assert acts._held_bytes == held < 1000
    assert acts["1"].zero_fraction.min() > 0
    assert acts["0"].zero_fraction.max() == 0


def test_capture_takes_the_options_of_an_example(narrow_net):
    example = RunningStats(channel_dim=-1, bins=[0])
    with torch.no_grad(), capture(narrow_net, "0", reduce=example) as acts:
        narrow_net(torch.zeros(1, 3, 8, 9))
    assert acts["0"].channels == 7
    assert acts["0"].histogram.shape == (7, 2)
    assert repr(example) == "RunningStats(nothing yet)"
    with torch.no_grad(), capture(narrow_net, "0", reduce=RunningStats, channels=[3, 1]) as acts:
        narrow_net(seeded(1, 3, 8, 9).float())
    assert_statistics_right(acts["0"], narrow_net[0](seeded(1, 3, 8, 9).float())[:, [3, 1]].detach())
    with torch.no_grad(), capture(narrow_net, "0", reduce=RunningStats, channel_dim=2) as acts:
        narrow_net(torch.zeros(1, 3, 8, 9))
    assert acts["0"].channels == 6


def test_capture_gathers_for_both_names_of_a_shared_module():
    relu = nn.ReLU()
    net = nn.Sequential(relu, nn.Conv2d(3, 3, 1), relu).eval()
    x = seeded(2, 3, 4, 4).float()
    with torch.no_grad(), capture(net, ["0", "2"], reduce=RunningStats) as acts:
        y = net(x)
    for name in ("0", "2"):
        assert_statistics_right(acts[name], torch.cat([x.relu(), y]))


def test_capture_gathers_what_is_in_tuples_and_inputs(narrow_net):
    lstm = nn.LSTM(3, 5, batch_first=True)
    with torch.no_grad(), capture(lstm, "", reduce=RunningStats(channel_dim=-1)) as acts:
        output, (hidden, _) = lstm(seeded(2, 7, 3).float())
    assert_statistics_right(acts[""][0], output, -1)
    assert_statistics_right(acts[""][1][0], hidden, -1)
    x = seeded(2, 3, 8, 8).float()
    with torch.no_grad(), capture(narrow_net, "1", io="both", reduce=RunningStats) as acts:
        narrow_net(x)
        narrow_net(x)
    assert_statistics_right(acts["1"].input, torch.cat([narrow_net[0](x).detach()] * 2))
    assert_statistics_right(acts["1"].output, torch.cat([narrow_net[0](x).detach().relu()] * 2))


def test_capture_of_statistics_knows_what_did_not_run_forgets_and_shows_itself(narrow_net):
    narrow_net.spare = nn.Identity()
    narrow_net.forward = lambda x: narrow_net[2](narrow_net[1](narrow_net[0](x)))
    with torch.no_grad(), capture(narrow_net, ["0", "spare"], reduce=RunningStats) as acts:
        narrow_net(torch.zeros(1, 3, 8, 8))
        acts.clear()
        assert acts.not_called == ("0", "spare")
        narrow_net(torch.zeros(1, 3, 8, 8))
    assert acts.not_called == ("spare",)
    assert acts["0"].count.tolist() == [36] * 4
    assert "statistics (4,)  float64  cpu" in repr(acts)


def test_statistics_are_not_saved_as_activations(narrow_net, tmp_path):
    with torch.no_grad(), capture(narrow_net, "0", reduce=RunningStats) as acts:
        narrow_net(torch.zeros(1, 3, 8, 8))
    message = (
        r"`0#0` is statistics \(`reduce=RunningStats`\), which a file of activations does not hold; save"
    )
    with pytest.raises(OSError, match=message):
        acts.save(tmp_path / "acts.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [{"copy": "lazy"}, {"grad": True}, {"dtype": torch.half}, {"device": "cpu"}], ids=str
)
def test_options_without_effect_on_statistics_are_refused(narrow_net, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` has no effect with `reduce=RunningStats`"):
        capture(narrow_net, "0", reduce=RunningStats, **option)


@pytest.mark.parametrize("swallows", [False, True])
def test_calls_that_have_nothing_in_common_are_refused(swallows):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, *values):
            for value in values:
                try:
                    self.inner(value)
                except CaptureError:
                    if not swallows:
                        raise

    net = Caller()
    first = torch.zeros(1, 3)
    message = "the calls of `inner` have no statistics in common: `other` must have 3 channels, got 4"
    with pytest.raises(CaptureError, match=message), capture(net, "inner", reduce=RunningStats):
        net(first, torch.zeros(1, 4))
    message = "`inner` had 1 tensors in its first call and 2 in a later one, which have no statistics"
    with pytest.raises(CaptureError, match=message), capture(net, "inner", reduce=RunningStats):
        net(first, (first, first.clone()))
    message = r"there are no statistics of `inner`: `channel_dim` must be a dimension of the values, got 1"
    if not swallows:
        with pytest.raises(ValueError, match=message), capture(net, "inner", reduce=RunningStats):
            net(torch.zeros(3))


def test_the_limit_on_memory_counts_statistics(narrow_net):
    from torchlens_viz.errors import CaptureMemoryError

    with torch.no_grad(), capture(narrow_net, "0", reduce=RunningStats, max_bytes=250) as acts:
        for _ in range(5):
            acts.clear()
            narrow_net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(CaptureMemoryError, match="`0` needs 224 bytes, 0 are held and `max_bytes` is 100"):
        with torch.no_grad(), capture(narrow_net, "0", reduce=RunningStats, max_bytes=100):
            narrow_net(torch.zeros(1, 3, 8, 8))
