"""Which steps are watched, what is seen in one, and that nothing else comes of it."""

from __future__ import annotations

from collections.abc import MutableMapping

import pytest
import torch
from torch import nn

from tests.monitor.training import Recorder, build, statistics
from tests.nets import hook_count
from torchlens_viz import Monitor, capture
from torchlens_viz.errors import CaptureError
from torchlens_viz.monitor.health import MonitorWarning


def test_the_training_batch_is_logged_as_it_passed():
    net, board = build(), Recorder()
    twin = build()
    twin.load_state_dict(net.state_dict())
    batch = torch.randn(8, 3, 10, 10)
    with Monitor(net, board, every=10, norms=True, alarm=None, strict=True) as monitor:
        with monitor.watch(0):
            net(batch[:4])
            net(batch[4:])  # accumulation: one step, two passes
            with torch.no_grad():
                net[0].weight += 1
    first, second = (statistics(twin, half, training=True) for half in (batch[:4], batch[4:]))
    for layer in "03":
        both = (first[layer].pooled().mean + second[layer].pooled().mean) / 2
        assert board.last(f"health/{layer}/mean") == pytest.approx(both.item())
    assert board.last("health/0/update_norm") == pytest.approx(net[0].weight.numel() ** 0.5)
    assert not [entry for entry in board.entries if entry[1] == "probe/inputs"]
    assert hook_count(net) == 0


def test_steps_are_logged_that_every_divides_and_the_next_one_where_it_was_skipped(probe):
    board = Recorder()
    monitor = Monitor(build(), board, probe=probe, every=5, strict=True)
    for step in (3, 4, 5, 5, 6, 11, 12, 15, 21, 20):
        monitor.step(step)
    assert board.steps("kernels/0") == [5, 11, 15, 21, 20]


def test_no_hook_is_there_between_logged_steps(probe):
    net = build()
    counts = {}
    net[0].weight.register_hook(lambda grad: counts.update({step: hook_count(net)}))
    monitor = Monitor(net, Recorder(), every=3, alarm=None, strict=True)
    for step in range(5):
        with monitor.watch(step):
            net(probe).sum().backward()
        assert hook_count(net) == 0
    assert counts == {0: 2, 1: 0, 2: 0, 3: 2, 4: 0}


