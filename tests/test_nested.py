"""Tensors inside any structure are recorded, kept safe, and handed on in that structure."""

from __future__ import annotations

import collections
import types
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.nets import Gives, everything
from torchlens_viz import capture

pytestmark = pytest.mark.usefixtures("process_as_it_was")

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Boxes:
    scores: torch.Tensor
    size: tuple[int, int]


class Holder:
    def __init__(self, tensors):
        self.tensors = tensors


class ListOfTensors(list):
    pass


@pytest.mark.parametrize(
    ("make", "tensors_of"),
    [
        (lambda t: (t, None, [t, 3]), lambda v: [v[0], v[2][0]]),
        (lambda t: Point(t, {"a": t}), lambda v: [v.x, v.y["a"]]),
        (lambda t: OrderedDict(a=t), lambda v: [v["a"]]),
        (lambda t: Boxes(t, (1, 2)), lambda v: [v.scores]),
        (lambda t: Holder([t]), lambda v: [v.tensors[0]]),
        (lambda t: ListOfTensors([t]), lambda v: [v[0]]),
        (lambda t: torch.max(t, 0), lambda v: [v.values]),
        (lambda t: nn.utils.rnn.pack_sequence([t]), lambda v: [v.data]),
    ],
)
def test_structure_is_kept_and_every_tensor_in_it_is_safe(make, tensors_of):
    model = nn.Sequential(Gives(make))
    with capture(model, "0") as acts:
        output = model(torch.arange(3.0))
    recorded = acts["0"]
    assert type(recorded) is type(output)
    for kept, original in zip(tensors_of(recorded), tensors_of(output), strict=True):
        assert torch.equal(kept, original)
        assert kept is not original
    before = [kept.clone() for kept in tensors_of(recorded)]
    for original in tensors_of(output):
        original.fill_(-1)
    for kept, expected in zip(tensors_of(recorded), before, strict=True):
        assert torch.equal(kept, expected)


def test_recurrent_layers_keep_their_nested_tuples():
    model = nn.Sequential(nn.LSTM(3, 4))
    value = torch.randn(5, 2, 3)
    with torch.no_grad(), capture(model, nn.LSTM) as acts:
        output, (hidden, cell) = model(value)
    kept, (kept_hidden, kept_cell) = acts["0"]
    for actual, expected in ((kept, output), (kept_hidden, hidden), (kept_cell, cell)):
        assert torch.equal(actual, expected)


# Odd structures.


class Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class Record:
    tensor: torch.Tensor
    name: str = "kept"


class Labelled(list):
    def __init__(self, items, label):
        super().__init__(items)
        self.label = label


@pytest.mark.parametrize(
    ("make", "tensor_of", "rest"),
    [
        pytest.param(Slotted, lambda v: v.tensor, type, id="slots"),
        pytest.param(Record, lambda v: v.tensor, lambda v: v.name, id="slotted dataclass"),
        pytest.param(lambda t: {t}, lambda v: next(iter(v)), len, id="set"),
        pytest.param(lambda t: frozenset([t]), lambda v: next(iter(v)), len, id="frozenset"),
        pytest.param(lambda t: collections.deque([t], 3), lambda v: v[0], lambda v: v.maxlen, id="deque"),
        pytest.param(
            lambda t: collections.defaultdict(list, a=[t]),
            lambda v: v["a"][0],
            lambda v: v.default_factory,
            id="defaultdict",
        ),
        pytest.param(lambda t: types.MappingProxyType({"a": t}), lambda v: v["a"], list, id="mappingproxy"),
        pytest.param(lambda t: Labelled([t], "kept"), lambda v: v[0], lambda v: v.label, id="list subclass"),
        pytest.param(lambda t: torch.distributions.Normal(t, 1.0), lambda v: v.loc, type, id="distribution"),
    ],
)
def test_tensors_inside_any_structure_are_safe(make, tensor_of, rest):
    model = Gives(make)
    value = torch.arange(3.0)
    with torch.no_grad(), capture(model, "") as acts:
        output = model(value)
    assert tensor_of(output) is not tensor_of(acts[""])
    assert type(acts[""]) is type(output)
    assert rest(acts[""]) == rest(output)
    tensor_of(output).fill_(-1)
    assert torch.equal(tensor_of(acts[""]), torch.arange(3.0))


def test_a_tensor_that_occurs_twice_is_kept_once():
    model = Gives(lambda value: (value, [value], value + 1))
    with capture(model, "", max_bytes=24) as acts:
        model(torch.ones(3))
    first, (again,), other = acts[""]
    assert first is again
    assert torch.equal(other, first + 1)


