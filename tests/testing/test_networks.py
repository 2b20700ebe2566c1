"""`assert_same_activations` says which layer is the first to differ."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn

import torchlens_viz.testing.networks
from tests.comparison.nets import altered, small
from torchlens_viz.testing import assert_same_activations

IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def test_a_copy_passes():
    a = small()
    assert_same_activations(a, copy.deepcopy(a).to(memory_format=torch.channels_last), IMAGES)


def test_the_message_names_the_first_layer_and_its_worst_channel():
    a = small()
    b = altered(a, "3", lambda layer: layer.bias[6].add_(1))
    with pytest.raises(AssertionError, match=r"(?s)^after\n5 of 8 layers .*first: `3`, channel 6 of 8"):
        assert_same_activations(a, b, IMAGES, msg="after")
    with pytest.raises(AssertionError, match=r"^1 of 1 layer \(100.0%\) differs by more than 0 \+ 0.001 \*"):
        assert_same_activations(a, b, IMAGES, "3", rtol=1e-3, atol=0)
    assert_same_activations(a, b, IMAGES, ["0", "1"])
    assert_same_activations(a, b, IMAGES, atol=10)


def test_layers_of_another_shape_are_named():
    a = small()
    b = copy.deepcopy(a)
    b[6] = nn.Linear(8 * 6 * 6, 3)
    with pytest.raises(AssertionError, match=r"first: `6` puts out \(2, 5\) in `a` and \(2, 3\) in `b`"):
        assert_same_activations(a, b, IMAGES)


def test_a_chosen_layer_without_a_counterpart_fails():
    a = small()
    b = nn.Sequential(*copy.deepcopy(a)[:6])
    with pytest.raises(AssertionError, match=r"not compared, since they have no counterpart .* in `b`: `6`"):
        assert_same_activations(a, b, IMAGES, ["0", "6"])


def test_examples_run():
    assert doctest.testmod(torchlens_viz.testing.networks).failed == 0
