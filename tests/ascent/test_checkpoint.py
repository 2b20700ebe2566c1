"""Runs that are broken off and go on: to the same result, and only with the same settings."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn

from torchlens_viz import objectives
from torchlens_viz.ascent.checkpoint import Resumption
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.method import Normalized
from torchlens_viz.ascent.parametrization import Pixels
from torchlens_viz.ascent.plan import Climb, Request
from torchlens_viz.errors import ArchiveError
from torchlens_viz.files.tensors import read_npz, write_npz


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3)).eval()


class Brittle:
    """A preprocessing that is interrupted after some calls."""

    calls = 10**9

    def __call__(self, images):
        Brittle.calls -= 1
        if Brittle.calls < 0:
            raise KeyboardInterrupt
        return images


def run(folder, *, interrupted_after=10**9, **options):
    Brittle.calls = interrupted_after
    options = {"size": 12, "steps": 8, "precision": "float32", "batch_size": 2, **options}
    return maximize(net(), "2", preprocess=Brittle(), checkpoint=folder, **options)


def same(left, right):
    assert left.channels.tolist() == right.channels.tolist()
    assert left.status == right.status
    assert left.evidence == right.evidence
    torch.testing.assert_close(left.images, right.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(left.scores, right.scores)
    torch.testing.assert_close(left.means, right.means)
    torch.testing.assert_close(left.history, right.history, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transforms": "robust", "method": Normalized(frames=2)},
        {"method": Normalized(tiles=2, frames=2), "batch_size": 1},
        {"threshold": 0.0},
        {"parametrization": "maco"},
    ],
)
def test_a_run_that_was_broken_off_goes_on_to_the_same_result(tmp_path, options):
    whole = run(None, **options)
    cut = run(tmp_path, interrupted_after=32, **options)
    assert 0 < len(cut.channels) < 7
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    assert len(kept) == len(cut.channels)
    resumed = run(tmp_path, **options)
    same(resumed, whole)
    assert all((tmp_path / name).read_bytes() == data for name, data in kept.items())  # not made anew
    if "method" in options:
        assert all(map(torch.equal, resumed.frames, whole.frames))


def test_a_run_that_is_finished_is_only_read(tmp_path):
    whole = run(tmp_path)
    # One call tells whether images can be prepared, and one what shapes the network has.
    same(run(tmp_path, interrupted_after=6), whole)
    some = run(tmp_path, channels=[5, 1], interrupted_after=6)
    torch.testing.assert_close(some.images, whole.images[[5, 1]])


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-60], lambda data: b"", lambda data: b"PK" + data[20:]]
)
def test_a_damaged_file_counts_as_not_finished(tmp_path, damage):
    whole = run(tmp_path)
    path = tmp_path / "3-0.npz"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    same(run(tmp_path), whole)
    assert len(path.read_bytes()) == len(before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"steps": 9}, "steps"),
        ({"lr": 0.01}, "rate"),
        ({"seed": 1}, "seed"),
        ({"size": 13}, "size"),
        ({"threshold": 1.0}, "threshold"),
        ({"transforms": "gentle"}, "transforms"),
        ({"parametrization": "fourier"}, "parametrization"),
        ({"objective": "max"}, "objective"),
        ({"objective": 2 * objectives.channel()}, "objective"),
        ({"precision": "bfloat16"}, "precision"),
        ({"image": torch.full((3, 12, 12), 0.3)}, "start"),
        ({"method": Normalized(references=torch.full((2, 3, 12, 12), 0.3))}, "references"),
        ({"method": "classic"}, "parametrization"),
        ({"parametrization": Pixels(decay=0.1)}, "parametrization"),
        ({"method": Normalized(frames=2)}, "method"),
        ({"method": Normalized(restarts=1)}, "method"),
    ],
)
def test_a_folder_that_was_begun_with_other_settings_is_refused(tmp_path, options, name):
    run(tmp_path, channels=[0], steps=8)
    with pytest.raises(ArchiveError, match=rf"begun with the same settings.*`{name}` was .* and now is"):
        run(tmp_path, channels=[0], **options)


def test_other_weights_layers_and_preprocessing_are_refused(tmp_path):
    def start(model, layer="2", **options):
        return maximize(
            model, layer, 0, size=12, steps=1, precision="float32", checkpoint=tmp_path, **options
        )

    start(net())
    other = net()
    with torch.no_grad():
        other[2].bias[6] += 1e-3
    with pytest.raises(ArchiveError, match="`weights` was"):
        start(other)
    with pytest.raises(ArchiveError, match="`layer` was '2' and now is '0'"):
        start(net(), "0")
    with pytest.raises(ArchiveError, match="`preprocess` was None and now is"):
        start(net(), preprocess=torch.sigmoid)


def test_functions_are_known_again_in_another_process_where_they_stand_at_another_address(tmp_path):
    run(tmp_path, channels=[0])
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert "0x" not in json.dumps(settings)
    folder = tmp_path / "partial"
    for _ in range(2):
        part = functools.partial(torch.clamp, min=0.0)
        maximize(net(), "2", 0, size=12, steps=1, preprocess=part, checkpoint=folder)
    assert "0x" not in (folder / "settings.json").read_text()


def test_images_that_are_compared_are_made_together_again(tmp_path):
    goal = objectives.channel() + objectives.diversity()
    options = {"channels": [1, 1, 4, 4], "objective": goal}
    whole = run(tmp_path, **options)
    (tmp_path / "4-1.npz").unlink()
    same(run(tmp_path, **options), whole)


def test_settings_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ArchiveError, match=r"cannot read .*settings.json.*choose another folder"):
        run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveError, match="choose"):
        run(tmp_path / "file")


@pytest.mark.parametrize("shape", [(3, 20), (3, 4, 5), (3, 2, 2, 5)])
@pytest.mark.parametrize("filmed", [False, True])
def test_what_is_kept_is_read_bit_for_bit(tmp_path, filmed, shape):
    frames = torch.arange(120, dtype=torch.uint8).view(2, *shape) if filmed else None
    request = Request(place=3, channel=5, copy=1)
    climb = Climb(
        request=request,
        image=torch.rand(shape),
        score=0.1 + 0.2,
        means=torch.randn(6),
        history=torch.tensor([1.0, torch.nan]),
        status="nonfinite",
        evidence='say "why"',
        frames=frames,
    )
    store = Resumption(tmp_path / "new", {"a": 1})
    store.keep(climb)
    elsewhere = request._replace(place=0)  # in another list of channels
    (again,) = Resumption(tmp_path / "new", {"a": 1}).finished([elsewhere, Request(1, 7, 0)], shape)
    assert again.request == elsewhere
    assert (again.score, again.status, again.evidence) == (climb.score, climb.status, climb.evidence)
    for name in ("image", "means", "history"):
        torch.testing.assert_close(getattr(again, name), getattr(climb, name), rtol=0, atol=0, equal_nan=True)
    other = (*shape[:-1], shape[-1] + 1)
    assert not store.finished([elsewhere], other)
    assert not store.finished([elsewhere], (3, 20) if len(shape) == 3 else (3, 4, 5))
    assert (again.frames is None) if frames is None else torch.equal(again.frames, frames)


def edit(path, *, told=None, **arrays):
    """Change what a file of ours holds, and leave it well formed."""
    tensors, before = read_npz(path, remedy="")
    write_npz(path, {**tensors, **arrays}, {**before, **(told or {})})


@pytest.mark.parametrize(
    "change",
    [
        {"told": {"status": "x"}},
        {"told": {"score": None}},
        {"told": {"evidence": 3}},
        {"told": {"more": 1}},
        {"image": torch.full((3, 12, 12), torch.nan)},
        {"image": torch.rand(3, 11, 12)},
        {"image": torch.rand(3, 12, 12).double()},
        {"means": torch.rand(6)},
        {"history": torch.rand(9)},
        {"frames": torch.zeros(1, 3, 12, 12, dtype=torch.uint8)},
    ],
)
def test_an_edited_file_counts_as_not_finished(tmp_path, change):
    whole = run(tmp_path)
    edit(tmp_path / "4-0.npz", **change)
    same(run(tmp_path), whole)
