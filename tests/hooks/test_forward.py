"""Passes that are stopped early, compiled, scripted, transformed, traced or distributed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import torchlens_viz as tv
from tests.nets import Catches, Repeats, everything, hook_count, instance_state
from tests.processes import said
from torchlens_viz import LayerNotFoundError, capture, maximize, survey
from torchlens_viz.errors import CaptureError

# Early stop.


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


# Transforms and tracing.


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_transforms_are_refused_with_an_explanation(bare_net, x, transform):
    function = transform(lambda value: bare_net(value).sum())
    with pytest.raises(CaptureError, match=r"`0` ran inside torch\.vmap or torch\.func\.grad"):
        with capture(bare_net, "0"):
            function(x)
    assert hook_count(bare_net) == 0


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, value):
        return self.child(value) + 1


@pytest.mark.parametrize("io", ["output", "input", "both"])
def test_symbolic_tracing_is_refused_with_an_explanation(bare_net, io):
    model = Parent(Parent(bare_net))
    with pytest.raises(CaptureError, match=r"ran inside torch\.fx\.symbolic_trace"):
        with capture(model, everything, io=io):
            torch.fx.symbolic_trace(model)
    assert hook_count(model) == 0


def test_graph_modules_are_captured_and_their_copies_are_not(bare_net, x):
    model = torch.fx.symbolic_trace(bare_net)
    with torch.no_grad():
        expected = bare_net(x)
        with capture(model, "0", stop=True) as acts:
            twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            for twin in twins:
                assert torch.equal(twin(x), expected)
                assert twin.__dict__.get("_compiled_call_impl") is None
            assert list(acts) == []
            assert model(x) is None
        assert torch.equal(acts["0"], bare_net[0](x))


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


def test_exported_programs_say_that_their_layers_do_not_run(bare_net, x):
    program = torch.export.export(bare_net, (x,))
    with torch.no_grad(), capture(torch.export.unflatten(program), "0") as acts:
        torch.export.unflatten(program)  # a second one is another model
    assert acts.not_called == ("0",)
    unflattened = torch.export.unflatten(program)
    with torch.no_grad(), capture(unflattened, "0") as acts:
        unflattened(x)
    assert torch.equal(acts["0"], bare_net[0](x).detach())
    flat = program.module()
    for refused in (
        lambda: capture(flat, ["0", "2"]),
        lambda: maximize(flat, "0", size=8),
        lambda: survey(flat, [x], "0", progress=False),
    ):
        with pytest.raises(
            CaptureError, match=r"made by torch.export.*capture the nn.Module it was made from"
        ):
            refused()
    traced = torch.fx.symbolic_trace(bare_net)  # calls its layers
    with torch.no_grad(), capture(traced, "0") as acts:
        traced(x)
    assert torch.equal(acts["0"], bare_net[0](x).detach())


def test_export_within_the_block_is_neither_disturbed_nor_recorded(bare_net, x):
    with capture(bare_net, everything, io="both") as acts:
        program = torch.export.export(bare_net, (x,))
    assert list(acts) == []
    with torch.no_grad():
        assert torch.equal(program.module()(x), bare_net(x))


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


def test_capturing_a_compiled_model_causes_no_recompilation(bare_net, x, compiles):
    backend, count = compiles
    model = torch.compile(bare_net, backend=backend)
    with torch.no_grad():
        model(x)
        for stop in (False, True):
            with capture(model, nn.Conv2d, stop=stop) as acts:
                model(x)
            assert len(acts.calls("0")) == 1
            model(x)
            assert len(acts.calls("0")) == 1  # nothing is recorded after the block
    assert len(count) == 1


def test_first_call_of_a_compiled_model_may_be_within_the_block(bare_net, x, compiles):
    backend, count = compiles
    model = torch.compile(bare_net, backend=backend)
    with torch.no_grad():
        with capture(bare_net, "0") as first:
            model(x)
        model(x)
        with capture(bare_net, "0") as second:
            model(x)
    assert torch.equal(first["0"], second["0"])
    assert len(count) == 1


def test_an_identical_twin_compiled_earlier_does_not_hide_hooks(bare_net, x, compiles):
    backend, _ = compiles
    twin = copy.deepcopy(bare_net)
    models = torch.compile(bare_net, backend=backend), torch.compile(twin, backend=backend)
    with torch.no_grad():
        models[0](x)
        with capture(models[1], "0") as acts:
            models[1](x)
    assert torch.equal(acts["0"], bare_net[0](x).detach())


def test_compiling_within_the_block_is_recorded_where_dynamo_is_loaded(bare_net, x, compiles):
    backend, count = compiles
    with torch.no_grad(), capture(bare_net, "0") as acts:
        model = torch.compile(bare_net, backend=backend)
        model(x)
    assert len(acts.calls("0")) == 1
    with torch.no_grad():
        model(x)
    assert len(acts.calls("0")) == len(count) == 1


def test_a_stance_of_the_caller_is_put_back(bare_net, x):
    from torch._dynamo import eval_frame

    model = torch.compile(bare_net, backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad(), capture(model, "0") as acts:
            model(x)
        assert eval_frame._stance.stance == "fail_on_recompile"
    assert list(acts) == ["0"]
    torch.compiler.reset()


def test_compiled_parts_of_a_model_are_captured_with_inputs_and_outputs(bare_net, x):
    model = nn.Sequential(bare_net, nn.Flatten())
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
    torch_s = "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", torch_s, "-c", textwrap.dedent(source)],
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


# Distributed.


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


def test_ddp_is_captured_under_plain_names_and_still_trains(process_group, bare_net, x):
    model = nn.parallel.DistributedDataParallel(bare_net)
    with capture(model, nn.Conv2d, io="both") as acts:
        model(x).sum().backward()
    assert list(acts) == ["0", "2"]
    assert torch.equal(acts["0"].output, bare_net[0](x).detach())
    assert bare_net[0].weight.grad is not None


def test_stop_under_ddp_needs_no_grad_at_entry_too(process_group, bare_net, x):
    model = nn.parallel.DistributedDataParallel(bare_net)
    with pytest.raises(CaptureError, match="leave DistributedDataParallel waiting"):
        capture(model, "0", stop=True)
    with torch.no_grad():
        manager = capture(model, "0", stop=True)
        with manager:
            assert model(x) is None
    with pytest.raises(CaptureError, match="leave DistributedDataParallel waiting"), manager:
        pytest.fail("the block must not be entered")
    assert hook_count(bare_net) == 0
    model(x).sum().backward()
    assert bare_net[0].weight.grad is not None


def test_sharded_models_are_refused_whole_in_part_and_after_the_fact(process_group, bare_net):
    from torch.distributed.fsdp import fully_shard

    mesh = process_group.device_mesh.init_device_mesh("cpu", (1,))
    model = nn.Sequential(bare_net)
    manager = capture(model, "0.0")
    fully_shard(model[0], mesh=mesh)
    for refused in (model, model[0]):
        with pytest.raises(CaptureError, match=r"the model is fully sharded \(FSDPSequential\)"):
            capture(refused, nn.Conv2d)
    with pytest.raises(CaptureError, match="the model is fully sharded"), manager:
        pytest.fail("the block must not be entered")


def test_data_parallel_without_devices_is_its_module(bare_net, x):
    model = nn.DataParallel(bare_net)
    with torch.no_grad(), capture(model, nn.Conv2d, stop=True) as acts:
        assert model(x) is None
    assert list(acts) == ["0", "2"]
    with pytest.raises(LayerNotFoundError, match=r"no layer is named `module\.0`; did you mean"):
        capture(model, "module.0")


def test_data_parallel_over_devices_is_refused(bare_net):
    model = nn.DataParallel(bare_net)
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
    printed = [said(worker.communicate(timeout=240)[0]) for worker in workers]
    assert printed == [["['0', '2'] True True True"]] * 2


SCRIPTED = {
    "survey": lambda model, image: survey(model, [image], "0", progress=False),
    "maximize": lambda model, image: maximize(model, "0", [0], size=8, steps=1),
    "receptive_field": lambda model, image: tv.receptive_field(model, "0", image.shape),
    "overlay_grid": lambda model, image: tv.overlay_grid(model, "0", image[0]),
    "pair_grid": lambda model, image: tv.pair_grid(model, "0", image[0]),
    "kernel_grid": lambda model, image: tv.kernel_grid(model, "0"),
    "save_kernel_sheets": lambda model, image: tv.save_kernel_sheets(model, "nowhere"),
    "Monitor": lambda model, image: tv.Monitor(model, None, probe=image, every=1),
}


@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_in_one_way_by_all_that_takes_a_model(name):
    image = torch.rand(1, 3, 8, 8)
    model = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), image)
    with pytest.raises(CaptureError, match=r"the model is TorchScript .*the nn.Module it was made from"):
        SCRIPTED[name](model, image)
