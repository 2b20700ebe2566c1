"""`capture`: what is recorded is what the layer put out, and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from tests.nets import hook_count, instance_state
from torchlens_viz import capture
from torchlens_viz.errors import CaptureError, LayerNotCapturedError, SeveralCallsError

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


def test_train_mode_is_captured_as_it_is(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    with capture(model, "2") as acts:
        output = model(x)
    assert torch.equal(acts["2"], output.detach())
    assert all(module.training for module in model)
    assert model[1].num_batches_tracked == 1


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


# Gradients.


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"io": "out"}, ValueError, "`io` must be .* got 'out'"),
        ({"compiled": "off"}, ValueError, "`compiled` must be .* got 'off'"),
        ({"copy": "maybe"}, ValueError, "`copy` must be .* got 'maybe'"),
        ({"dtype": torch.int8}, ValueError, "`dtype` must be a floating-point type"),
        ({"channels": []}, ValueError, "`channels` must choose at least one"),
        ({"channels": [True, False]}, TypeError, r"`channels` must be .*; of a mask, pass `mask\.nonzero"),
        ({"channels": torch.tensor([True, False])}, TypeError, r"ints.*; of a mask, pass `mask\.nonzero"),
        ({"max_bytes": float("nan")}, ValueError, "`max_bytes` must be positive, got nan"),
        ({"channels": True}, TypeError, "`channels` must be an int or a list of ints, got True"),
        ({"channels": [1, 1], "grad": True}, ValueError, "`channels` must be distinct with `grad=True`"),
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


# Checkpointed, under autocast, in other layouts.


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


def test_a_capture_that_nobody_entered_says_so():
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    acts = capture(net, "0")
    net(torch.rand(1, 3, 5, 5))
    with pytest.raises(
        CaptureError, match=r"a capture is entered, as in `with capture\(model, ...\) as acts:`"
    ):
        acts["0"]


def test_a_copy_that_ran_instead_is_named():
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    with capture(net, "0") as acts:
        copy.deepcopy(net)(torch.rand(1, 3, 5, 5))
    with pytest.raises(LayerNotCapturedError, match="the model was copied within the block"):
        acts["0"]
    twin = copy.deepcopy(net)
    with capture(net, "0") as acts:
        twin(torch.rand(1, 3, 5, 5))
    with pytest.raises(LayerNotCapturedError, match="another model ran, such as the copy"):
        acts["0"]


def test_a_layer_that_ran_twice_says_how_to_go_through_everything():
    relu = nn.ReLU()
    net = nn.Sequential(relu, relu)
    with capture(net, "0") as acts:
        net(torch.rand(1, 3, 5, 5))
    with pytest.raises(
        SeveralCallsError, match=r"`0` ran 2 times; .*`for name in acts: for value in acts.calls"
    ):
        list(acts.items())
