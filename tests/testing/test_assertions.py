"""`torchlens_viz.testing`: assertions pass at their bounds, fail beyond them, and say where and how far."""

from __future__ import annotations

import doctest
import importlib
import re
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchlens_viz
from tests.nets import stats_of
from torchlens_viz import LayerNotFoundError, RunningStats, capture, testing
from torchlens_viz.errors import InvalidArgumentError, LayerNotCapturedError
from torchlens_viz.testing import (
    assert_activations_close,
    assert_finite,
    assert_mean,
    assert_no_dead_channels,
    assert_std,
    assert_zero_fraction,
)

NAN, INF = float("nan"), float("inf")


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def fails(message: str):
    return pytest.raises(AssertionError, match=exactly(message))


def columns(*channels: list[float]) -> torch.Tensor:
    return torch.tensor(channels).T.contiguous()


@pytest.fixture
def net() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU())
    for layer, biases in ((net[0], [1.0, 2.0, -1.0, -2.0]), (net[2], [1.0, 1.0, -5.0])):
        layer.weight.data.zero_()
        layer.bias.data = torch.tensor(biases)
    return net.eval()


@pytest.fixture
def acts(net):
    with torch.no_grad(), capture(net, "*") as acts:
        net(torch.zeros(2, 1, 3, 3))
    return acts


# Each assertion.


def test_finite_values_pass_in_any_shape():
    for x in (torch.tensor(1.0), torch.ones(3), torch.ones(2, 3, 4), torch.arange(6), torch.tensor([True])):
        assert_finite(x)


def test_nan_and_inf_are_named():
    values = torch.zeros(2, 3, 2)
    values[1, 2, 0], values[0, 2, 1], values[1, 1, 1] = NAN, -INF, INF
    message = (
        "the tensor: 3 of 12 values (25.0%) are NaN or infinite, in 2 of 3 channels\n"
        "  channels: 1 (1 value), 2 (2 values)\n  first: -inf at index (0, 2, 1)"
    )
    with fails(message):
        assert_finite(values)
    with fails("the statistics: " + message.partition(": ")[2].rpartition("\n")[0]):
        assert_finite(stats_of(values))
    with fails("the tensor: 1 of 1 value (100.0%) is NaN or infinite\n  first: nan at index ()"):
        assert_finite(torch.tensor(NAN))


def test_dead_channels_are_counted():
    values = columns([0.0, -1.0], [0.5, 0.0], [-3.0, -2.0], [1.0, 1.0])
    message = (
        "the tensor: 2 of 4 channels (50.0%) are dead, at most 1 allowed\n"
        "  channels: 0 (max 0), 2 (max -2)\n"
        "  dead: no value of 2 in the channel exceeds eps = 0"
    )
    for x in (values, stats_of(values)):
        assert_no_dead_channels(x, max_dead=2)
        with fails(message.replace("the tensor", "the tensor" if x is values else "the statistics")):
            assert_no_dead_channels(x, max_dead=1)
    assert_no_dead_channels(values, eps=0.499, max_dead=2)
    with pytest.raises(AssertionError, match=r"3 of 4 channels \(75.0%\) are dead, at most 2 allowed"):
        assert_no_dead_channels(values, eps=0.5, max_dead=2)
    with pytest.raises(ValueError, match="`max_dead` must be 0 or more, got -1"):
        assert_no_dead_channels(values, max_dead=-1)


@pytest.mark.parametrize(
    ("check", "what", "values"),
    [
        (assert_mean, "mean", columns([0.0, 0.5], [1.0, 3.0], [2.0, 8.0])),  # 0.25, 2, 5
        (assert_std, "std", columns([0.0, 0.5], [0.0, 4.0], [0.0, 10.0])),
        (
            assert_zero_fraction,
            "zero fraction",
            columns([1.0, 1, 1, 0], [1.0, 1, 0, 0], [1.0, 0, 0, 0]),
        ),
    ],
)
def test_bounds_are_inclusive_per_channel(check, what, values):
    stats = stats_of(values)
    seen = getattr(stats, what.replace(" ", "_"))
    low, high = seen.min().item(), seen.max().item()
    for x in (values, stats):
        check(x, low, high)
        label = "the tensor" if x is values else "the statistics"
        worst, bound = int(seen.argmax()), (high + seen.median().item()) / 2
        with fails(
            f"{label}: the {what} of 1 of 3 channels (33.3%) is outside [{low:.6g}, {bound:.6g}]\n"
            f"  channels: {worst} ({high:.6g})\n"
            f"  worst: channel {worst} with {high:.6g}, which is {high - bound:.6g} above the upper bound"
        ):
            check(x, low, bound)
        worst, bound = int(seen.argmin()), (low + seen.median().item()) / 2
        with fails(
            f"{label}: the {what} of 1 of 3 channels (33.3%) is outside [{bound:.6g}, {high:.6g}]\n"
            f"  channels: {worst} ({low:.6g})\n"
            f"  worst: channel {worst} with {low:.6g}, which is {bound - low:.6g} below the lower bound"
        ):
            check(x, bound, high)


