"""Checks that all arguments share: the value comes back, or one message that names the rule."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import torchlens_viz as tv
from torchlens_viz import (
    RunningStats,
    feature_grid,
    kernel_grid,
    layers,
    make_grid,
    objectives,
    receptive_field,
    survey,
)
from torchlens_viz.arguments import (
    a_name,
    flag,
    function,
    indices_of,
    integer,
    listed,
    made_of,
    named_device,
    number,
    one_of,
    pair,
    plain,
    real,
    shown,
)
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, needed
from torchlens_viz.files.paths import as_path
from torchlens_viz.testing import assert_no_dead_channels


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


def odd(error):
    """An object of which nothing can be asked without an error of that kind."""

    def fail(*_):
        raise error("on purpose")

    names = "index float int bool len iter getitem fspath eq repr array"
    return type("Odd", (), {**{f"__{name}__": fail for name in names.split()}, "__hash__": lambda _: 1})()


@pytest.mark.parametrize("error", [ValueError, KeyError, ZeroDivisionError, RuntimeError, TypeError])
def test_what_raises_anything_as_it_is_looked_at_is_refused(error):
    refused = pytest.raises(InvalidTypeError, match=r"`x` must be .*, got a (value of type )?Odd$")
    value = odd(error)
    for check in (integer, number, real, pair, flag, a_name, listed, as_path):
        with refused:
            check(value, "x")
    for given in (value, [value]):
        with pytest.raises(InvalidTypeError, match=r"`x` must be an int or a list of ints, got"):
            indices_of(given, 3, "x")
    with pytest.raises(InvalidArgumentError, match="`x` must be 1 or 2, got a value of type Odd"):
        one_of(value, "x", (1, 2))
    kind = InvalidArgumentError if error is ValueError else InvalidTypeError
    with pytest.raises(kind, match=r"^the rule$"):
        made_of(value, float, "the rule")


class OddFloat(float):
    def __float__(self):
        raise ValueError("on purpose")


class OddInt(int):
    def __lt__(self, other):
        raise ValueError("on purpose")

    __gt__ = __le__ = __ge__ = __eq__ = __lt__
    __hash__ = int.__hash__


def test_numbers_of_a_class_of_its_own_count_by_their_value():
    with pytest.raises(InvalidTypeError, match=r"`x` must be a number, got 1\.5"):
        number(OddFloat(1.5), "x")
    found = integer(OddInt(2), "x", least=1, most=3)
    assert type(found) is int
    assert found == 2


ODD = {
    "RunningStats": (lambda x: RunningStats(bins=[x, 1.0]), "bins"),
    "kernel_grid": (lambda x: kernel_grid(torch.rand(2, 3, 3, 3), value_range=(x, 1.0)), "value_range"),
    "kernel_grid labels": (lambda x: kernel_grid(torch.rand(2, 3, 3, 3), labels=["a", x]), "labels"),
    "make_grid": (
        lambda x: make_grid(torch.rand(1, 3, 4, 4), normalize=True, value_range=(x, 1.0)),
        "value_range",
    ),
    "feature_grid": (lambda x: feature_grid(torch.rand(1, 4, 3), grid=(x, 2)), "grid"),
    "receptive_field": (lambda x: receptive_field(nn.Conv2d(3, 2, 3), "", (1, 3, x, 8)), "input_shape"),
    "region": (lambda x: receptive_field(nn.Conv2d(3, 2, 3), "", (1, 3, 8, 8)).region((x, 0)), "position"),
    "layers": (lambda x: layers(nn.Conv2d(3, 2, 3), input_shape=(1, 3, x, 8)), "input_shape"),
    "neuron": (lambda x: objectives.neuron(layer=x), "layer"),
    "direction": (lambda x: objectives.direction([x, 1.0]), "vector"),
    "survey": (lambda x: survey(nn.Conv2d(3, 2, 3), [], "", checkpoint_seconds=x), "checkpoint_seconds"),
    "survey indices": (
        lambda x: survey(nn.Conv2d(3, 2, 3), [torch.rand(1, 3, 4, 4)], "", indices=[x]),
        "indices",
    ),
}


@pytest.mark.parametrize("error", [ValueError, KeyError])
@pytest.mark.parametrize("where", ODD)
def test_every_check_of_numbers_refuses_what_raises_anything(where, error):
    act, name = ODD[where]
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=f"`{name}` must be "):
        act(odd(error))


class Count(int):
    """A number that can be neither compared nor reckoned with."""

    def _refuse(self, *_):
        raise RuntimeError("of the caller's")

    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __neg__ = _refuse


NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELLED = [(IMAGES, torch.tensor([0, 1]))]
FOUND = tv.survey(NET, [IMAGES], "0", top_k=1, progress=False)
EXPLAINED = tv.explain(NET, IMAGES, lambda output: output.mean((1, 2, 3)), method="gradient")
COUNTED = {
    "nrow": lambda n: np.asarray(tv.feature_grid(IMAGES, nrow=n)),
    "padding": lambda n: np.asarray(tv.kernel_grid(NET, padding=n)),
    "upscale": lambda n: np.asarray(tv.overlay_grid(NET, "0", IMAGES[0], upscale=n)),
    "upscale of an explanation": lambda n: np.asarray(EXPLAINED.overlay(0, upscale=n)),
    "max_tiles and page": lambda n: np.asarray(tv.kernel_grid(NET, max_tiles=n, page=n - n)),
    "nrow of make_grid": lambda n: tv.make_grid(IMAGES, nrow=n, padding=n).numpy(),
    "tile": lambda n: np.asarray(FOUND.grid("0", IMAGES, tile=n)),
    "seed and steps": lambda n: tv.maximize(
        NET, "0", [0], size=10, steps=n, seed=n, progress=False
    ).images.numpy(),
    "blur_every": lambda n: tv.maximize(
        NET, "0", [0], size=10, steps=2, parametrization=tv.Pixels(blur=1.0, blur_every=n), progress=False
    ).images.numpy(),
    "frames and restarts": lambda n: tv.maximize(
        NET, "0", [0], size=10, steps=2, method=tv.Normalized(frames=n, restarts=n), progress=False
    ).images.numpy(),
    "max_dead": lambda n: assert_no_dead_channels(torch.zeros(1, 2, 3, 3), max_dead=n),
    "rows": lambda n: tv.ablate(
        NET, LABELLED, "0", loss=lambda output, _: output.mean((1, 2, 3)), rows=n, seed=n
    ).loss_change.numpy(),
    "maps": lambda n: repr(tv.compare(NET, NET, IMAGES, maps=n)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_counts_as_an_int_is_used_as_one(name):
    """A tensor of one number, or a class of the caller's, passed as a number and failed where it was used."""
    act = COUNTED[name]
    if name != "max_tiles and page":
        np.testing.assert_array_equal(act(torch.tensor(2)), act(2))
        np.testing.assert_array_equal(act(Count(2)), act(2))
    np.testing.assert_array_equal(act(np.int8(2)), act(2))


class Unasked:
    """Raises for whatever it is asked."""

    def __getattribute__(self, name):
        raise RuntimeError(name)


class Classless:
    @property
    def __class__(self):
        raise RuntimeError


@pytest.mark.parametrize("make", [Unasked, Classless])
def test_what_cannot_even_be_asked_is_refused(make):
    value = make()
    for check in (integer, number, real, pair, flag, a_name, listed, named_device):
        with pytest.raises(InvalidTypeError, match=r"`x` must be .* got .*(Unasked|Classless)"):
            check(value, "x")
    with pytest.raises(InvalidTypeError, match="`x` must be an int or a list of ints"):
        indices_of(value, 3, "x")
    with pytest.raises(InvalidArgumentError, match='`x` must be "a" or "b"'):
        one_of(value, "x", ("a", "b"))
