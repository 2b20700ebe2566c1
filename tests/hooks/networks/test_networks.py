"""`capture` on the networks people use: every tensor of every call, against a record made without hooks.

The reference is `recorder.Recorder`, which wraps `forward` on each module. Every module of every network is
checked, containers and the network itself included: values bit for bit, structure, number of calls, order.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.hooks.networks.catalogue import NETWORKS, Network, parameters
from tests.hooks.networks.recorder import Frozen, Recorder, freeze, same, same_tensor
from tests.nets import everything
from torchlens_viz import capture
from torchlens_viz.hooks.activations import InputOutput, Inputs

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def convolutions(name: str, module: nn.Module) -> bool:
    return not module._modules and "Conv" in type(module).__name__


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def circumstances(model: nn.Module) -> list:
    """List what a capture may not change about the modules, apart from their numbers."""
    return [
        (module.training, set(vars(module)), [dict(getattr(module, hooks)) for hooks in HOOKS])
        for module in model.modules()
    ] + [(id(tensor), tensor.requires_grad, tensor._version) for tensor in tensors_of(model)]


def unequal_calls(acts, recorder: Recorder) -> list[str]:
    """Name every call that was recorded differently, once per name of its module."""
    wrong = []
    for name, calls in recorder.by_name().items():
        kept = acts.calls(name)
        if len(kept) != len(calls):
            wrong.append(f"{name}: {len(kept)} calls, not {len(calls)}")
        wrong += [
            f"{name}[{index}]"
            for index, (value, call) in enumerate(zip(kept, calls, strict=False))
            if not same(freeze(value, clone=False), call.output)
        ]
    return wrong


def assert_same_as(acts, recorder: Recorder) -> None:
    assert unequal_calls(acts, recorder) == []
    by_name = recorder.by_name()
    assert list(acts) == list(by_name)
    assert set(acts.not_called) == set(recorder.names()) - set(by_name)


@dataclass
class Case:
    network: Network
    model: nn.Module
    inputs: tuple
    reference: Recorder
    output: object


@pytest.fixture(scope="module", params=parameters())
def case(request):
    network = request.param
    model = network.build()
    torch.manual_seed(1)
    inputs = network.inputs()
    with torch.no_grad(), Recorder(model) as reference:
        output = model(*inputs)
    return Case(network, model, inputs, reference, freeze(output))


def test_every_call_of_every_module_is_what_the_module_put_out(case):
    model = case.model
    before, numbers = circumstances(model), freeze(tensors_of(model))
    given, rng = freeze(case.inputs), torch.get_rng_state()
    with torch.no_grad(), capture(model, everything) as acts:
        output = model(*case.inputs)
    assert_same_as(acts, case.reference)
    assert same(freeze(output), case.output)
    assert circumstances(model) == before
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())
    assert same(freeze(tensors_of(model)), numbers)
    assert same(freeze(case.inputs), given)
    assert torch.equal(torch.get_rng_state(), rng)


def test_without_a_copy_as_many_convolutions_are_overwritten_as_the_table_says(case):
    by_name, network = case.reference.by_name(), case.network
    with torch.no_grad():
        with capture(case.model, convolutions, copy=False) as unsafe:
            case.model(*case.inputs)
        with capture(case.model, convolutions, copy="lazy") as lazy:
            case.model(*case.inputs)
    assert len(unsafe) + len(unsafe.not_called) == network.convolutions
    pairs = {"unsafe": [], "lazy": []}
    for label, acts in (("unsafe", unsafe), ("lazy", lazy)):
        for name in acts:
            kept = acts.calls(name)
            assert len(kept) == len(by_name[name])
            pairs[label] += [same_tensor(a, call.output) for a, call in zip(kept, by_name[name], strict=True)]
    assert len(pairs["unsafe"]) == len(pairs["lazy"]) == network.calls
    assert pairs["unsafe"].count(False) == network.overwritten
    assert all(pairs["lazy"])


def test_table_names_the_trap_where_it_is_known_to_be():
    overwritten = {network.name: (network.overwritten, network.calls) for network in NETWORKS}
    assert overwritten["alexnet"] == (5, 5)
    assert overwritten["vgg11"] == (8, 8)
    assert overwritten["squeezenet1_0"] == (26, 26)
    assert overwritten["efficientnet_b0"] == (16, 81)
    assert overwritten["resnet18"][0] == overwritten["resnet50"][0] == 0
    assert sum(count > 0 for count, _ in overwritten.values()) >= 10


def test_comparison_sees_a_single_wrong_bit_and_a_missing_call():
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.ReLU())
    value = torch.tensor([1.0, float("nan")])
    with Recorder(model) as recorder:
        model(value.clone())
    with capture(model, everything) as acts:
        model(value.clone())
    assert_same_as(acts, recorder)
    acts["2"][0] = torch.nextafter(acts["2"][0], torch.tensor(2.0))
    assert unequal_calls(acts, recorder) == ["2[0]"]
    with capture(model, everything) as acts:
        model(value.clone())
        model[0](value)
    assert unequal_calls(acts, recorder) == ["0: 2 calls, not 1"]
    with capture(model, everything) as acts:
        model[1:](value.clone())
    with pytest.raises(AssertionError, match=r"0: 0 calls, not 1"):
        assert_same_as(acts, recorder)
    assert not same(freeze((value,)), freeze([value]))
    assert not same(freeze({"a": value}), freeze({"b": value}))
    assert not same_tensor(value, value.double())


# Modes.


@pytest.mark.parametrize(
    "network", parameters("vgg11", "densenet121", "vit_b_16", "fcos_resnet50_fpn", "quantized_resnet18")
)
def test_inference_mode(network):
    model = network.build()
    inputs = network.inputs()
    with torch.inference_mode():
        with Recorder(model) as reference:
            model(*inputs)
        with capture(model, everything) as acts, capture(model, everything, copy="lazy") as lazy:
            model(*inputs)
    assert_same_as(acts, reference)
    assert_same_as(lazy, reference)


def train_on(model: nn.Module, inputs: tuple, within=contextlib.nullcontext):
    """Run one pass and its backward from one seed; return what `within` gave, the output, the RNG state."""
    torch.manual_seed(2)
    with within() as given:
        output = model(*inputs)
        parts: list[torch.Tensor] = []
        collect(freeze(output, clone=False), parts)
        count = len(given.calls) if isinstance(given, Recorder) else None
        sum(part.square().sum() for part in parts if part.requires_grad).backward()
        if count is not None:
            del given.calls[count:]  # what checkpointing runs again, in backward, is no call
    return given, freeze(output), torch.get_rng_state()


def collect(value, parts: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        parts.append(value)
    elif isinstance(value, Frozen):
        for item in value.items:
            collect(item, parts)


def targets() -> list[dict]:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [8.0, 2.0, 30.0, 20.0]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(2)]


def densenet_checkpointed() -> tuple[nn.Module, tuple]:
    network = Network("densenet121", lambda: (), 120, 120, 0, {"memory_efficient": True})
    return network.build(), (torch.randn(2, 3, 32, 32),)


def classifier(name: str, size: int, **options):
    return lambda: (Network(name, lambda: (), 0, 0, 0, options).build(), (torch.randn(2, 3, size, size),))


def detector(name: str):
    def make() -> tuple[nn.Module, tuple]:
        options = {"weights_backbone": None, "min_size": 64, "max_size": 96}
        network = Network(name, lambda: (), 0, 0, 0, options)
        return network.build(), ([torch.rand(3, 64, 48), torch.rand(3, 48, 64)], targets())

    return make


@pytest.mark.parametrize(
    ("make", "aux"),
    [
        pytest.param(classifier("alexnet", 64), (), id="alexnet"),
        pytest.param(classifier("resnet18", 32), (), id="resnet18"),
        pytest.param(classifier("efficientnet_b0", 32), (), id="efficientnet_b0"),
        pytest.param(densenet_checkpointed, (), id="densenet121_memory_efficient"),
        pytest.param(classifier("googlenet", 64, init_weights=False), ("aux1", "aux2"), id="googlenet"),
        pytest.param(
            classifier("inception_v3", 299, init_weights=False),
            ("AuxLogits",),
            id="inception_v3",
            marks=pytest.mark.slow,
        ),
        pytest.param(detector("fcos_resnet50_fpn"), (), id="fcos"),
        pytest.param(detector("fasterrcnn_mobilenet_v3_large_320_fpn"), (), id="fasterrcnn"),
    ],
)
@pytest.mark.parametrize("grad", [False, True], ids=["values", "graph"])
def test_train_mode_with_gradients(make, aux, grad):
    torch.manual_seed(1)
    model, inputs = make()
    model.train()
    twin = copy.deepcopy(model)
    reference, expected, rng = train_on(twin, inputs, lambda: Recorder(twin))
    before = [(flags, hooks) for flags, _, hooks in circumstances(model)[: len(list(model.modules()))]]
    acts, output, rng_after = train_on(model, inputs, lambda: capture(model, everything, grad=grad))
    assert_same_as(acts, reference)
    assert same(output, expected)
    assert torch.equal(rng_after, rng)
    after = [(flags, hooks) for flags, _, hooks in circumstances(model)[: len(list(model.modules()))]]
    assert after == before
    assert set(aux) <= set(acts)
    assert same(freeze(tensors_of(model)), freeze(tensors_of(twin)))  # running statistics too
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(
                parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(
    "network",
    parameters("alexnet", "squeezenet1_0", "mobilenet_v3_small", "vit_b_16", "retinanet_resnet50_fpn"),
)
def test_inputs_and_outputs_are_kept_together(network):
    model = network.build()
    inputs = network.inputs()
    with torch.no_grad():
        with Recorder(model, inputs=True) as reference:
            model(*inputs)
        with capture(model, everything, io="both") as acts, capture(model, everything, io="input") as taken:
            model(*inputs)
    by_name = reference.by_name()
    assert list(acts) == list(by_name)
    checked = 0
    for name, calls in by_name.items():
        for pair, only, call in zip(acts.calls(name), taken.calls(name), calls, strict=True):
            assert isinstance(pair, InputOutput)
            assert same(freeze(pair.output, clone=False), call.output), name
            for kept in (pair.input, only):
                args, kwargs = kept if isinstance(kept, Inputs) else ((kept,), {})
                assert same(freeze(args, clone=False), call.args), name
                assert same(freeze(kwargs, clone=False), call.kwargs), name
            checked += 1
    assert checked == len(reference.calls)


@pytest.mark.parametrize(
    ("name", "layer", "later"),
    [
        ("vgg11", "features.3", "features.6"),
        ("resnet18", "layer1.0.conv1", "layer1.0.bn1"),
        ("efficientnet_b0", "features.1.0.block.1.fc1", "features.1.0.block.1.fc2"),
        ("fcos_resnet50_fpn", "backbone.body.conv1", "backbone.body.layer1"),
        ("raft_small", "feature_encoder.convnormrelu", "feature_encoder.layer1"),
        ("quantized_mobilenet_v2", "features.0.0", "features.1"),
    ],
)
def test_stop_gives_the_same_value_and_leaves_out_the_rest(name, layer, later):
    (network,) = [network for network in NETWORKS if network.name == name]
    model = network.build()
    inputs = network.inputs()
    with torch.no_grad():
        with Recorder(model) as reference:
            model(*inputs)
        with capture(model, [layer, ""], stop=False) as whole:
            model(*inputs)
        with capture(model, later) as rest, capture(model, layer, stop=True) as acts:
            assert model(*inputs) is None
        assert model(*inputs) is not None
    first = reference.by_name()[layer][0].output
    assert same_tensor(acts[layer], first)
    assert same_tensor(whole.calls(layer)[0], first)
    assert rest.not_called == (later,)


@pytest.mark.parametrize(
    "network",
    parameters("alexnet", "resnet18", "convnext_tiny", "efficientnet_b0", "deeplabv3_mobilenet_v3_large"),
)
def test_autocast_keeps_the_dtype_of_each_layer(network):
    model = network.build()
    inputs = network.inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with Recorder(model) as reference:
            model(*inputs)
        with capture(model, everything) as acts:
            model(*inputs)
    assert_same_as(acts, reference)
    dtypes = {
        acts.calls(name)[0].dtype for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    assert dtypes == {torch.bfloat16}
