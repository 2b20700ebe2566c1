"""Checks that all arguments share: the value comes back, or one message that names the rule."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from torchlens_viz.arguments import (
    a_name,
    flag,
    function,
    indices_of,
    integer,
    listed,
    named_device,
    number,
    one_of,
    pair,
    plain,
    real,
    shown,
)
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("a\nb", "'a\\nb'"),
        ("a" * 100, f"'{'a' * 75} ..."),
        (torch.zeros(2, 3), "a tensor of shape (2, 3)"),
        (torch.zeros(2, device="meta"), "a tensor of shape (2,)"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
    ],
)
def test_a_message_shows_any_value_in_one_short_line(value, text):
    assert shown(value) == text


def test_a_number_with_more_digits_than_python_writes_is_shown_by_its_kind():
    assert shown(10**5000) == "a value of type int"


@pytest.mark.parametrize("value", [True, False, np.True_])
def test_flags_are_bools(value):
    assert flag(value, "legend") is bool(value)


@pytest.mark.parametrize("value", [0, 1, None, "yes", torch.ones(2), []])
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(InvalidTypeError, match="`legend` must be True or False, got"):
        flag(value, "legend")


def test_pairs_are_two_finite_numbers():
    assert pair([1, Fraction(3, 2)], "limits") == (1.0, 1.5)
    for value in (1, "a", (1,), (1, 2, 3), range(2**60), None, torch.tensor(1.0)):
        with pytest.raises(InvalidTypeError, match=r"`limits` must be \(low, high\), got"):
            pair(value, "limits")
    with pytest.raises(InvalidTypeError, match="`limits` must be a number, got 'a'"):
        pair("ab", "limits")
    with pytest.raises(InvalidArgumentError, match="`limits` must be finite, got nan"):
        pair((0, float("nan")), "limits")


def test_real_numbers_may_be_infinite():
    assert real(10**400, "high") == float("inf")
    with pytest.raises(InvalidArgumentError, match="`lr` must be finite, got 1000"):
        number(10**400, "lr")


def test_functions_and_names_are_what_they_are():
    assert function(None, "preprocess") is None
    assert function(len, "preprocess") is len
    assert a_name("x", "layer") == "x"
    with pytest.raises(InvalidTypeError, match="`preprocess` must be a function or None, got 3"):
        function(3, "preprocess")
    with pytest.raises(InvalidTypeError, match="`layer` must be a string, got 3"):
        a_name(3, "layer")


def test_lists_are_never_longer_than_memory_holds():
    assert listed((n for n in (1, 2)), "layers") == [1, 2]
    for value in (range(2**60), iter(int, 1)):
        with pytest.raises(InvalidArgumentError, match="`layers` must have at most 10 items, got"):
            listed(value, "layers", most=10)
    for value in (3, torch.tensor(1)):
        with pytest.raises(InvalidTypeError, match="`layers` must be a list, got"):
            listed(value, "layers")
    with pytest.raises(InvalidArgumentError, match="`channels` must choose at most 1,048,576, got range"):
        indices_of(range(2**60), 3, "channels")


def test_devices_are_named():
    assert named_device("meta") == torch.device("meta")
    assert named_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InvalidArgumentError, match="`device` must be a device, got 'x'"):
        named_device("x")
    with pytest.raises(
        InvalidArgumentError, match="`device` must be a device of this machine, got 'cuda:99'"
    ):
        named_device("cuda:99")
    with pytest.raises(InvalidTypeError, match="`device` must be a device or its name, got 3"):
        named_device(3)
