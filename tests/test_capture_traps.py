"""`capture` where it would be easy to be silently wrong: odd tensors, odd structures, odd calls, wrappers."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchlens_viz import capture
from torchlens_viz.errors import CaptureError, CaptureMemoryError, LayerNotCapturedError, LayerNotFoundError
from torchlens_viz.hooks.activations import Inputs


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def everything(name: str, module: nn.Module) -> bool:
    return True


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, value):
        return self.make(value)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was():
    from torch._dynamo import eval_frame

    before = eval_frame._stance, torch.is_grad_enabled()
    yield
    assert (eval_frame._stance, torch.is_grad_enabled()) == before


# Kinds of tensors.


def quantised(value: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        message = "torch.quantize_per_tensor, torch.quantize_per_channel and other"
        warnings.filterwarnings("ignore", message, UserWarning)
        return torch.quantize_per_tensor(value, 0.1, 3, torch.quint8)


@pytest.mark.parametrize("keep", [True, "lazy"])
def test_quantised_tensors_keep_scale_and_values(keep):
    # A lazy clone of a quantised tensor has no scale: reading it ended the process.
    model = Gives(quantised)
    value = torch.tensor([0.1, 0.5, -0.2])
    with torch.no_grad(), capture(model, "", copy=keep) as acts:
        output = model(value)
    kept = acts[""]
    assert (kept.q_scale(), kept.q_zero_point(), kept.dtype) == (0.1, 3, torch.quint8)
    assert torch.equal(kept.int_repr(), output.int_repr())
    assert "quint8" in repr(acts)


def without_warnings(make):
    def made(value):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            warnings.filterwarnings(
                "ignore", "The PyTorch API of nested tensors is in prototype", UserWarning
            )
            warnings.filterwarnings("ignore", "ComplexHalf support is experimental", UserWarning)
            return make(value)

    return made


def parts(value: torch.Tensor) -> list[torch.Tensor]:
    """Return plain tensors with the same content as any kind of tensor."""
    if value.is_nested:
        return list(value.unbind())
    if value.layout is not torch.strided:
        value = value.to_dense()
    if value.dtype.itemsize == 1 and value.is_floating_point():
        value = value.view(torch.uint8)
    return [value.resolve_conj()]


@pytest.mark.parametrize("keep", [True, "lazy"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda v: v.to_sparse(), id="sparse"),
        pytest.param(lambda v: v.to_sparse_csr(), id="csr"),
        pytest.param(lambda v: torch.nested.nested_tensor([v[0], v[1, :2]]), id="nested"),
        pytest.param(
            lambda v: torch.nested.nested_tensor([v[0], v[1, :2]], layout=torch.jagged), id="jagged"
        ),
        pytest.param(lambda v: v.to_mkldnn(), id="mkldnn"),
        pytest.param(lambda v: v.to(torch.float8_e4m3fn), id="float8"),
        pytest.param(lambda v: v.to(torch.complex64), id="complex"),
        pytest.param(lambda v: (v * 1j).conj(), id="conjugate view"),
        pytest.param(lambda v: v > 0, id="bool"),
        pytest.param(lambda v: v.to(torch.uint16), id="uint16"),
        pytest.param(lambda v: v[:0], id="empty"),
        pytest.param(lambda v: v[0, 0], id="scalar"),
        pytest.param(lambda v: v[None].expand(4, 2, 3), id="expanded"),
        pytest.param(lambda v: v.t()[1:], id="view"),
    ],
)
def test_every_kind_of_tensor_is_kept_and_described(make, keep):
    model = Gives(without_warnings(make))
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with torch.no_grad(), capture(model, "", copy=keep, max_bytes=2**20) as acts:
        output = model(value)
    kept = acts[""]
    assert (type(kept), kept.dtype, kept.layout) == (type(output), output.dtype, output.layout)
    for actual, expected in zip(parts(kept), parts(output), strict=True):
        assert torch.equal(actual, expected)
    assert len(repr(acts).splitlines()) == 3


def test_table_is_printed_for_tensors_that_cannot_tell_their_values(net, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.no_grad(), capture(net, "0") as acts:
            net(x)
        line = repr(acts).splitlines()[2].split()
    assert line == ["0", "(2,", "4,", "6,", "6)", "float32", "cpu", "-", "-", "-"]


@pytest.mark.parametrize("keep", [True, "lazy"])
def test_elements_of_an_expanded_output_can_be_written_one_by_one(keep):
    model = Gives(lambda value: value.expand(4, 3))
    with capture(model, "", copy=keep) as acts:
        model(torch.zeros(1, 3))
    acts[""][0, 0] = 1
    assert acts[""].sum() == 1


@pytest.mark.parametrize("keep", [True, "lazy"])
def test_a_view_that_is_kept_does_not_keep_the_whole(keep):
    model = Gives(lambda value: value[:1])
    with capture(model, "", copy=keep) as acts:
        model(torch.zeros(1000))
    assert acts[""].untyped_storage().nbytes() == 4


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize("keep", [True, "lazy"])
def test_tensor_subclasses_stay_what_they_are_and_are_safe(keep):
    model = Gives(lambda value: value.as_subclass(Marked))
    value = torch.ones(3)
    with torch.no_grad(), capture(model, "", copy=keep) as acts:
        model(value)
    value.zero_()
    assert type(acts[""]) is Marked
    assert acts[""].sum().item() == 3


@pytest.mark.parametrize("keep", [True, "lazy"])
def test_what_a_layer_hands_back_unchanged_is_safe_too(keep):
    model = Gives(lambda value: value)
    value = torch.ones(3)
    with torch.no_grad(), capture(model, "", copy=keep) as acts:
        model(value)
    value.zero_()
    assert acts[""].sum() == 3


def test_parameters_that_a_layer_puts_out_are_recorded_as_plain_values():
    model = nn.Linear(2, 2)
    model.forward = lambda: model.weight
    with capture(model, "") as acts:
        model()
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(acts[""], before)
    assert not acts[""].requires_grad


# Structures.


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


# Calls.


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, value, depth=2):
        return self.conv(value) if depth == 0 else self(value, depth - 1) * 2


def test_modules_that_call_themselves_are_recorded_inside_out(x):
    model, value = Recursive(), x[:, :1]
    with torch.no_grad(), capture(model, everything, io="both") as acts:
        output = model(value)
    inner, middle, outer = acts.calls("")
    assert list(acts) == ["conv", ""]
    assert torch.equal(outer.output, output)
    assert torch.equal(middle.output * 2, output)
    assert torch.equal(inner.output, acts["conv"].output)
    assert [call.input.args[1:] for call in (inner, middle)] == [(0,), (1,)]
    assert torch.equal(outer.input, value)


def test_both_pairs_the_right_input_when_a_module_fails_within_itself():
    class Fails(nn.Module):
        def forward(self, value, again=True):
            if not again:
                raise ValueError("not like that")
            with contextlib.suppress(ValueError):
                self(value * 100, again=False)
            return value + 1

    model = Fails()
    with capture(model, "", io="both") as acts:
        model(torch.ones(1))
    assert acts[""].input == 1
    assert acts[""].output == 2


def test_both_leaves_out_a_call_that_began_before_the_block():
    blocks = []

    class Enters(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, value):
            blocks.append(capture(model, everything, io="both"))
            blocks.append(blocks[0].__enter__())
            return self.inner(value)

    model = nn.Sequential(Enters())
    for module in model.modules():  # a module without hooks skips those added while it runs
        module.register_forward_hook(lambda *_: None)
    model(torch.ones(1))
    blocks[0].__exit__(None, None, None)
    assert list(blocks[1]) == ["0.inner"]
    assert blocks[1].not_called == ("", "0")


def test_stopping_forgets_the_inputs_of_calls_that_never_return(x):
    model = Recursive()
    manager = capture(model, "", io="both", stop=True)
    with torch.no_grad(), manager as acts:
        for _ in range(3):
            assert model(x[:, :1]) is None  # ends where the innermost call returns
        assert manager._taken == []
    assert [call.input.args[1] for call in acts.calls("")] == [0, 0, 0]


def test_a_module_that_overrides_call_is_not_called_and_its_children_are(x):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def __call__(self, value):
            return self.forward(value)

        def forward(self, value):
            return self.conv(value)

    model = nn.Sequential(Calls())
    with torch.no_grad(), capture(model, everything) as acts:
        output = model(x)
    assert torch.equal(acts["0.conv"], output)
    assert acts.not_called == ("0",)
    with pytest.raises(
        LayerNotCapturedError, match=r"`0` was selected but did not run.*calls `\.forward\(\)`"
    ):
        acts["0"]


def test_a_layer_replaced_within_the_block_is_not_called_and_loses_its_hook(net, x):
    with capture(net, "0") as acts:
        old, net[0] = net[0], nn.Conv2d(3, 4, 3)
        net(x)
    assert acts.not_called == ("0",)
    assert hook_count(old) == 0


def test_functional_calls_are_recorded_with_the_weights_they_use(net, x):
    weights = {name: value * 2 for name, value in net.named_parameters()}
    with torch.no_grad(), capture(net, "0") as acts:
        torch.func.functional_call(net, weights, (x,))
    assert torch.equal(acts["0"], F.conv2d(x, weights["0.weight"], weights["0.bias"]))


def test_weights_that_are_computed_show_in_what_is_recorded(x):
    weight_norm, spectral_norm = (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    )
    model = nn.Sequential(
        weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(inplace=True), spectral_norm(nn.Conv2d(4, 4, 3))
    )
    model.eval()
    with torch.no_grad():
        with capture(model, nn.Conv2d) as acts:
            output = model(x)
        assert torch.equal(acts["0"], F.conv2d(x, model[0].weight, model[0].bias))
    assert list(acts) == ["0", "2"]
    assert torch.equal(acts["2"], output)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(2, 3, 3), (1, 2, 9)),
        (nn.Conv3d(2, 3, 3), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(2, 3, 3), (1, 2, 4, 4)),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.LazyConv2d(3, 3), (1, 2, 5, 5)),
        (nn.LazyConvTranspose1d(3, 3), (1, 2, 5)),
        (nn.Linear(4, 2), (3, 4)),
        (nn.BatchNorm2d(2), (2, 2, 3, 3)),
        (nn.GroupNorm(1, 2), (2, 2, 3, 3)),
        (nn.GELU(), (2, 2)),
        (nn.Upsample(scale_factor=2), (1, 2, 3, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("keep", [True, "lazy"])
def test_every_kind_of_layer_is_recorded_before_in_place_operations(layer, size, keep):
    layer = copy.deepcopy(layer)
    value = torch.randn(size)
    model = nn.Sequential(layer, nn.Hardtanh(-0.01, 0.01, inplace=True)).eval()
    with torch.no_grad(), capture(model, "0", copy=keep) as acts:
        model(value)
    with torch.no_grad():
        assert torch.equal(acts["0"], layer(value))
    assert acts["0"].abs().max() > 0.01
    assert hook_count(model) == 0


def test_lazy_layers_are_captured_on_the_call_that_makes_them(x):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(inplace=True))
    with torch.no_grad(), capture(model, 0, io="both", stop=True) as acts:
        assert model(x) is None
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(acts["0"].output, F.conv2d(x, model[0].weight, model[0].bias))
    assert hook_count(model) == 0


def test_attention_records_what_runs_and_names_what_is_bypassed():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    value = torch.randn(1, 4, 8)
    with torch.no_grad():
        alone = layer(value)  # the fused path, in which no child is called
        with capture(layer, everything) as acts:
            output = layer(value)
    torch.testing.assert_close(output, alone)
    assert torch.equal(acts[""], output)
    assert torch.equal(acts["linear1"], layer.linear1(acts["norm1"]).detach())
    assert acts.not_called == ("self_attn.out_proj",)
    with pytest.raises(LayerNotCapturedError, match=r"`self_attn.out_proj` .*uses the weights directly"):
        acts["self_attn.out_proj"]


# Other people's hooks.


def test_hooks_that_were_there_first_are_part_of_what_is_recorded(net, x):
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad(), capture(net, "0", io="both") as acts:
        net(x)
    assert torch.equal(acts["0"].input, x * 2)
    with torch.no_grad():
        assert torch.equal(acts["0"].output, F.conv2d(x * 2, net[0].weight, net[0].bias) + 1)


def test_a_hook_that_replaces_keyword_arguments_does_not_confuse_the_pairs():
    class Scales(nn.Module):
        def forward(self, value, *, by):
            return value * by

    model = Scales()
    value = torch.ones(2)
    with capture(model, "", io="both") as acts:
        model.register_forward_pre_hook(lambda module, args, kwargs: (args, {"by": 5}), with_kwargs=True)
        model(value, by=3)
    assert isinstance(acts[""].input, Inputs)
    assert acts[""].input.kwargs == {"by": 3}
    assert torch.equal(acts[""].output, value * 5)


def test_a_failing_hook_of_somebody_else_ends_only_the_pass_it_is_in(net, x):
    def fail(*_):
        raise ZeroDivisionError("not mine")

    with torch.no_grad(), capture(net, everything, io="both") as acts:
        handle = net[1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError, match="not mine"):
            net(x)
        handle.remove()
        net(x * 2)
    assert [len(acts.calls(name)) for name in ("0", "1", "2", "")] == [2, 2, 1, 1]
    assert torch.equal(acts[""].input, x * 2)


def test_hooks_that_always_run_get_no_less_than_before(net, x):
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output is None), always_call=True)
    with torch.no_grad(), capture(net, "0") as acts:
        with pytest.raises(RuntimeError, match="channels"):
            net(x[:, :2])
        net(x)
    assert seen == [True, False]
    assert len(acts.calls("0")) == 1


def test_full_backward_hooks_get_the_same_gradients(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 5, 3))
    seen = []
    x.requires_grad_()
    model[0].register_full_backward_hook(lambda module, taken, given: seen.append(given[0].clone()))
    model(x).square().sum().backward()
    with capture(model, everything, grad=True, io="both"):
        output = model(x)
    output.square().sum().backward()
    assert torch.equal(seen[0], seen[1])


# Options.


def test_reduction_with_parameters_works_in_inference_mode_and_leaves_no_graph(net, x):
    probe = nn.Linear(6, 2)
    for mode in (torch.inference_mode, torch.no_grad, contextlib.nullcontext):
        with mode(), capture(net, "0", reduce=probe) as acts:
            net(x)
        assert not acts["0"].requires_grad
        assert not acts["0"].is_inference()
        assert torch.equal(acts["0"], probe(net[0](x)).detach())


def test_each_name_of_a_shared_layer_can_be_trained_on_after_inference_mode(x):
    model = nn.Module()
    model.conv = model.alias = nn.Conv2d(3, 3, 1)
    with torch.inference_mode(), capture(model, nn.Conv2d) as acts:
        model.conv(x)
    for value in acts.values():
        weight = torch.ones((), requires_grad=True)
        (value * weight).sum().backward()
        assert weight.grad == value.sum()


def test_memory_limit_counts_every_name_of_a_shared_layer(x):
    model = nn.Module()
    model.conv = model.alias = nn.Conv2d(3, 3, 1)
    size = 2 * 3 * 8 * 8 * 4
    with pytest.raises(CaptureMemoryError, match=r"`alias` needs 1,536 bytes, 1,536 are held"):
        with torch.no_grad(), capture(model, nn.Conv2d, max_bytes=2 * size - 1):
            model.conv(x)
    with torch.no_grad(), capture(model, nn.Conv2d, max_bytes=2 * size) as acts:
        model.conv(x)
    assert len(acts) == 2


# Transforms and tracing.


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_transforms_are_refused_with_an_explanation(net, x, transform):
    function = transform(lambda value: net(value).sum())
    with pytest.raises(CaptureError, match=r"`0` ran inside torch\.vmap or torch\.func\.grad"):
        with capture(net, "0"):
            function(x)
    assert hook_count(net) == 0


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, value):
        return self.child(value) + 1


@pytest.mark.parametrize("io", ["output", "input", "both"])
def test_symbolic_tracing_is_refused_with_an_explanation(net, io):
    model = Parent(Parent(net))
    with pytest.raises(CaptureError, match=r"ran inside torch\.fx\.symbolic_trace"):
        with capture(model, everything, io=io):
            torch.fx.symbolic_trace(model)
    assert hook_count(model) == 0


def test_graph_modules_are_captured_and_their_copies_are_not(net, x):
    model = torch.fx.symbolic_trace(net)
    with torch.no_grad():
        expected = net(x)
        with capture(model, "0", stop=True) as acts:
            twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            for twin in twins:
                assert torch.equal(twin(x), expected)
                assert twin.__dict__.get("_compiled_call_impl") is None
            assert list(acts) == []
            assert model(x) is None
        assert torch.equal(acts["0"], net[0](x))


class CopiesItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, value):
        return self.conv(value)

    def __getstate__(self):
        return self.__dict__.copy()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_copies_its_whole_dict_leaves_the_stop_behind(duplicate, x):
    model = CopiesItself()
    with torch.no_grad(), capture(model, "conv", stop=True) as acts:
        twin = duplicate(model)
        assert torch.equal(twin(x), twin.conv(x))
        assert list(acts) == []
    assert twin._compiled_call_impl is None


def test_exported_programs_say_that_their_layers_do_not_run(net, x):
    program = torch.export.export(net, (x,))
    with torch.no_grad(), capture(torch.export.unflatten(program), "0") as acts:
        torch.export.unflatten(program)  # a second one is another model
    assert acts.not_called == ("0",)
    unflattened = torch.export.unflatten(program)
    with torch.no_grad(), capture(unflattened, "0") as acts:
        unflattened(x)
    assert torch.equal(acts["0"], net[0](x).detach())
    flat = program.module()
    with torch.no_grad(), capture(flat, ["0", "2"]) as acts:
        flat(x)
    assert acts.not_called == ("0", "2")
    with pytest.raises(LayerNotCapturedError, match=r"`0` was selected but did not run"):
        acts["0"]


def test_export_within_the_block_is_neither_disturbed_nor_recorded(net, x):
    with capture(net, everything, io="both") as acts:
        program = torch.export.export(net, (x,))
    assert list(acts) == []
    with torch.no_grad():
        assert torch.equal(program.module()(x), net(x))


# torch.compile.


@pytest.fixture
def compiles():
    count = []

    def backend(module, inputs):
        count.append(1)
        return module.forward

    torch.compiler.reset()
    yield backend, count
    torch.compiler.reset()


def test_capturing_a_compiled_model_causes_no_recompilation(net, x, compiles):
    backend, count = compiles
    model = torch.compile(net, backend=backend)
    with torch.no_grad():
        model(x)
        for stop in (False, True):
            with capture(model, nn.Conv2d, stop=stop) as acts:
                model(x)
            assert len(acts.calls("0")) == 1
            model(x)
            assert len(acts.calls("0")) == 1  # nothing is recorded after the block
    assert len(count) == 1


def test_first_call_of_a_compiled_model_may_be_within_the_block(net, x, compiles):
    backend, count = compiles
    model = torch.compile(net, backend=backend)
    with torch.no_grad():
        with capture(net, "0") as first:
            model(x)
        model(x)
        with capture(net, "0") as second:
            model(x)
    assert torch.equal(first["0"], second["0"])
    assert len(count) == 1


def test_an_identical_twin_compiled_earlier_does_not_hide_hooks(net, x, compiles):
    backend, _ = compiles
    twin = copy.deepcopy(net)
    models = torch.compile(net, backend=backend), torch.compile(twin, backend=backend)
    with torch.no_grad():
        models[0](x)
        with capture(models[1], "0") as acts:
            models[1](x)
    assert torch.equal(acts["0"], net[0](x).detach())


def test_compiling_within_the_block_is_recorded_where_dynamo_is_loaded(net, x, compiles):
    backend, count = compiles
    with torch.no_grad(), capture(net, "0") as acts:
        model = torch.compile(net, backend=backend)
        model(x)
    assert len(acts.calls("0")) == 1
    with torch.no_grad():
        model(x)
    assert len(acts.calls("0")) == len(count) == 1


def test_a_stance_of_the_caller_is_put_back(net, x):
    from torch._dynamo import eval_frame

    model = torch.compile(net, backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad(), capture(model, "0") as acts:
            model(x)
        assert eval_frame._stance.stance == "fail_on_recompile"
    assert list(acts) == ["0"]
    torch.compiler.reset()


def test_compiled_parts_of_a_model_are_captured_with_inputs_and_outputs(net, x):
    model = nn.Sequential(net, nn.Flatten())
    model[0].compile(backend="eager")
    with torch.no_grad():
        model(x)
        with capture(model, everything, io="both") as acts:
            output = model(x)
    assert list(acts) == ["0.0", "0.1", "0.2", "0", "1", ""]
    assert torch.equal(acts["1"].output, output)
    torch.compiler.reset()


def run_alone(source: str) -> str:
    """Run a program in a fresh process, where nothing has been compiled yet, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiling_for_the_first_time_within_the_block_is_told_not_silent():
    printed = run_alone(
        """
        import sys, torch
        from torch import nn
        from torchlens_viz import capture
        assert "torch._dynamo" not in sys.modules  # so that entering the block could not take the stance
        net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), torch.ones(1, 3, 5, 5)
        with torch.no_grad(), capture(net, "0") as acts:
            compiled = torch.compile(net, backend="eager")
            compiled(x)
        print(acts.not_called)
        try:
            acts["0"]
        except KeyError as error:
            print(error)
        with torch.no_grad(), capture(net, "0") as acts:
            compiled(x)
        print(torch.equal(acts["0"], net[0](x)))
        """
    )
    first, second, third = printed.splitlines()
    assert first == "('0',)"
    assert "compiled within the block" in second
    assert third == "True"


