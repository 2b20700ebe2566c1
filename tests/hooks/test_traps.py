"""`capture` where it would be easy to be silently wrong: odd tensors, odd calls, other people's hooks."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.nets import Gives, everything, hook_count
from torchlens_viz import capture
from torchlens_viz.errors import CaptureMemoryError, LayerNotCapturedError
from torchlens_viz.hooks.activations import Inputs

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


def test_table_is_printed_for_tensors_that_cannot_tell_their_values(bare_net, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.no_grad(), capture(bare_net, "0") as acts:
            bare_net(x)
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
        assert manager._block._calls._open == []
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


def test_a_layer_replaced_within_the_block_is_not_called_and_loses_its_hook(bare_net, x):
    with capture(bare_net, "0") as acts:
        old, bare_net[0] = bare_net[0], nn.Conv2d(3, 4, 3)
        bare_net(x)
    assert acts.not_called == ("0",)
    assert hook_count(old) == 0


def test_functional_calls_are_recorded_with_the_weights_they_use(bare_net, x):
    weights = {name: value * 2 for name, value in bare_net.named_parameters()}
    with torch.no_grad(), capture(bare_net, "0") as acts:
        torch.func.functional_call(bare_net, weights, (x,))
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


def test_hooks_that_were_there_first_are_part_of_what_is_recorded(bare_net, x):
    bare_net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    bare_net[0].register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad(), capture(bare_net, "0", io="both") as acts:
        bare_net(x)
    assert torch.equal(acts["0"].input, x * 2)
    with torch.no_grad():
        assert torch.equal(acts["0"].output, F.conv2d(x * 2, bare_net[0].weight, bare_net[0].bias) + 1)


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


def test_a_failing_hook_of_somebody_else_ends_only_the_pass_it_is_in(bare_net, x):
    def fail(*_):
        raise ZeroDivisionError("not mine")

    with torch.no_grad(), capture(bare_net, everything, io="both") as acts:
        handle = bare_net[1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError, match="not mine"):
            bare_net(x)
        handle.remove()
        bare_net(x * 2)
    assert [len(acts.calls(name)) for name in ("0", "1", "2", "")] == [2, 2, 1, 1]
    assert torch.equal(acts[""].input, x * 2)


def test_hooks_that_always_run_get_no_less_than_before(bare_net, x):
    seen = []
    bare_net[0].register_forward_hook(
        lambda module, args, output: seen.append(output is None), always_call=True
    )
    with torch.no_grad(), capture(bare_net, "0") as acts:
        with pytest.raises(RuntimeError, match="channels"):
            bare_net(x[:, :2])
        bare_net(x)
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


def test_reduction_with_parameters_works_in_inference_mode_and_leaves_no_graph(bare_net, x):
    probe = nn.Linear(6, 2)
    for mode in (torch.inference_mode, torch.no_grad, contextlib.nullcontext):
        with mode(), capture(bare_net, "0", reduce=probe) as acts:
            bare_net(x)
        assert not acts["0"].requires_grad
        assert not acts["0"].is_inference()
        assert torch.equal(acts["0"], probe(bare_net[0](x)).detach())


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


# Checkpointing.


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_disturbs_neither_pairs_nor_gradients(bare_net, x, reentrant):
    x.requires_grad_()
    checkpoint(bare_net, x, use_reentrant=reentrant).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in bare_net.parameters()]
    bare_net.zero_grad()
    with capture(bare_net, everything, io="both", grad=True) as acts:
        checkpoint(bare_net, x, use_reentrant=reentrant).square().sum().backward()
    assert [len(acts.calls(name)) for name in ("0", "1", "2", "")] == [1, 1, 1, 1]
    assert torch.equal(acts["0"].output, bare_net[0](x))
    for parameter, gradient in zip(bare_net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_checkpoint_wrappers_do_not_show_in_names(bare_net, x):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(bare_net), nn.Flatten())
    with capture(model, nn.Conv2d) as acts:
        model(x).sum().backward()
    assert {name: len(acts.calls(name)) for name in acts} == {"0.0": 1, "0.2": 1}


def test_stopping_inside_a_checkpoint_leaves_the_model_usable(bare_net, x):
    class Checkpoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bare_net

        def forward(self, value):
            return checkpoint(self.net, value, use_reentrant=False)

    model = Checkpoints()
    with capture(model, "net.0", stop=True) as acts:
        assert model(x) is None
    model(x).sum().backward()
    assert torch.equal(acts["net.0"], bare_net[0](x).detach())
    assert bare_net[0].weight.grad is not None


# Concurrency.


def test_a_hook_that_another_thread_sees_half_registered_does_nothing(bare_net, x):
    # PyTorch notes in a second step which hooks want keyword arguments; a call in between passes none.
    outputs, errors = [], []

    def run():
        try:
            with torch.no_grad():
                outputs.append(bare_net(x))
        except BaseException as error:
            errors.append(error)

    with torch.no_grad(), capture(bare_net, "0", io="both") as acts:
        for noted in (bare_net[0]._forward_hooks_with_kwargs, bare_net[0]._forward_pre_hooks_with_kwargs):
            before = dict(noted)
            noted.clear()
            worker = threading.Thread(target=run)
            worker.start()
            worker.join()
            noted.update(before)
        expected = bare_net(x)
    assert errors == []
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(acts.calls("0")) == 1


def test_tasks_of_one_thread_see_each_others_passes(bare_net, x):
    async def task(step):
        with capture(bare_net, "0") as acts:
            await asyncio.sleep(0)
            bare_net(x + step)
            await asyncio.sleep(0)
        return acts

    async def both():
        return await asyncio.gather(task(0), task(1))

    for acts in asyncio.run(both()):
        for step, value in enumerate(acts.calls("0")):
            assert torch.equal(value, bare_net[0](x + step).detach())
    assert hook_count(bare_net) == 0


class _Counted:
    """What a weak reference can be kept to."""


@pytest.mark.parametrize(
    "options", [{"reduce": lambda tensor: 1 / 0}, {"max_bytes": 50}], ids=["own", "ours"]
)
def test_an_error_from_a_hook_holds_on_to_nothing_once_it_is_dropped(x, options):
    # Checkpointing is undone when the frames of an error go, which those of a cycle do at some other time.
    seen = []

    class Holds(nn.Module):
        def forward(self, value):
            held = _Counted()
            seen.append(weakref.ref(held))
            return self.layer(value)

    model = Holds()
    model.layer = nn.Conv2d(3, 4, 3)
    gc.disable()
    try:
        with contextlib.suppress(ZeroDivisionError, CaptureMemoryError), capture(model, ["layer"], **options):
            model(x)
        assert seen[0]() is None
        manager = capture(model, ["layer"], **options)
        manager.__enter__()
        with contextlib.suppress(ZeroDivisionError, CaptureMemoryError):
            model(x)  # caught within the block, which goes on
        assert seen[1]() is None
        with contextlib.suppress(CaptureMemoryError):
            manager.__exit__(None, None, None)
    finally:
        gc.enable()
