"""Selectors: what each kind finds, and what is said where it finds nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import torchlens_viz as tv
from torchlens_viz import LayerNotFoundError, capture
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.layers import named_layers, select


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.relu = self.stem[1]
        self.head = nn.Linear(4, 2)


def names(model, layers):
    return [layer.name for layer in select(model, layers)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("stem.0", ["stem.0"]),
        (0, ["stem.0"]),
        (-1, ["head"]),
        (1, ["stem.1", "relu"]),
        ("stem.*", ["stem.0", "stem.1"]),
        ("*", ["stem", "stem.0", "stem.1", "relu", "head"]),
        ("stem.[01]", ["stem.0", "stem.1"]),
        (re.compile(r"re|head$"), ["relu", "head"]),
        (nn.Conv2d, ["stem.0"]),
        (nn.ReLU, ["stem.1", "relu"]),
        (lambda name, module: isinstance(module, nn.Linear), ["head"]),
        (["head", 0, nn.Conv2d], ["stem.0", "head"]),
        ("", [""]),
    ],
)
def test_each_kind_of_selector_finds_its_layers_in_definition_order(layers, expected):
    assert names(Shared(), layers) == expected


def test_instance_is_found_under_every_name():
    model = Shared()
    assert names(model, model.relu) == ["stem.1", "relu"]
    assert names(model, model.stem) == ["stem"]
    assert names(model, [model.stem, model.head]) == ["stem", "head"]


def test_exact_name_wins_over_glob():
    model = nn.ModuleDict({"a[0]": nn.ReLU(), "a0": nn.ReLU()})
    assert names(model, "a[0]") == ["a[0]"]


def test_model_without_children_is_its_own_layer():
    assert names(nn.Conv2d(1, 1, 1), nn.Conv2d) == [""]
    assert names(nn.Conv2d(1, 1, 1), 0) == [""]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("stem.2", "no layer is named `stem.2`; did you mean `stem.1` or `stem.0`"),
        ("conv?", "no layer is named `conv.`; there are `stem`"),
        (3, "layer 3 is out of range: the model has 3 modules without children"),
        (-4, "layer -4 is out of range"),
        (re.compile("layer4"), "no layer name matches 'layer4'; there are `stem`, `stem.0`"),
        (nn.ConvTranspose2d, "has no ConvTranspose2d; it has 1 Conv2d, 1 ReLU, 1 Linear"),
        (nn.ReLU(), "does not contain the given ReLU instance"),
        (lambda name, module: False, "no layer satisfies the predicate"),
        (["stem.0", "nothing"], "no layer is named `nothing`"),
    ],
)
def test_selector_without_a_match_names_what_there_is(layers, message):
    model = Shared()
    model.relu = nn.Identity()
    del model.relu
    with pytest.raises(LayerNotFoundError, match=message):
        select(model, layers)


def test_empty_list_is_refused():
    with pytest.raises(ValueError, match="`layers` must name at least one layer, got an empty list"):
        select(Shared(), [])


@pytest.mark.parametrize("layers", [True, 1.5, None, torch.zeros(1), int, {"stem": 1}])
def test_other_kinds_are_refused(layers):
    with pytest.raises(TypeError, match="`layers` must"):
        select(Shared(), layers)


def test_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got int"):
        select(3, "a")


def test_wrappers_do_not_show_in_names():
    plain = Shared()
    expected = [layer.name for layer in named_layers(plain)]
    compiled = torch.compile(plain, backend="eager")
    assert [layer.name for layer in named_layers(compiled)] == expected
    assert [layer.name for layer in named_layers(nn.DataParallel(plain))] == expected
    plain.stem = torch.compile(plain.stem, backend="eager")
    found = named_layers(plain)
    assert [layer.name for layer in found] == expected
    assert all("_orig_mod" not in type(layer.module).__name__ for layer in found)
    assert found[1].module is plain.stem._orig_mod


class Unready(nn.Module):
    def __init__(self):
        pass  # without `super().__init__()`


LOOKED_AT = {
    "capture": lambda model: capture(model, "*"),
    "maximize": lambda model: tv.maximize(model, "0", size=8, steps=1),
    "survey": lambda model: tv.survey(model, [torch.rand(1, 3, 8, 8)], "*", progress=False),
    "explain": lambda model: tv.explain(model, torch.rand(3, 8, 8)),
    "project": lambda model: tv.project(model, "0", torch.rand(3, 8, 8)),
    "overlay_grid": lambda model: tv.overlay_grid(model, "0", torch.rand(3, 8, 8)),
    "pair_grid": lambda model: tv.pair_grid(model, "0", torch.rand(3, 8, 8)),
    "compare": lambda model: tv.compare(model, model, torch.rand(1, 3, 8, 8)),
    "report": lambda model: tv.report(model, torch.rand(1, 3, 8, 8), "page.html"),
    "receptive_field": lambda model: tv.receptive_field(model, "0", (1, 3, 8, 8)),
    "layers": lambda model: tv.layers(model, torch.rand(1, 3, 8, 8)),
    "kernel_grid": lambda model: tv.kernel_grid(model),
    "Monitor": lambda model: tv.Monitor(model, object()),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_model_that_was_not_initialised_is_refused(name):
    with pytest.raises(InvalidArgumentError, match=r"`model` must be initialised, got Unready .*super\(\)"):
        LOOKED_AT[name](Unready())
    model = nn.Sequential(nn.Conv2d(3, 2, 3), object.__new__(nn.ReLU))
    with pytest.raises(InvalidArgumentError, match=r"`model` must list its parts, but .* fails .*'ReLU' obj"):
        LOOKED_AT[name](model)


@pytest.mark.parametrize("method", ["parameters", "named_parameters", "buffers", "modules", "named_modules"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_model_that_cannot_list_its_parts_is_refused(name, method):
    kind = type("Failing", (nn.Sequential,), {method: lambda *_, **__: {}["on purpose"]})
    with pytest.raises(
        InvalidArgumentError, match=rf"but `{method}\(\)` of Failing fails \(KeyError: 'on purpose'\)"
    ) as caught:
        LOOKED_AT[name](kind(nn.Conv2d(3, 2, 3)))
    assert isinstance(caught.value.__cause__, KeyError)
