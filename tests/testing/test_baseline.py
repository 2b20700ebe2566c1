"""Statistics against a baseline file: what changed is named, and what is broken says so."""

from __future__ import annotations

import json
import os

import pytest
import torch

from torchlens_viz.errors import ArchiveError
from torchlens_viz.testing.baseline import ActivationRegression


@pytest.fixture
def regression(tmp_path):
    """Return a function that makes what the fixture of that name makes."""

    def make(test: str = "test_x", *, overwrite: bool = False) -> ActivationRegression:
        return ActivationRegression(tmp_path / "test_module", test, overwrite=overwrite)

    return make


def test_a_baseline_can_be_read_by_people(regression, tmp_path):
    regression(overwrite=True).check({"conv": torch.tensor([[0.0, 1 / 3], [2.0, 1 / 3]])})
    assert (tmp_path / "test_module" / "test_x.json").read_text() == (
        "{\n"
        '  "format": "torchlens_viz.baseline/1",\n'
        '  "test": "test_x",\n'
        '  "layers": {\n'
        '    "conv": {\n'
        '      "values": 2,\n'
        '      "mean": [1.0, 0.333333],\n'
        '      "std": [1.0, 0.0],\n'
        '      "min": [0.0, 0.333333],\n'
        '      "max": [2.0, 0.333333],\n'
        '      "zero_fraction": [0.5, 0.0]\n'
        "    }\n"
        "  }\n"
        "}\n"
    )


def test_layers_channels_and_counts_that_changed_are_named(regression):
    one = torch.ones(2, 3)
    regression(overwrite=True).check({"a": one, "b": one, "c": one, "d": one})
    with pytest.raises(AssertionError) as caught:
        regression().check({"a": one, "b": torch.ones(4, 3), "d": torch.ones(2, 2), "e": one})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("8 differences from the baseline")
    assert lines[1:4] == [
        "e: there, and not in the baseline",
        "b: 4 values per channel where 2 were expected",
        "c: in the baseline, and not there",
    ]
    assert lines[4] == "d: mean: shape (2,) where (3,) was expected"


def test_a_tolerance_is_inclusive(regression):
    regression(overwrite=True).check(torch.full((2, 1), 2.0))
    regression().check(torch.full((2, 1), 2.5), rtol=0.25, atol=0.0)
    with pytest.raises(
        AssertionError, match=r"mean: 1 of 1 channel \(100.0%\) differs by more than 0.25 \+ 0 "
    ):
        regression().check(torch.full((2, 1), 2.5), rtol=0.0, atol=0.25)


def test_nan_is_never_written_nor_passed(regression, tmp_path):
    for overwrite in (True, False):
        with pytest.raises(
            AssertionError, match=r"a: 1 of 2 values \(50.0%\) is NaN or infinite, in 1 of 2 cha"
        ):
            regression(overwrite=overwrite).check({"a": torch.tensor([[0.0, float("nan")]])})
    assert not list(tmp_path.iterdir())


def test_a_name_serves_once_in_a_test(regression):
    checks = regression(overwrite=True)
    checks.check(torch.ones(1, 1))
    checks.check(torch.ones(1, 1), name="second")
    with pytest.raises(ValueError, match="`name` must differ from that of the other checks in this test"):
        checks.check(torch.ones(1, 1))


@pytest.mark.parametrize(
    "names",
    [
        ("test_a[x/y]", "test_a[x_y]"),
        ("test_a[..]", "test_a[__]"),
        ("test_d[b-c]", "test_d[b[c]"),
    ],
)
def test_hostile_names_stay_in_the_folder_and_apart(regression, tmp_path, names):
    for name in names:
        regression(name, overwrite=True).check(torch.ones(1, 1))
    assert len(list((tmp_path / "test_module").iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"format": "other"}', "its format is 'other', not 'torchlens_viz.baseline/1'"),
        ('{"format": "torchlens_viz.baseline/1", "layers": {"a": {"values": 1}}}', "'mean'"),
    ],
)
def test_a_broken_baseline_says_so(regression, tmp_path, content, reason):
    folder = tmp_path / "test_module"
    folder.mkdir()
    (folder / "test_x.json").write_text(content)
    with pytest.raises(ArchiveError, match=f"cannot read the baseline .*test_x.json'?: .*{reason}"):
        regression().check(torch.ones(1, 1))
    regression(overwrite=True).check(torch.ones(1, 1))
    assert json.loads((folder / "test_x.json").read_text())["test"] == "test_x"
    assert len(list(folder.iterdir())) == 1


def test_a_pipe_is_refused_as_a_baseline(regression, tmp_path):
    (tmp_path / "test_module").mkdir()
    os.mkfifo(tmp_path / "test_module" / "test_x.json")
    with pytest.raises(
        ArchiveError, match="it is a pipe or device and no file; run `pytest --activations-over"
    ):
        regression().check(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"values": 2**70}, "`values` must be at most"),
        ({"values": "x"}, "`values` must be an int, got 'x'"),
        ({"mean": [1.0, 2.0]}, "its columns are not of one length"),
        ({"mean": 1.0}, "its columns are not of one length"),
    ],
)
def test_an_edited_baseline_is_refused_with_the_reason(regression, tmp_path, change, reason):
    regression(overwrite=True).check(torch.ones(1, 1))
    path = tmp_path / "test_module" / "test_x.json"
    content = json.loads(path.read_text())
    for fields in content["layers"].values():
        fields.update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ArchiveError, match=f"cannot read the baseline .*{reason}"):
        regression().check(torch.ones(1, 1))


def test_layers_that_differ_by_backticks_only_are_kept_apart(regression):
    acts = {"a": torch.zeros(1, 1), "`a`": torch.ones(1, 1), "a`": torch.full((1, 1), 2.0)}
    regression(overwrite=True).check(acts)
    regression().check(acts)
    with pytest.raises(AssertionError, match="`a`: mean: 1 of 1 channel"):
        regression().check({**acts, "`a`": torch.full((1, 1), 5.0)})


def test_a_hundred_differences_are_not_a_hundred_lines(regression):
    acts = {f"layer{index}": torch.ones(2, 3) for index in range(50)}
    regression(overwrite=True).check(acts)
    with pytest.raises(AssertionError) as caught:
        regression().check({name: value * 2 for name, value in acts.items()})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("150 differences from the baseline")
    assert lines[1].startswith("layer0: mean: ")
    assert lines[-2] == "... and 130 more, further on"
    assert len(lines) == 2 * 20 + 3
