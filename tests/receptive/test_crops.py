"""Crops hold all that a unit sees, begin where windows begin, and are made only where they can stand in."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from tests.nets import Gives
from torchlens_viz import receptive_field
from torchlens_viz.receptive.crops import crops_for


def chain(stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=stride, padding=padding),
        nn.MaxPool2d(3, 2, padding // 2),
        nn.Conv2d(2, 2, 3),
    )


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("size", [(96, 120), (97, 131), (101, 96)])
def test_every_unit_has_its_value_in_its_crop_and_its_region_lies_within(stride, padding, size):
    torch.manual_seed(0)
    net, image = chain(stride, padding).double(), torch.randn(1, 1, *size, dtype=torch.float64)
    field = receptive_field(net, "2", image.shape)
    places = list(product(range(field.map_shape[0]), range(field.map_shape[1])))
    crops = crops_for(field, places)
    assert crops is not None
    assert len({crop.size for crop in crops}) <= 4
    with torch.no_grad():
        whole = net(image)
        for place, crop in zip(places, crops, strict=True):
            rows, columns = field.region(place)
            assert crop.rows[0] <= rows.start <= rows.stop <= crop.rows[1] <= size[0]
            assert crop.columns[0] <= columns.start <= columns.stop <= crop.columns[1] <= size[1]
            part = net(image[..., slice(*crop.rows), slice(*crop.columns)])
            found, expected = part[0, :, *crop.place], whole[0, :, *place]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "end",
    [
        nn.Upsample(scale_factor=2),  # a stride of less than one
        nn.AdaptiveAvgPool2d(7),  # windows of different sizes
        nn.Sequential(nn.Conv2d(2, 2, 3, stride=4), nn.ConvTranspose2d(2, 2, 4, stride=2)),  # they take turns
        nn.Flatten(),  # no positions
        nn.Conv2d(2, 2, 90, padding=45),  # sees nearly all
        Gives(lambda x: x.cumsum(3)),  # is followed by gradient, if at all
    ],
)
def test_no_crop_is_made_where_it_could_not_stand_in(end):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), end)
    field = receptive_field(net, "1", (1, 1, 96, 96))
    assert crops_for(field, [(1, 1)] * 9) is None


def test_crops_are_made_where_they_are_less_work():
    field = receptive_field(chain(1, 1), "2", (1, 1, 96, 96))
    assert crops_for(field, [(3, 3)]) is None  # one unit: once back through the whole image is the least
    assert crops_for(field, [(3, 3)] * 2) is not None
    small = receptive_field(chain(1, 1), "2", (1, 1, 13, 13))
    assert crops_for(small, [(3, 3)] * 50) is None
