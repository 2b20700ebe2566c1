"""`maximize` where it would be easy to be silently wrong, to leave traces, or to call a living unit dead."""

from __future__ import annotations

import copy
import threading
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.nets import small_net
from torchlens_viz import capture, objectives
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError


def run(model=None, layer="2", channels=None, **options):
    options = {"size": 12, "steps": 8, "precision": "float32", **options}
    return maximize(small_net() if model is None else model, layer, channels, **options)


def same(left, right, atol=1e-5):
    torch.testing.assert_close(left.images, right.images, rtol=0, atol=atol)
    torch.testing.assert_close(left.scores, right.scores, rtol=1e-4, atol=1e-5)


# No trace is left.


def test_nothing_about_the_model_changes():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 7, 3))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[4].register_full_backward_hook(lambda *args: None)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    keys = [sorted(vars(module)) for module in model.modules()]
    run(model, "4", transforms="robust")
    run(model, "4", precision="bfloat16", method="classic")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [module.training for module in model.modules()] == flags
    assert [sorted(vars(module)) for module in model.modules()] == keys
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()) == 1
    assert all(not p.is_cuda and p.is_contiguous() for p in model.parameters())


def test_gradients_that_the_caller_has_stay_as_they_are():
    model = small_net()
    model(torch.rand(1, 3, 12, 12)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    run(model)
    assert all(map(torch.equal, before, [parameter.grad for parameter in model.parameters()]))


def test_buffers_that_a_forward_pass_writes_to_stay_as_they_are():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.seen += len(x)
            return self.conv(x)

    model = Counting()
    run(model, "conv")
    assert model.seen == 0


def test_random_numbers_of_the_caller_go_on_as_if_nothing_had_run():
    import random

    import numpy as np

    model = small_net()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    run(model, transforms="robust", steps=2)
    run(model, method="classic", steps=2)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


def test_what_the_caller_has_seeded_changes_nothing():
    model = small_net()
    torch.manual_seed(1)
    first = run(model, transforms="robust")
    torch.manual_seed(2)
    assert torch.equal(run(model, transforms="robust").images, first.images)


def test_the_modes_of_the_caller_change_nothing_and_stay():
    model, expected = small_net(), run(channels=[1, 2])
    with torch.no_grad():
        same(run(model, channels=[1, 2]), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        same(run(model, channels=[1, 2]), expected)
        assert torch.is_inference_mode_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        same(run(model, channels=[1, 2]), expected)
        assert torch.is_autocast_enabled("cpu")


def test_a_default_type_and_a_default_device_of_the_caller_change_nothing():
    model, expected = small_net(), run(channels=[1, 2], transforms="gentle", parametrization="fourier")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            result = run(model, channels=[1, 2], transforms="gentle", parametrization="fourier")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    same(result, expected)
    assert {result.images.dtype, result.scores.dtype, result.history.dtype} == {torch.float32}


def test_the_precision_of_products_that_the_caller_chose_is_put_back():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        run(steps=1)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_enclosing_capture_records_nothing_of_the_ascent():
    model = small_net()
    with capture(model, "2") as acts:
        run(model, "2")
    assert acts.not_called == ("2",)


def test_preprocessing_and_networks_may_work_in_place_on_what_they_get():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            x -= 0.5
            return self.conv(F.relu(x, inplace=True))

    model = Shifts()
    result = run(model, "conv")
    torch.testing.assert_close(result.scores, model(result.images.clone()).mean((2, 3)).diagonal().detach())
    same(run(preprocess=lambda x: x.sub_(0.5).div_(2)), run(preprocess=lambda x: (x - 0.5) / 2))


# Models of all kinds.


def test_a_model_in_training_is_maximised_as_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 7, 3))
    model(torch.rand(8, 3, 12, 12))
    trained = run(model.train(), "4")
    same(trained, run(model.eval(), "4"))
    expected = model(trained.images).mean((2, 3)).diagonal()
    torch.testing.assert_close(trained.scores, expected.detach())


def test_a_norm_by_the_statistics_of_the_batch_is_refused_but_for_one_image_at_a_time():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 3)
    )
    with pytest.raises(InvalidArgumentError, match=r"`1` \(track_running_stats=False\).*give `batch_size=1`"):
        run(model)
    assert run(model, batch_size=1).channels.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prepares", [False, True])
