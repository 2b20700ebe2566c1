"""What a monitor writes, read back with TensorBoard's own reader and server, and when its alarm goes off."""

from __future__ import annotations

import doctest
import io
import json
import random
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import MutableMapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import torchlens_viz.monitor.monitor
from torchlens_viz import (
    LayerNotFoundError,
    Monitor,
    RunningStats,
    TorchlensVizError,
    capture,
    feature_grid,
    kernel_grid,
)
from torchlens_viz.errors import CaptureError, InvalidArgumentError, InvalidTypeError, MissingDependencyError
from torchlens_viz.monitor.health import Figures, MonitorWarning, Trouble
from torchlens_viz.monitor.writer import Board

WHAT = ("mean", "std", "zero_fraction", "dead", "dead_fraction", "nonfinite")


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 20, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 2),
    )


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, object, int]] = []

    def add_image(self, tag, image, step):
        self.entries.append(("image", tag, image, step))

    def add_scalar(self, tag, value, step):
        self.entries.append(("scalar", tag, value, step))

    def add_histogram(self, tag, values, step):
        self.entries.append(("histogram", tag, values, step))

    def steps(self, tag):
        return [entry[3] for entry in self.entries if entry[1] == tag]

    def last(self, tag):
        return next(entry[2] for entry in reversed(self.entries) if entry[1] == tag)


def events(folder) -> EventAccumulator:
    read = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    return read.Reload()


def decoded(event) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def train(net, steps, monitor, *, spoil=None, lr=0.05, watch=False):
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(steps):
        images = torch.randn(8, 3, 10, 10, generator=generator)
        labels = (images[:, 0].mean((1, 2)) > 0).long()
        if spoil is not None:
            spoil(step, net, images)

        def one(images=images, labels=labels):
            optimiser.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimiser.step()

        if watch:
            with monitor.watch(step):
                one()
        else:
            one()
            monitor.step(step)


@pytest.fixture
def probe():
    return torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def statistics(net, batch, *, training=False):
    net.train(training)
    with torch.no_grad(), capture(net, nn.Conv2d, reduce=RunningStats) as seen:
        net(batch)
    return dict(seen)


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
            share = (shown.abs() > scales[f"maps/{layer}"][1]).double().mean().item()
            title = f"maps/{layer}: scale of step 0, {share:.1%} beyond; a row per input"
            options = {"upscale": 3, "value_range": scales[f"maps/{layer}"], "legend": True, "title": title}
            ours = feature_grid(shown.flatten(0, 1), nrow=shown.shape[1], **options)
            assert np.array_equal(image, pixels(ours))
            histogram = read.Histograms(f"health/{layer}/values")[place].histogram_value
            places = torch.arange(8009) * values.numel() // 8009
            sample = values.flatten()[places]
            assert len(histogram.bucket) <= 62
            assert sum(histogram.bucket) == histogram.num
            assert (histogram.num, histogram.sum) == (8009, pytest.approx(sample.sum().item(), rel=1e-5))
        for layer, weight in (("0", at["kernels"]), ("3", at["deep"])):
            image = decoded(read.Images(f"kernels/{layer}")[place])
            title = f"kernels/{layer}: scale of step 0, 0.0% beyond"
            limits = scales[f"kernels/{layer}"]
            ours = kernel_grid(weight, value_range=limits, max_tiles=64, legend=True, title=title)
            assert np.array_equal(image, pixels(ours))
    updates = read.Scalars("health/0/update_norm")
    assert [event.step for event in updates] == [2, 4]  # nobody saw the weights before step 0
    assert [event.value for event in updates] == pytest.approx([expected[2]["update"], expected[4]["update"]])
    norm = torch.cat([parameter.detach().flatten() for parameter in net[0].parameters()]).norm().item()
    assert read.Scalars("health/0/weight_norm")[-1].value == pytest.approx(norm)


def test_the_training_batch_is_logged_as_it_passed():
    net, board = build(), Recorder()
    twin = build()
    twin.load_state_dict(net.state_dict())
    batch = torch.randn(8, 3, 10, 10)
    with Monitor(net, board, every=10, norms=True, strict=True) as monitor:
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