# Checkpointing.


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_disturbs_neither_pairs_nor_gradients(net, x, reentrant):
    x.requires_grad_()
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    with capture(net, everything, io="both", grad=True) as acts:
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    assert [len(acts.calls(name)) for name in ("0", "1", "2", "")] == [1, 1, 1, 1]
    assert torch.equal(acts["0"].output, net[0](x))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_checkpoint_wrappers_do_not_show_in_names(net, x):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(net), nn.Flatten())
    with capture(model, nn.Conv2d) as acts:
        model(x).sum().backward()
    assert {name: len(acts.calls(name)) for name in acts} == {"0.0": 1, "0.2": 1}


def test_stopping_inside_a_checkpoint_leaves_the_model_usable(net, x):
    class Checkpoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, value):
            return checkpoint(self.net, value, use_reentrant=False)

    model = Checkpoints()
    with capture(model, "net.0", stop=True) as acts:
        assert model(x) is None
    model(x).sum().backward()
    assert torch.equal(acts["net.0"], net[0](x).detach())
    assert net[0].weight.grad is not None


# Concurrency.


def test_a_hook_that_another_thread_sees_half_registered_does_nothing(net, x):
    # PyTorch notes in a second step which hooks want keyword arguments; a call in between passes none.
    outputs, errors = [], []

    def run():
        try:
            with torch.no_grad():
                outputs.append(net(x))
        except BaseException as error:
            errors.append(error)

    with torch.no_grad(), capture(net, "0", io="both") as acts:
        for noted in (net[0]._forward_hooks_with_kwargs, net[0]._forward_pre_hooks_with_kwargs):
            before = dict(noted)
            noted.clear()
            worker = threading.Thread(target=run)
            worker.start()
            worker.join()
            noted.update(before)
        expected = net(x)
    assert errors == []
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(acts.calls("0")) == 1


