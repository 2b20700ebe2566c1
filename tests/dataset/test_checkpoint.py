"""Surveys in files: saved and read, broken off and gone on with to the same answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.nets import quiet, same_survey
from torchlens_viz import Survey, survey
from torchlens_viz.errors import ArchiveError, InvalidArgumentError

# Files


def test_a_survey_comes_back_from_its_file(net, tmp_path):
    images = torch.randn(7, 3, 12, 10)
    found = survey(net, images.split(3), "*", bins=[0.0, 1.0], correlations=True, **quiet)
    loaded = Survey.load(found.save(tmp_path / "new" / "s.safetensors"))
    same_survey(loaded, found, rtol=0)
    assert loaded.correlation["0"].equal(found.correlation["0"])
    assert repr(loaded) == repr(found)
    assert json.loads(json.dumps(loaded.to_dict())) == json.loads(json.dumps(found.to_dict()))
    assert loaded.rows()[0]["layer"] == "0"
    assert loaded.rows()[0]["max"] == found.stats["0"].max[0].item()
    with pytest.raises(InvalidArgumentError, match="`model` must be given"):
        loaded.patches("0", 0, images)
    ours, theirs = loaded.patches("0", 0, images, model=net)[0], found.patches("0", 0, images)[0]
    assert ours.values.equal(theirs.values)
    (tmp_path / "half").write_bytes((tmp_path / "new" / "s.safetensors").read_bytes()[:99])
    for name in ("half", "missing"):
        with pytest.raises(ArchiveError, match=r"truncated or no safetensors|No such file"):
            Survey.load(tmp_path / name)


# Breaking off and going on


def test_ctrl_c_returns_what_was_seen_and_the_checkpoint_goes_on(net, tmp_path):
    images = torch.randn(12, 3, 12, 10)

    def broken():
        yield from images[:6].split(2)
        raise KeyboardInterrupt

    file = tmp_path / "c"
    found = survey(net, broken(), "*", checkpoint=file, **quiet)
    assert (found.samples_seen, found.is_complete) == (6, False)
    same_survey(found, survey(net, images[:6].split(2), "*", **quiet), rtol=0)
    calls = []
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    whole = survey(net, images.split(2), "*", **quiet)
    calls.clear()
    same_survey(survey(net, iter(images.split(2)), "*", checkpoint=file, **quiet), whole, rtol=0)
    assert len(calls) == 3
    same_survey(survey(net, iter(()), "*", checkpoint=file, **quiet), whole, rtol=0)  # it is finished
    hook.remove()


def test_a_checkpoint_of_something_else_is_refused(net, tmp_path):
    images = torch.randn(8, 3, 12, 10)

    def broken():
        yield from images[:4].split(2)
        raise KeyboardInterrupt

    file = tmp_path / "c"
    survey(net, broken(), "0", checkpoint=file, **quiet)
    for options, message in (({"top_k": 3}, "`top_k` was 9 and now is 3"), ({}, "`layers` was")):
        with pytest.raises(ArchiveError, match=message):
            survey(net, iter(images.split(2)), "0" if options else "2", checkpoint=file, **options, **quiet)
    with pytest.raises(ArchiveError, match="the first batch is not the one"):
        survey(net, iter(images.add(1).split(2)), "0", checkpoint=file, **quiet)
    with pytest.raises(ArchiveError, match="had 4 inputs and now have 3"):
        survey(net, iter([images[:2], images[2:3]]), "0", checkpoint=file, **quiet)
    with torch.no_grad():
        net[0].bias += 1
    with pytest.raises(ArchiveError, match="`weights` was"):
        survey(net, iter(images.split(2)), "0", checkpoint=file, **quiet)
    finished = survey(net, images.split(2), "0", **quiet).save(tmp_path / "finished")
    with pytest.raises(ArchiveError, match="a finished survey"):
        survey(net, images.split(2), "0", checkpoint=finished, **quiet)


SLOW = """
import sys, time, torch
from torch import nn
from torchlens_viz import survey

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
)
images = torch.randn(40, 3, 8, 8)

def loader():
    for number, batch in enumerate(images.split(4)):
        if len(sys.argv) > 4 and number == 6:
            print("far enough", flush=True)
            time.sleep(60)
        yield batch, torch.arange(4) % (2 + number % 2)

options = dict(checkpoint_seconds=0, progress=False, checkpoint=None if sys.argv[2] == "-" else sys.argv[2])
if sys.argv[1] == "worth":
    options |= dict(
        loss="cross_entropy", by_class=True, encoder="output", target=lambda output, batch: output[:, 1]
    )
survey(net, loader(), "*", **options).save(sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["plain", "worth"])
def test_after_kill_9_it_goes_on_to_the_same_answer(tmp_path, what):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    run = [sys.executable, str(script), what]
    with subprocess.Popen([*run, tmp_path / "c", tmp_path / "no", "slow"], stdout=subprocess.PIPE) as killed:
        assert killed.stdout.readline() == b"far enough\n"
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "no").exists()
    subprocess.run([*run, tmp_path / "c", tmp_path / "resumed"], check=True)
    subprocess.run([*run, "-", tmp_path / "whole"], check=True)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