@pytest.mark.slow
def test_the_tensorboard_server_answers_with_what_was_logged(tmp_path, probe):
    net = build()
    with Monitor(net, tmp_path, probe=probe, every=3, strict=True) as monitor:
        train(net, 7, monitor)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--load_fast=false"]
    with subprocess.Popen(
        [*command, "--host=127.0.0.1", "--port=0"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            address = next(
                word for line in server.stderr for word in line.split() if word.startswith("http://127")
            )

            def ask(path, **query):
                url = f"{address}data/{path}?{urllib.parse.urlencode(query)}"
                with urllib.request.urlopen(url, timeout=30) as answer:
                    return answer.read()

            deadline = time.monotonic() + 60
            while json.loads(ask("runs")) != ["."] and time.monotonic() < deadline:
                time.sleep(0.2)
            images = json.loads(ask("plugin/images/tags"))["."]
            assert set(images) == {"probe/inputs", "kernels/0", "kernels/3", "maps/0", "maps/3"}
            listed = json.loads(ask("plugin/images/images", run=".", tag="kernels/0", sample=0))
            assert [entry["step"] for entry in listed] == [0, 3, 6]
            blob = listed[-1]["query"].partition("=")[2]
            served = ask("plugin/images/individualImage", blob_key=blob)
            written = events(tmp_path)
            assert served == written.Images("kernels/0")[-1].encoded_image_string
            scalars = json.loads(ask("plugin/scalars/scalars", run=".", tag="health/3/std"))
            ours = [(event.step, pytest.approx(event.value)) for event in written.Scalars("health/3/std")]
            assert [(step, value) for _, step, value in scalars] == ours
        finally:
            server.terminate()


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
    monitor = Monitor(net, Recorder(), every=3, strict=True)
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


@pytest.mark.parametrize("every", [1, 2])
def test_the_scale_of_a_picture_stays_the_same(probe, every):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=probe, every=every, strict=True, scales={"maps/3": (-1, 3)})
    monitor.step(0)
    scales = monitor.scales
    assert scales["maps/3"] == (-1, 3)
    assert scales["kernels/0"] == pytest.approx(
        (-2 * net[0].weight.abs().max().item(), scales["kernels/0"][1])
    )
    with torch.no_grad():
        net[0].weight *= 5
    monitor.step(2)
    assert monitor.scales == scales
    share = (net[0].weight.abs() > scales["kernels/0"][1]).float().mean().item()
    assert share > 0.1
    title = f"kernels/0: scale of step 0, {share:.1%} beyond"
    ours = kernel_grid(net, value_range=scales["kernels/0"], max_tiles=64, title=title, legend=False)
    board_image = board.last("kernels/0").transpose(1, 2, 0)
    height = 16 + pixels(kernel_grid(net, max_tiles=64)).shape[0]
    assert np.array_equal(board_image[:height, : ours.width], pixels(ours)[:height])


def test_a_scale_is_not_taken_from_what_has_none(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=probe, every=1, strict=True, alarm=None, headroom=1.5)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(float("nan"))
    monitor.step(0)
    assert not {"kernels/0", "maps/0", "maps/3"} & set(monitor.scales)
    assert board.last("health/0/nonfinite") == 16 * 6 * 100
    assert np.isnan(board.last("health/0/mean"))
    assert not board.steps("health/0/values")
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[0].bias.zero_()
    monitor.step(1)
    assert monitor.scales["kernels/0"] == (-3.0, 3.0)


def test_unsigned_maps_begin_at_zero_and_large_ones_are_averaged():
    net, board = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), Recorder()
    net[0].weight.data.fill_(1.0)
    batch = torch.rand(1, 1, 100, 130)
    with Monitor(net, board, layers=nn.ReLU, strict=True, headroom=1.0) as monitor, monitor.watch(0):
        shown = net(batch).detach()
    shown = F.avg_pool2d(shown[0][None], 5, ceil_mode=True)
    assert monitor.scales == {"maps/1": (0.0, shown.max().item())}
    title = "maps/1: scale of step 0, 0.0% beyond; averaged 5 x 5"
    ours = feature_grid(
        shown, nrow=2, upscale=1, value_range=monitor.scales["maps/1"], legend=True, title=title
    )
    logged = board.last("maps/1").transpose(1, 2, 0)
    assert np.array_equal(np.broadcast_to(logged, (*logged.shape[:2], 3)), pixels(ours))
    assert not board.steps("kernels/1")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 200, 1),
        nn.Conv2d(200, 150, 1),
        nn.Conv3d(2, 70, 3),
        nn.Conv1d(5, 7, 3),
        nn.ConvTranspose2d(4, 70, 2),
        nn.Conv2d(1, 4, 3).half(),
        nn.Conv2d(4, 4, 3).double(),
    ],
    ids=repr,
)
def test_kernels_of_every_kind_are_drawn_within_the_limit(layer):
    board = Recorder()
    Monitor(layer, board, layers=lambda name, module: True, strict=True).step(0)
    (entry,) = board.entries
    assert entry[1] == "kernels/model"
    assert entry[2].dtype == np.uint8
    assert entry[2].shape[1] * entry[2].shape[2] < 1_000_000


