"""Gradients at what was captured: for every option that is not refused, those of the network itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.nets import hook_count
from torchlens_viz import RunningStats, capture
from torchlens_viz.errors import CaptureError, InvalidArgumentError
from torchlens_viz.hooks.activations import Inputs


class Branches(nn.Module):
    """Residual, with in-place layers, one of which is called for its effect alone, and a keyword argument."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.gate = nn.Hardtanh(-0.2, 0.2, inplace=True)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, image):
        value = self.act(self.stem(image))
        inner = self.body(value)
        self.gate(inner)
        value = self.norm(input=value + inner)
        return self.head(value.mean((2, 3)))


@pytest.fixture
def branches():
    torch.manual_seed(4)
    return Branches().double().eval()


@pytest.fixture
def image():
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_of(output):
    return (output * torch.arange(1.0, output.numel() + 1).view_as(output)).square().sum()


def gradient_at(model, name, image, io):
    """Return the gradient at a point of the network by adding zeros there, without any hook."""
    module, forward = model.get_submodule(name), model.get_submodule(name).forward
    zeros = []

    def shifted(value):
        zeros.append(torch.zeros_like(value, requires_grad=True))
        # Nobody uses what the gate returns, so that the network's own tensor is the one to shift.
        return value.add_(zeros[-1]) if name == "gate" else value + zeros[-1]

    def around(*args, **kwargs):
        if io == "input":
            args, kwargs = tuple(map(shifted, args)), {key: shifted(value) for key, value in kwargs.items()}
        output = forward(*args, **kwargs)
        return shifted(output) if io == "output" else output

    module.forward = around
    try:
        return torch.autograd.grad(loss_of(model(image)), zeros)[0]
    finally:
        del module.forward


def point(recorded, io):
    """Return the tensor at one point of what was recorded."""
    if io == "both":
        recorded = recorded.input
    if isinstance(recorded, Inputs):
        return recorded.kwargs["input"]
    return recorded


LAYERS = ["stem", "act", "body", "gate", "norm", "head"]


# `copy=False` is for where nothing works in place; and nobody uses what the gate returns.
CASES = [
    *((name, io, copy) for name in LAYERS for io in ("output", "input", "both") for copy in (True, "lazy")),
    *((name, io, False) for name in ("norm", "head") for io in ("output", "input", "both")),
]


@pytest.mark.parametrize(("name", "io", "copy"), [case for case in CASES if case[:2] != ("gate", "output")])
def test_the_gradient_at_a_layer_is_that_of_the_network(branches, image, name, io, copy):
    image.requires_grad_()
    expected, plain = gradient_at(branches, name, image, "input" if io == "both" else io), branches(image)
    with capture(branches, [name], io=io, grad=True, copy=copy) as acts:
        output = branches(image)
    assert torch.equal(output, plain)
    (found,) = torch.autograd.grad(loss_of(output), point(acts[name], io), retain_graph=True)
    torch.testing.assert_close(found, expected)
    parameters = list(branches.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss_of(output), parameters),
        torch.autograd.grad(loss_of(plain), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert hook_count(branches) == 0


@pytest.mark.parametrize("io", ["output", "input"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"device": "cpu"},
        {"channels": [4, 1]},
        {"channels": 2, "dtype": torch.float32, "copy": False},
    ],
    ids=str,
)
def test_the_gradient_at_a_part_or_in_another_type_is_that_of_the_network(branches, image, options, io):
    expected, plain = gradient_at(branches, "body", image, io), branches(image)
    with capture(branches, ["body"], io=io, grad=True, **options) as acts:
        output = branches(image)
    assert torch.equal(output, plain)  # to the last bit, though what is kept is rounded
    (found,) = torch.autograd.grad(loss_of(output), acts["body"], retain_graph=True)
    chosen = options.get("channels", list(range(6)))
    expected = expected[:, [chosen] if isinstance(chosen, int) else chosen]
    assert found.dtype == options.get("dtype", torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3 if "dtype" in options else 1e-9, atol=1e-3)
    (ours,) = torch.autograd.grad(loss_of(output), branches.stem.weight)
    (theirs,) = torch.autograd.grad(loss_of(plain), branches.stem.weight)
    torch.testing.assert_close(ours, theirs)  # what the type does not hold is not lost to the network


def test_one_tensor_that_is_taken_three_times_is_one_tensor(image):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    value = image[:, 0].clone().requires_grad_()
    expected = torch.autograd.grad(attention(value, value, value)[0].square().sum(), value)[0]
    with capture(attention, "", io="input", grad=True) as acts:
        output = attention(value, value, value)[0]
    query, key, _ = acts[""].args
    assert query is key
    (found,) = torch.autograd.grad(output.square().sum(), query)
    torch.testing.assert_close(found, expected)


def test_each_name_of_a_shared_layer_has_the_gradient(image):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Conv2d(3, 3, 1).double()

        def forward(self, value):
            return self.one(value).square()

    model = Shared()
    with capture(model, ["one", "other"], grad=True) as acts:
        output = model(image)
    for name in ("one", "other"):
        (found,) = torch.autograd.grad(output.sum(), acts[name], retain_graph=True)
        torch.testing.assert_close(found, 2 * acts[name].detach())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{"io": "input"}, {"channels": [0, 2]}, {"dtype": torch.float32}], ids=str
)
def test_checkpointing_gets_the_gradients_it_always_had(branches, image, options, reentrant):
    image.requires_grad_()
    expected = torch.autograd.grad(loss_of(branches(image)), image)[0]
    with capture(branches, ["body", "act"], grad=True, **options):
        output = checkpoint(branches, image, use_reentrant=reentrant)
        loss_of(output).backward()
    torch.testing.assert_close(image.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduce", [torch.mean, RunningStats])
def test_a_reduced_value_is_refused_on_a_graph(branches, reduce):
    with pytest.raises(InvalidArgumentError, match=r"`(reduce|grad)` (cannot go|has no effect) with .*leave"):
        capture(branches, ["body"], grad=True, reduce=reduce)


@pytest.mark.parametrize("where", ["", "body", "head"])
def test_a_hook_that_is_always_called_is_not_skipped_though_it_came_later(branches, image, where):
    called = []
    with capture(branches, ["body"], stop=True):
        handle = branches.get_submodule(where).register_forward_hook(
            lambda *args: called.append(1), always_call=True
        )
        with pytest.raises(CaptureError, match=r"`stop=True` would skip .*`always_call=True`; remove them"):
            branches(image)
        handle.remove()
    assert called == ([] if where == "head" else [1])
    assert hook_count(branches) == 0
