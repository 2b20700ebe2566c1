"""`Normalized(compile=True)`: the same images from a network that is compiled, in one piece."""

import shutil
import weakref
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from torchlens_viz import capture, maximize, objectives
from torchlens_viz.ascent.method import Classic, Normalized
from torchlens_viz.backprop.network import Cut
from torchlens_viz.errors import CaptureError, InvalidTypeError


class Net(nn.Module):
    """Branches, work in place, a function where others have a module, and a part that breaks if it runs."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 5, 3)

    def forward(self, x):
        x = torch.relu_(self.norm(self.first(x)))
        x = self.left(x).relu_() + self.right(x)
        self.last(x)
        raise AssertionError("what comes after the layer was run")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def graphs(monkeypatch):
    """Compile with Dynamo alone, which takes no C++ compiler; return the graphs that it makes."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    yield made
    torch.compiler.reset()


def run(model, layer="last", channels=range(5), **options):
    given = {"size": 12, "steps": 6, "precision": "float32", **options}
    return maximize(model, layer, channels, **given)


def same(left, right):
    torch.testing.assert_close(left.images, right.images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.scores, right.scores, rtol=1e-4, atol=1e-5)
    assert left.status == right.status


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("last", {}),
        ("norm", {"objective": "max"}),
        ("last", {"objective": objectives.channel() - objectives.channel(layer="norm")}),
        ("last", {"transforms": "robust", "parametrization": "fourier"}),
        ("last", {"precision": "bfloat16", "steps": 1}),
        ("last", {"method": "classic"}),
    ],
)
def test_compiled_or_not_the_images_are_the_same(net, graphs, layer, options):
    method = Classic(compile=True) if options.get("method") == "classic" else Normalized(compile=True)
    result = run(net, layer, **{**options, "method": method})
    same(result, run(net, layer, **options))
    assert len(graphs) == 1, "the network was compiled in pieces, or anew"
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    convolutions = sum("conv2d" in name for name in called)
    assert convolutions == {"last": 3, "norm": 1}[layer] + ("objective" in options and layer == "last")


def test_the_last_images_of_a_layer_are_not_compiled_for_anew(net, graphs):
    same(run(net, method=Normalized(compile=True), batch_size=2), run(net))
    same(run(net, method=Normalized(compile=True), batch_size=4, threshold=-1.0), run(net, threshold=-1.0))
    assert len(graphs) == 2
    torch.manual_seed(0)
    folding = Folding()
    options = {"objective": FOLDED, "threshold": -1.0}
    same(
        run(folding, "last", [0, 1, 0], method=Normalized(compile=True), batch_size=2, **options),
        run(folding, "last", [0, 1, 0], **options),
    )


def test_every_layer_of_a_network_is_compiled_however_many_there_are(graphs):
    torch.manual_seed(0)
    deep = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(12)])
    for layer in range(1, 12):
        run(deep, layer, [0], method=Normalized(compile=True), steps=1)
    assert len(graphs) == 11