def test_models_of_other_types_are_run_in_float32(dtype, prepares):
    model = small_net().to(dtype)
    options = {"preprocess": (lambda x: x.to(dtype))} if prepares else {}
    result = run(model, **options)
    assert next(model.parameters()).dtype == dtype
    if prepares:  # what the network sees is rounded, which no gradient knows
        expected = copy.deepcopy(model).float()[:3](result.images.to(dtype).float()).mean((2, 3)).diagonal()
        torch.testing.assert_close(result.scores, expected.detach())
    else:
        same(result, run(copy.deepcopy(model).float()))


def test_bfloat16_climbs_nearly_as_high_and_its_scores_are_true_float32():
    full, half = run(steps=30), run(steps=30, precision="bfloat16")
    expected = small_net()[:3](half.images).mean((2, 3)).diagonal().detach()
    torch.testing.assert_close(half.scores, expected, rtol=1e-5, atol=1e-6)
    gained = (half.scores - half.history[:, 0]) / (full.scores - full.history[:, 0])
    assert gained.min() > 0.95


def test_a_model_that_folds_maps_with_view_is_maximised_too():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(100, 5)

        def forward(self, x):
            return self.dense(F.max_pool2d(self.conv(x), 2).view(len(x), 100))

    model = View()
    for precision in ("float32", "bfloat16"):
        result = run(model, "dense", precision=precision)
        torch.testing.assert_close(result.scores, model(result.images).diagonal().detach())
        assert (result.scores > result.history[:, 0]).all()


def test_shared_modules_are_found_by_either_name_and_taken_at_their_first_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = self.first
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.second(self.act(self.first(x))))

    model = Shared()
    result = run(model, "second")
    torch.testing.assert_close(result.scores, model.first(result.images).mean((2, 3)).diagonal().detach())
    act = run(model, "act", objective=objectives.channel() + objectives.channel(layer="second"))
    maps = model.first(act.images)
    torch.testing.assert_close(act.scores, (maps + maps.relu()).mean((2, 3)).diagonal().detach())


def test_another_layer_is_scored_before_the_in_place_relu_that_follows_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).eval()
    with torch.no_grad():
        model[0].bias -= 0.2
    result = run(model, "2", objective=objectives.channel() - 0.5 * objectives.channel(layer="0"))
    before = F.conv2d(result.images, model[0].weight, model[0].bias)
    expected = (model[2](before.relu()) - 0.5 * 0).mean((2, 3)).diagonal() - 0.5 * before.mean(
        (2, 3)
    ).diagonal()
    torch.testing.assert_close(result.scores, expected.detach())
    # The ascent sees the same value: its first score is that of the start.
    start = torch.rand(3, 12, 12)
    first = run(
        model,
        "2",
        1,
        image=start,
        steps=1,
        objective=objectives.channel(1, layer="0") + 0 * objectives.channel(),
    )
    expected = F.conv2d(start[None], model[0].weight, model[0].bias)[0, 1].mean()
    torch.testing.assert_close(first.history[0, 0], expected.detach())


def test_other_layers_are_named_by_a_glob_too():
    by_glob = run(objective=objectives.channel(layer="[0]"), channels=2)
    same(by_glob, run(objective=objectives.channel(layer="0"), channels=2))
    with pytest.raises(InvalidTypeError, match="`layer` must be a name, got 0"):
        objectives.channel(layer=0)


def old_weight_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        old_weight_norm,
    ],
)
@pytest.mark.parametrize("place", ["0", "2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_that_are_computed_are_computed(wrap, place, precision):
    model = small_net()
    setattr(model, place, wrap(getattr(model, place)))
    model.train()(torch.rand(2, 3, 12, 12))
    before = copy.deepcopy(model.state_dict())
    result = run(model, "2", precision=precision)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    expected = model.eval()[:3](result.images).mean((2, 3)).diagonal().detach()
    torch.testing.assert_close(result.scores, expected, rtol=1e-4, atol=1e-5)
    assert (result.scores > result.history[:, 0]).all()


@pytest.mark.filterwarnings("ignore:the model has forward hooks that are not its own")
def test_hooks_of_the_caller_never_run_on_a_copy():
    """Forward and backward, before and after, with an object that cannot be copied."""

    class Saver:
        def __init__(self):
            self.calls, self.lock = 0, threading.Lock()

        def __call__(self, *args):
            self.calls += 1

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3))
    bare, savers = copy.deepcopy(model), [Saver() for _ in range(6)]
    model.register_forward_hook(savers[0], always_call=True)
    model[0].register_forward_pre_hook(savers[1])
    model[0].register_forward_hook(partial(savers[2], "more"), with_kwargs=True)
    model[2].register_full_backward_hook(savers[3])
    model[2].register_full_backward_pre_hook(savers[4])
    nn.Sequential(model[0]).register_forward_hook(savers[5])
    same(run(model, "2"), run(bare, "2"))
    assert [saver.calls for saver in savers] == [0] * 6
    model(torch.rand(1, 3, 12, 12, requires_grad=True)).sum().backward()
    assert [saver.calls for saver in savers] == [1] * 5 + [0]  # no Sequential around it ran


