"""Redirected ReLUs: values stay, gradients pass where they would wake, for the chosen samples alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlens_viz.backprop.relu import Redirection

INF = float("inf")
# (function, its limits)
KINDS = {
    "F.relu": (F.relu, 0, INF),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), 0, INF),
    "F.relu by position": (lambda x: F.relu(x, True), 0, INF),
    "torch.relu": (torch.relu, 0, INF),
    "torch.relu_": (torch.relu_, 0, INF),
    "Tensor.relu": (lambda x: x.relu(), 0, INF),
    "Tensor.relu_": (lambda x: x.relu_(), 0, INF),
    "nn.ReLU": (nn.ReLU(), 0, INF),
    "nn.ReLU in place": (nn.ReLU(inplace=True), 0, INF),
    "F.relu6": (F.relu6, 0, 6),
    "nn.ReLU6": (nn.ReLU6(), 0, 6),
    "nn.ReLU6 in place": (nn.ReLU6(inplace=True), 0, 6),
    "clamp": (lambda x: x.clamp(min=0), 0, INF),
    "torch.clamp": (lambda x: torch.clamp(x, 0, 6), 0, 6),
    "clamp_": (lambda x: x.clamp_(0), 0, INF),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), 0, INF),
    "clamp_min_": (lambda x: x.clamp_min_(0), 0, INF),
    "clip": (lambda x: x.clip(0, 6), 0, 6),
}
NEITHER = torch.tensor([False, False])


def gradient_of(function, values, weight, chosen, narrow=None):
    leaf = values.clone().requires_grad_()
    with Redirection(chosen, torch.zeros_like(chosen) if narrow is None else narrow):
        result = function(leaf * 1)
    (gradient,) = torch.autograd.grad((result * weight).sum(), leaf)
    return result.detach(), gradient


def slopes_at_limits(function):
    """Return what torch itself says of the gradient at 0 and 6, of which its versions think differently."""
    limits = torch.tensor([0.0, 6.0], requires_grad=True)
    return torch.autograd.grad(function(limits * 1).sum(), limits)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_where_they_would_wake_and_nowhere_else(kind):
    function, low, high = KINDS[kind]
    values = torch.tensor([-3.0, -0.1, 0.0, 0.1, 5.9, 6.0, 6.1, 9.0]).repeat(4, 1)
    weight = torch.stack([torch.ones(8), -torch.ones(8), torch.ones(8), -torch.ones(8)])
    chosen = torch.tensor([True, True, False, False])
    result, gradient = gradient_of(function, values, weight, chosen)
    assert torch.equal(result, values.clamp(low, None if high == INF else high))
    for row in range(4):
        for value, slope, found in zip(
            values[row].tolist(), weight[row].tolist(), gradient[row].tolist(), strict=True
        ):
            at_limit = float(slopes_at_limits(function)[value == high]) if value in (low, high) else 0
            is_open = low < value < high
            wakes = (value <= low and slope > 0) or (value >= high and slope < 0)
            assert found == (slope if is_open or at_limit or (bool(chosen[row]) and wakes) else 0), (
                row,
                value,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_were_not_chosen_get_the_gradient_they_always_had(kind):
    function = KINDS[kind][0]
    values, weight = torch.randn(6, 3, 4, 4) * 4, torch.randn(6, 3, 4, 4)
    values[1, 0] = 0
    leaf = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad((function(leaf * 1) * weight).sum(), leaf)
    _, gradient = gradient_of(function, values, weight, torch.tensor([True, False] * 3))
    assert torch.equal(gradient[1::2], expected[1::2])
    assert not torch.equal(gradient[::2], expected[::2])


def test_what_is_changed_in_place_is_changed_in_place():
    values = torch.randn(2, 5, requires_grad=True) * 1
    kept = values.detach().clone()
    with Redirection(torch.tensor([True, False]), NEITHER):
        result = F.relu(values, inplace=True)
    assert result is values
    assert torch.equal(values.detach(), kept.relu())


def test_rows_that_are_folded_into_the_batch_belong_to_their_sample():
    values = -torch.ones(6, 2)
    _, gradient = gradient_of(F.relu, values, torch.ones(6, 2), torch.tensor([False, True, False]))
    assert gradient.sum(1).tolist() == [0, 0, 2, 2, 0, 0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(min=0.5),
        lambda x: x.clamp(max=1),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(min=torch.zeros(5)),
        F.hardtanh,
        F.leaky_relu,
        torch.sigmoid,
        lambda x: x.reshape(5, 2).relu().reshape(2, 5),
    ],
)
def test_what_is_no_relu_of_the_batch_is_left_alone(function):
    values, weight = torch.randn(2, 5), torch.randn(2, 5)
    leaf = values.clone().requires_grad_()
    expected = function(leaf * 1)
    (slope,) = torch.autograd.grad((expected * weight).sum(), leaf)
    result, gradient = gradient_of(function, values, weight, torch.tensor([True, True]))
    assert torch.equal(result, expected)
    assert torch.equal(gradient, slope)


def test_bfloat16_and_tensors_without_gradient_pass_too():
    values = -torch.ones(2, 3, dtype=torch.bfloat16)
    result, gradient = gradient_of(F.relu, values, torch.ones_like(values), torch.tensor([True, False]))
    assert result.dtype == torch.bfloat16
    assert gradient.sum(1).tolist() == [3, 0]
    with Redirection(torch.tensor([True]), torch.tensor([False])):
        assert torch.equal(torch.relu(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_of_a_narrow_sample_only_the_unit_nearest_to_being_on_is_redirected():
    off = torch.tensor([[-3.0, -1.0], [-2.0, -4.0]])
    some_on = torch.tensor([[-3.0, 1.0], [-2.0, -4.0]])
    values = torch.stack([off, some_on]).expand(4, 2, 2, 2)
    chosen, narrow = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    _, gradient = gradient_of(F.relu, values, torch.ones(4, 2, 2, 2), chosen, narrow)
    assert gradient[0].tolist() == [[[0, 1], [0, 0]], [[0, 1], [0, 0]]]
    assert (gradient[1] == 1).all()
    assert torch.equal(gradient[2:], (values[2:] > 0).float())
    _, flat = gradient_of(F.relu, -torch.rand(4, 5, 6), torch.ones(4, 5, 6), chosen, narrow)
    assert flat.flatten(1).sum(1).tolist() == [30, 30, 0, 0]  # where units and channels lie is not known


def test_nothing_is_redirected_after_the_block():
    leaf = -torch.ones(2, 3, requires_grad=True)
    with Redirection(torch.tensor([True, True]), NEITHER):
        pass
    (gradient,) = torch.autograd.grad(leaf.relu().sum(), leaf)
    assert gradient.abs().sum() == 0