# Bad input


def test_a_place_that_cannot_be_written_is_refused_before_the_pass(net):
    with pytest.raises(ArchiveError, match="`checkpoint` must name a file that can be written"):
        survey(net, [torch.rand(2, 3, 8, 8)], "*", checkpoint="/proc/nowhere/found", progress=False)


def test_a_finished_checkpoint_of_other_data_is_refused(net, tmp_path):
    images = torch.rand(8, 3, 8, 8)
    options = {"checkpoint": tmp_path / "found", "progress": False}
    survey(net, images.split(4), "*", **options)
    with pytest.raises(ArchiveError, match="the first batch is not the one"):
        survey(net, (5 * images).split(4), "*", **options)


def test_a_checkpoint_is_no_survey_and_the_message_says_what_to_do(net, tmp_path):
    survey(net, [torch.rand(2, 3, 12, 10)], "*", progress=False, checkpoint=tmp_path / "c")
    with pytest.raises(
        ArchiveError, match="it is the checkpoint of a survey; pass it to `survey` as `checkpoint`"
    ):
        Survey.load(tmp_path / "c")


def edit(path, change):
    """Change what a file of ours tells, and leave it well formed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["torchlens_viz"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    change(header, tensors)
    save_file(tensors, path, metadata={"torchlens_viz": json.dumps(header)})


def replaced(name, make):
    def change(header, tensors):
        tensors[name] = make(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header, _: header["about"].update(samples_seen="x"), "`samples_seen` must be int"),
        (lambda header, _: header["about"].update(top_k=3), "`top_k` is not that of its layers"),
        (lambda header, _: header["about"].update(input_shape=[-1]), "`shape` must be at least 0, got -1"),
        (
            lambda header, _: header["about"].pop("is_complete"),
            "it must tell samples_seen, top_k, is_complete",
        ),
        (lambda header, _: header.update(about=[]), "nothing is told about it"),
        (lambda header, _: header["layers"]["0"].update({"top.k": 0}), "`k` must be at least 1, got 0"),
        (lambda header, _: header["layers"]["0"].update(inputs=-1), "`inputs` must be at least 0, got -1"),
        (lambda header, _: header["layers"]["0"].update(inputs=0), "all parts must be of the same channels"),
        (
            replaced("0.stats.total", lambda values: values[:-1]),
            r"`state` must hold \(C,\) for each of its parts",
        ),
        (
            replaced("0.stats.zeros", lambda values: values + 10**6),
            "must count 0 <= zeros <= finite <= total",
        ),
        (replaced("0.top.samples", lambda values: values.float()), r"must be values and samples \(C, k\)"),
        (replaced("0.top.samples", lambda values: values - 99), "must have indices from 0 and no NaN"),
        (replaced("0.top.values", lambda values: values * torch.nan), "must have indices from 0 and no NaN"),
        (replaced("0.top.positions", lambda values: values[:1]), r"must be values and samples \(C, k\)"),
        (
            replaced("0.alike.sums", lambda values: values[:1]),
            "the sums of `alike` must be float64 of the 5 channels",
        ),
        (
            replaced("0.alike.sums", lambda values: values.float()),
            "the sums of `alike` must be float64 of the 5 channels",
        ),
    ],
)
def test_an_edited_survey_is_refused_with_the_reason(net, tmp_path, change, reason):
    images = torch.randn(8, 3, 12, 10)
    path = survey(net, images.split(4), "0", correlations=True, **quiet).save(tmp_path / "s.safetensors")
    edit(path, change)
    with pytest.raises(ArchiveError, match=rf"its header is damaged \(.*{reason}.*\); make the survey again"):
        Survey.load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header, _: header["about"]["progress"].update(batches=None), "`batches` must be int"),
        (lambda header, _: header["about"].update(progress=3), "it must tell batches, inputs, shape"),
        (
            lambda header, _: header["layers"].update(x=header["layers"].pop("0")),
            "its layers are not those of its settings",
        ),
    ],
)
def test_an_edited_checkpoint_is_refused_with_the_reason(net, tmp_path, change, reason):
    images, path = torch.randn(8, 3, 12, 10), tmp_path / "c.safetensors"
    survey(net, images.split(4), "0", checkpoint=path, **quiet)
    edit(path, change)
    with pytest.raises(ArchiveError, match=rf"its header is damaged \(.*{reason}.*\)"):
        survey(net, images.split(4), "0", checkpoint=path, **quiet)


def test_names_that_no_file_can_have_and_pipes_are_refused_as_checkpoints(net, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "no regular file"), (tmp_path / ("a" * 300), "too long")):
        with pytest.raises(ArchiveError, match=reason):
            survey(net, torch.randn(2, 3, 12, 10).split(2), "0", checkpoint=path, **quiet)