@pytest.mark.parametrize(
    ("check", "value"), [(assert_mean, 2.0), (assert_std, 2.0), (assert_zero_fraction, 0.5)]
)
def test_bounds_are_inclusive_per_layer(check, value):
    values = columns([0.0, 0.0], [4.0, 4.0])
    name = check.__name__.removeprefix("assert_").replace("_", " ")
    check(values, value, value, per="layer")
    message = (
        f"the tensor: the {name} is {value:g}, outside [0, {value / 2:g}], {value / 2:g} above the upper"
    )
    with fails(f"{message} bound"):
        check(values, 0, value / 2, per="layer")
    with pytest.raises(ValueError, match="`low` must not exceed `high`, got 2 and 1"):
        check(values, 2, 1)
    with pytest.raises(ValueError, match=f"`low` must not exceed `high`, got {NAN} and 1"):
        check(values, NAN, 1)
    with pytest.raises(ValueError, match='`per` must be "channel" or "layer", got \'filter\''):
        check(values, 0, 1, per="filter")


def test_only_the_first_channels_are_listed():
    with pytest.raises(
        AssertionError, match=r"  channels: 0 \(1\), 1 \(1\), 2 \(1\), 3 \(1\), 4 \(1\) and 7 more"
    ):
        assert_mean(torch.ones(2, 12), 0, 0.5)


@pytest.mark.parametrize("spoilt", [NAN, INF, -INF])
def test_what_is_not_finite_fails_every_assertion(spoilt):
    values = columns([0.0, 1.0], [1.0, spoilt])
    for x in (values, stats_of(values), {"conv": values}):
        for check in (
            assert_finite,
            assert_no_dead_channels,
            lambda x: assert_mean(x, -INF, INF),
            lambda x: assert_std(x, 0, INF),
            lambda x: assert_zero_fraction(x, 0, 1),
            lambda x: assert_mean(x, -INF, INF, per="layer"),
            lambda x: assert_activations_close(x, x),
        ):
            with pytest.raises(AssertionError, match=r"1 of 4 values \(25.0%\) is NaN or infinite"):
                check(x)


def test_close_values_pass_up_to_the_tolerance():
    expected = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    actual = expected + torch.tensor([[0.0, -0.5], [0.25, 0.0]])
    assert_activations_close(actual, expected, rtol=0.125, atol=0.25)
    with fails(
        "the tensor: 1 of 4 values (25.0%) differs by more than 0.25 + 0 * abs(expected)\n"
        "  worst: -2.5 where -2 was expected, at index (0, 1); "
        "the difference is 0.5, or 25% of what was expected"
    ):
        assert_activations_close(actual, expected, rtol=0.0, atol=0.25)
    with fails(
        "the tensor: 2 of 4 values (50.0%) differ by more than 0 + 0 * abs(expected)\n"
        "  worst: -2.5 where -2 was expected, at index (0, 1); "
        "the difference is 0.5, or 25% of what was expected"
    ):
        assert_activations_close(actual, expected, rtol=0.0, atol=0.0)
    assert_activations_close(expected.half(), expected.int())
    with fails("the tensor: shape (2, 2) where (1, 2) was expected"):
        assert_activations_close(expected, expected[:1])
    with pytest.raises(ValueError, match="`atol` must be 0 or more, got -1"):
        assert_activations_close(expected, expected, atol=-1)
    with pytest.raises(ValueError, match=f"`rtol` must be 0 or more, got {NAN}"):
        assert_activations_close(expected, expected, rtol=NAN)


def test_close_statistics_pass_and_others_are_named():
    values = columns([1.0, 2.0], [1.0, 3.0])
    assert_activations_close(stats_of(values), stats_of(values + 0.25), atol=0.25, rtol=0.0)
    with pytest.raises(AssertionError) as caught:
        assert_activations_close(
            stats_of(values), stats_of(values + torch.tensor([0, 0.5])), atol=0.25, rtol=0
        )
    assert str(caught.value) == "\n".join(
        ["3 of 3 failed"]
        + [
            f"the statistics: {name}: 1 of 2 channels (50.0%) differs by more than 0.25 + 0 * abs(expected)\n"
            f"  worst: {got:g} where {got + 0.5:g} was expected, at channel 1; the difference is 0.5, "
            f"or {50 / (got + 0.5):.3g}% of what was expected"
            for name, got in (("mean", 2), ("min", 1), ("max", 3))
        ]
    )


