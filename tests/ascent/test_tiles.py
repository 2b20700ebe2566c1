"""Climbs in two phases: a smaller image first, then copies of it side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import ascend, small_net
from torchlens_viz import maximize, objectives
from torchlens_viz.ascent.fourier import Fourier
from torchlens_viz.ascent.method import Classic, Normalized
from torchlens_viz.ascent.parametrization import Pixels
from torchlens_viz.errors import InvalidArgumentError

TWO = Normalized(tiles=2)


def by_hand(model, layer, channel, *, small, size, steps, **options):
    """Climb with a smaller image, put copies side by side in numpy's way, and go on from there."""
    first = steps * 3 // 4
    begun = ascend(model, layer, channel, size=small, steps=first, **options)
    beyond = [(0, 0), *((0, whole - part) for whole, part in zip(size, small, strict=True))]
    image = torch.from_numpy(np.pad(begun.images[0].numpy(), beyond, "wrap"))
    end = ascend(model, layer, channel, image=image, steps=steps - first, **options)
    return end, torch.cat((begun.history, end.history), 1)


@pytest.mark.parametrize("size", [(24, 24), (23, 21)], ids=["even", "odd"])
@pytest.mark.parametrize("parametrization", [Pixels(), Fourier()], ids=["pixels", "fourier"])
def test_the_rest_goes_on_from_copies_side_by_side(size, parametrization):
    small = tuple(-(-side // 2) for side in size)
    options = {"parametrization": parametrization, "seed": 4}
    expected, history = by_hand(small_net(), "2", 3, small=small, size=size, steps=10, **options)
    found = ascend(small_net(), "2", 3, size=size, steps=10, method=TWO, **options)
    assert found.images.shape == (1, 3, *size)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.history, history, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("convolution", "size"),
    [(nn.Conv1d, (30,)), (nn.Conv3d, (10, 14, 12))],
    ids=["signals", "volumes"],
)
def test_signals_and_volumes_too(convolution, size):
    torch.manual_seed(0)
    model = nn.Sequential(convolution(2, 4, 3), nn.ReLU(), convolution(4, 5, 3)).eval()
    small = tuple(side // 2 for side in size)
    expected, _ = by_hand(model, "2", 1, small=small, size=size, steps=8)
    found = ascend(model, "2", 1, size=size, steps=8, method=TWO)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-5)


def test_company_changes_nothing_and_all_steps_are_told():
    channels = [0, 5, 2, 2]
    options = {"size": 16, "steps": 9, "method": TWO, "transforms": "robust", "precision": "float32"}
    together = maximize(small_net(), "2", channels, batch_size=4, **options)
    alone = maximize(small_net(), "2", channels, batch_size=1, **options)
    torch.testing.assert_close(together.images, alone.images, rtol=0, atol=1e-4)
    assert together.history.shape == (4, 9)
    assert bool(together.history.isfinite().all())
    assert not torch.equal(together.images[2], together.images[3])


def test_images_that_are_compared_stay_together():
    diverse = objectives.channel() + 1.0 * objectives.diversity()
    options = {"size": 16, "steps": 8, "method": TWO, "objective": diverse, "precision": "float32"}
    alone = maximize(small_net(), "2", [1, 1, 4, 4], batch_size=1, **options)
    together = maximize(small_net(), "2", [1, 1, 4, 4], batch_size=8, **options)
    torch.testing.assert_close(alone.images, together.images, rtol=0, atol=1e-4)


def test_a_film_shows_both_phases_at_full_size():
    found = ascend(small_net(), "2", 3, size=15, steps=8, method=Normalized(tiles=2, frames=2))
    (frames,) = found.frames
    assert frames.shape == (5, 3, 15, 15)  # before steps 0, 2, 4 and 6, and the end
    torch.testing.assert_close(frames[1][:, :7, :7], frames[1][:, 8:, 8:], rtol=0, atol=0)
    last = (found.images[0] * 255).round().to(torch.uint8)
    assert int((frames[-1].int() - last.int()).abs().max()) <= 1


def test_what_has_no_gradient_when_small_begins_from_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias[0] = -1e3
    found = maximize(model, "1", [0, 1], size=12, steps=8, method=Normalized(tiles=2, restarts=1))
    assert found.status[0] == "dead"
    assert found.status[1] != "dead"
    assert found.images.shape == (2, 3, 12, 12)


def test_the_pattern_of_a_stripe_is_found_in_a_quarter_of_the_area():
    # One convolution whose kernel is a stripe: the best image in [0, 1] is known to the pixel.
    model = nn.Conv2d(1, 1, (1, 2), stride=(1, 2), bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[[[1.0, -1.0]]]]))
    found = ascend(model, "", 0, size=16, steps=40, method=TWO)
    expected = torch.tensor([1.0, 0.0]).repeat(8).expand(1, 1, 16, 16)
    torch.testing.assert_close(found.images, expected)
    assert found.scores.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image": torch.rand(3, 16, 16)}, "`tiles` has no effect beside `image`"),
        ({"size": 16, "steps": 1}, "`steps` at least 2, got 2 and 1"),
        ({"size": 16, "method": Normalized(tiles=17)}, "at most the sides of the image"),
        (
            {"size": 7, "method": Normalized(tiles=3)},
            "`tiles=3` begins with images of 3 x 3.*leave `ti",
        ),
    ],
)
def test_what_cannot_be_done_in_two_phases_is_refused(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        ascend(small_net(), "2", 0, **{"method": TWO, "steps": 8, **options})


def test_the_classic_recipe_has_one_phase():
    with pytest.raises(TypeError, match="tiles"):
        Classic(tiles=2)
