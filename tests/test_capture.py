"""`capture`: what is recorded is what the layer put out, and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from torchlens_viz import LayerNotFoundError, capture
from torchlens_viz.errors import CaptureError, CaptureMemoryError, LayerNotCapturedError, SeveralCallsError


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def instance_state(model: nn.Module) -> list[set[str]]:
    return [set(module.__dict__) for module in model.modules()]


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 3),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(4, 5, 3),
            relu2=nn.ReLU(True),
        )
    ).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _leave_stance_alone():
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    yield
    assert eval_frame._stance == before


# Values.


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("keep", [True, "lazy"])
def test_convolutions_overwritten_in_place_keep_their_values(name, mode, keep):
    model = models.get_model(name, weights=None).eval()
    image = torch.randn(1, 3, 64, 64)
    with mode(), capture(model, nn.Conv2d, copy=keep) as acts:
        model(image)
    value, checked = image, 0
    with torch.no_grad():
        for index, layer in enumerate(model.features):  # an independent run, without any in-place operation
            value = value.relu() if isinstance(layer, nn.ReLU) else layer(value)
            if isinstance(layer, nn.Conv2d):
                assert torch.equal(acts[f"features.{index}"], value)
                checked += 1
    assert checked == len(acts) == {"alexnet": 5, "vgg16": 13}[name]
    assert acts["features.0"].min() < 0


def test_without_a_copy_in_place_operations_show_through(net, x):
    with capture(net, "conv1", copy=False) as acts:
        net(x)
    assert acts["conv1"].min() == 0  # what the default protects from


def test_what_is_handed_out_belongs_to_the_caller(net, x):
    for keep in (True, "lazy"):
        with torch.no_grad(), capture(net, "*", copy=keep) as acts:
            expected = net(x).clone()
            for value in acts.values():
                value.fill_(7)
                value.numpy()[...] = 8
        with torch.no_grad():
            assert torch.equal(net(x), expected)
        with torch.no_grad(), capture(net, ["relu2", "conv2"], copy=keep) as acts:
            output = net(x)
            acts["relu2"].fill_(7)
            assert torch.equal(output, expected)
            output.numpy()[...] = 9
        assert (acts["relu2"] == 7).all()
        assert not (acts["conv2"] == 9).any()


@pytest.mark.parametrize("keep", [True, "lazy"])
@pytest.mark.parametrize("write", ["data", "numpy", "detach", "in-place"])
def test_writes_that_versions_do_not_see_do_not_reach_the_record(write, keep):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, value):
            value = self.conv(value)
            match write:
                case "data":
                    value.data.zero_()
                case "numpy":
                    value.numpy()[...] = 0
                case "detach":
                    value.detach().zero_()
                case "in-place":
                    value.zero_()
            return value

    model, image = Writes(), torch.ones(1, 1, 2, 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), capture(model, "conv", copy=keep) as acts:
            output = model(image)
        assert (output == 0).all()
        assert torch.equal(acts["conv"], model.conv(image).detach())


def test_tensors_recorded_in_inference_mode_can_be_trained_on(net, x):
    with torch.inference_mode(), capture(net, "conv2") as acts:
        net(x)
    weight = torch.ones((), requires_grad=True)
    (acts["conv2"] * weight).sum().backward()
    assert weight.grad is not None


def test_iteration_is_in_execution_order_and_read_only(net, x):
    with capture(net, ["conv2", "conv1", ""]) as acts:
        net(x)
    assert list(acts) == ["conv1", "conv2", ""]
    assert len(acts) == 3
    assert "conv1" in acts
    assert "relu1" not in acts
    with pytest.raises(TypeError, match="does not support item assignment"):
        acts["conv1"] = 0


def test_train_mode_is_captured_as_it_is(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    with capture(model, "2") as acts:
        output = model(x)
    assert torch.equal(acts["2"], output.detach())
    assert all(module.training for module in model)
    assert model[1].num_batches_tracked == 1


# Calls.


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.alias = self.conv
        self.unused = nn.Conv2d(2, 2, 1)

    def forward(self, value):
        return self.conv(self.conv(value)[:, :, ::2])


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


# Inputs and structure.


def test_input_is_recorded_before_the_layer_works_on_it_in_place(net, x):
    with torch.no_grad(), capture(net, "relu1", io="both") as acts:
        net(x)
    taken, given = acts["relu1"]
    assert torch.equal(taken, net.conv1(x))
    assert torch.equal(given, taken.relu())
    assert taken.min() < 0
    with torch.no_grad(), capture(net, "relu1", io="input") as only:
        net(x)
    assert torch.equal(only["relu1"], taken)


def test_inputs_by_keyword_keep_their_names():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = nn.Module()
    model.attention = attention
    value = torch.randn(1, 3, 4)
    with torch.no_grad(), capture(model, "attention", io="input") as acts:
        attention(value, value, value=value, need_weights=False)
    args, kwargs = acts["attention"]
    assert len(args) == 2
    assert kwargs["need_weights"] is False
    assert torch.equal(kwargs["value"], value)


def test_both_pairs_the_right_input_after_a_failed_call():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(1, 1, 1)

        def forward(self, value):
            with contextlib.suppress(RuntimeError):
                self.inner(torch.zeros(1, 2, 1, 1))  # wrong number of channels
            return self.inner(value)

    model = Nested()
    with torch.no_grad(), capture(model, ["", "inner"], io="both") as acts:
        model(torch.full((1, 1, 1, 1), 3.0))
    assert acts["inner"].input.item() == 3
    assert acts[""].input.item() == 3


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


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, value):
        return self.make(value)


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


# Options.


def test_dtype_device_channels_and_reduce(net, x):
    with torch.no_grad():
        expected = net.conv1(x)
    with torch.no_grad(), capture(net, "conv1", dtype=torch.float16) as acts:
        net(x)
    assert torch.equal(acts["conv1"], expected.half())
    with torch.no_grad(), capture(net, "conv1", channels=[2, 0]) as acts:
        net(x)
    assert torch.equal(acts["conv1"], expected[:, [2, 0]])
    with torch.no_grad(), capture(net, "conv1", reduce=lambda t: t[:, 0]) as acts:
        net(x)
    assert torch.equal(acts["conv1"], expected[:, 0])
    with torch.no_grad(), capture(net, "conv1", device="meta") as acts:
        net(x)
    assert acts["conv1"].is_meta
    assert acts["conv1"].shape == expected.shape


def test_integers_keep_their_dtype():
    model = nn.Sequential(Gives(lambda t: t.long()))
    with capture(model, "0", dtype=torch.float16) as acts:
        model(torch.ones(2))
    assert acts["0"].dtype == torch.int64


def test_gradients_flow_through_what_was_captured(net, x):
    x.requires_grad_()
    with capture(net, ["conv1", "conv2"], grad=True) as acts:
        output = net(x)
    reference = net.conv1(x)
    expected = torch.autograd.grad(reference.square().sum(), net.conv1.weight)[0]
    (actual,) = torch.autograd.grad(acts["conv1"].square().sum(), net.conv1.weight, retain_graph=True)
    torch.testing.assert_close(actual, expected)
    (at_layer,) = torch.autograd.grad(output.sum(), acts["conv2"], retain_graph=True)
    assert torch.equal(at_layer, (acts["conv2"] > 0).float())  # through the in-place ReLU
    assert torch.equal(acts["conv1"], reference)


def test_capturing_with_gradients_changes_no_gradient(net, x):
    net(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    with capture(net, "*", grad=True):
        output = net(x)
    output.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_default_record_has_no_graph(net, x):
    with capture(net, "conv1") as acts:
        net(x)
    assert not acts["conv1"].requires_grad


def test_memory_limit_stops_before_the_copy_that_would_pass_it(net, x):
    fits = 2 * 4 * 6 * 6 * 4
    with pytest.raises(CaptureMemoryError, match=r"`conv2` needs 640 bytes, 1,152 are held .* is 1,791"):
        with capture(net, nn.Conv2d, max_bytes=fits + 639) as acts:
            net(x)
    assert list(acts) == ["conv1"]
    assert hook_count(net) == 0
    with capture(net, nn.Conv2d, max_bytes=fits + 640) as acts:
        net(x)
        acts.clear()
        net(x)
    assert len(acts) == 2


def test_an_error_that_the_model_catches_is_raised_at_the_end_of_the_block():
    model = Catches()
    with pytest.raises(CaptureMemoryError, match=r"`second` needs 4 bytes, 4 are held"):
        with torch.no_grad(), capture(model, nn.Conv2d, max_bytes=7):
            model(torch.ones(1, 1, 1, 1))
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"io": "out"}, ValueError, "`io` must be .* got 'out'"),
        ({"compiled": "off"}, ValueError, "`compiled` must be .* got 'off'"),
        ({"copy": "maybe"}, ValueError, "`copy` must be .* got 'maybe'"),
        ({"dtype": torch.int8}, ValueError, "`dtype` must be a floating-point type"),
        ({"channels": []}, ValueError, "`channels` must be one or more indices"),
        ({"channels": [-1]}, ValueError, "`channels` must be one or more indices from 0"),
        ({"channels": "a"}, TypeError, "`channels` must be an int or a list of ints"),
        ({"reduce": 3}, TypeError, "`reduce` must be a function"),
        ({"max_bytes": 0}, ValueError, "`max_bytes` must be positive"),
    ],
)
def test_bad_options_are_refused_before_any_hook(net, options, error, message):
    with pytest.raises(error, match=message):
        capture(net, "conv1", **options)
    assert hook_count(net) == 0


def test_channels_out_of_range_name_the_layer(net, x):
    with pytest.raises(
        ValueError, match=r"`channels` must be below 4 for `conv1`, got 4 \(shape \(2, 4, 6, 6\)"
    ):
        with capture(net, "conv1", channels=4):
            net(x)
    assert hook_count(net) == 0


# Early stop.


class Catches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(1, 1, 1) for _ in range(3))
        self.ran = []

    def forward(self, value):
        for name in ("first", "second", "third"):
            try:
                value = getattr(self, name)(value)
                self.ran.append(name)
            except Exception:
                pass
        return value


@pytest.mark.parametrize("layers", [["first", "second"], ["second", "first"]])
@pytest.mark.parametrize("io_", ["output", "input", "both"])
def test_stop_ends_after_the_last_selected_layer_in_execution_order(layers, io_):
    model = Catches()
    with torch.no_grad(), capture(model, layers, stop=True, io=io_) as acts:
        for _ in range(2):
            assert model(torch.ones(1, 1, 1, 1)) is None
        after = "reached"
    assert after == "reached"
    assert model.ran == ["first", "first"]
    assert len(acts.calls("second")) == 2
    assert model(torch.ones(1, 1, 1, 1)) is not None
    assert "_compiled_call_impl" not in model.__dict__


def test_stop_runs_to_the_end_where_a_selected_layer_does_not_run():
    model = Repeats()
    with torch.no_grad(), capture(model, ["conv", "unused"], stop=True) as acts:
        output = model(torch.ones(1, 2, 4, 4))
    assert output.shape == (1, 2, 2, 4)
    assert len(acts.calls("conv")) == 2


def test_stop_in_a_part_called_directly_ends_the_block(net, x):
    with capture(net, "conv1", stop=True) as acts:
        net.conv1(x)
        pytest.fail("the block should have ended")
    assert acts["conv1"].shape == (2, 4, 6, 6)
    assert hook_count(net) == 0


def test_overlapping_stops_come_off_in_any_order(net, x):
    before = instance_state(net)
    first, second = capture(net, "conv1", stop=True), capture(net, "conv2", stop=True)
    first.__enter__()
    acts = second.__enter__()
    first.__exit__(None, None, None)
    assert net(x) is None
    second.__exit__(None, None, None)
    assert list(acts) == ["conv2"]
    assert net(x) is not None
    assert instance_state(net) == before
    assert hook_count(net) == 0


def test_stop_refuses_to_skip_hooks_that_must_always_run(net):
    handle = net.conv2.register_forward_hook(lambda *_: None, always_call=True)
    with pytest.raises(CaptureError, match=r"`stop=True` would skip forward hooks .*`always_call=True`"):
        capture(net, "conv1", stop=True)
    handle.remove()


# Compiled, scripted, transformed.


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("how", ["wrapper", "in place", "part"])
def test_compiled_models_are_captured_under_plain_names(net, x, how, called_before):
    model = net
    if how == "wrapper":
        model = torch.compile(net, backend="eager")
    elif how == "in place":
        net.compile(backend="eager")
    else:
        net.conv1 = torch.compile(net.conv1, backend="eager")
    with torch.no_grad():
        if called_before:
            model(x)
        with capture(model, nn.Conv2d) as acts:
            model(x)
    assert list(acts) == ["conv1", "conv2"]
    assert acts["conv1"].min() < 0
    with pytest.raises(CaptureError, match='compiled and `compiled="error"`'):
        capture(model, nn.Conv2d, compiled="error")
    torch.compiler.reset()


def test_compiled_function_that_calls_the_model_is_captured(net, x):
    run = torch.compile(lambda value: net(value), backend="eager")
    with torch.no_grad():
        run(x)
        with capture(net, "conv1", stop=True) as acts:
            assert run(x) is None
    assert acts["conv1"].shape == (2, 4, 6, 6)
    torch.compiler.reset()


def test_overlapping_captures_hold_the_eager_stance_until_the_last_ends(net, x):
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    first, second = capture(net, "conv1"), capture(net, "conv2")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance == before


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_torchscript_is_refused_at_entry(net, x):
    for make in (lambda: torch.jit.trace(net, x), lambda: torch.jit.freeze(torch.jit.trace(net, x))):
        with pytest.raises(CaptureError, match="the model is TorchScript"):
            capture(make(), "conv1")
    holder = nn.Sequential(torch.jit.trace(net.conv1, x), nn.ReLU())
    with pytest.raises(CaptureError, match="`0` is TorchScript"):
        capture(holder, "0")
    with capture(holder, "1") as acts:
        holder(x)
    assert acts["1"].min() == 0
    with pytest.raises(CaptureError, match=r"torch.jit.trace is running"):
        with capture(net, "conv1"):
            torch.jit.trace(net, x)


def test_vmap_is_refused_with_an_explanation(net, x):
    with pytest.raises(CaptureError, match=r"`conv1` ran inside torch.vmap"):
        with capture(net, "conv1"):
            torch.vmap(net.conv1)(x[None])
    assert hook_count(net) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_adds_no_call(net, x, reentrant):
    x.requires_grad_()
    with capture(net, "conv1") as acts:
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    assert len(acts.calls("conv1")) == 1
    assert isinstance(acts["conv1"], torch.Tensor)
    assert x.grad is not None


def test_autocast_keeps_the_dtype_of_the_layer(net, x):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), capture(net, "conv1") as acts:
        net(x)
    assert acts["conv1"].dtype == torch.bfloat16


def test_channels_last_strides_are_kept(net, x):
    with torch.no_grad(), capture(net, "conv1") as acts:
        net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert acts["conv1"].is_contiguous(memory_format=torch.channels_last)


def test_meta_tensors_keep_their_shape(net):
    with capture(net.to("meta"), "conv2") as acts:
        net(torch.empty(1, 3, 8, 8, device="meta"))
    assert acts["conv2"].shape == (1, 5, 4, 4)
    assert "meta" in repr(acts)


# Lifetime.


def test_hooks_stand_within_the_block_only_and_are_gone_whatever_happens(net, x):
    manager = capture(net, "*", io="both")
    assert hook_count(net) == 0
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with contextlib.suppress(error), manager:
            assert hook_count(net) == 8
            net(x)
            raise error
        assert hook_count(net) == 0


def test_failing_registration_leaves_no_hook(net, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("no room for a hook")

    monkeypatch.setattr(net.conv2, "register_forward_hook", fail)
    before = instance_state(net)
    with pytest.raises(MemoryError, match="no room for a hook"), capture(net, "*", stop=True):
        pytest.fail("the block must not be entered")
    assert hook_count(net) == 0
    assert instance_state(net) == before


def test_capture_can_be_entered_again_but_not_twice_at_once(net, x):
    manager = capture(net, "conv1")
    with manager as first:
        net(x)
        with pytest.raises(CaptureError, match="active already"), manager:
            pytest.fail("the block must not be entered")
        assert hook_count(net) == 1
    with manager as second:
        net(x + 1)
    assert not torch.equal(first["conv1"], second["conv1"])


def test_nested_captures_record_independently(net, x):
    with torch.no_grad(), capture(net, "conv1") as outer:
        net(x)
        with capture(net, "conv1") as inner:
            net(x + 1)
    assert len(outer.calls("conv1")) == 2
    assert torch.equal(inner["conv1"], outer.calls("conv1")[1])
    assert inner["conv1"] is not outer.calls("conv1")[1]


def test_generator_that_is_closed_takes_its_hooks_along(net):
    def stepwise():
        with capture(net, "conv1"):
            yield

    generator = stepwise()
    next(generator)
    assert hook_count(net) == 1
    generator.close()
    assert hook_count(net) == 0


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "save"])
def test_hooks_are_inert_in_copies(net, x, duplicate, stop):
    with torch.no_grad(), capture(net, "conv1", io="both", stop=stop) as acts:
        if duplicate == "deepcopy":
            twin = copy.deepcopy(net)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(net))
        else:
            file = io.BytesIO()
            torch.save(net, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        output = twin(x)
        assert list(acts) == []
    assert torch.equal(output, net(x).detach())


def test_calls_in_other_threads_are_not_mixed_in(net, x):
    with torch.no_grad(), capture(net, "conv1") as acts:
        worker = threading.Thread(target=net, args=(x,))
        worker.start()
        worker.join()
        assert list(acts) == []
        with pytest.raises(LayerNotCapturedError, match="`conv1` ran in another thread"):
            acts["conv1"]


def test_threads_that_capture_one_model_get_their_own_values(net):
    results, errors = {}, []
    barrier = threading.Barrier(4)

    def work(number):
        try:
            for _ in range(20):
                value = torch.full((1, 3, 5, 5), float(number))
                barrier.wait(20)
                with torch.no_grad(), capture(net, "conv1", stop=number % 2 == 0) as acts:
                    net(value)
                results[number] = acts["conv1"]
                assert torch.equal(acts["conv1"], torch.nn.functional.conv2d(value, *net.conv1.parameters()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(results) == 4
    assert hook_count(net) == 0
    assert "_compiled_call_impl" not in net.__dict__


def test_nothing_of_the_callers_is_changed(net, x):
    net.train()
    flags = [parameter.requires_grad for parameter in net.parameters()]
    rng = torch.get_rng_state()
    before = x.clone()
    with capture(net, "*", io="both", grad=True, stop=True):
        net(x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(module.training for module in net.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(x, before)


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


@pytest.mark.cuda
def test_cuda_capture_is_exact_and_offloads_complete_tensors(net, x):
    net, x = net.cuda(), x.cuda()
    with torch.no_grad(), capture(net, nn.Conv2d) as acts:
        net(x)
    assert acts["conv1"].is_cuda
    with torch.no_grad():
        torch.testing.assert_close(acts["conv1"], net.conv1(x), rtol=0, atol=0)
    with torch.no_grad(), capture(net, nn.Conv2d, device="cpu", channels=[1]) as moved:
        net(x)
    assert torch.equal(moved["conv1"], acts["conv1"][:, [1]].cpu())


@pytest.mark.cuda
def test_cuda_capture_does_not_wait_for_the_device(net, x):
    net, x = net.cuda(), x.cuda()
    net(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad(), capture(net, "*", io="both"):
            net(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
