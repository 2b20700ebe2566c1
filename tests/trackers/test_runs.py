"""What a monitor logs is read back by each tracker's own reader, offline, on the real package."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.monitor.training import Recorder, build, train
from torchlens_viz import Monitor
from torchlens_viz.errors import InvalidTypeError
from torchlens_viz.files.pictures import read_image
from torchlens_viz.monitor.writer import Board
from torchlens_viz.trackers.folder import FolderWriter
from torchlens_viz.trackers.recognise import adapted
from torchlens_viz.trackers.rows import histogram_of

PROBE = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))
STEPS = (0, 3, 6)
# Other people's packages warn of what is deprecated in them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def logged(writer) -> Recorder:
    """Log a small training twice, alike: to a writer, and to one that keeps all it is given."""
    reference = Recorder()
    for each in (reference, writer):
        torch.manual_seed(0)
        net = build()
        alarm = None if each is reference else lambda trouble: None
        with Monitor(net, each, probe=PROBE, every=3, strict=True, alarm=alarm, norms=True) as monitor:
            train(net, 7, monitor)
    return reference


def numbers(reference: Recorder, tag: str) -> list[tuple[int, float]]:
    return [(step, value) for kind, name, value, step in reference.entries if (kind, name) == ("scalar", tag)]


def picture(reference: Recorder, tag: str) -> np.ndarray:
    """The last picture (H, W, C)."""
    return reference.last(tag).transpose(1, 2, 0)


def same_numbers(reference: Recorder, tag: str, found: Sequence[tuple[int, float]]) -> None:
    expected = numbers(reference, tag)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(STEPS)
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def assert_same_picture(reference: Recorder, tag: str, path: str | Path) -> None:
    read = np.asarray(read_image(path))
    assert np.array_equal(read, np.broadcast_to(picture(reference, tag), read.shape))


def same_histogram(reference: Recorder, tag: str, counts, edges) -> bool:
    ours, bounds = histogram_of(reference.last(tag))
    return list(counts) == ours and np.allclose(edges, bounds)


def test_a_folder_of_plain_files_has_every_entry(tmp_path):
    reference = logged(FolderWriter(tmp_path / "log"))
    lines = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text("utf-8").splitlines()]
    expected = [(step, tag) for _, tag, _, step in reference.entries]
    assert [(line["step"], line["tag"]) for line in lines] == expected
    stds = [(line["step"], line["value"]) for line in lines if line["tag"] == "health/3/std"]
    same_numbers(reference, "health/3/std", stds)
    last = [line for line in lines if line["tag"] == "maps/3"][-1]
    assert last["picture"] == "maps/3/000000006.png"
    assert_same_picture(reference, "maps/3", tmp_path / "log" / last["picture"])
    values = [line for line in lines if line["tag"] == "health/3/values"][-1]
    assert same_histogram(reference, "health/3/values", values["counts"], values["edges"])


def test_a_folder_takes_hostile_tags_and_what_is_not_finite(tmp_path):
    writer = FolderWriter(str(tmp_path / "log"))
    assert os.fspath(writer) == str(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    writer.add_scalar("a", float("nan"), 0)
    writer.add_scalar("a", float("-inf"), 1)
    writer.add_image("maps/../../x:y", np.zeros((1, 2, 3), np.uint8), 2)
    writer.add_text("alarms", "two\nlines", 3)
    writer.add_histogram("h", np.array([1.0, 1.0 + 2.3e-16]), 4)
    lines = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line.get("value", "") for line in lines] == [None, None, "", "", ""]
    assert (tmp_path / "log" / lines[2]["picture"]).resolve().is_relative_to(tmp_path / "log")
    assert read_image(tmp_path / "log" / lines[2]["picture"]).size == (3, 2)
    assert lines[3]["text"] == "two\nlines"
    assert sum(lines[4]["counts"]) == 2


def test_two_monitors_on_one_folder_keep_apart(tmp_path):
    nets = build(), build()
    first = Monitor(nets[0], FolderWriter(tmp_path), every=1, alarm=None)
    with pytest.warns(UserWarning, match="model2"):
        second = Monitor(nets[1], FolderWriter(tmp_path), every=1, alarm=None)
    for monitor in (first, second):
        monitor.step(0)
        monitor.close()
    tags = [json.loads(line)["tag"] for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert sorted(tags) == ["kernels/0", "kernels/3", "kernels/model2/0", "kernels/model2/3"]


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a file that wandb writes: blocks of 32 KiB, with records whole or in pieces."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def test_wandb_s_own_records_hold_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True)
    run = wandb.init(project="p", mode="offline", dir=str(tmp_path), settings=settings)
    run.log({"loss": 1.0}, step=5)  # the training's own, before and after
    reference = logged(run)
    run.log({"loss": 0.5})
    run.finish()
    wandb.teardown()  # waits for the process that writes the file, which goes on after `finish`
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records_of(path):
        record = protocol.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    ours = [row for row in rows if "monitor/step" in row]
    found = [(row["monitor/step"], row["health/3/std"]) for row in ours if "health/3/std" in row]
    same_numbers(reference, "health/3/std", found)
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5]
    last = [row for row in ours if "maps/3.path" in row][-1]
    assert_same_picture(reference, "maps/3", path.parent / "files" / last["maps/3.path"])
    counts, edges = (last[f"health/3/values.{part}"] for part in ("values", "bins"))
    assert same_histogram(reference, "health/3/values", counts, edges)


def test_mlflow_s_own_client_reads_a_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    try:
        with mlflow.start_run() as run:
            reference = logged(run)
        client, name = mlflow.MlflowClient(), run.info.run_id
        history = client.get_metric_history(name, "health/3/std")
        same_numbers(reference, "health/3/std", sorted((metric.step, metric.value) for metric in history))
        (picture,) = [
            file.path
            for file in client.list_artifacts(name, "images")
            if file.path.startswith("images/maps~3+step+6+") and file.path.endswith(".png")
        ]
        assert_same_picture(reference, "maps/3", client.download_artifacts(name, picture))
        place = client.download_artifacts(name, "histograms/health/3/values/000000006.json")
        values = json.loads(Path(place).read_text("utf-8"))
        assert same_histogram(reference, "health/3/values", values["counts"], values["edges"])
    finally:
        mlflow.set_tracking_uri(before)


def test_trackio_s_own_storage_reads_a_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    for name, module in list(sys.modules.items()):
        for constant, folder in (("TRACKIO_DIR", tmp_path), ("MEDIA_DIR", tmp_path / "media")):
            if name.partition(".")[0] == "trackio" and hasattr(module, constant):
                monkeypatch.setattr(module, constant, folder)
    run = trackio.init(project="p", name="r", auto_log_gpu=False, auto_log_cpu=False, embed=False)
    reference = logged(run)
    trackio.finish()
    rows = storage.SQLiteStorage.get_logs("p", "r")
    found = [(row["step"], row["health/3/std"]) for row in rows if "health/3/std" in row]
    same_numbers(reference, "health/3/std", found)
    last = [row["maps/3"] for row in rows if "maps/3" in row][-1]
    (file,) = tmp_path.rglob(Path(last["file_path"]).name)
    assert_same_picture(reference, "maps/3", file)
    histogram = [row["health/3/values"] for row in rows if "health/3/values" in row][-1]
    assert same_histogram(reference, "health/3/values", histogram["values"], histogram["bins"])


def test_aim_s_own_run_is_read_again(tmp_path):
    aim = pytest.importorskip("aim")
    context = pytest.importorskip("aim.storage.context").Context({})
    run = aim.Run(repo=str(tmp_path), system_tracking_interval=None, log_system_params=False)
    reference = logged(run)
    run.close()
    read = aim.Run(run.hash, repo=str(tmp_path), system_tracking_interval=None)
    steps, (values, *_) = read.get_metric("health/3/std", context).data.numpy()
    same_numbers(reference, "health/3/std", list(zip(steps.tolist(), values.tolist(), strict=True)))
    steps, (pictures, *_) = read.get_image_sequence("maps/3", context).data.items_list()
    last = np.asarray(pictures[list(steps).index(6)].to_pil_image().convert("RGB"))
    assert np.array_equal(last, np.broadcast_to(picture(reference, "maps/3"), last.shape))
    steps, (found, *_) = read.get_distribution_sequence("health/3/values", context).data.items_list()
    counts, edges = found[list(steps).index(6)].to_np_histogram()
    assert same_histogram(reference, "health/3/values", counts, edges)
    read.close()


def test_what_is_no_run_stays_what_it_is():
    class Run:
        """A class of that name, of nobody's."""

    for writer in (Run(), Recorder(), "folder"):
        assert adapted(writer) is writer
    with pytest.raises(InvalidTypeError, match=r"a run of wandb, mlflow, .* aim, or have .*, got Run"):
        Board(Run())
