"""What fails is told: a function of the caller's by its argument, a model with what it was given."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

import torchlens_viz as tv
from torchlens_viz import objectives
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, ModelFailedError, calling

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
IMAGE = IMAGES[0]
LABELS = torch.tensor([0, 1, 0, 1])


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.LazyLinear(2))


NET = make_net()
NET(IMAGES)
NET.eval()
SURVEY = tv.survey(NET, [IMAGES], "0", progress=False)
surveyed = partial(tv.survey, NET, [IMAGES], "0", progress=False)
ablated = partial(tv.ablate, NET, [(IMAGES, LABELS)], "0", loss="cross_entropy")
climbed = partial(tv.maximize, NET, "0", [0], size=12, steps=1)


def captured(**options):
    with tv.capture(NET, options.pop("layers", "0"), **options):
        NET(IMAGES)


TAKEN = {
    "layers": lambda f: captured(layers=f),
    "objective": lambda f: climbed(objective=f),
    "objective of score": lambda f: climbed(objective=objectives.score(f)),
    "preprocess of maximize": lambda f: climbed(preprocess=f),
    "preprocess of patches": lambda f: SURVEY.patches("0", 0, IMAGES, preprocess=f),
    "preprocess of project": lambda f: tv.project(NET, "0", IMAGE, preprocess=f),
    "preprocess of explain": lambda f: tv.explain(NET, IMAGE, 0, preprocess=f),
    "preprocess of explain of a batch": lambda f: tv.explain(NET, IMAGES, 0, preprocess=f),
    "preprocess of pair_grid": lambda f: tv.pair_grid(NET, "0", IMAGE, preprocess=f),
    "preprocess of a picture": lambda f: tv.pair_grid(NET, "0", Image.new("RGB", (12, 12)), preprocess=f),
    "preprocess of overlay_grid": lambda f: tv.overlay_grid(NET, "0", IMAGE, preprocess=f),
    "invert": lambda f: SURVEY.patches("0", 0, IMAGES, invert=f),
    "invert of explain": lambda f: tv.explain(NET, IMAGE, 0, invert=f).overlay(0),
    "indices": lambda f: surveyed(indices=f),
    "input_of": lambda f: surveyed(input_of=f),
    "input_of of ablate": lambda f: ablated(input_of=f),
    "input_of of compare": lambda f: tv.compare(NET, NET, [(IMAGES, LABELS)], input_of=f),
    "label_of": lambda f: ablated(label_of=f),
    "loss": lambda f: ablated(loss=f),
    "loss of survey": lambda f: surveyed(loss=f),
    "target": lambda f: surveyed(target=f),
    "target of explain": lambda f: tv.explain(NET, IMAGE, f),
    "encoder": lambda f: surveyed(encoder=f),
}


def no_arguments():
    return IMAGES


def too_many(a, b, c, d):
    return a


def failing(*_):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("function", [no_arguments, too_many, failing])
@pytest.mark.parametrize("where", TAKEN)
def test_one_that_cannot_be_called_is_told_by_its_argument(where, function):
    name = where.partition(" ")[0]
    reason = "ZeroDivisionError: on purpose" if function is failing else r"TypeError: .* positional argument"
    with pytest.raises(InvalidArgumentError, match=rf"`{name}` must (.*) \(?{reason}") as caught:
        TAKEN[where](function)
    assert isinstance(caught.value.__cause__, ZeroDivisionError if function is failing else TypeError)


@pytest.mark.parametrize("returned", [1, None, "x", object()])
@pytest.mark.parametrize("where", [each for each in TAKEN if each not in ("layers", "label_of")])
def test_one_that_returns_something_else_is_told_by_its_argument(where, returned):
    name = {"preprocess": "preprocess|image", "invert": "invert|image", "input_of": "loader"}
    rule = name.get(where.partition(" ")[0], where.partition(" ")[0])
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=rf"`(?:{rule})` must|the objective"):
        TAKEN[where](lambda *_: returned)


def test_a_predicate_that_returns_a_tensor_is_asked_for_true_or_false():
    with pytest.raises(
        InvalidArgumentError, match=r"`layers` must tell .* True or False, but it fails .*Bool"
    ):
        captured(layers=lambda name, module: torch.ones(3))
    with tv.capture(NET, lambda name, module: torch.tensor(name == "2")) as acts:
        NET(IMAGES)
    assert list(acts) == ["2"]


def test_a_pattern_of_bytes_is_no_selector():
    with pytest.raises(InvalidTypeError, match=r"`layers` must be a name, .* got re.compile\(b'x'\)"):
        captured(layers=re.compile(b"x"))


@pytest.mark.parametrize(
    "error",
    [
        InvalidTypeError("ours"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
)
def test_errors_of_ours_and_of_memory_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, calling("loss(output)", "do"):
        raise error
    assert caught.value is error


# A model that fails


class Breaking(nn.Module):
    """Takes images of 12 pixels a side, but for the one that it is told to break at."""

    def __init__(self, error=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        runs = []  # of which the model knows nothing: a count of its own would be given back
        self.error, self.run = error, lambda: runs.append(1) or len(runs)

    def forward(self, images):
        if self.run() > 1 and self.error is not None:
            raise self.error
        return self.conv(images).mean((2, 3))


RUN = {
    "loader": lambda net: tv.survey(net, [IMAGES, IMAGES], "conv", progress=False),
    "loader of a survey with a loss": lambda net: tv.survey(
        net, [(IMAGES, LABELS)] * 2, "conv", loss="cross_entropy", progress=False
    ),
    "loader of ablate": lambda net: tv.ablate(net, [(IMAGES, LABELS)], "conv", loss="cross_entropy"),
    "inputs": lambda net: tv.compare(net, net, IMAGES),
    "x": lambda net: tv.layers(net, IMAGES),
}


@pytest.mark.parametrize("where", RUN)
def test_what_a_model_raises_is_told_with_what_it_was_given(where):
    net = Breaking(ZeroDivisionError("on purpose"))
    rule = rf"`{where.partition(' ')[0]}` must be what the model takes: Breaking fails for torch.float32 of"
    with pytest.raises(
        ModelFailedError, match=rf"{rule} shape \(4, 3, 12, 12\) \(ZeroDivisionError"
    ) as caught:
        RUN[where](net)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)  # of a copy, perhaps
    assert not net.conv._forward_hooks


@pytest.mark.parametrize("where", RUN)
def test_memory_that_runs_out_is_told_as_such(where):
    net = Breaking(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(MemoryError, match=r"is more than there is memory for: .* \(CUDA out of memory"):
        RUN[where](net)


def test_ctrl_c_and_what_the_loader_raises_stay_what_they_are():
    def loader(error):
        yield IMAGES
        raise error

    with pytest.raises(ZeroDivisionError, match="of the loader"):
        tv.survey(Breaking(), loader(ZeroDivisionError("of the loader")), "conv", progress=False)
    assert tv.survey(Breaking(KeyboardInterrupt()), [IMAGES] * 2, "conv", progress=False).samples_seen == 4