def test_layers_that_are_no_pictures_are_logged_in_numbers(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, layers=[0, nn.Linear], probe=probe, strict=True)
    monitor.step(0)
    tags = {tag for _, tag, *_ in board.entries}
    assert {"kernels/0", "maps/0", "health/7/mean", "health/7/values"} <= tags
    assert not {"kernels/7", "maps/7"} & tags


def test_a_layer_with_two_names_is_shown_once(probe):
    conv = nn.Conv2d(3, 3, 3)
    net, board = nn.Sequential(conv, nn.ReLU(), conv), Recorder()
    Monitor(net, board, probe=probe, strict=True).step(0)
    assert {tag for _, tag, *_ in board.entries if tag.startswith(("kernels", "maps"))} == {
        "kernels/0",
        "maps/0",
    }
    seen = RunningStats()
    with torch.no_grad(), capture(net, "0") as acts:
        net(probe)
    for values in acts.calls("0"):
        seen.update(values)
    assert board.last("health/0/std") == pytest.approx(seen.compute().pooled().std.item())


def test_the_histogram_is_of_values_from_everywhere():
    net, board = nn.Sequential(nn.Identity()), Recorder()
    batch = torch.arange(64 * 64 * 64).float().view(4, 16, 64, 64)
    with Monitor(net, board, layers="0", alarm=None, strict=True).watch(0):
        net(batch)
    sample = board.last("health/0/values")
    assert len(sample) == 8009
    assert len(np.unique(sample % 64)) == 64  # every column is in it
    assert sample.mean() == pytest.approx(batch.double().mean().item(), rel=1e-3)


def test_a_writer_of_the_callers_stays_open(tmp_path, probe):
    with SummaryWriter(str(tmp_path)) as writer:
        with Monitor(build(), writer, probe=probe, strict=True) as monitor:
            monitor.step(0)
        writer.add_scalar("after", 1.0, 1)
    assert "after" in events(tmp_path).Tags()["scalars"]
    assert "maps/3" in events(tmp_path).Tags()["images"]


def test_tensorboardx_works(tmp_path, probe):
    writer = pytest.importorskip("tensorboardX").SummaryWriter(str(tmp_path))
    net = build()
    with Monitor(net, writer, probe=probe, strict=True) as monitor:
        monitor.step(0)
    writer.close()
    read = events(tmp_path)
    title = "kernels/0: scale of step 0, 0.0% beyond"
    weight = net[0].weight
    ours = kernel_grid(weight, value_range=monitor.scales["kernels/0"], legend=True, title=title)
    assert np.array_equal(decoded(read.Images("kernels/0")[0]), pixels(ours))
    assert read.Scalars("health/0/nonfinite")[0].value == 0


def test_a_folder_is_not_touched_before_there_is_something_to_write(tmp_path):
    with Monitor(build(), tmp_path / "runs", every=10) as monitor:
        monitor.step(1)
    assert not (tmp_path / "runs").exists()


def test_a_missing_tensorboard_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "torchlens_viz\[tensorboard\]"'):
        Monitor(build(), tmp_path)


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


