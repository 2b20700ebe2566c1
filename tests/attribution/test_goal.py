"""What `explain` explains: targets in every form, and functions of whatever a model puts out."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from tests.attribution.conftest import METHODS, Wrapped
from torchlens_viz import explain
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError


def test_the_highest_output_of_each_image_counts_unless_told(net, images):
    found = explain(net, images)
    output = net.eval()(images)
    assert found.targets.tolist() == output.argmax(1).tolist()
    torch.testing.assert_close(found.scores, output.amax(1).detach())


@pytest.mark.parametrize(
    "target", [2, np.int64(2), [2, 2], (2, 2), torch.tensor(2), torch.tensor([2, 2]), np.array([2, 2])]
)
def test_targets_in_every_form(net, images, target):
    found = explain(net, images, target, method="hirescam")
    assert found.targets.tolist() == [2, 2]
    assert torch.equal(found.heatmaps, explain(net, images, 2, method="hirescam").heatmaps)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda output: {"logits": output}, lambda output: output["logits"][:, 3]),
        (lambda output: (output, 0), lambda output: output[0][:, 3]),
        (
            lambda output: [{"scores": row} for row in output],
            lambda output: torch.stack([each["scores"][3] for each in output]),
        ),
        (lambda output: output[:, :, None, None], lambda output: output[:, 3].mean((1, 2))),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_functions_of_any_output(net, images, make, target, method):
    found = explain(Wrapped(net, make), images, target, method=method)
    expected = explain(net, images, 3, method=method)
    assert found.targets is None
    torch.testing.assert_close(found.heatmaps, expected.heatmaps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.scores, expected.scores)


def test_one_number_per_image_needs_no_target(net, images):
    assert explain(Wrapped(net, lambda output: output[:, 3]), images).targets.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "`target` must be an index from 0 to 4, since the model puts out 5 numbers per image, got 5"),
        (-1, "`target` must be an index from 0, or None for the highest output, got -1"),
        ([], "`target` must be an index from 0"),
        ([1, 2, 3], r"`target` must have an int for each of 2 images, got 3; pass one int for all of them"),
        (lambda output: output, r"`target` must make a floating-point tensor \(2,\), .* shape \(2, 5\)"),
        (lambda output: output.argmax(1), r"must make a floating-point tensor \(2,\), .* got int64"),
        (lambda output: output[:, 9], r"`target` must make .* model puts out, float32 .* fails \(IndexError"),
    ],
)
def test_targets_that_do_not_fit_are_refused(net, images, target, message):
    with pytest.raises(InvalidArgumentError, match=message):
        explain(net, images, target)


@pytest.mark.parametrize("target", [True, "cat", 1.5, [1.5, 2]])
def test_targets_of_other_types_are_refused(net, images, target):
    with pytest.raises(InvalidTypeError, match="`target` must be None, an int, an int for each image"):
        explain(net, images, target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda output: {"out": output}, r"puts out a dict with the keys 'out'.*output\['out'\]\[:, 3\]"),
        (lambda output: (output,), r"puts out a tuple.*output\[0\]\[:, 3\]"),
        (lambda output: output[:, :, None, None], r"shape \(2, 5, 1, 1\) for 2 images, not \(N, classes\)"),
    ],
)
def test_outputs_that_need_a_function_say_which(net, images, make, message):
    with pytest.raises(InvalidArgumentError, match=message):
        explain(Wrapped(net, make), images, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda output: {"out": output[:, :, None, None].expand(-1, -1, 4, 4)},
        lambda output: {"count": 2, "maps": output},
        lambda output: (output[:, :2, None, None],),
        lambda output: [{"labels": row.long(), "scores": row} for row in output],
        lambda output: [{"boxes": row[:4].view(1, 4)} for row in output],
    ],
)
def test_the_function_that_is_proposed_makes_a_number_per_image(net, images, make):
    model = Wrapped(net, make)
    with pytest.raises(InvalidArgumentError, match="must be a function where") as refusal:
        explain(model, images, method="gradient")
    proposed = re.search(r"`target=(lambda .*)`, which", str(refusal.value))[1]
    found = explain(model, images, eval(proposed, {"torch": torch}), method="gradient")
    assert found.scores.shape == (2,)
    assert (found.heatmaps.flatten(1).amax(1) > 0).all()


def test_logits_under_that_name_are_explained_as_a_tensor_is(net, images):
    named = explain(Wrapped(net, lambda output: {"loss": None, "logits": output}), images)
    plain = explain(net, images)
    assert torch.equal(named.targets, plain.targets)
    torch.testing.assert_close(named.heatmaps, plain.heatmaps, rtol=1e-4, atol=1e-6)


def test_a_target_that_nothing_speaks_for_is_said():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1, bias=False))
    nn.init.constant_(net[0].weight, 1.0)
    nn.init.constant_(net[3].weight, -1.0)
    found = explain(net, torch.rand(2, 1, 2, 2), 0, method="hirescam")
    assert not found.heatmaps.any()
    assert found.notes == ("nothing here speaks for the target in image 0, 1",)
