"""`maximize` where it would be easy to be silently wrong, to leave traces, or to call a living unit dead."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.nets import small_net
from torchlens_viz import capture, objectives
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.method import Normalized
from torchlens_viz.errors import CaptureError, InvalidArgumentError, InvalidTypeError
from torchlens_viz.models.demo_net import load_demo_net, normalize


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
    calls = []
    model[4].register_forward_hook(lambda *args: calls.append(len(args)))
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
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
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
        torch.set_default_device("meta")
        result = run(model, channels=[1, 2], transforms="gentle", parametrization="fourier")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
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


def test_hooks_of_the_caller_on_the_layer_have_their_say():
    model = small_net()
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    result = run(model, "2")
    expected = model[2](model[1](model[0](result.images))).mean((2, 3)).diagonal().detach()
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
    model = small_net()
    model.register_forward_hook(lambda *args: None, always_call=True)
    with pytest.raises(CaptureError, match="always_call=True"):
        run(model)


# Units that do not respond: the dead are found, all of them and no other.


class Functional(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.last, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), act
        self.out = nn.Identity()

    def forward(self, x):
        return self.out(self.act(self.last(self.act(self.first(x)))))


ACTS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp by position": lambda x: torch.clamp(x, 0),
    "clamp_": lambda x: x.clamp_(0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, min=0),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
}


def planted(act) -> tuple[nn.Module, list[bool]]:
    """A network in which channels 1 and 4 are dead, 2 and 6 only woken by redirection, and the rest alive."""
    torch.manual_seed(0)
    model = Functional(act)
    with torch.no_grad():
        model.first.weight.abs_()
        model.last.weight.abs_().mul_(0.3)
        model.first.bias.fill_(0.1)
        model.last.bias.fill_(0.1)
        model.last.bias[1] = -1e3
        model.last.weight[4] = 0
        model.last.bias[4] = 0
        noise = model.first(torch.full((1, 3, 12, 12), 0.5)).relu()
        white = model.first(torch.ones(1, 3, 12, 12)).relu()
        for place in (2, 6):  # off at gray, on at white
            at_gray, at_white = (
                F.conv2d(maps, model.last.weight[place : place + 1]).mean() for maps in (noise, white)
            )
            model.last.bias[place] = -(0.2 * at_gray + 0.8 * at_white)
    return model, [place in (1, 4) for place in range(8)]


@pytest.mark.parametrize("kind", ACTS)
def test_the_dead_are_found_and_only_they(kind):
    model, dead = planted(ACTS[kind])
    start = model.eval()(torch.full((1, 3, 12, 12), 0.5))[0].mean((1, 2))
    assert start[[1, 2, 4, 6]].tolist() == [0, 0, 0, 0]
    result = run(model, "out", steps=30, method=Normalized(restarts=1))
    assert [status == "dead" for status in result.status] == dead
    assert (result.scores[[2, 6]] > 0).all()
    assert result.scores[[1, 4]].tolist() == [0, 0]
    assert result.evidence[1] == "no gradient from 2 starts, with and after redirected ReLUs"
    torch.testing.assert_close(result.means, model(result.images).mean((2, 3)).detach())


@pytest.mark.parametrize("kind", ["nn.ReLU", "nn.ReLU6 in place", "clamp"])
def test_waking_some_leaves_the_others_of_the_batch_alone(kind):
    model, _ = planted(ACTS[kind])
    together = run(model, "out", steps=12)
    for place in (0, 2, 4):
        alone = run(model, "out", place, steps=12)
        torch.testing.assert_close(alone.images[0], together.images[place], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.history[0], together.history[place], equal_nan=True)
    same(run(model, "out", steps=12, batch_size=3), together)


def test_a_threshold_passed_while_woken_counts():
    model, _ = planted(F.relu)
    result = run(model, "out", 2, steps=64, threshold=0.01)
    assert result.status == ("threshold",)
    assert (~result.history[0].isnan()).sum() < 18


def test_the_dead_are_tried_on_the_reference_that_drives_them_hardest():
    # Alive on one picture only, whose pattern no redirection of a constant objective finds.
    class Picky(nn.Module):
        def __init__(self, picture):
            super().__init__()
            self.picture = picture
            self.out = nn.Identity()

        def forward(self, x):
            distance = (x - self.picture).square().mean((1, 2, 3))
            near = torch.where(distance < 1e-3, x.mean((1, 2, 3)), 0 * x.sum((1, 2, 3)))
            return self.out(near[:, None])

    torch.manual_seed(0)
    picture = torch.rand(3, 8, 8)
    references = torch.stack([torch.rand(3, 8, 8), picture, torch.rand(3, 8, 8)])
    without = run(Picky(picture), "out", size=8, lr=1e-4)
    assert without.status == ("dead",)
    found = run(Picky(picture), "out", size=8, lr=1e-4, references=references)
    assert found.status != ("dead",)
    torch.testing.assert_close(found.images[0], picture, rtol=0, atol=2e-3)
    hopeless = run(Picky(picture - 5), "out", size=8, references=references, method=Normalized(restarts=0))
    assert hopeless.evidence == (
        "no gradient from 2 starts, one of them the reference image that drives it hardest, "
        "with and after redirected ReLUs",
    )


def test_a_unit_whose_windows_undo_each_others_pull_is_woken_alone():
    # The pull of all windows on a pixel is +1 - 1; to be on, a pixel must be 0.9 brighter than its neighbour.
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2), padding="same", padding_mode="circular"), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([-1.0, 1.0])
        model[0].bias[:] = -0.9
    assert run(model, "1", steps=30, size=(8, 8), method=Normalized(restarts=0)).status == ("dead",)
    found = run(model, "1", steps=30, size=(8, 8), method=Normalized(restarts=1))
    assert found.status != ("dead",)
    assert found.scores[0] > 0


def test_what_transforms_extinguish_is_climbed_without_them():
    # Channel 0 sees red against its neighbours, which resampling blurs; 1 sees brightness; 2 nothing.
    model = nn.Sequential(nn.Conv2d(3, 3, 2, stride=2), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[0] = 0  # so that green and blue stay what they were at the start
        model[0].weight[0, 0] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        model[0].weight[1] = 1 / 12
        model[0].weight[2] = 0
        model[0].bias[:] = torch.tensor([-1.6, 0, -1])
    found = run(model, "1", steps=30, size=16, transforms="robust")
    assert found.status[0] != "dead"
    assert found.evidence[0].endswith(
        "; without the transforms, since under them no gradient lasted from 5 starts"
    )
    assert "transforms" not in found.evidence[1]
    assert found.status[2] == "dead"
    assert found.evidence[2] == (
        "no gradient from 5 starts, under the transforms and without them, with and after redirected ReLUs"
    )
    assert found.scores[0] > 0
    same(run(model, "1", 0, steps=30, size=16, transforms="robust"), run(model, "1", 0, steps=30, size=16))
    others = {"steps": 30, "size": 16, "transforms": "robust", "batch_size": 2}
    same(run(model, "1", **others), found)
    beside = run(model, "1", [0] + [1] * 40, **others)  # for as long as channel 0 takes
    apart = run(model, "1", [1] * 40, **others)
    torch.testing.assert_close(beside.history[1:], apart.history, rtol=1e-5, atol=1e-5)
    alone = run(model, "1", 0, steps=30, size=16, transforms="robust", method=Normalized(restarts=0))
    assert alone.evidence[0].endswith("since under them no gradient lasted")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_do_not_make_a_living_unit_dead(steps):
    model, dead = planted(F.relu)
    result = run(model, "out", steps=steps)
    assert [status == "dead" for status in result.status] == dead
    assert result.history.shape == (8, steps)
    assert result.history[[2, 6]].isfinite().all()


def test_what_falls_asleep_on_the_way_is_woken():
    # Channels that a step too far switches off, all of which photographs and other climbs drive.
    demo, channels = load_demo_net(), [4, 11, 23, 29, 36]
    result = maximize(
        demo, "features.4", channels, size=48, steps=32, preprocess=normalize, parametrization="fourier"
    )
    assert (result.scores > 1).all()
    assert set(result.status) <= {"steps", "stalled"}
    assert result.history.isfinite().all()


def test_a_channel_with_nan_among_its_weights_is_stopped_and_the_others_climb():
    model, _ = planted(F.relu)
    clean = run(model, "out", steps=8)
    with torch.no_grad():
        model.last.weight[3, 0, 0, 0] = torch.nan
        model.last.bias[5] = torch.inf
    for layer in ("last", "out"):
        result = run(model, layer, steps=8)
        assert [status == "nonfinite" for status in result.status] == [n in (3, 5) for n in range(8)]
        assert not result.scores[[3, 5]].isfinite().any()
    others = [0, 1, 2, 4, 6, 7]
    torch.testing.assert_close(result.images[others], clean.images[others], rtol=0, atol=1e-5)
    assert model.last.weight[3].isnan().any()


def test_a_convolution_without_weights_is_dead_before_its_relu_too():
    model, _ = planted(F.relu)
    result = run(model, "last", steps=8)
    assert [status == "dead" for status in result.status] == [n == 4 for n in range(8)]


def test_without_restarts_the_evidence_says_so():
    model, _ = planted(F.relu)
    assert run(model, "out", 1, method=Normalized(restarts=0)).evidence == (
        "no gradient at the start, with and after redirected ReLUs",
    )
    assert run(model, "out", 1, method="classic", seed=1).evidence == ("no gradient at the start",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image": torch.rand(3, 12, 12), "size": 20},
            r"`size` must be left out.*12 x 12.*got 20",
        ),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        maximize(nn.Conv2d(3, 4, 3), "", steps=2, **options)
