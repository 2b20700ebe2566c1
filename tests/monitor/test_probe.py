"""A fixed batch that leaves no trace, and where it comes from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.monitor.training import Recorder, build, statistics, train
from torchlens_viz import Monitor
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, ModelFailedError
from torchlens_viz.monitor.health import MonitorWarning
from torchlens_viz.monitor.probe import ProbeBatch


def test_a_probe_that_does_not_fit_warns_and_the_training_goes_on():
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=torch.randn(16, 4, 10, 10), every=1)
    with pytest.warns(MonitorWarning, match=r"step 0 could not be logged.*expected input"):
        train(net, 2, monitor)
    assert net.training
    assert board.steps("kernels/0") == [0, 1]


class Items(Dataset):
    """Draws random numbers for every item, as augmentation does."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((3, 10, 10), float(index)) + 0 * torch.rand(1) + 0 * np.random.rand(), 0


def test_a_loader_gives_sixteen_inputs_at_even_distances_and_no_random_number_is_lost():
    net, board = build(), Recorder()
    loader = DataLoader(Items(64), batch_size=2, shuffle=True)
    torch.manual_seed(3)
    np.random.seed(3)
    monitor = Monitor(net, board, probe=loader, strict=True)
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert (torch.rand(1), np.random.rand()) == after
    monitor.step(0)
    expected = statistics(net, torch.stack([Items(64)[index][0] for index in range(0, 64, 4)]))
    assert board.last("health/3/mean") == pytest.approx(expected["3"].pooled().mean.item())


def test_a_model_of_several_inputs_takes_them_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, image, *, gain):
            return self.conv(image * gain)

    board, image = Recorder(), torch.randn(16, 3, 5, 5)
    net = Two()
    Monitor(net, board, probe={"image": image, "gain": torch.tensor(2.0)}, strict=True).step(0)
    assert board.last("health/conv/std") == pytest.approx(net.conv(2 * image).std(correction=0).item())


def test_the_probe_is_a_copy(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=probe, every=1, strict=True)
    monitor.step(0)
    probe.fill_(100.0)
    monitor.step(1)
    first, second = (entry[2] for entry in board.entries if entry[1] == "health/0/std")
    assert first == second


def test_a_loader_without_indices_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 4, 4)

    with pytest.raises(
        InvalidTypeError, match="over a dataset with a length and indices, got one over Stream"
    ):
        Monitor(build(), Recorder(), probe=DataLoader(Stream()))


def test_everything_a_forward_pass_draws_and_writes_is_given_back(probe):
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("late", None)

        def forward(self, x):
            self.count.data += random.random() + np.random.rand()
            self.late = torch.ones(1)
            return self.conv(x)

    net = Restless()
    random.seed(0)
    np.random.seed(0)
    expected = random.Random(0).random(), np.random.RandomState(0).rand()
    Monitor(net, Recorder(), probe=probe, strict=True).step(0)
    assert net.count.item() == 0
    assert net.late is None
    assert (random.random(), np.random.rand()) == expected


def test_a_loader_that_makes_no_batches_is_refused(probe):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(probe), batch_size=None)
    with pytest.raises(InvalidArgumentError, match="`probe` must be a DataLoader that makes batches"):
        Monitor(build(), Recorder(), probe=loader)


@pytest.mark.parametrize(("key", "rule"), [("image", None), ("x", None), ("picture", "picture")])
def test_a_loader_of_rows_is_read_by_the_rule_of_a_survey(key, rule):
    rows = [{"label": index, key: torch.full((1, 8, 8), float(index))} for index in range(4)]
    batch = ProbeBatch(DataLoader(rows, batch_size=2), rule, nn.Identity())
    assert batch.picture()[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    if rule is not None:
        with pytest.raises(InvalidArgumentError, match=r"`input_of` must say.*the keys 'label', 'picture'"):
            ProbeBatch(DataLoader(rows, batch_size=2), None, nn.Identity())


def test_what_the_network_raises_is_told_of_the_probe():
    net = build()
    net[2] = nn.Linear(3, 3)
    monitor = Monitor(net, Recorder(), probe=torch.randn(2, 3, 10, 10), every=1, strict=True)
    with pytest.raises(
        ModelFailedError, match=r"`probe` must be what the model takes: Sequential fails for .*\(RuntimeError"
    ) as caught:
        monitor.step(0)
    assert isinstance(caught.value.__cause__, RuntimeError)