def test_tasks_of_one_thread_see_each_others_passes(net, x):
    async def task(step):
        with capture(net, "0") as acts:
            await asyncio.sleep(0)
            net(x + step)
            await asyncio.sleep(0)
        return acts

    async def both():
        return await asyncio.gather(task(0), task(1))

    for acts in asyncio.run(both()):
        for step, value in enumerate(acts.calls("0")):
            assert torch.equal(value, net[0](x + step).detach())
    assert hook_count(net) == 0


# Distributed.


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


def test_ddp_is_captured_under_plain_names_and_still_trains(process_group, net, x):
    model = nn.parallel.DistributedDataParallel(net)
    with capture(model, nn.Conv2d, io="both") as acts:
        model(x).sum().backward()
    assert list(acts) == ["0", "2"]
    assert torch.equal(acts["0"].output, net[0](x).detach())
    assert net[0].weight.grad is not None


def test_stop_under_ddp_needs_no_grad_at_entry_too(process_group, net, x):
    model = nn.parallel.DistributedDataParallel(net)
    with pytest.raises(CaptureError, match="leave DistributedDataParallel waiting"):
        capture(model, "0", stop=True)
    with torch.no_grad():
        manager = capture(model, "0", stop=True)
        with manager:
            assert model(x) is None
    with pytest.raises(CaptureError, match="leave DistributedDataParallel waiting"), manager:
        pytest.fail("the block must not be entered")
    assert hook_count(net) == 0
    model(x).sum().backward()
    assert net[0].weight.grad is not None


