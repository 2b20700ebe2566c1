"""What a monitor writes, read back with TensorBoard's own reader, and what it refuses."""

from __future__ import annotations

import doctest
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torchlens_viz.monitor.monitor
from tests.monitor.training import Recorder, build, decoded, events, train
from tests.nets import hook_count
from tests.pixels import colours
from torchlens_viz import LayerNotFoundError, Monitor, TorchlensVizError, capture, feature_grid, kernel_grid
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.monitor.health import MonitorWarning

WHAT = ("mean", "std", "zero_fraction", "dead", "dead_fraction", "nonfinite")


def test_every_picture_and_number_is_read_back_at_its_step(tmp_path, probe):
    net, expected = build(), {}
    with Monitor(net, tmp_path, probe=probe, every=2, norms=True, strict=True) as monitor:
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(5):
            before = net[0].weight.detach().clone(), net[0].bias.detach().clone()
            net.train()
            net(probe).square().mean().backward()
            optimiser.step()
            monitor.step(step)
            if step % 2 == 0:
                update = [(net[0].weight - before[0]).flatten(), net[0].bias - before[1]]
                with torch.no_grad(), capture(net.eval(), nn.Conv2d) as acts:
                    net(probe)
                expected[step] = {
                    "acts": acts,
                    "kernels": net[0].weight.detach().clone(),
                    "deep": net[3].weight.detach().clone(),
                    "update": torch.cat(update).detach().norm().item(),
                }
        scales = monitor.scales
    read = events(tmp_path)
    assert set(read.Tags()["images"]) == {
        "probe/inputs",
        *(f"{kind}/{layer}" for kind in ("kernels", "maps") for layer in "03"),
    }
    names = (*WHAT, "weight_norm", "update_norm", "update_ratio")
    assert set(read.Tags()["scalars"]) == {f"health/{layer}/{what}" for layer in "03" for what in names}
    assert set(read.Tags()["histograms"]) == {f"health/{layer}/values" for layer in "03"}
    for tag in read.Tags()["images"]:
        assert [event.step for event in read.Images(tag)] == ([0] if tag == "probe/inputs" else [0, 2, 4])
    assert [event.step for event in read.Scalars("health/0/mean")] == [0, 2, 4]
    for place, (step, at) in enumerate(expected.items()):
        for layer in "03":
            values = at["acts"][layer].double()
            dead = int((values.amax((0, 2, 3)) <= 0).sum())
            figures = {
                "mean": values.mean().item(),
                "std": values.std(correction=0).item(),
                "zero_fraction": (values == 0).double().mean().item(),
                "dead": dead,
                "dead_fraction": dead / values.shape[1],
                "nonfinite": 0,
            }
            for what, figure in figures.items():
                event = read.Scalars(f"health/{layer}/{what}")[place]
                assert (event.step, event.value) == (step, pytest.approx(figure, rel=1e-5, abs=1e-6)), what
            shown = values.float()[:4, :16]
            image = decoded(read.Images(f"maps/{layer}")[place])
            title = f"maps/{layer}: scale of step 0; a row per input"
            options = {"upscale": 3, "value_range": scales[f"maps/{layer}"], "legend": True, "title": title}
            ours = feature_grid(shown.flatten(0, 1), nrow=shown.shape[1], **options)
            assert np.array_equal(image, colours(ours))
            histogram = read.Histograms(f"health/{layer}/values")[place].histogram_value
            places = torch.arange(8009) * values.numel() // 8009
            sample = values.flatten()[places]
            assert len(histogram.bucket) <= 62
            assert sum(histogram.bucket) == histogram.num
            assert (histogram.num, histogram.sum) == (8009, pytest.approx(sample.sum().item(), rel=1e-5))
        for layer, weight in (("0", at["kernels"]), ("3", at["deep"])):
            image = decoded(read.Images(f"kernels/{layer}")[place])
            title = f"kernels/{layer}: scale of step 0" + (", 0.0% beyond" if layer == "0" else "")
            limits = scales[f"kernels/{layer}"]
            ours = kernel_grid(weight, value_range=limits, max_tiles=64, legend=True, title=title)
            assert np.array_equal(image, colours(ours))
    updates = read.Scalars("health/0/update_norm")
    assert [event.step for event in updates] == [2, 4]  # nobody saw the weights before step 0
    assert [event.value for event in updates] == pytest.approx([expected[2]["update"], expected[4]["update"]])
    norm = torch.cat([parameter.detach().flatten() for parameter in net[0].parameters()]).norm().item()
    assert read.Scalars("health/0/weight_norm")[-1].value == pytest.approx(norm)