def test_a_probe_that_does_not_fit_warns_and_the_training_goes_on():
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=torch.randn(16, 4, 10, 10), every=1)
    with pytest.warns(MonitorWarning, match=r"step 0 could not be logged.*expected input"):
        train(net, 2, monitor)
    assert net.training
    assert board.steps("kernels/0") == [0, 1]


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


# The alarm.


class StopTrainingError(Exception):
    pass


def stop(trouble: Trouble) -> None:
    raise StopTrainingError(str(trouble))


def test_a_healthy_training_raises_no_alarm(probe):
    net = build()
    train(net, 12, Monitor(net, Recorder(), probe=probe, every=1, alarm=stop, strict=True))


@pytest.mark.parametrize("watch", [False, True])
def test_a_nan_raises_the_alarm_at_its_step(probe, watch):
    def spoil(step, net, images):
        if step == 3:
            with torch.no_grad():
                net[3].weight[2, 0, 1, 1] = float("nan")

    net = build()
    monitor = Monitor(net, Recorder(), probe=None if watch else probe, every=1, alarm=stop)
    count = 800 if watch else 1600
    # Within the step one channel is hit; after it the gradient has spread NaN to every weight, and the first
    # layer is where it comes up.
    message = (
        rf"^step 3: `3` puts out {count} values that are NaN or infinite$" if watch else "^step 3: `0` puts"
    )
    with pytest.raises(StopTrainingError, match=message):
        train(net, 6, monitor, spoil=spoil, watch=watch)
    assert hook_count(net) == 0


def test_a_dead_layer_raises_the_alarm_at_its_step(probe):
    def spoil(step, net, images):
        if step == 4:
            net[3].bias.data.fill_(-100.0)

    net = build()
    message = r"^step 4: 20 channels of `3` \(100\.0%\) are dead, at most 90\.0% are expected"
    with pytest.raises(StopTrainingError, match=message):
        train(net, 6, Monitor(net, Recorder(), probe=probe, every=2, alarm=stop), spoil=spoil)


def test_a_learning_rate_that_is_far_too_high_raises_the_alarm_at_once(probe):
    losses = []

    def note(trouble):
        losses.append(trouble)
        raise StopTrainingError

    net = build()
    monitor = Monitor(net, Recorder(), probe=probe, every=1, alarm=note, std_range=(1e-3, 10))
    train(build(), 6, Monitor(build(), Recorder(), probe=probe, every=1, alarm=stop, std_range=(1e-3, 10)))
    with pytest.raises(StopTrainingError):
        train(net, 6, monitor, lr=50.0)
    (trouble,) = losses
    assert trouble.step <= 2
    assert trouble.kind in ("std", "dead", "nonfinite")


def test_a_std_out_of_bounds_raises_the_alarm_with_its_figures(probe):
    net, troubles = build(), []
    monitor = Monitor(net, Recorder(), probe=probe, every=1, alarm=troubles.append, std_range=(0.01, 10))
    monitor.step(0)
    for factor in (1e3, 1.0, 1e-3):  # the second changes nothing: it was said
        net[3].weight.data *= factor
        monitor.step(monitor._schedule.heard + 1)
    net[3].bias.data.zero_()
    net[3].weight.data *= 1e-4
    monitor.step(9)
    assert [(t.kind, t.layer, t.step) for t in troubles] == [("std", "3", 1), ("std", "3", 9)]
    assert troubles[0].figures.std > 10
    assert troubles[0].message == (
        f"step 1: the std of `3` is {troubles[0].figures.std:.4g}, outside [0.01, 10]"
    )


