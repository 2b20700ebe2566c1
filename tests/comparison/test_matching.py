"""Which layers belong together, where one network has folded some of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental import optimization

from tests.comparison.nets import small
from torchlens_viz import compare
from torchlens_viz.comparison.matching import Call, by_name, is_layer, plain_name

IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def calls(*names: str) -> list[Call]:
    return [Call(name, 0) for name in names]


def test_a_normalisation_that_is_gone_was_folded_into_the_layer_before():
    conv, norm, relu = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()
    a = {"conv": conv, "norm": norm, "relu": relu}
    order = calls("conv", "norm", "relu")
    found, folded = by_name(order, a, {"conv": conv, "relu": relu})
    assert found == {Call("conv", 0): Call("norm", 0), Call("relu", 0): Call("relu", 0)}
    assert folded == {"conv": "norm"}


@pytest.mark.parametrize("gone", [nn.Dropout(), nn.ReLU(), nn.MaxPool2d(2)])
def test_another_layer_that_is_gone_was_not(gone):
    conv = nn.Conv2d(1, 1, 1)
    found, folded = by_name(calls("conv", "other"), {"conv": conv, "other": gone}, {"conv": conv})
    assert found == {Call("conv", 0): Call("conv", 0)}
    assert folded == {}


def test_what_became_an_identity_is_looked_at_there():
    conv = nn.Conv2d(1, 1, 1)
    a = {"conv": conv, "norm": nn.BatchNorm2d(1), "relu": nn.ReLU()}
    b = {"conv": conv, "norm": nn.Identity(), "relu": nn.Identity()}
    found, folded = by_name(calls("conv", "norm", "relu"), a, b)
    assert found == {Call("relu", 0): Call("relu", 0)}
    assert folded == {"conv": "relu", "norm": "relu"}


def test_a_network_whose_normalisations_torch_folded_is_the_same():
    a = small()
    b = optimization.fuse(copy.deepcopy(a))
    found = compare(a, b, IMAGES)
    assert found.first is None
    assert found.folded == {"0": "1"}
    assert (found["1"].other, found.only_in_a) == ("0", ())
    with torch.no_grad():
        b.get_submodule("0").bias[4] += 0.1
    found = compare(a, b, IMAGES)
    assert (found.first, found["1"].channel) == ("1", 4)


def test_names_of_exported_layers_lose_the_number_of_their_call():
    assert plain_name("body@1.relu@12") == "body.relu"


def test_containers_identities_and_dropout_have_no_place_in_an_order():
    assert [is_layer(each) for each in (nn.Sequential(nn.ReLU()), nn.Identity(), nn.Dropout())] == [False] * 3
    assert is_layer(nn.ReLU())