def test_with_gradients_a_network_still_sees_that_two_outputs_are_one_tensor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Gives(lambda value: (value, value))

        def forward(self, value):
            first, second = self.pair(value * 2)
            first.add_(1)
            return second

    model, value = Twice(), torch.ones(3, requires_grad=True)
    with capture(model, "pair", grad=True) as acts:
        output = model(value)
    assert torch.equal(output, model(value))
    (gradient,) = torch.autograd.grad(output.sum(), acts["pair"][0])
    assert torch.equal(gradient, torch.ones(3))


def test_a_structure_with_many_paths_to_one_tensor_is_walked_once():
    value = [torch.ones(1)]
    for _ in range(200):
        value = [value, value]
    model = Gives(lambda _: value)
    with capture(model, "") as acts:
        model(torch.ones(1))
    kept = acts[""]
    assert kept[0] is kept[1]
    while isinstance(kept, list):
        kept = kept[0]
    assert kept == 1


def test_a_structure_that_contains_itself_is_kept():
    def make(value):
        made = {"tensor": value}
        made["self"] = made
        return made

    model = Gives(make)
    with capture(model, "") as acts:
        model(torch.ones(1))
    assert acts[""]["tensor"] == 1


def test_lists_that_the_network_goes_on_writing_to_are_kept_as_they_were():
    # Feature pyramids append to a list of names, which holds no tensor.
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.extra = Gives(lambda pair: pair)

        def forward(self, value):
            features, names = self.extra(([value], {"names": ["0"], "sizes": collections.deque([1])}))
            features.append(value)
            names["names"].append("pool")
            names["sizes"].append(2)
            return features, names

    model = Pyramid()
    with capture(model, "extra", io="both") as acts:
        _, names = model(torch.ones(1))
    assert (len(names["names"]), len(names["sizes"])) == (2, 2)
    for features, kept in (acts["extra"].input, acts["extra"].output):
        assert len(features) == 1
        assert kept == {"names": ["0"], "sizes": collections.deque([1])}


def test_objects_without_tensors_are_handed_on_as_they_are():
    class Settings:
        def __init__(self):
            self.names = ["a"]

        def __copy__(self):
            raise AssertionError("there is no need to copy this")

    settings = Settings()
    model = Gives(lambda value: (value, settings, (1, "a"), frozenset([2])))
    with capture(model, "") as acts:
        output = model(torch.ones(1))
    assert acts[""][1] is settings
    assert all(kept is given for kept, given in zip(acts[""][2:], output[2:], strict=True))


def test_a_generator_is_handed_on_unread():
    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, value):
            return (self.conv(value + step) for step in range(3))

    model, value = Streams(), torch.ones(1, 3, 2, 2)
    with torch.no_grad(), capture(model, everything) as acts:
        stream = model(value)
        assert acts.not_called == ("conv",)
        outputs = list(stream)
    for kept, output in zip(acts.calls("conv"), outputs, strict=True):
        assert torch.equal(kept, output)


class Scaled(tuple):
    """A tuple that wants more than its items, and knows more."""

    def __new__(cls, items, scale):
        made = super().__new__(cls, items)
        made.scale = scale
        return made


class Batch(collections.abc.Mapping):
    """A mapping that is no dict and has a state of its own, tensors in it."""

    def __init__(self, data, weight, sizes=()):
        self.data, self.weight, self.sizes = dict(data), weight, sizes

    def __getitem__(self, key):
        return self.data[key]

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)


class Marked(dict):
    """A dict with a state of its own."""


def test_a_state_beside_the_items_is_kept_and_its_tensors_are_copied():
    def make(value):
        marked = Marked(a=value)
        marked.mask = value + 1
        return Scaled([value], value * 2), Batch({"a": value}, value * 3, (3,)), marked

    net, given = Gives(make), torch.ones(2)
    with capture(net, "", copy=True) as acts:
        out = net(given)
    scaled, batch, marked = acts[""]
    for tensor in (out[0].scale, out[1].weight, out[2].mask, given):
        tensor.zero_()
    assert type(scaled) is Scaled
    assert scaled.scale.tolist() == [2, 2]
    assert type(batch) is Batch
    assert batch.sizes == (3,)
    assert batch.weight.tolist() == [3, 3]
    assert batch["a"].tolist() == [1, 1]
    assert out[1]["a"].tolist() == [0, 0]
    assert type(marked) is Marked
    assert marked.mask.tolist() == [2, 2]
    assert marked["a"].tolist() == [1, 1]