def test_the_alarm_warns_with_layer_and_step_unless_told_otherwise(probe):
    net = build()
    with torch.no_grad():
        net[0].bias[1] = float("inf")
    with pytest.warns(MonitorWarning) as caught:
        Monitor(net, Recorder(), probe=probe).step(0)
    assert [str(warning.message) for warning in caught] == [
        "step 0: `0` puts out 1,600 values that are NaN or infinite, and so does 1 more of 2 layers"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Monitor(net, Recorder(), probe=probe, alarm=None).step(0)


@pytest.mark.slow
def test_the_example_is_stopped_by_its_alarm(tmp_path):
    pytest.importorskip("skimage")
    script = Path(__file__).parent.parent / "examples" / "train_with_monitor.py"
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, InvalidArgumentError, "`every` must be at least 1, got 0"),
        ({"every": 2.5}, InvalidTypeError, "`every` must be an int, got 2.5"),
        ({"max_tiles": 0}, InvalidArgumentError, "`max_tiles` must be at least 1"),
        ({"map_images": True}, InvalidTypeError, "`map_images` must be an int"),
        ({"map_channels": 0}, InvalidArgumentError, "`map_channels` must be at least 1"),
        ({"alarm": "warn"}, InvalidTypeError, "`alarm` must be a function"),
        ({"max_dead": 2}, InvalidArgumentError, "`max_dead` must be a share from 0 to 1, got 2"),
        ({"std_range": (2, 1)}, InvalidArgumentError, "`std_range` must be"),
        ({"headroom": 0.5}, InvalidArgumentError, "`headroom` must be at least 1"),
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


def test_a_loader_without_indices_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 4, 4)

    with pytest.raises(
        InvalidTypeError, match="over a dataset with a length and indices, got one over Stream"
    ):
        Monitor(build(), Recorder(), probe=DataLoader(Stream()))


def test_a_writer_without_the_methods_is_refused():
    with pytest.raises(InvalidTypeError, match=r"`writer` must be a folder or have .* without add_image"):
        Monitor(build(), object())


def test_two_sources_at_once_are_refused(probe):
    with pytest.raises(InvalidArgumentError, match="`watch` shows the training batch under the tags"):
        Monitor(build(), Recorder(), probe=probe).watch(0)


def test_a_step_that_is_no_number_is_refused():
    with pytest.raises(InvalidTypeError, match=r"`global_step` must be an int, got 1\.5"):
        Monitor(build(), Recorder()).step(1.5)


def test_figures_are_of_the_finite_values():
    stats = RunningStats()
    stats.update(torch.tensor([[[1.0, torch.nan]], [[3.0, 0.0]]]))
    figures = Figures.of([stats.compute()])
    assert (figures.mean, figures.nonfinite, figures.dead) == (pytest.approx(4 / 3), 1, 0)
    assert figures.zero_fraction == pytest.approx(1 / 3)


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


def test_an_alarm_that_raises_keeps_the_other_troubles_for_the_next_look(probe):
    net, told = build(), []
    for place in (0, 3):
        net[place].bias.data.fill_(-1e3)

    def alarm(trouble):
        told.append(trouble.layer)
        raise StopTrainingError

    monitor = Monitor(net, Recorder(), probe=probe, every=1, alarm=alarm, std_range=(0, 1e9))
    for step in range(2):
        with pytest.raises(StopTrainingError):
            monitor.step(step)
    assert told == ["0", "3"]


def test_values_beyond_all_bounds_do_not_take_the_maps_with_them(tmp_path, probe):
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    net[0].weight.data *= 1e22
    with Monitor(net, tmp_path, probe=probe, alarm=None, strict=True) as monitor:
        monitor.step(0)
    assert set(events(tmp_path).Tags()["images"]) == {"kernels/0", "maps/0", "probe/inputs"}


def test_a_channel_with_infinity_is_not_dead():
    stats = RunningStats()
    stats.update(torch.tensor([[-1.0, -1.0], [torch.inf, -1.0]]))
    assert Figures.of([stats.compute()]).dead == 1


def test_a_loader_that_makes_no_batches_is_refused(probe):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(probe), batch_size=None)
    with pytest.raises(InvalidArgumentError, match="`probe` must be a DataLoader that makes batches"):
        Monitor(build(), Recorder(), probe=loader)


def test_values_too_close_for_buckets_and_pictures_of_every_mode_are_written(tmp_path):
    board = Board(tmp_path)
    for step, values in enumerate(([1, 1 + 2.3e-16], [5e-324, 0], [3, 3], [-1e30, 1e30])):
        board.values("values", torch.tensor(values, dtype=torch.float64), step)
    for step, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA")):
        board.picture("picture", Image.new(mode, (3, 2)), step)
    board.close()
    read = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "histograms": 0}).Reload()
    assert [entry.histogram_value.num for entry in read.Histograms("values")] == [2, 2, 2, 2]
    assert len(read.Images("picture")) == 6
