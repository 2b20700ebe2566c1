"""What a kernel keeps of a picture, against numpy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from torchlens_viz.grids.pairs import measure_patterns


def maps_of(kernels, image):
    return F.conv2d(image[None], kernels, padding="same")[0]


def test_picture_is_numpys_correlation_with_luminance():
    image = torch.rand(3, 20, 30)
    kernels = torch.randn(5, 3, 3, 3)
    maps = maps_of(kernels, image)
    luminance = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(np.float64), 1)
    expected = [abs(np.corrcoef(m.ravel(), luminance.ravel())[0, 1]) for m in maps.numpy().astype(np.float64)]
    assert measure_patterns(kernels, maps, image).picture.tolist() == pytest.approx(expected, abs=1e-6)


def test_colour_share_is_the_energy_off_the_gray_axis():
    gray = torch.ones(3, 2, 2)
    opponent = torch.stack([torch.ones(2, 2), -torch.ones(2, 2), torch.zeros(2, 2)])
    one_channel = torch.stack([torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)])
    kernels = torch.stack([gray, opponent, one_channel, torch.zeros(3, 2, 2)])
    found = measure_patterns(kernels, torch.rand(4, 5, 5), torch.rand(3, 5, 5))
    assert found.color.tolist() == pytest.approx([0, 1, 2 / 3, 0], abs=1e-6)


def test_edge_kernels_and_colour_kernels_differ_as_they_should():
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1
    image[0, 8:24, 8:24] += 0.5
    blur = torch.full((3, 3, 3), 1 / 27)
    edge = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(3, 3, 3)
    kernels = torch.stack([blur, edge])
    found = measure_patterns(kernels, maps_of(kernels, image)[:, 1:-1, 1:-1], image[:, 1:-1, 1:-1])
    assert found.picture[0] > 0.9 > 0.5 > found.picture[1]
    assert found.edges[1] > 0.7 > found.edges[0]


def test_constant_map_correlates_with_nothing():
    found = measure_patterns(torch.zeros(1, 3, 3, 3), torch.zeros(1, 8, 8), torch.rand(3, 16, 16))
    assert found.picture.tolist() == [0]
    assert found.edges.tolist() == [0]


def test_other_than_three_channels_have_no_colour():
    found = measure_patterns(torch.rand(2, 1, 3, 3), torch.rand(2, 8, 8), torch.rand(1, 16, 16))
    assert found.color.isnan().all()
    assert found.picture.isfinite().all()


def test_numbers_of_kernels_and_maps_must_agree():
    with pytest.raises(ValueError, match="got 2 kernels and 3 maps"):
        measure_patterns(torch.rand(2, 3, 3, 3), torch.rand(3, 8, 8), torch.rand(3, 8, 8))
