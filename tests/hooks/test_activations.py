"""`Activations`: every call of every layer, in execution order, and what is said of the missing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.nets import Repeats
from torchlens_viz import LayerNotFoundError, capture
from torchlens_viz.errors import LayerNotCapturedError, SeveralCallsError


def test_iteration_is_in_execution_order_and_read_only(net, x):
    with capture(net, ["conv2", "conv1", ""]) as acts:
        net(x)
    assert list(acts) == ["conv1", "conv2", ""]
    assert len(acts) == 3
    assert "conv1" in acts
    assert "relu1" not in acts
    with pytest.raises(TypeError, match="does not support item assignment"):
        acts["conv1"] = 0


def test_every_call_is_kept_with_its_own_shape():
    model = Repeats()
    with torch.no_grad(), capture(model, ["conv", "unused"]) as acts:
        model(torch.ones(1, 2, 4, 4))
    assert [tuple(value.shape) for value in acts.calls("conv")] == [(1, 2, 4, 4), (1, 2, 2, 4)]
    assert acts.not_called == ("unused",)
    assert acts.calls("unused") == ()
    with pytest.raises(SeveralCallsError, match=r"`conv` ran 2 times; take one of `acts.calls\('conv'\)`"):
        acts["conv"]


def test_shared_module_is_recorded_under_every_name_in_memory_of_its_own():
    model = Repeats()
    with torch.no_grad(), capture(model, nn.Conv2d) as acts:
        model(torch.ones(1, 2, 4, 4))
    first, second = acts.calls("conv")[0], acts.calls("alias")[0]
    assert torch.equal(first, second)
    first.zero_()
    assert not torch.equal(first, second)


def test_clear_forgets_and_goes_on(net, x):
    with capture(net, "conv1") as acts:
        net(x)
        acts.clear()
        assert acts.not_called == ("conv1",)
        net(x + 1)
    assert torch.equal(acts["conv1"], net.conv1(x + 1).detach())


def test_missing_layers_are_explained(net, x):
    with capture(net, ["conv1", "conv2"]) as acts:
        net.conv1(x)
    with pytest.raises(LayerNotCapturedError, match="`conv2` was selected but did not run"):
        acts["conv2"]
    with pytest.raises(KeyError, match=r"`relu1` was not selected .* `conv1`"):
        acts["relu1"]
    with pytest.raises(LayerNotFoundError, match="did you mean `conv1`"):
        capture(net, "conv_1")
    assert acts.get("conv2") is None


def test_repr_is_a_table(net, x):
    net.register_module("spare", nn.Identity())
    net.forward = lambda value: net.conv1(value)
    with capture(net, ["conv1", "spare"]) as acts:
        net(torch.zeros(1, 3, 3, 3))
        net(torch.zeros(2, 3, 3, 3))
    lines = [line.split() for line in repr(acts).splitlines()]
    assert lines[1] == ["layer", "shape", "dtype", "device", "min", "mean", "max"]
    assert lines[2][:9] == ["conv1", "[call", "0]", "(1,", "4,", "1,", "1)", "float32", "cpu"]
    assert lines[2][9] == f"{net.conv1.bias.min():.4g}"
    assert lines[4] == ["spare", "not", "called"]
