"""The options that all sheets share: the order of the tiles, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.pixels import FIGURES, WEIGHT, ranked, same
from torchlens_viz import feature_grid, kernel_grid
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

# Bad input: one clear message, whatever is wrong.


MAPS = torch.rand(4, 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": False, "scale_each": True}, "`scale_each` has no effect with `normalize=False`"),
        ({"normalize": False, "value_range": (0, 1)}, "`value_range` has no effect with `normalize=False`"),
        ({"scale_each": True, "value_range": (0, 1)}, "exclude each other"),
        (
            {"interpolation": "bicubic", "upscale": 1},
            "`interpolation='bicubic'` has no effect with",
        ),
        ({"interpolation": "cubic"}, '"nearest", "bilinear" or "bicubic", got \'cubic\''),
        ({"cmap": "jett"}, "viridis, seismic, RdBu_r.*got 'jett'"),
        ({"nrow": 0}, "`nrow` must be at least 1, got 0"),
        ({"padding": -1}, "`padding` must be at least 0, got -1"),
        ({"upscale": 0}, "`upscale` must be at least 1, got 0"),
        ({"max_tiles": 0}, "`max_tiles` must be at least 1, got 0"),
        ({"labels": ["a"]}, "`labels` must be 4 strings, one per tile, got 1"),
        ({"labels": []}, "`labels` must be 4 strings, one per tile, got 0"),
        ({"channels": []}, "`channels` must choose at least one, got an empty list"),
        ({"channels": [0, 9]}, "`channels` must be indices from 0 to [35], got 9"),
        ({"channels": -1}, "`channels` must be indices from 0 to [35], got -1"),
        ({"upscale": 10_000}, r"the sheet would have [\d,]+ pixels .*; choose fewer tiles with `max_tiles`"),
    ],
)
def test_options_that_would_be_ignored_or_mean_nothing_raise(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        feature_grid(MAPS, **options)
    with pytest.raises(InvalidArgumentError, match=message):
        kernel_grid(WEIGHT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nrow": 2.0}, r"`nrow` must be an int, got 2\.0"),
        ({"padding": True}, "`padding` must be an int, got True"),
        ({"upscale": "2"}, "`upscale` must be an int, got '2'"),
        ({"cmap": None}, "`cmap` must be the name of a colour map or .* got NoneType"),
        ({"cmap": ["gray"]}, "`cmap` must be the name of a colour map or .* got list"),
        ({"value_range": 5}, r"`value_range` must be \(low, high\)"),
        ({"value_range": (None, 1)}, r"`value_range` must be .* got \(None, 1\)"),
        ({"labels": "abcd"}, "`labels` must be True or a list of 4 strings, got 'abcd'"),
        ({"labels": 4}, "`labels` must be True or a list of 4 strings, got 4"),
        ({"labels": None}, "`labels` must be True or a list of 4 strings, got None"),
        ({"channels": 1.0}, r"`channels` must be an int or a list of ints, got 1\.0"),
        ({"channels": "1"}, "`channels` must be an int or a list of ints, got '1'"),
        ({"channels": True}, "`channels` must be an int or a list of ints, got True"),
        ({"channels": [True, False, True, True]}, "`channels` must be an int or a list of ints"),
        ({"channels": torch.tensor([True, False])}, "`channels` must be an int or a list of ints"),
        ({"channels": np.array([True, False])}, "`channels` must be an int or a list of ints"),
        ({"channels": torch.tensor(1.0)}, "`channels` must be an int or a list of ints"),
    ],
)
def test_options_of_another_type_raise_type_error(options, message):
    with pytest.raises(InvalidTypeError, match=message):
        feature_grid(MAPS, **options)
    with pytest.raises(InvalidTypeError, match=message):
        kernel_grid(WEIGHT, **options)


# Rank.


@pytest.mark.parametrize("rank", FIGURES)
def test_maps_are_shown_in_the_order_of_their_figure(rank):
    maps = torch.randn(9, 5, 4) * torch.rand(9, 1, 1) + torch.randn(9, 1, 1)
    order = ranked(maps, rank)
    assert order != list(range(9))
    assert same(feature_grid(maps, sort_by=rank), feature_grid(maps, channels=order))
    labelled = feature_grid(maps, sort_by=rank, labels=True)
    assert same(labelled, feature_grid(maps, channels=order, labels=True))


@pytest.mark.parametrize("rank", FIGURES)
@pytest.mark.parametrize("inputs", [1, 3, 5])
def test_kernels_are_shown_in_the_order_of_their_figure(rank, inputs):
    weight = torch.randn(7, inputs, 3, 3) * torch.rand(7, 1, 1, 1)
    seen = weight if inputs == 3 else weight[:, :1]
    order = ranked(seen, rank)
    assert same(
        kernel_grid(weight, sort_by=rank, labels=True), kernel_grid(weight, filters=order, labels=True)
    )


@pytest.mark.parametrize("rank", FIGURES)
def test_row_of_several_channels_is_ranked_as_a_whole(rank):
    weight = torch.randn(6, 8, 3, 3) * torch.rand(6, 1, 1, 1)
    order = ranked(weight[:, [1, 7, 2]], rank)
    ordered = kernel_grid(weight, filters=order, channels=[1, 7, 2], labels=True)
    assert same(kernel_grid(weight, channels=[1, 7, 2], sort_by=rank, labels=True), ordered)


def test_ranking_is_among_the_chosen():
    maps = torch.randn(9, 5, 4)
    chosen = [8, 1, 5, 2]
    order = [chosen[place] for place in ranked(maps[chosen], "std")]
    ranked_sheet = feature_grid(maps, channels=chosen, sort_by="std", labels=True)
    assert same(ranked_sheet, feature_grid(maps, channels=order, labels=True))


def test_labels_of_the_caller_go_with_their_tiles():
    maps = torch.tensor([1.0, 3.0, 2.0])[:, None, None].expand(3, 40, 40)
    sheet = feature_grid(maps, sort_by="mean", labels=["low", "high", "middle"])
    assert same(sheet, feature_grid(maps[[1, 2, 0]], labels=["high", "middle", "low"]))


@pytest.mark.parametrize("rank", FIGURES)
def test_equal_figures_keep_their_order(rank):
    maps = torch.ones(40, 2, 2)
    maps[30] = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    order = [30, *(index for index in range(40) if index != 30)]
    assert same(
        feature_grid(maps, sort_by=rank, labels=True), feature_grid(maps, channels=order, labels=True)
    )


@pytest.mark.parametrize("rank", FIGURES)
def test_numbers_that_are_not_finite_count_as_zero_in_a_rank(rank):
    maps = torch.rand(5, 4, 4) * torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])[:, None, None]
    maps[0, 0, 0], maps[1, 1, 1], maps[2, 2, 2] = math.nan, math.inf, -math.inf
    maps[3] = math.nan
    order = ranked(maps, rank)
    assert order[-1] == 3
    assert same(feature_grid(maps, sort_by=rank), feature_grid(maps, channels=order))


def test_ranks_of_other_types_are_those_of_their_values():
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.bool):
        maps = (torch.rand(6, 4, 4) * 9).to(dtype)
        assert same(feature_grid(maps, sort_by="mean"), feature_grid(maps, channels=ranked(maps, "mean")))


@pytest.mark.parametrize("rank", ["Norm", "", "median", 1])
def test_unknown_rank_raises(rank):
    with pytest.raises(
        InvalidArgumentError, match=r"`sort_by` must be one of norm, mean, std, max, or None, got "
    ):
        feature_grid(torch.rand(2, 3, 3), sort_by=rank)
