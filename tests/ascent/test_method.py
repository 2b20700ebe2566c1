"""How an image climbs: what each method may be given, and what it makes of that."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from torchlens_viz import maximize
from torchlens_viz.ascent.fourier import Fourier
from torchlens_viz.ascent.method import Classic, Normalized, method_of
from torchlens_viz.ascent.parametrization import Pixels
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError


def test_names_are_methods_with_their_defaults():
    assert method_of("normalized") == Normalized() == Normalized(restarts=4, frames=None, compile=False)
    assert method_of("classic") == Classic()
    given = Normalized(restarts=0, frames=3)
    assert method_of(given) is given


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"restarts": -1}, InvalidArgumentError, "`restarts` must be at least 0, got -1"),
        ({"restarts": 1.0}, InvalidTypeError, "`restarts` must be an int, got 1.0"),
        ({"tiles": 0}, InvalidArgumentError, "`tiles` must be at least 1, got 0"),
        ({"frames": 0}, InvalidArgumentError, "`frames` must be at least 1, got 0"),
        ({"frames": True}, InvalidTypeError, "`frames` must be an int, got True"),
        ({"compile": 1}, InvalidTypeError, "`compile` must be True or False, got 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        Normalized(**options)


def test_the_classic_recipe_has_no_restarts():
    with pytest.raises(TypeError, match="restarts"):
        Classic(restarts=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decay": 1.0}, "`decay` must be from 0 to below 1"),
        ({"blur": -1.0}, "`blur` from 0 to 100"),
        ({"blur_every": 2}, "`blur_every` has no effect without `blur`"),
        ({"blur": 1.0, "blur_every": 0}, "`blur_every` at least 1"),
    ],
)
def test_smoothing_that_cannot_be_is_refused(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Pixels(**options)


def test_other_parametrisations_have_no_smoothing():
    with pytest.raises(TypeError, match="blur"):
        Fourier(blur=1.0)
    assert Fourier().smoothing is None
    assert Pixels().smoothing is None


def test_the_classic_recipe_takes_the_smoothing_of_pixels_and_nothing_else():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 3)
    options = {"size": 8, "steps": 2, "seed": 42, "precision": "float32", "method": "classic"}
    plain = maximize(net, "", 0, **options)
    smooth = maximize(net, "", 0, parametrization=Pixels(decay=0.5), **options)
    # Half of the way to the middle, zero, is taken back at each of two steps of the plain recipe.
    assert plain.images.mean().item() > 100
    assert smooth.images.mean().item() == pytest.approx(plain.images.mean().item() / 4, rel=0.1)
    for other in (Pixels(low=-1), Pixels(sd=0.1), Fourier()):
        with pytest.raises(InvalidArgumentError, match="has neither `parametrization`"):
            maximize(net, "", 0, parametrization=other, **options)


def test_maximize_has_a_signature_one_can_read():
    assert len(inspect.signature(maximize).parameters) <= 20
