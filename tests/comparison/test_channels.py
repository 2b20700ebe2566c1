"""Channels of two checkpoints are matched by how they respond."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.comparison.nets import small
from torchlens_viz import compare
from torchlens_viz.comparison.channels import CoMoments
from torchlens_viz.errors import InvalidArgumentError

IMAGES = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def rearranged(model: nn.Sequential) -> nn.Sequential:
    """Swap channels 1 and 4 of the second convolution, switch 2 off, and make of 6 something new."""
    other = copy.deepcopy(model)
    places = torch.tensor([0, 4, 2, 3, 1, 5, 6, 7])
    with torch.no_grad():
        for values in (other[3].weight, other[3].bias):
            values.copy_(values[places])
        other[3].weight[2] = 0
        torch.manual_seed(1)
        other[3].weight[6].normal_()
    return other


def test_moved_dead_and_new_channels_are_told_apart():
    a = small()
    match = compare(a, rearranged(a), IMAGES, correlations=True).channels("3", threshold=0.9)
    assert match.kept.tolist() == [0, 3, 5, 7]
    assert sorted((move.channel, move.to) for move in match.moved) == [(1, 4), (4, 1)]
    assert min(move.correlation for move in match.moved) == pytest.approx(1)
    assert match.died.tolist() == [2, 6]  # 2 is off, and of 6 nothing is left
    assert match.born.tolist() == [6]
    assert match.partners.tolist() == [0, 4, -1, 3, 1, 5, -1, 7]
    assert match.correlations.isnan().tolist() == [False, False, True, False, False, False, True, False]


def test_channels_that_are_silent_in_both_neither_died_nor_were_born():
    a = small()
    with torch.no_grad():
        a[3].weight[2] = 0
    match = compare(a, copy.deepcopy(a), IMAGES, correlations=True).channels("3")
    assert match.kept.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert (len(match.died), len(match.born), match.moved) == (0, 0, ())


def test_a_whole_layer_that_fell_silent_has_died():
    a = small()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[3].weight.zero_()
    found = compare(a, b, IMAGES, correlations=True)
    assert found.channels("3").died.tolist() == list(range(8))
    assert compare(b, a, IMAGES, correlations=True).channels("3").born.tolist() == list(range(8))


def test_layers_with_unlike_numbers_of_channels_can_be_matched():
    a = small()
    b = copy.deepcopy(a)
    b[6] = nn.Linear(8 * 6 * 6, 3)
    with torch.no_grad():
        b[6].weight.copy_(a[6].weight[[4, 0, 1]])
        b[6].bias.zero_()
    found = compare(a, b, IMAGES, correlations=True)
    assert found["6"].excess == float("inf")
    match = found.channels("6", threshold=0.9999)
    assert match.partners.tolist() == [1, 2, -1, -1, 0]
    assert match.died.tolist() == [2, 3]


def test_correlations_of_batches_are_those_of_numpy_over_all():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 3, 4, 5, generator=generator) + 1e4
    b = a[:, :2] * 0.5 + torch.randn(7, 2, 4, 5, generator=generator)
    moments = CoMoments()
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        moments.add(a[part], b[part], 1)
    found = moments.compute()
    assert found is not None
    x, y = (side.double().movedim(1, 0).flatten(1).numpy() for side in (a, b))
    np.testing.assert_allclose(found.correlation.numpy(), np.corrcoef(x, y)[:3, 3:], atol=1e-9)


def test_without_correlations_there_is_nothing_to_match_by():
    a = small()
    with pytest.raises(InvalidArgumentError, match=r"compare again with `correlations=True`"):
        compare(a, copy.deepcopy(a), IMAGES).channels("3")
    with pytest.raises(InvalidArgumentError, match=r"`threshold` must be above 0, got 0"):
        compare(a, copy.deepcopy(a), IMAGES, correlations=True).channels("3", threshold=0)
