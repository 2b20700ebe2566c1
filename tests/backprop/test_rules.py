"""What passes a ReLU on the way back under each rule, and what the rules are not defined for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.backprop.test_relu import INF, KINDS, slopes_at_limits
from tests.nets import Gives
from torchlens_viz.backprop.rules import Rectified
from torchlens_viz.errors import InvalidArgumentError

RULES = ("deconvnet", "guided")
VALUES = torch.tensor([-3.0, -0.1, 0.0, 0.1, 5.9, 6.0, 6.1, 9.0])
MORE = {
    "F.threshold": (lambda x: F.threshold(x, 0, 0), 0, INF),
    "nn.Threshold in place": (nn.Threshold(0, 0, inplace=True), 0, INF),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6, True), 0, 6),
}


def gradient_of(function, values, weight, rule):
    leaf = values.clone().requires_grad_()
    with Rectified(nn.Identity(), rule) as rectified:
        result = function(leaf * 1)
    rectified.check(result)
    (gradient,) = torch.autograd.grad((result * weight).sum(), leaf)
    return result.detach(), gradient


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
@pytest.mark.parametrize("slope", [1.0, -2.0])
def test_the_deconvnet_lets_pass_what_is_positive_and_guided_only_where_it_was_open(kind, slope):
    function, low, high = {**KINDS, **MORE}[kind]
    result, passed = gradient_of(function, VALUES, slope, "deconvnet")
    assert torch.equal(result, VALUES.clamp(low, None if high == INF else high))
    assert passed.tolist() == [max(slope, 0)] * 8
    _, gated = gradient_of(function, VALUES, slope, "guided")
    for value, found in zip(VALUES.tolist(), gated.tolist(), strict=True):
        is_open = low < value < high
        if value in (low, high):  # of which torch's versions think differently
            is_open = bool(slopes_at_limits(function)[value == high])
        assert found == (max(slope, 0) if is_open else 0), value


@pytest.mark.parametrize("rule", RULES)
def test_what_is_changed_in_place_is_changed_in_place(rule):
    values = torch.randn(2, 5, requires_grad=True) * 1
    kept = values.detach().clone()
    with Rectified(nn.Identity(), rule):
        result = F.relu(values, inplace=True)
    assert result is values
    assert torch.equal(values.detach(), kept.relu())


@pytest.mark.parametrize("rule", RULES)
def test_all_else_passes_gradients_as_they_are(rule):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.LayerNorm(3)
    ).eval()
    values, weight = torch.randn(2, 2, 12, 12), torch.randn(2, 4, 3, 3)
    leaf = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad((net(leaf) * weight).sum(), leaf)
    _, found = gradient_of(net, values, weight, rule)
    assert torch.equal(found, expected)


def test_bfloat16_and_tensors_without_gradient_pass_too():
    result, gradient = gradient_of(F.relu, -torch.ones(2, 3, dtype=torch.bfloat16), 1, "deconvnet")
    assert result.dtype == torch.bfloat16
    assert (gradient == 1).all()
    with Rectified(nn.Identity(), "guided"):
        assert torch.equal(torch.relu(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.Hardswish(inplace=True), "hardswish"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Sigmoid(), "sigmoid"),
        (lambda x: x.sigmoid_(), "sigmoid"),
        (torch.tanh, "tanh"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.PReLU(), "prelu"),
        (nn.ELU(inplace=True), "elu"),
        (nn.Softplus(), "softplus"),
        (nn.Softmax(1), "softmax"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Threshold(0.5, 0), "threshold"),
        (lambda x: x.clamp(-1, 1), "clamp"),
        (lambda x: x.clamp(max=1), "clamp"),
        (lambda x: torch.maximum(x, torch.zeros(())), "the larger of a map and a constant"),
        (lambda x: torch.max(torch.zeros(6), x), "the larger of a map and a constant"),
        (lambda x: -torch.minimum(-x, torch.zeros(())), "the smaller of a map and a constant"),
        (lambda x: -(-x).min(torch.zeros(6)), "the smaller of a map and a constant"),
        (abs, "__abs__"),
        (torch.exp2, "exp2"),
        (lambda x: torch.logaddexp(x, torch.zeros(())), "logaddexp"),
        (lambda x: torch.stack([x, 0 * x]).logsumexp(0), "logsumexp"),
        (torch.special.expit, "expit"),
        (torch.asinh, "asinh"),
        (torch.erfc, "erfc"),
        (lambda x: x * x.sign(), "sign"),
        (lambda x: x.remainder(1), "remainder"),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), "scaled_dot_product_attention"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_what_bends_a_path_and_is_no_relu_is_refused_by_name(function, operation, rule):
    message = rf'`rule="{rule}"` .*applies {operation}.*; pass `rule="gradient"`, or choose a layer before it'
    with pytest.raises(InvalidArgumentError, match=message):
        gradient_of(function, torch.randn(4, 6), 1, rule)


def hidden(function):
    """Run a function where no mode can see it, as fused and scripted operations do."""

    def run(values):
        with torch._C.DisableTorchFunction():
            return function(values)

    return run


def without_gradient(x):
    with torch.no_grad():
        mask = x > 0
    return x * mask


def written_to(x):
    x = 1 * x
    x[x < 0] = 0
    return x


MASKED = [
    lambda x: x * (x > 0),
    lambda x: x * (x > 0).float(),
    lambda x: x * (1 - (x <= 0).type(torch.float32)),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x.masked_fill(~torch.gt(x, 0), 0),
    lambda x: x.clone().mul_(x >= 0),
    lambda x: x * (x.detach() > 0),
    lambda x: x * (2 * x.data - 1 > 0),
    lambda x: x * torch.logical_and(x > 0, x < 6),
    without_gradient,
    written_to,
]


@pytest.mark.parametrize("function", MASKED)
@pytest.mark.parametrize("rule", RULES)
def test_masks_made_by_comparing_values_are_refused(function, rule):
    with pytest.raises(
        InvalidArgumentError, match=r"the model works by a mask .* \(write it as torch.relu, if"
    ):
        gradient_of(function, torch.randn(4, 6), 1, rule)


def looked_at(x):
    if bool((x > 1e4).any()):
        raise ValueError
    return x


@pytest.mark.parametrize(
    "function",
    [
        looked_at,
        lambda x: x * (torch.rand_like(x) < 0.9),
        lambda x: x * (torch.rand_like(x.detach()) < 0.9),
        lambda x: x * (torch.arange(6) > 2),
        lambda x: torch.where(torch.isfinite(x), x, 0.0),
        lambda x: x[:, x[0] > -9],
        lambda x: x / (x.detach().norm() + 1),
        lambda x: x / x.norm().clamp_min(1e-6),
        F.normalize,
        hidden(F.normalize),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_comparisons_that_make_no_activation_are_not_refused(function, rule):
    values = torch.randn(4, 6)
    torch.manual_seed(0)
    _, gradient = gradient_of(function, values, 1, rule)
    leaf = values.clone().requires_grad_()
    torch.manual_seed(0)
    function(leaf).sum().backward()
    assert torch.equal(gradient, leaf.grad)


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda act: nn.Sequential(nn.ReLU(), act), r"`1` \(SiLU\)"),
        (lambda act: nn.Sequential(nn.ReLU(), nn.Sequential(act)), r"`1.0` \(SiLU\)"),
        (lambda act: nn.Sequential(Gives(F.silu)), r"`0` \(Gives\)"),
        (lambda act: Gives(F.silu), r"the model itself \(Gives\)"),
    ],
)
def test_the_refusal_names_the_innermost_module(wrap, place):
    net = wrap(nn.SiLU())
    with Rectified(net, "guided") as rectified:
        output = net(torch.randn(3, requires_grad=True))
    with pytest.raises(InvalidArgumentError, match=f"but {place} applies silu"):
        rectified.check(output)


def test_the_first_of_several_is_named_and_attention_too():
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.GELU())
    with Rectified(net, "deconvnet") as rectified:
        output = net(torch.randn(1, 3, 4, requires_grad=True))
    with pytest.raises(
        InvalidArgumentError,
        match=r"`0.self_attn` \(MultiheadAttention\) applies multi_head_attention_forward",
    ):
        rectified.check(output)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.relu()

    @staticmethod
    def backward(context, gradient):
        return gradient


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (hidden(torch.relu), "Relu is hidden within an operation of the model"),
        (hidden(F.gelu), "Gelu is hidden within an operation of the model"),
        (hidden(lambda x: torch.sigmoid(x) * 2), "Sigmoid is hidden within an operation of the model"),
        (hidden(lambda x: x.clamp(min=0)), "Clamp is hidden within an operation of the model"),
        (lambda x: torch.ops.aten.clamp_min(x, 0), "ClampMin is hidden within an operation of the model"),
        (hidden(torch.exp2), "Exp2 is hidden within an operation of the model"),
        (Own.apply, "the model has an operation of its own, Own"),
    ],
)
def test_what_is_hidden_is_found_in_the_graph(function, reason):
    with pytest.raises(InvalidArgumentError, match=reason):
        gradient_of(function, torch.randn(4), 1, "guided")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(torch.ones(4)),
        lambda x: x + F.silu(x.detach()),
        lambda x: torch.maximum(x, 2 * x),
        lambda x: x.max(1, keepdim=True).values,
        lambda x: x.expand(2, 4).amax(0),
    ],
)
def test_what_is_not_on_the_path_or_chooses_among_maps_is_not_refused(function):
    result, gradient = gradient_of(function, torch.randn(1, 4), 1, "guided")
    assert torch.isfinite(result).all()
    assert gradient.abs().sum() > 0


def test_nothing_is_rectified_after_the_block():
    leaf = torch.ones(2, 3, requires_grad=True)
    with Rectified(nn.Identity(), "guided"):
        pass
    (gradient,) = torch.autograd.grad(-leaf.relu().sum(), leaf)
    assert (gradient == -1).all()
