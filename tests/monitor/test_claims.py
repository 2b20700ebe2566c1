"""Monitors that share a writer: two models keep apart, one model keeps its tags."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tests.monitor.training import Recorder
from torchlens_viz import Monitor
from torchlens_viz.errors import InvalidTypeError
from torchlens_viz.monitor.health import MonitorWarning

PROBE = torch.rand(2, 3, 8, 8)


class Tags(Recorder):
    """Counts how often each tag of each step was written."""

    def __init__(self):
        super().__init__()
        self.written = []

    def add_image(self, tag, pixels, step):
        self.written.append((tag, step))

    def add_scalar(self, tag, value, step):
        self.written.append((tag, step))

    def add_histogram(self, tag, values, step, **options):
        self.written.append((tag, step))

    def names(self):
        return {tag.split("/")[1] for tag, _ in self.written if tag != "probe/inputs"}


def net():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())


def test_two_models_on_one_writer_are_kept_apart_and_the_second_says_so():
    writer, models = Tags(), [net(), net(), net()]
    first = Monitor(models[0], writer, probe=PROBE, every=1)
    with pytest.warns(MonitorWarning, match=r"writes under `health/model2/0` .*`name=`"):
        second = Monitor(models[1], writer, probe=PROBE, every=1)
    with pytest.warns(MonitorWarning, match=r"writes under `health/model3/0`"):
        third = Monitor(models[2], writer, probe=PROBE, every=1)
    for monitor in (first, second, third):
        monitor.step(0)
    assert len(writer.written) == len(set(writer.written))
    assert writer.names() == {"0", "model2", "model3"}
    assert list(second.scales) == ["kernels/model2/0", "maps/model2/0"]


def test_a_name_is_what_the_caller_says():
    writer, models = Tags(), [net(), net()]
    for name, model in zip(("generator", "critic"), models, strict=True):
        Monitor(model, writer, probe=PROBE, every=1, name=name).step(0)
    assert {tag for tag, _ in writer.written if tag.endswith("/std")} == {
        "health/generator/0/std",
        "health/critic/0/std",
    }
    with pytest.raises(InvalidTypeError, match="`name` must be a text that stands in tags, got ''"):
        Monitor(models[0], writer, name="")


def test_tags_stay_the_same_for_a_run_that_goes_on():
    writer, model = Tags(), net()
    kept = Monitor(model, writer, probe=PROBE, every=1)
    Monitor(model, writer, probe=PROBE, every=1).step(1)  # the same model
    kept.step(0)
    kept.close()
    Monitor(net(), writer, probe=PROBE, every=1).step(2)  # another one, after the end of the first
    gc.collect()
    Monitor(net(), writer, probe=PROBE, every=1).step(3)  # or after it was dropped
    assert writer.names() == {"0"}


def test_other_layers_or_other_folders_are_no_clash(tmp_path):
    writer, models = Tags(), [net(), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 3)), net(), net()]
    monitors = [Monitor(models[0], writer), Monitor(models[1], writer), Monitor(models[2], tmp_path / "a")]
    with pytest.warns(MonitorWarning, match="model2"):
        monitors.append(Monitor(models[3], tmp_path / "b" / ".." / "a"))