def test_close_activations_have_the_same_layers(acts, net):
    assert_activations_close(acts, acts)
    with torch.no_grad(), capture(net, ["0", "1"]) as fewer:
        net(torch.zeros(2, 1, 3, 3))
    assert_activations_close(acts, fewer, layers=["0", "1"])
    with fails("2 of 2 failed\n`2`: there, and not expected\n`3`: there, and not expected"):
        assert_activations_close(acts, fewer)
    with fails("2 of 2 failed\n`2`: expected, and not there\n`3`: expected, and not there"):
        assert_activations_close(fewer, acts)
    changed = {**acts, "1": acts["1"] + 1}
    with fails(
        "`1`: 72 of 72 values (100.0%) differ by more than 1e-05 + 0 * abs(expected)\n"
        "  worst: 2 where 1 was expected, at index (0, 0, 0, 0); "
        "the difference is 1, or 100% of what was expected"
    ):
        assert_activations_close(changed, dict(acts), rtol=0)
    with fails("`1`: a ChannelStats where a Tensor was expected"):
        assert_activations_close({"1": stats_of(acts["1"])}, {"1": acts["1"]})


# What they speak of.


def test_all_layers_that_fail_are_named(acts):
    assert_no_dead_channels(acts, layers=["1", "3"], max_dead=2)
    with fails(
        "2 of 4 failed\n"
        "`0`: 2 of 4 channels (50.0%) are dead, at most 1 allowed\n"
        "  channels: 2 (max -1), 3 (max -2)\n"
        "  dead: no value of 18 in the channel exceeds eps = 0\n"
        "`1`: 2 of 4 channels (50.0%) are dead, at most 1 allowed\n"
        "  channels: 2 (max 0), 3 (max 0)\n"
        "  dead: no value of 18 in the channel exceeds eps = 0"
    ):
        assert_no_dead_channels(acts, max_dead=1)


def test_gathered_statistics_mappings_and_surveys_serve_as_well(net, acts):
    with torch.no_grad(), capture(net, "*", reduce=RunningStats) as gathered:
        net(torch.zeros(2, 1, 3, 3))
    running = RunningStats()
    running.update(acts["0"])
    survey = SimpleNamespace(stats={name: gathered[name] for name in gathered})
    for x in (acts, gathered, dict(gathered), survey, {"0": running}):
        with fails(
            "`0`: the mean of 1 of 4 channels (25.0%) is outside [-1, 2]\n"
            "  channels: 3 (-2)\n  worst: channel 3 with -2, which is 1 below the lower bound"
        ):
            assert_mean(x, -1, 2, layers="0")
    assert_mean(running, -2, 2)
    assert_zero_fraction(gathered, 0.5, 0.5, per="layer", layers="1")


def test_every_call_of_a_layer_counts():
    relu = nn.ReLU()
    net = nn.Sequential(relu, nn.Conv2d(2, 2, 1, bias=False), relu)
    net[1].weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).view(2, 2, 1, 1)
    with torch.no_grad(), capture(net, "0") as acts:
        net(torch.ones(1, 2, 1, 1))
    message = (
        "1 of 2 failed\n`0` [call 1]: 1 of 2 channels (50.0%) is dead, at most 0 allowed\n"
        "  channels: 1 (max 0)\n  dead: no value of 1 in the channel exceeds eps = 0"
    )
    with fails(message):
        assert_no_dead_channels(acts)


def test_messages_of_one_s_own_come_first():
    with fails("epoch 3\nthe tensor: the mean is 1, outside [0, 0.5], 0.5 above the upper bound"):
        assert_mean(torch.ones(2, 1), 0, 0.5, msg="epoch 3")


def test_globs_choose_layers_and_unknown_ones_raise(acts):
    assert_no_dead_channels(acts, layers="[13]", max_dead=2)
    named = {"features.conv1": torch.ones(1, 2), "features.relu1": torch.zeros(1, 2)}
    assert_no_dead_channels(named, layers="*.conv*")
    with pytest.raises(LayerNotFoundError, match=r"no layer matches `features.conv2`; did you mean `feat"):
        assert_no_dead_channels(named, layers=["features.conv1", "features.conv2"])
    with pytest.raises(
        LayerNotFoundError, match=r"no layer matches `head\.\*`; there are `features.conv1`, "
    ):
        assert_finite(named, layers="head.*")
    with pytest.raises(
        ValueError, match="`layers` has no effect on a Tensor, which has no layers; leave it out"
    ):
        assert_finite(torch.ones(1), layers="*")