def test_the_histogram_is_of_values_from_everywhere():
    net, board = nn.Sequential(nn.Identity()), Recorder()
    batch = torch.arange(64 * 64 * 64).float().view(4, 16, 64, 64)
    with Monitor(net, board, layers="0", alarm=None, strict=True).watch(0):
        net(batch)
    sample = board.last("health/0/values")
    assert len(sample) == 8009
    assert len(np.unique(sample % 64)) == 64  # every column is in it
    assert sample.mean() == pytest.approx(batch.double().mean().item(), rel=1e-3)


class Broken(Recorder):
    def add_image(self, tag, image, step):
        raise OSError("disk full")


def test_a_failure_to_log_warns_once_and_the_training_goes_on(probe):
    net, board = build(), Broken()
    monitor = Monitor(net, board, probe=probe, every=1)
    with pytest.warns(MonitorWarning, match=r"step 0 could not be logged.*OSError: disk full") as caught:
        train(net, 3, monitor)
    assert len(caught) == 1
    assert board.steps("health/0/mean") == [0, 1, 2]  # what can be logged is


@pytest.mark.parametrize("source", ["step", "watch"])
def test_strict_raises_what_went_wrong(probe, source):
    net = build()
    if source == "step":
        monitor = Monitor(net, Broken(), probe=probe, strict=True)
        with pytest.raises(OSError, match="disk full"):
            monitor.step(0)
    else:
        monitor = Monitor(net, Recorder(), layers=lambda name, module: name == "7", strict=True)
        with pytest.raises(TorchlensVizError, match=r"inside torch\.vmap"), monitor.watch(0):
            torch.vmap(net[7])(torch.randn(2, 20))
    assert hook_count(net) == 0


# The examples.