def test_an_error_in_a_watched_step_is_the_callers_and_leaves_no_hook(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, strict=True)
    net[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"), monitor.watch(0):
        net(probe)
    net[3]._forward_hooks.clear()
    assert hook_count(net) == 0
    assert not board.entries


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.used(x)


def train_nothing(monitor, steps):
    for step in range(steps):
        monitor.step(step)


def test_a_layer_that_does_not_run_is_named_once():
    batch = torch.randn(16, 3, 5, 5)
    net, board = HalfUsed(), Recorder()
    monitor = Monitor(net, board, probe=batch, every=1)
    with pytest.warns(MonitorWarning, match="step 0: `unused` did not run") as caught:
        train_nothing(monitor, 2)
    assert len(caught) == 1
    assert "watch" not in str(caught[0].message)
    assert board.steps("maps/used") == [0, 1]
    assert board.steps("maps/unused") == []


def test_a_watched_step_without_a_forward_pass_is_said(probe):
    monitor = Monitor(build(), Recorder())
    with pytest.warns(MonitorWarning, match=r"did not run.*within `watch`"), monitor.watch(0):
        pass


def test_a_layer_whose_output_has_no_statistics_does_not_stop_the_network():
    class Complex(nn.Module):
        def forward(self, x):
            return x.to(torch.complex64)

    net = nn.Sequential(nn.Conv2d(3, 2, 3), Complex())
    batch = torch.randn(2, 3, 5, 5)
    monitor = Monitor(net, Recorder(), layers=["0", "1"])
    with pytest.warns(MonitorWarning, match="real numbers"), monitor.watch(0):
        out = net(batch)
    assert torch.equal(out, net(batch))


def test_a_transform_within_a_watched_step_does_not_stop_it():
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    batch = torch.randn(2, 3, 5, 5)
    with pytest.warns(MonitorWarning, match=r"inside torch\.vmap"), Monitor(net, Recorder()).watch(0):
        out = torch.vmap(net)(batch)
    assert torch.allclose(out, net(batch), atol=1e-6)


def test_a_model_that_cannot_be_hooked_does_not_stop_the_training():
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    board = Recorder()
    monitor = Monitor(net, board)
    net[0].__class__ = type("FSDPModule", (nn.Conv2d,), {})
    with pytest.warns(MonitorWarning, match="fully sharded"), monitor.watch(0):
        net(torch.randn(2, 3, 5, 5))
    monitor.step(100)
    assert not board.entries  # to read a weight would wait for the other processes
    with pytest.raises(CaptureError, match="fully sharded"):
        Monitor(net, board)


def test_one_relu_for_layers_of_several_widths_is_counted_in_full(probe):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU()
            self.two.bias.data.fill_(-1e3)

        def forward(self, x):
            return self.relu(self.two(self.relu(self.one(x))))

    net, board = Shared(), Recorder()
    Monitor(net, board, layers=nn.ReLU, probe=probe, alarm=None).step(0)
    with capture(net, "relu") as acts:
        net(probe)
    dead = sum(int((call.amax((0, 2, 3)) <= 0).sum()) for call in acts.calls("relu"))
    assert board.last("health/relu/dead") == dead >= 6
    assert board.last("health/relu/dead_fraction") == pytest.approx(dead / 10)
    values = torch.cat([call.flatten() for call in acts.calls("relu")]).double()
    assert board.last("health/relu/mean") == pytest.approx(values.mean().item())
    assert board.last("health/relu/std") == pytest.approx(values.std(unbiased=False).item())


def test_tokens_have_their_channels_in_the_last_dimension():
    net, board = nn.Sequential(nn.Linear(5, 6), nn.ReLU()), Recorder()
    net[0].bias.data = torch.tensor([-1e3, -1e3, -1e3, 1e3, 1e3, 1e3])
    tokens = torch.randn(2, 4, 5)
    Monitor(net, board, layers="*", probe=tokens, channel_dim=-1, alarm=None).step(0)
    assert board.last("health/0/dead") == board.last("health/1/dead") == 3


@pytest.mark.parametrize("source", ["step", "watch"])
@pytest.mark.parametrize(("every", "stride"), [(1, 1), (4, 1), (10, 2)])
def test_updates_are_measured_whatever_the_steps_are_called(probe, source, every, stride):
    net, board = nn.Sequential(nn.Conv2d(3, 4, 3)), Recorder()
    monitor = Monitor(net, board, probe=None, every=every, norms=True, alarm=None)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    expected = {}
    for step in range(0, 8 * stride, stride):
        before = torch.cat([p.detach().flatten() for p in net.parameters()])

        def one():
            optimiser.zero_grad()
            net(probe).square().mean().backward()
            optimiser.step()

        if source == "watch":
            with monitor.watch(step):
                one()
        else:
            one()
            monitor.step(step)
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        expected[step] = (after - before).double().norm().item()
    found = {step: value for _, tag, value, step in board.entries if tag == "health/0/update_norm"}
    due = [step for step in expected if step % every == 0 and (source == "watch" or step > 0)]
    assert list(found) == due
    assert found == pytest.approx({step: expected[step] for step in due}, rel=1e-4)


def test_updates_are_those_of_the_optimiser_while_gradients_accumulate(probe):
    net, board = nn.Sequential(nn.Conv2d(3, 4, 3)), Recorder()
    monitor = Monitor(net, board, every=1, norms=True, alarm=None)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        for part in range(2):
            with monitor.watch(step):
                net(probe).square().mean().backward()
                if part == 1:
                    optimiser.step()
    found = [value for _, tag, value, _ in board.entries if tag == "health/0/update_norm"]
    assert board.steps("health/0/update_norm") == [0, 1, 2]
    assert min(found) > 0


def test_lazy_layers_are_left_to_the_training(probe):
    net = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.warns(MonitorWarning, match="lazy parameters"):
        Monitor(net, Recorder(), layers="0", probe=probe).step(0)
    assert isinstance(net[0], nn.LazyConv2d)


def test_outputs_of_every_kind_reach_the_network_as_they_are(probe):
    class Pair(tuple):
        def __new__(cls, one, two):
            return super().__new__(cls, (one, two))

    class Store(MutableMapping):
        def __init__(self, held):
            self.held = held

        def __getitem__(self, key):
            return self.held[key]

        def __setitem__(self, key, value):
            self.held[key] = value

        def __delitem__(self, key):
            del self.held[key]

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    class Back(nn.Module):
        def forward(self, x):
            return Store({"x": x, "pair": Pair(x, x + 1)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.back = Back()

        def forward(self, x):
            out = self.back(x)
            return out["x"] + out["pair"][1]

    net = Net()
    with Monitor(net, Recorder(), layers="back", strict=True).watch(0):
        assert torch.equal(net(probe), probe + (probe + 1))


def test_a_step_that_was_broken_off_is_logged_when_it_is_tried_again(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, every=10)
    with pytest.raises(MemoryError), monitor.watch(10):
        raise MemoryError
    with monitor.watch(10):
        net(probe)
    assert board.steps("maps/0") == [10]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_is_watched_from_the_step_that_makes_it():
    net, board = nn.Sequential(nn.LazyConv2d(4, 3)), Recorder()
    monitor = Monitor(net, board, layers="0", every=1, norms=True, strict=True, alarm=None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        with monitor.watch(step):
            loss = net(torch.rand(2, 3, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
    assert board.steps("health/0/update_norm") == [1, 2]