def test_layers_that_did_not_run_are_no_success(net):
    with torch.no_grad(), capture(net, "*") as acts:
        net[:2](torch.zeros(1, 1, 3, 3))
    assert_finite(acts)
    assert_finite(acts, layers="*")
    with pytest.raises(LayerNotCapturedError, match="`2` was selected but did not run"):
        assert_finite(acts, layers="2")
    acts.clear()
    with pytest.raises(
        ValueError, match="`x` must hold at least one layer, got none: `0`, `1`, `2`, `3` did not run"
    ):
        assert_finite(acts)


def test_tuples_are_taken_apart_for_finiteness_and_comparison_alone():
    lstm = nn.LSTM(3, 4, batch_first=True)
    lstm.weight_hh_l0.data.fill_(0.1)
    with torch.no_grad(), capture(lstm, "") as acts:
        lstm(torch.ones(2, 5, 3))
    assert_finite(acts)
    assert_activations_close(acts, acts)
    assert_mean(acts[""][0], -1, 1, channel_dim=-1)
    with pytest.raises(
        TypeError, match="`` must be one tensor, got 3 tensors in a tuple; pass the one that counts"
    ):
        assert_mean(acts, -1, 1)
    acts[""][1][1][0, 0, 0] = NAN
    with pytest.raises(
        AssertionError, match=r"1 of 3 failed\n`` \[tensor 2\]: 1 of 8 values \(12.5%\) is NaN"
    ):
        assert_finite(acts)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (
            torch.zeros(0, 3),
            ValueError,
            "the tensor must hold values, got none, so that nothing can be asserted",
        ),
        ({"a": torch.zeros(2, 0)}, ValueError, "`a` must hold values, got none"),
        (
            torch.zeros(3),
            ValueError,
            r"the tensor must have a dimension 1 for its channels, got shape \(3,\); say",
        ),
        ({}, ValueError, "`x` must hold at least one layer, got none"),
        ({"a": None}, TypeError, "`a` must be one tensor, got NoneType; pass the one that counts"),
        (
            [1.0],
            TypeError,
            "`x` must be a tensor, Activations, ChannelStats, a Survey or a mapping .* got list",
        ),
    ],
)
def test_what_cannot_be_asserted_on_is_refused(x, kind, message):
    with pytest.raises(kind, match=message):
        assert_mean(x, -1, 1)


ON_VALUES = [
    name for name in vars(testing) if name.startswith("assert_") and name != "assert_same_activations"
]


@pytest.mark.parametrize("name", ON_VALUES)
def test_tracebacks_end_at_the_caller_s_line(name):
    arguments = {"assert_activations_close": [torch.tensor([[NAN]])], "assert_finite": []}
    options = arguments.get(name, [] if name == "assert_no_dead_channels" else [0, 1])
    subject = [torch.tensor([[NAN]]), *options]
    if name == "assert_same_activations":
        subject = [nn.Softmax(1), nn.Softmax(0), torch.eye(3)[:2]]
    with pytest.raises(AssertionError) as caught:
        getattr(testing, name)(*subject)
    shown = [entry for entry in caught.traceback if not entry.ishidden(caught)]
    assert [entry.path.name for entry in shown] == ["test_assertions.py"]
    assert len(traceback.extract_tb(caught.tb)) > 1  # there was something to hide


@pytest.mark.parametrize("module", ["testing.assertions", "stats.running"])
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(importlib.import_module(f"torchlens_viz.{module}"))
    assert found.attempted > 3
    assert found.failed == 0


def test_examples_in_the_documentation_are_true():
    page = Path(torchlens_viz.__file__).parents[1] / "docs" / "testing.md"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 10
    assert found.failed == 0


def test_the_module_is_there_without_importing_it():
    assert torchlens_viz.testing is testing
    assert "testing" in dir(torchlens_viz)


def test_a_bound_that_is_no_number_is_refused():
    with pytest.raises(InvalidArgumentError, match="`eps` must be a number"):
        testing.assert_no_dead_channels(torch.zeros(2, 3), eps=float("nan"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_can_be_asserted(dtype):
    values = torch.tensor([[1.0, 2.0], [0.0, -1.0]]).to(dtype)
    assert_finite(values)
    assert_activations_close(values, values.float(), rtol=0, atol=0)
    assert_mean(values, 0.5, 0.5)
    with pytest.raises(AssertionError, match=r"1 of 4 values .* is NaN or infinite"):
        assert_finite(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]).to(dtype))
    with pytest.raises(AssertionError, match="differs by more"):
        assert_activations_close(
            values, values.float() + torch.tensor([[0.0, 0.0], [1.0, 0.0]]), rtol=0, atol=0
        )


def test_the_traceback_of_two_models_ends_at_the_caller_s_line_too():
    one, other = (torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(AssertionError) as caught:
        testing.assert_same_activations(one, other, torch.ones(1, 2))
    shown = [entry for entry in caught.traceback if not entry.ishidden(caught)]
    assert [entry.path.name for entry in shown] == ["test_assertions.py"]