@pytest.mark.slow
def test_the_example_is_stopped_by_its_alarm(tmp_path):
    pytest.importorskip("skimage")
    script = Path(__file__).parents[2] / "examples" / "train_with_monitor.py"
    options = ["--lr", "4", "--steps", "60", "--every", "5", "--out", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    stopped = [line for line in done.stdout.splitlines() if line.startswith("stopped: step ")]
    assert len(stopped) == 1
    step = int(stopped[0].split()[2].rstrip(":"))
    assert step % 5 == 0
    assert [event.step for event in events(tmp_path / "runs").Images("kernels/features.0")][-1] == step


def test_the_example_of_the_docstring_runs():
    result = doctest.testmod(torchlens_viz.monitor.monitor)
    assert (result.failed, result.attempted > 0) == (0, True)


# Arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, InvalidArgumentError, "`every` must be at least 1, got 0"),
        ({"every": 2.5}, InvalidTypeError, "`every` must be an int, got 2.5"),
        ({"max_tiles": 0}, InvalidArgumentError, "`max_tiles` must be at least 1"),
        ({"map_images": True}, InvalidTypeError, "`map_images` must be an int"),
        ({"map_channels": 0}, InvalidArgumentError, "`map_channels` must be at least 1"),
        ({"alarm": "warn"}, InvalidTypeError, "`alarm` must be a function"),
        ({"max_dead": 2}, InvalidArgumentError, "`max_dead` must be at most 1, got 2"),
        ({"max_dead": "all"}, InvalidTypeError, "`max_dead` must be a number, got 'all'"),
        ({"std_range": (2, 1)}, InvalidArgumentError, r"`std_range` must be \(low, high\) with low <= high"),
        ({"std_range": (float("nan"), 1)}, InvalidArgumentError, "`std_range` must be"),
        ({"std_range": 3}, InvalidTypeError, r"`std_range` must be \(low, high\), got 3"),
        ({"std_range": (0, torch.ones(2))}, InvalidTypeError, "`std_range` must be a number, got a tensor"),
        ({"headroom": 0.5}, InvalidArgumentError, "`headroom` must be at least 1"),
        ({"headroom": torch.ones(2)}, InvalidTypeError, "`headroom` must be a number, got a tensor"),
        ({"norms": 1}, InvalidTypeError, "`norms` must be True or False, got 1"),
        ({"histograms": "no"}, InvalidTypeError, "`histograms` must be True or False"),
        ({"strict": None}, InvalidTypeError, "`strict` must be True or False"),
        ({"scales": [(0, 1)]}, InvalidTypeError, r"`scales` must be a mapping of tags to \(low, high\)"),
        ({"scales": {3: (0, 1)}}, InvalidTypeError, "`scales` must be a string, got 3"),
        ({"scales": {"maps/*": 3}}, InvalidTypeError, r"`scales` must be \(low, high\), got 3"),
        (
            {"probe": torch.ones(1, 3, 9, 1).expand(1, 3, 9, 2**44)},
            InvalidArgumentError,
            "`probe` must be a batch that can be copied, got a tensor of shape",
        ),
        ({"scales": {"map/0": (0, 1)}}, InvalidArgumentError, "got `map/0`; did you mean `maps/0`"),
        ({"scales": {"maps/*": (1, 1)}}, InvalidArgumentError, "low < high"),
        ({"probe": [torch.zeros(1)]}, InvalidTypeError, "`probe` must be a batch"),
        ({"probe": torch.zeros(0, 3, 4, 4)}, InvalidArgumentError, "at least one input"),
        ({"layers": "features"}, LayerNotFoundError, "no layer is named `features`"),
        ({"probe": DataLoader(TensorDataset(torch.zeros(0, 3)))}, InvalidArgumentError, "DataLoader without"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Monitor(build(), Recorder(), **options)


def test_a_writer_without_the_methods_is_refused():
    with pytest.raises(InvalidTypeError, match=r"`writer` must be a folder, a run of .* without add_image"):
        Monitor(build(), object())


def test_two_sources_at_once_are_refused(probe):
    with pytest.raises(InvalidArgumentError, match="`watch` shows the training batch under the tags"):
        Monitor(build(), Recorder(), probe=probe).watch(0)


def test_a_step_that_is_no_number_is_refused():
    with pytest.raises(InvalidTypeError, match=r"`global_step` must be an int, got 1\.5"):
        Monitor(build(), Recorder()).step(1.5)


class Merging(nn.Conv2d):
    """Adds its adapter to its weight when it is put into eval mode, and takes it off again for training."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.adapter = nn.Parameter(torch.ones_like(self.weight))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.adapter.data if mode else self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x):
        return F.conv2d(x, self.weight if self.merged else self.weight + self.adapter, self.bias)


@pytest.mark.parametrize("source", ["step", "watch"])
def test_modules_with_a_mode_of_their_own_are_left_in_it(probe, source):
    net = nn.Sequential(Merging(), nn.ReLU())
    weight = net[0].weight.clone()
    monitor = Monitor(net, Recorder(), probe=probe if source == "step" else None)
    if source == "step":
        monitor.step(0)
    else:
        with monitor.watch(0):
            net(probe)
    assert not net[0].merged
    assert torch.equal(net[0].weight, weight)


def test_leaving_after_ctrl_c_does_not_wait_for_the_disk(monkeypatch):
    may_end = threading.Event()

    class Slow(Recorder):
        def flush(self):
            may_end.wait(60)

    monkeypatch.setattr("torchlens_viz.monitor.monitor._PATIENCE", 0.1)
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    monitor = Monitor(model, Slow(), probe=torch.rand(1, 3, 8, 8))
    monitor.step(0)
    monitor.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not may_end.is_set()  # and yet it came out
    may_end.set()
