"""A training with a monitor is the training without it, to the last bit."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchlens_viz import Monitor
from torchlens_viz.monitor.health import MonitorWarning

STEPS, EVERY = 6, 2


class Net(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.block = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.3)
        )
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(F.dropout(self.conv(x), 0.2, self.training).mean((2, 3)))


class Board:
    """Counts what is logged, and uses up no random numbers."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def add_image(self, tag, image, step):
        self.steps.setdefault(tag, []).append(step)

    add_scalar = add_histogram = add_image


def train(
    source, *, checkpointed=False, autocast=False, accumulate=1, compiled=False, wrap=None, writer=None
):
    """Train; return everything that the training has left: parameters, buffers, optimiser, random numbers."""
    torch.manual_seed(0)
    net = Net(checkpointed=checkpointed)
    model = net if wrap is None else wrap(net)
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    probe = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    board = Board() if writer is None else writer
    monitor = None
    if source in ("step", "inside", "watch"):
        monitor = Monitor(
            model,
            board,
            probe=None if source == "watch" else probe,
            every=EVERY,
            norms=True,
            strict=True,
            max_dead=1.0,
        )

    def one(step):
        optimiser.zero_grad()
        for _ in range(accumulate):
            images = torch.randn(8, 3, 8, 8)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if source == "inside":  # where autocast has its cache
                    monitor.step(step)
                loss = F.cross_entropy(model(images), torch.randint(3, (8,)))
            (loss / accumulate).backward()
        optimiser.step()

    for step in range(STEPS):
        is_eager = source == "eager" and step % EVERY == 0
        if source == "watch":
            with monitor.watch(step):
                one(step)
        elif is_eager:
            with torch.compiler.set_stance("force_eager"):
                one(step)
        else:
            one(step)
        if source == "step":
            monitor.step(step)
    if monitor is not None and isinstance(board, Board):
        assert board.steps["health/conv/mean"] == board.steps["maps/block.0"] == [0, 2, 4]
    state = {f"state/{name}": value.clone() for name, value in net.state_dict().items()}
    state |= {f"grad/{name}": parameter.grad.clone() for name, parameter in net.named_parameters()}
    for index, entry in optimiser.state_dict()["state"].items():
        state |= {
            f"optimiser/{index}/{name}": torch.as_tensor(value).clone() for name, value in entry.items()
        }
    state["rng"] = torch.get_rng_state()
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    return state


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


VARIANTS = {
    "plain": {},
    "autocast": {"autocast": True},
    "accumulation": {"accumulate": 3},
    "checkpointing": {"checkpointed": True},
    "all": {"autocast": True, "accumulate": 2, "checkpointed": True},
}


@pytest.mark.parametrize("source", ["step", "inside", "watch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_is_bit_identical_with_a_monitor(variant, source):
    assert_same(train(source, **VARIANTS[variant]), train(None, **VARIANTS[variant]))


def test_the_guard_on_identity_can_fail():
    def disturbed():
        torch.manual_seed(0)
        _ = torch.rand(1)
        return train(None)

    ours = disturbed()
    ours["state/block.1.running_mean"][0] += 1e-7
    with pytest.raises(AssertionError, match=r"block\.1\.running_mean"):
        assert_same(ours, train(None))


def test_a_compiled_training_is_bit_identical_with_a_probe():
    with_monitor = train("step", compiled=True)
    assert_same(with_monitor, train(None, compiled=True))


def test_a_probe_makes_nothing_compile_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(None, compiled=True)
    before = dict(torch._dynamo.utils.counters["stats"])
    torch._dynamo.utils.counters.clear()
    train("step", compiled=True)
    assert dict(torch._dynamo.utils.counters["stats"]) == before


def test_a_watched_compiled_training_is_that_with_logged_steps_run_eagerly_and_says_so_once():
    with pytest.warns(MonitorWarning, match="the model is compiled") as caught:
        with_monitor = train("watch", compiled=True)
    assert [warning.category for warning in caught].count(MonitorWarning) == 1
    assert_same(with_monitor, train("eager", compiled=True))


def _ddp(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        for source in (None, "step", "watch"):
            logs = folder / f"logs_{source}_{rank}"
            state = train(
                source, wrap=partial(nn.parallel.DistributedDataParallel), writer=str(logs), accumulate=2
            )
            torch.save(state, folder / f"{source}_{rank}.pt")
            assert logs.exists() == (rank == 0 and source is not None)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_ddp_training_is_bit_identical_and_rank_0_alone_writes(tmp_path):
    mp.spawn(_ddp, (tmp_path,), nprocs=2)
    for rank in range(2):
        without = torch.load(tmp_path / f"None_{rank}.pt")
        for source in ("step", "watch"):
            assert_same(torch.load(tmp_path / f"{source}_{rank}.pt"), without)


def test_buffers_that_learn_in_eval_mode_are_given_back():
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)
            self.register_buffer("most", torch.zeros(1))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.most.copy_(x.max())
            self.calls = self.calls + 1
            return self.conv(x)

    net, board = Observer(), Board()
    calls = net.calls
    Monitor(net, board, probe=torch.ones(16, 3, 5, 5), strict=True).step(0)
    assert board.steps["maps/conv"] == [0]
    assert net.most.item() == 0
    assert net.calls is calls


def test_a_probe_within_autocast_leaves_the_weights_their_gradients():
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    monitor = Monitor(net, Board(), probe=torch.ones(16, 3, 5, 5), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        monitor.step(0)
        loss = net(torch.ones(2, 3, 5, 5)).sum()
    loss.backward()
    assert net[0].weight.grad is not None