def test_sharded_models_are_refused_whole_in_part_and_after_the_fact(process_group, net):
    from torch.distributed.fsdp import fully_shard

    mesh = process_group.device_mesh.init_device_mesh("cpu", (1,))
    model = nn.Sequential(net)
    manager = capture(model, "0.0")
    fully_shard(model[0], mesh=mesh)
    for refused in (model, model[0]):
        with pytest.raises(CaptureError, match=r"the model is fully sharded \(FSDPSequential\)"):
            capture(refused, nn.Conv2d)
    with pytest.raises(CaptureError, match="the model is fully sharded"), manager:
        pytest.fail("the block must not be entered")


def test_data_parallel_without_devices_is_its_module(net, x):
    model = nn.DataParallel(net)
    with torch.no_grad(), capture(model, nn.Conv2d, stop=True) as acts:
        assert model(x) is None
    assert list(acts) == ["0", "2"]
    with pytest.raises(LayerNotFoundError, match=r"no layer is named `module\.0`; did you mean"):
        capture(model, "module.0")


def test_data_parallel_over_devices_is_refused(net):
    model = nn.DataParallel(net)
    model.device_ids = [0, 1]
    with pytest.raises(CaptureError, match=r"DataParallel over several devices.*`model\.module`"):
        capture(model, "0")


@pytest.mark.slow
def test_two_ddp_processes_record_each_their_own(tmp_path):
    source = f"""
        import sys, torch
        from torch import nn, distributed as dist
        from torchlens_viz import capture
        rank = int(sys.argv[1])
        dist.init_process_group(
            "gloo", init_method="file://{tmp_path / "store"}", rank=rank, world_size=2
        )
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
        model = nn.parallel.DistributedDataParallel(net)
        x = torch.full((1, 3, 6, 6), rank + 1.0)
        with capture(model, nn.Conv2d) as acts:
            model(x).sum().backward()
        ours = torch.equal(acts["0"], net[0](x).detach())
        total = acts["0"].sum()
        both = [torch.zeros(()) for _ in range(2)]
        dist.all_gather(both, total)
        print(list(acts), ours, both[0].item() != both[1].item(), net[0].weight.grad is not None)
        dist.destroy_process_group()
    """
    program = tmp_path / "worker.py"
    program.write_text(textwrap.dedent(source))
    workers = [
        subprocess.Popen([sys.executable, program, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [worker.communicate(timeout=240)[0].strip() for worker in workers]
    assert printed == ["['0', '2'] True True True"] * 2