def test_units_that_sleep_are_woken_in_compiled_networks_too(graphs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias.fill_(-0.5)
        model[2].bias[1] = -1e3
    result = run(model, "3", range(4), method=Normalized(compile=True), steps=24)
    plain = run(model, "3", range(4), steps=24)
    assert result.status == plain.status
    assert result.status[1] == "dead"
    assert graphs


def test_hooks_of_the_model_itself_have_their_say(graphs):
    class Doubling(nn.Module):
        """Hooks its own layer, by a method."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.factor = 2.0
            self.last.register_forward_pre_hook(self.double)
            self.last.register_forward_hook(partial(type(self).squared, self))

        def double(self, module, args):
            return (args[0] * self.factor,)

        def squared(self, module, args, output):
            return output.square()

        def forward(self, x):
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    net = Doubling()
    result = run(net, channels=range(4))
    expected = net(result.images).mean((2, 3)).diagonal().detach()
    torch.testing.assert_close(result.scores, expected)
    same(run(net, channels=range(4), method=Normalized(compile=True)), result)


class Keeping(nn.Module):
    """A block that keeps what the rest of the network takes from it, past its output."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 4, 3, padding=1), None

    def forward(self, x):
        self.kept = self.conv(x)
        return self.kept.relu()


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.last = Keeping(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.block(x)
        return self.last(y + self.block.kept)


class Direct(nn.Module):
    """Runs a layer's forward by itself before it calls the layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv.forward(x).relu())


class Catching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        try:
            y = self.conv(x)
        except BaseException:
            y = torch.zeros(len(x), 4, 10, 10)
        return self.last(y)


class Folding(nn.Module):
    """Folds the halves of an image into the batch, as windows of attention are."""

    def __init__(self):
        super().__init__()
        self.halves, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        parts = self.halves(torch.stack(x.chunk(2, dim=3), dim=1).flatten(0, 1))
        return self.last(torch.cat(parts.unflatten(0, (-1, 2)).unbind(1), dim=3))


FOLDED = objectives.score(
    lambda scene: scene.activations["halves"].unflatten(0, (-1, 2))[:, 0, 0].mean((1, 2)), layers=["halves"]
)
BOTH = objectives.channel() + objectives.channel(layer="block")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("build", "layer", "objective", "truth"),
    [
        (Reading, "last", BOTH, lambda net, x: net(x).mean((2, 3)) + net.block(x).mean((2, 3))),
        (Direct, "conv", "mean", lambda net, x: net(x).mean((2, 3))),
        (Direct, "conv", "max", lambda net, x: net(x).amax((2, 3))),
        (Folding, "last", FOLDED, lambda net, x: net.halves(x[..., :6])[:, [0, 0]].mean((2, 3))),
        (Catching, "conv", "mean", lambda net, x: net.conv(x).mean((2, 3))),
    ],
)
def test_the_score_that_is_climbed_is_that_of_the_network(build, layer, objective, truth, compiled, graphs):
    torch.manual_seed(0)
    model = build().eval()
    image = torch.rand(3, 12, 12)
    result = run(
        model, layer, range(2), objective=objective, image=image, steps=1, method=Normalized(compile=compiled)
    )
    with torch.no_grad():
        expected = truth(model, image[None])[0, :2]
    torch.testing.assert_close(result.history[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_all_modules_run_once_at_the_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    image = torch.rand(3, 12, 12)
    doubling = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 2,) if isinstance(module, nn.ReLU) else None
    )
    with doubling:
        result = run(model, "1", [0], image=image, steps=1)
        expected = model[:2](image[None])[0, 0].mean()
    torch.testing.assert_close(result.history[0, 0], expected)


def test_parts_that_the_caller_has_compiled_run_as_they_are():
    def fails(graph, inputs):
        raise AssertionError("it was compiled")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3)).eval()
    expected = run(model, "1", range(4))
    inner = run(model, "0", objective="max", channels=range(4))
    model[0] = torch.compile(model[0], backend=fails)
    same(run(model, "1", range(4)), expected)
    same(run(model, "0", objective="max", channels=range(4)), inner)
    torch.compiler.reset()


def test_a_network_that_decides_by_values_is_followed_or_refused_by_name(graphs):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if len(x) == 1 else x

    torch.manual_seed(0)
    for compiled in (False, True):
        with pytest.raises(
            CaptureError, match="`conv` did not run in this pass, though it did in the first one"
        ):
            run(Fickle(), "conv", range(3), method=Normalized(compile=compiled), batch_size=3)


@pytest.mark.parametrize("layer", ["right", "last"])
def test_parts_that_the_caller_has_compiled_are_compiled_with_the_rest(net, graphs, layer):
    expected = run(net, layer)
    net.right = torch.compile(net.right)
    same(run(net, layer, method=Normalized(compile=True)), expected)
    assert len(graphs) == 1


def test_where_it_cannot_be_compiled_the_message_says_what_to_leave_out(net, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    with pytest.raises(CaptureError, match=r"leave `compile` out \(.*no working compiler"):
        run(net, method=Normalized(compile=True))
    torch.compiler.reset()
    with pytest.raises(InvalidTypeError, match="`compile` must be True or False, got 'max-autotune'"):
        run(net, method=Normalized(compile="max-autotune"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # those of the compiler are its own
def test_the_compiler_of_torch_makes_the_same_images(net):
    same(run(net, method=Normalized(compile=True)), run(net))
    torch.compiler.reset()


class Checkpointed(nn.Module):
    """Computes its parts a second time in backward."""

    def __init__(self, *, last):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True), last)

    def forward(self, x):
        for part in (self.first, self.second):
            x = checkpoint(part, self.stem(x) if part is self.first else x, use_reentrant=False)
        return x


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    "layer", ["first.0", "first.1", "first.2", "second.0", "second.1", "second.2", "second.3"]
)
def test_a_pass_may_end_within_a_part_that_is_checkpointed(layer, early_stop):
    torch.manual_seed(0)
    net = Checkpointed(last=nn.Conv2d(5, 5, 3))
    plain = nn.Sequential(OrderedDict(stem=net.stem, first=net.first, second=net.second))
    with set_checkpoint_early_stop(early_stop):
        for objective in ("mean", "max"):
            result = run(net, layer, range(4), objective=objective, size=20)
            same(result, run(plain, layer, range(4), objective=objective, size=20))
        both = objectives.channel(layer="first.0") + objectives.channel()
        same(run(net, layer, [1], objective=both, size=20), run(plain, layer, [1], objective=both, size=20))


def test_a_pass_that_ended_leaves_nothing_behind():
    """Neither saved-tensor hooks that a checkpoint installs, nor frames with what they held."""
    net, images = Checkpointed(last=nn.Conv2d(5, 5, 3)), torch.rand(1, 3, 20, 20, requires_grad=True)
    cut = Cut(net, ["second.1"], io="output", is_compiled=False)
    held = weakref.ref(cut(images)["second.1"])
    with capture(Checkpointed(last=nn.ReLU()), "first.1", stop=True) as acts:
        assert net.stem(images).grad_fn is not None
    del acts
    assert held() is None
    weight = torch.rand(3, requires_grad=True)
    saved = (weight * weight.exp()).grad_fn  # saved-tensor hooks would pack these
    assert saved._saved_self.data_ptr() == weight.data_ptr()
