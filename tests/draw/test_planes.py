"""`draw.planes`: which planes of a volume are shown, and maps of one dimension as strips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nets import seeded
from torchlens_viz.draw.planes import Slicing, planes_of, strongest
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

AXES = {"depth": 0, "height": 1, "width": 2}


@pytest.mark.parametrize("plane", AXES)
@pytest.mark.parametrize("slices", [2, [2], (3, 0, 3), np.array([1]), range(1, 4)])
def test_slices_are_those_that_numpy_takes(plane, slices):
    maps = seeded(5, 4, 6, 7)
    tiles = planes_of(maps, Style(), plane, slices).tiles
    places = [int(place) for place in np.atleast_1d(slices)]
    expected = np.moveaxis(np.take(maps.numpy(), places, axis=1 + AXES[plane]), 1 + AXES[plane], 1)
    assert np.array_equal(tiles.numpy(), expected)


@pytest.mark.parametrize("plane", AXES)
def test_all_the_middle_one_and_the_maximum(plane):
    maps = seeded(3, 5, 6, 7)
    axis = 1 + AXES[plane]
    whole = planes_of(maps, Style(), plane, "all")
    assert np.array_equal(whole.tiles.numpy(), np.moveaxis(maps.numpy(), axis, 1))
    assert whole.labels == [f"@{place}" for place in range(maps.shape[axis])]
    middle = planes_of(maps, Style(), plane, None)
    assert np.array_equal(middle.tiles[:, 0].numpy(), np.take(maps.numpy(), maps.shape[axis] // 2, axis))
    assert middle.notes == [f"slice {maps.shape[axis] // 2} of {maps.shape[axis]} along {plane}"]
    most = planes_of(maps, Style(), plane, "max")
    assert np.array_equal(most.tiles[:, 0].numpy(), maps.numpy().max(axis))
    assert most.labels == ["@max"]


def test_depth_is_meant_where_no_plane_is_named():
    assert Slicing.of((4, 5, 6), None, 3) == Slicing.of((4, 5, 6), "depth", 3)


@pytest.mark.parametrize(
    ("sizes", "plane", "slices", "error", "message"),
    [
        ((4, 5, 6), "axial", None, InvalidArgumentError, "`plane` must be .*depth.*height.*width"),
        ((4, 5, 6), "height", 5, InvalidArgumentError, "`slices` must be indices from 0 to 4, got 5"),
        ((4, 5, 6), None, -1, InvalidArgumentError, "`slices` must be indices from 0 to 3, got -1"),
        ((4, 5, 6), None, "min", InvalidArgumentError, "`slices` must be .*all.*max"),
        ((4, 5, 6), None, 1.5, InvalidTypeError, "`slices` must be an int or a list of ints, got 1.5"),
        ((4, 5, 6), None, [], InvalidArgumentError, "`slices` must choose at least one"),
        ((4, 5), "depth", None, InvalidArgumentError, "`plane` has no effect on maps of 4 x 5"),
        ((4,), None, 0, InvalidArgumentError, "`slices` has no effect on maps of 4, which have no slices"),
    ],
)
def test_slices_that_there_are_not_are_refused(sizes, plane, slices, error, message):
    with pytest.raises(error, match=message):
        Slicing.of(sizes, plane, slices)


def test_a_long_signal_keeps_the_value_farthest_from_zero_in_each_place():
    values = seeded(3, 1000)
    found = strongest(values, 250)
    for channel in range(3):
        for place in range(250):
            part = values[channel, 4 * place : 4 * place + 4].numpy()
            assert found[channel, place] == part[np.abs(part).argmax()]
    values[1, 401] = torch.nan
    assert strongest(values, 250)[1].isnan().nonzero().tolist() == [[100]]


def test_strips_are_enlarged_to_be_seen_and_shortened_to_be_looked_at():
    short, long = (planes_of(seeded(2, length), Style(), None, None) for length in (7, 5000))
    assert short.tiles.shape == (2, 1, 1, 7)
    assert short.style.upscale == 37
    assert long.tiles.shape == (2, 1, 24, 2048)
    assert long.style.upscale == 1
    assert long.notes == ["each pixel: the value farthest from zero of 2.44 positions"]
    exact = planes_of(seeded(2, 5000), Style(upscale=1), None, None)
    assert torch.equal(exact.tiles[:, 0, 0], seeded(2, 5000))
    assert exact.notes == []