def test_hooks_that_are_left_out_are_told_and_our_own_are_not():
    model = small_net()
    with capture(model, "0"):
        same(run(model, "2"), run(small_net(), "2"))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match=r"forward hooks that are not its own.*put that into a module"):
        same(run(model, "2"), run(small_net(), "2"))


class Folding(nn.Module):
    """As adapters do: `eval()` folds an update into the weight in place, and `train()` takes it out again."""

    def __init__(self):
        super().__init__()
        self.conv, self.delta, self.is_folded = (
            nn.Conv2d(3, 6, 3),
            nn.Parameter(torch.ones(6, 3, 3, 3)),
            False,
        )

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_folded:
            self.conv.weight.data += (-1 if mode else 1) * self.delta.data
            self.is_folded = not mode
        return self

    def forward(self, x):
        return self.conv(x) if self.is_folded else F.conv2d(x, self.conv.weight + self.delta, self.conv.bias)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_that_eval_would_change_stay_and_the_scores_are_right(mode, precision):
    torch.manual_seed(0)
    model = nn.Sequential(Folding(), nn.ReLU()).train(mode)
    before = copy.deepcopy(model.state_dict())
    result = run(model, "0", [0, 1], precision=precision)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert model[0].is_folded is not mode
    expected = model[0](result.images).mean((2, 3)).diagonal().detach()
    torch.testing.assert_close(result.scores, expected)


@pytest.mark.parametrize("layer", ["2", nn.Linear, lambda name, module: name == "2", -1])
def test_layers_are_chosen_by_any_selector_in_compiled_models_too(layer):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3)).eval()
    expected = run(plain, "2")
    assert expected.layer == "2"
    same(run(plain, layer), expected)
    same(run(torch.compile(plain, backend="eager"), layer), expected)


def test_models_made_in_inference_mode_are_maximised():
    with torch.inference_mode():
        model = small_net()
    same(run(model), run())


def test_models_that_cannot_be_maximised_are_refused_with_the_reason():
    with pytest.raises(InvalidArgumentError, match=r"`model` has lazy parameters.*run it once"):
        run(nn.Sequential(nn.LazyConv2d(4, 3)), "0")

    class Locked(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("it is locked")

    with pytest.raises(
        InvalidTypeError, match=r"`model` must be a module that can be copied, got Locked.*it is locked"
    ):
        run(Locked(nn.Conv2d(3, 4, 3)), "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image": torch.rand(3, 12, 12), "size": 20},
            r"`size` must be left out.*12 x 12.*got \(20, 20\)",
        ),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        maximize(nn.Conv2d(3, 4, 3), "", steps=2, **options)


class PartlyOf(nn.Module):
    """A part of it is of another type, and converts what it takes by itself."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3).to(dtype), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.last(self.first(x.to(self.first.weight.dtype if self.training else self.dtype)).float())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_which_a_part_is_of_another_type_is_maximised(dtype, layer, precision):
    torch.manual_seed(0)
    model = PartlyOf(dtype).eval()
    model.dtype = dtype
    result = run(model, layer, [0, 1], precision=precision)
    with torch.no_grad(), capture(model, layer) as acts:
        model(result.images)
    expected = acts[layer].float().mean((2, 3)).diagonal()
    torch.testing.assert_close(result.scores, expected, rtol=1e-3, atol=1e-3)


class MixesTypes(nn.Module):
    """Hands values and weights to an operation that autocast leaves alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 28).view(4, 7))

    def forward(self, x):
        return torch.tensordot(x, self.weight, ([1], [0])).movedim(-1, 1)


def test_a_network_that_fails_in_bfloat16_climbs_in_float32(monkeypatch):
    monkeypatch.setattr("torchlens_viz.backprop.device._is_bfloat16_fast", lambda device: True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), MixesTypes(), nn.Hardtanh())
    options = {"size": 6, "steps": 4, "channel_dim": 1}
    found = maximize(net, "2", [1, 5], **options)
    exact = maximize(net, "2", [1, 5], precision="float32", **options)
    assert torch.equal(found.images, exact.images)
    assert torch.equal(found.scores, exact.scores)
    with pytest.raises(InvalidArgumentError, match=r'fails in bfloat16 .*pass `precision="float32"`'):
        maximize(net, "2", [1, 5], precision="bfloat16", **options)
