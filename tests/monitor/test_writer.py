"""Writers of the caller's and of a folder, and TensorBoard's own server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tests.monitor.training import build, decoded, events, train
from tests.pixels import colours
from torchlens_viz import Monitor, kernel_grid
from torchlens_viz.errors import MissingDependencyError
from torchlens_viz.monitor.writer import Board


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
            server.kill()  # it does not always heed a request to end


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
    assert np.array_equal(decoded(read.Images("kernels/0")[0]), colours(ours))
    assert read.Scalars("health/0/nonfinite")[0].value == 0


def test_a_folder_is_not_touched_before_there_is_something_to_write(tmp_path):
    with Monitor(build(), tmp_path / "runs", every=10) as monitor:
        monitor.step(1)
    assert not (tmp_path / "runs").exists()


def test_a_missing_tensorboard_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "torchlens_viz\[tensorboard\]"'):
        Monitor(build(), tmp_path)


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


@pytest.mark.parametrize("value", [0.0, 1e13, 1e15, -1e16, 1e20, 1e30])
def test_histograms_of_constants_of_any_size_are_written(tmp_path, value):
    board = Board(tmp_path)
    board.values("constant", torch.full((7,), value), 0)
    board.close()
    (found,) = events(tmp_path).Histograms("constant")
    assert found.histogram_value.num == 7
    assert found.histogram_value.sum == pytest.approx(7 * max(min(value, 9e19), -9e19))


def test_a_disk_that_takes_no_file_is_not_filled_with_empty_ones(tmp_path, monkeypatch):
    made = []

    class Full:
        def __init__(self, folder):
            made.append(folder)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchlens_viz.monitor.writer._summary_writer", lambda: Full)
    board = Board(tmp_path)
    for step in range(50):
        with pytest.raises(OSError, match=r"No space left|no file of events could be made"):
            board.number("a", 1.0, step)
    assert len(made) == 1
    monkeypatch.setattr("torchlens_viz.monitor.writer.monotonic", lambda: 1e12)
    with pytest.raises(OSError, match="No space left"):
        board.number("a", 1.0, 50)
    assert len(made) == 2
