"""Checks that all arguments share: the value comes back, or one message that names the rule."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from torchlens_viz.arguments import integer, number, one_of, plain
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, needed


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_any_kind_become_ints(value):
    found = integer(value, "steps", least=3, most=3)
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 3.0, "3", None, [3]])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(InvalidTypeError, match="`steps` must be an int, got"):
        integer(value, "steps")


def test_integers_out_of_range_are_refused():
    with pytest.raises(InvalidArgumentError, match="`steps` must be at least 1, got 0"):
        integer(0, "steps", least=1)
    with pytest.raises(InvalidArgumentError, match="`steps` must be at most 9, got 10"):
        integer(10, "steps", most=9)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind_become_floats(value):
    found = number(value, "lr", least=0.5, most=0.5, above=0)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, torch.tensor([0.5, 1.0])])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InvalidTypeError, match="`lr` must be a number, got"):
        number(value, "lr")


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (float("nan"), "finite, got nan"),
        (float("inf"), "finite, got inf"),
        (-1, "at least 0, got -1"),
        (2.5, "at most 2, got 2.5"),
        (0, "above 0, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(value, rule):
    with pytest.raises(InvalidArgumentError, match=f"`lr` must be {rule}"):
        number(value, "lr", least=0, most=2, above=0)


def test_one_of_gives_the_choice_back():
    assert one_of("b", "mode", ("a", "b")) == "b"
    assert one_of(False, "copy", (True, False, "lazy")) is False


def test_one_of_names_every_choice():
    with pytest.raises(InvalidArgumentError, match='`mode` must be "a", "b" or "c", got 3'):
        one_of(3, "mode", ("a", "b", "c"))
    with pytest.raises(InvalidArgumentError, match='`copy` must be True, False or "lazy", got 1'):
        one_of(1, "copy", (True, False, "lazy"))
    with pytest.raises(InvalidArgumentError, match='`mode` must be "a", got None'):
        one_of(None, "mode", ("a",))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_plain_numbers_are_themselves_and_others_what_they_stand_for():
    dense = torch.tensor([[0.0, 1.5], [-2.0, 0.0]])
    assert plain(dense) is dense
    assert torch.equal(plain(dense.to_sparse()), dense)
    quantised = torch.quantize_per_tensor(dense, 0.5, 10, torch.quint8)
    assert torch.equal(plain(quantised), dense)


def test_a_package_that_is_there_is_imported():
    assert needed("json.decoder", "this needs json").JSONDecoder


def test_a_missing_package_says_how_to_get_it():
    with pytest.raises(
        MissingDependencyError,
        match=r"^pictures fly with nowhere, which is not installed; run "
        r'`python -m pip install "torchlens_viz\[demo\]"`, or walk$',
    ):
        needed("nowhere.wings", "pictures fly with nowhere", "demo", otherwise="or walk")
    with pytest.raises(MissingDependencyError, match=r"run `python -m pip install nowhere`$"):
        needed("nowhere", "this needs nowhere")


def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_here.py").write_text("raise ImportError('libmissing.so')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"which fails: libmissing\.so; run"):
        needed("broken_here", "this needs broken_here")
