"""Ranges and levels, against the definition computed by numpy in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pixels import robust_ends
from torchlens_viz.draw.scale import (
    Limits,
    find_limits,
    finite_range,
    robust_range,
    share_beyond,
    special_codes,
    to_levels,
    words_for,
)
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LARGEST = torch.finfo(torch.float64).max


def find(tiles: torch.Tensor, **options: object) -> Limits:
    return find_limits(tiles, **{"normalize": True, "scale_each": False, "value_range": None, **options})


def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One tile (1, 1, 1, W)."""
    return torch.tensor(values, dtype=dtype).reshape(1, 1, 1, -1)


def levels_of(tiles: torch.Tensor, limits: Limits, *, levels: int = 251, signed: bool = False) -> list[int]:
    return to_levels(tiles, limits, levels=levels, signed=signed).flatten().tolist()


def exact_positions(values: np.ndarray, low: float, high: float, last: int) -> np.ndarray:
    """Where values lie between level 0 and the last one, in a precision that no double overflows."""
    values, low, high = values.astype(np.longdouble), np.longdouble(low), np.longdouble(high)
    return (np.clip(values, low, high) - low) / (high - low) * last


def is_nearest(levels: torch.Tensor, positions: np.ndarray) -> bool:
    """Whether every level is the nearest one; where two are nearest within rounding, either will do."""
    return bool((np.abs(levels.numpy() - positions) <= 0.5 + 1e-3).all())


ADVERSARIAL = {
    "plain": (0.0, 1.0),
    "large offset, tiny range": (1e6, 1.0),
    "larger offset, tinier range": (-3e4, 1e-2),
    "fills float32": (0.0, 3e38),
    "denormal": (0.0, 1e-42),
    "narrow": (0.0, 1e-33),
}


@pytest.mark.parametrize("scale_each", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("offset", "width"), ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_levels_are_the_nearest_for_adversarial_ranges(offset, width, dtype, scale_each):
    tiles = (torch.rand(5, 1, 6, 7, dtype=torch.float64) * 2 - 1) * width + offset
    tiles = tiles.to(torch.float32).to(dtype)  # half precision overflows and underflows here, as it may
    limits = find(tiles, scale_each=scale_each)
    levels = to_levels(tiles, limits, levels=251, signed=False)
    for tile, drawn in zip(tiles, levels, strict=True):
        group = tile if scale_each else tiles
        finite = group[group.isfinite()].double().numpy()
        if finite.size == 0 or finite.min() == finite.max():
            continue
        shown = tile.isfinite()
        positions = exact_positions(tile[shown].double().numpy(), finite.min(), finite.max(), 250)
        assert is_nearest(drawn[shown], positions)


@pytest.mark.parametrize(
    "ends",
    [
        (-LARGEST, LARGEST),
        (0.0, LARGEST),
        (0.0, 5e-324),
        (-5e-324, 5e-324),
        (1e-310, 3e-310),
        (1.0, 1.0 + 1e-15),
    ],
)
def test_float64_is_drawn_to_its_very_ends(ends):
    tiles = column([*ends, ends[0] / 2 + ends[1] / 2], torch.float64)
    positions = exact_positions(tiles.double().numpy(), *ends, 250)
    assert is_nearest(to_levels(tiles, find(tiles), levels=251, signed=False), positions)


def test_symmetric_limits_may_be_twice_as_wide_as_the_largest_number():
    tiles = column([0.0, LARGEST, -LARGEST * 0.4, LARGEST / 5], torch.float64)
    assert levels_of(tiles, find(tiles).symmetric(), signed=True) == [125, 250, 75, 150]


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
    st.sampled_from([251, 256]),
    st.booleans(),
)
def test_levels_are_the_nearest_for_any_values(values, count, signed):
    tiles = column(values)
    limits = find(tiles).symmetric() if signed else find(tiles)
    levels = to_levels(tiles, limits, levels=count, signed=signed)
    most = max(map(abs, values))
    low, high = (-most, most) if signed else (min(values), max(values))
    if low == high:
        middle = (count - 1) // 2 if signed or low != 0 else 0
        assert set(levels.flatten().tolist()) == {middle}
    else:
        assert is_nearest(levels, exact_positions(tiles.numpy(), low, high, count - 1))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12))
def test_zero_is_always_the_middle_of_symmetric_limits(values):
    tiles = column([0.0, -0.0, *values])
    assert levels_of(tiles, find(tiles).symmetric(), signed=True)[:2] == [125, 125]


@settings(max_examples=50)
@given(st.floats(-3e4, 3e4), st.floats(1e-9, 1e4), st.sampled_from(FLOATS))
def test_given_range_is_met_to_the_level(low, width, dtype):
    high = low + width
    tiles = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64).mul(width).add(low).to(dtype)
    tiles = tiles[tiles.isfinite()].reshape(1, 1, 1, -1)
    levels = to_levels(tiles, find(tiles, value_range=(low, high)), levels=251, signed=False)
    if low < high:
        assert is_nearest(levels, exact_positions(tiles.double().numpy(), low, high, 250))


def test_range_narrower_than_float32_can_tell_is_still_a_range():
    tiles = column([0.0, 1.0, 2.0])
    assert levels_of(tiles, find(tiles, value_range=(1.0, 1.0 + 1e-9))) == [0, 0, 250]


def test_tile_looks_the_same_beside_one_of_extreme_range():
    plain = torch.rand(1, 1, 1000, 1000)  # so many that a few lie halfway between two levels, within rounding
    extreme = torch.linspace(-1, 1, 1_000_000).mul(3e38).view_as(plain)
    together = torch.cat([plain, extreme])
    drawn = to_levels(together, find(together, scale_each=True), levels=251, signed=False)
    for tile, levels in zip((plain, extreme), drawn, strict=True):
        assert torch.equal(levels[None], to_levels(tile, find(tile), levels=251, signed=False))


# Which range.


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_range_holds_for_all_tiles_and_scale_each_has_one_per_tile(dtype):
    tiles = torch.tensor([[1.0, 2.0], [-4.0, 8.0]], dtype=dtype).reshape(2, 1, 1, 2)
    shared, each = find(tiles), find(tiles, scale_each=True)
    assert (shared.low.tolist(), shared.high.tolist()) == ([-4.0], [8.0])
    assert (each.low.tolist(), each.high.tolist()) == ([1.0, -4.0], [2.0, 8.0])
    assert each.low.dtype == each.high.dtype == np.float64


def test_channels_of_a_tile_share_its_range():
    tiles = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    limits = find(tiles, scale_each=True)
    assert (limits.low.tolist(), limits.high.tolist()) == ([1.0], [3.0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_left_out_of_the_range(dtype):
    dirty = column([math.nan, math.inf, -math.inf, 2.0, 5.0], dtype)
    limits = find(dirty)
    assert (limits.low.item(), limits.high.item(), limits.all_finite) == (2.0, 5.0, False)
    assert levels_of(dirty, limits)[3:] == [0, 250]
    assert find(column([2.0, 5.0], dtype)).all_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tile_without_a_finite_value_leaves_the_others_alone(value):
    tiles = torch.tensor([[value, value], [0.0, 4.0]]).reshape(2, 1, 1, 2)
    limits = find(tiles, scale_each=True)
    assert (limits.low.tolist(), limits.high.tolist()) == ([0.0, 0.0], [1.0, 4.0])
    assert levels_of(tiles, limits)[2:] == [0, 250]


def test_range_of_nothing_finite_is_zero_to_one():
    limits = find(column([math.nan, math.inf]))
    assert (limits.low.item(), limits.high.item(), limits.all_finite) == (0.0, 1.0, False)


def test_finite_values_whose_sum_overflows_are_still_finite():
    limits = find(torch.tensor([-LARGEST, LARGEST], dtype=torch.float64).expand(4, 1, 1, 2), scale_each=True)
    assert limits.all_finite
    assert (limits.low.tolist(), limits.high.tolist()) == ([-LARGEST] * 4, [LARGEST] * 4)


@pytest.mark.parametrize(
    ("value", "signed", "level"), [(3.0, False, 125), (0.0, False, 0), (-2.0, False, 125), (0.0, True, 125)]
)
def test_constant_tile_is_in_the_middle_unless_it_is_all_zero(value, signed, level):
    tiles = torch.full((1, 1, 2, 2), value)
    assert levels_of(tiles, find(tiles), signed=signed) == [level] * 4


@pytest.mark.parametrize("value", [-2.0, 2.0])
def test_constant_tile_keeps_its_sign_in_symmetric_limits(value):
    tiles = torch.full((1, 1, 1, 1), value)
    assert levels_of(tiles, find(tiles).symmetric(), signed=True) == [250 if value > 0 else 0]


def test_without_normalize_the_range_is_zero_to_one():
    tiles = column([-1.0, 0.0, 0.2, 1.0, 9.0])
    limits = find(tiles, normalize=False)
    assert levels_of(tiles, limits) == [0, 0, 50, 250, 250]
    assert levels_of(tiles, limits.symmetric(), signed=True) == [0, 125, 150, 250, 250]


def test_both_signs_are_told_from_one():
    assert find(column([-1.0, 2.0])).have_both_signs
    assert not find(column([0.0, 2.0])).have_both_signs
    assert not find(column([-1.0, 0.0])).have_both_signs
    assert find(column([1.0, 2.0]), value_range=(-1, 1)).have_both_signs


@pytest.mark.parametrize("value_range", [[-1, 3], (-1.0, 3.0), torch.tensor([-1.0, 3.0]), np.array([-1, 3])])
def test_given_range_may_be_any_pair_of_numbers(value_range):
    tiles = column([-5.0, -1.0, 1.0, 3.0, 5.0])
    assert levels_of(tiles, find(tiles, value_range=value_range)) == [0, 0, 125, 250, 250]


def test_input_is_never_changed():
    for dtype in FLOATS:
        tiles = torch.randn(3, 1, 4, 4).to(dtype)
        tiles[0, 0, 0, 0] = math.nan
        before = tiles.clone()
        to_levels(tiles, find(tiles), levels=251, signed=False)
        assert torch.equal(tiles.nan_to_num(7), before.nan_to_num(7))


# Codes of what is not finite.


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_tell_nan_and_the_infinities_apart(dtype):
    tiles = column([math.nan, math.inf, -math.inf, 0.0, -3.0], dtype)
    codes = special_codes(tiles)
    assert (codes.dtype, codes.flatten().tolist()) == (torch.uint8, [252, 253, 254, 0, 0])


def test_nan_in_any_channel_outweighs_infinities():
    tiles = torch.zeros(1, 3, 1, 3)
    tiles[0, 0], tiles[0, 1, 0, 1] = math.inf, -math.inf
    tiles[0, 2, 0, 2] = math.nan
    assert special_codes(tiles).flatten().tolist() == [253, 253, 252]


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": False, "scale_each": True}, "`scale_each` has no effect with `normalize=False`"),
        ({"normalize": False, "value_range": (0, 1)}, "`value_range` has no effect with `normalize=False`"),
        ({"scale_each": True, "value_range": (0, 1)}, "`scale_each` and `value_range` exclude each other"),
        ({"value_range": (1,)}, r"`value_range` must be \(low, high\).* got \(1,\)"),
        ({"value_range": (1, 2, 3)}, r"got \(1, 2, 3\)"),
        ({"value_range": (2, 1)}, r"low <= high.* got \(2, 1\)"),
        ({"value_range": (0, math.inf)}, r'both finite, or "robust", got \(0, inf\)'),
        ({"value_range": (math.nan, 1)}, r'both finite, or "robust", got \(nan, 1\)'),
        ({"value_range": "ab"}, "got 'ab'"),
    ],
)
def test_options_that_contradict_or_mean_nothing_raise(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        find(torch.zeros(1, 1, 2, 2), **options)


@pytest.mark.parametrize("value_range", [5, (None, 1), ([0, 1], 2)])
def test_range_that_does_not_consist_of_numbers_raises_type_error(value_range):
    with pytest.raises(InvalidTypeError, match=r"`value_range` must be \(low, high\)"):
        find(torch.zeros(1, 1, 2, 2), value_range=value_range)


@pytest.mark.cuda
def test_levels_on_cuda_are_those_of_the_cpu():
    tiles = torch.randint(-1009, 1010, (8, 1, 32, 32)) / 1009  # no value lies between two levels
    tiles[0, 0, 0, 0], tiles[1, 0, 0, 0] = math.nan, -math.inf
    here = to_levels(tiles, find(tiles), levels=251, signed=False)
    there = to_levels(tiles.cuda(), find(tiles.cuda()), levels=251, signed=False).cpu()
    finite = tiles.isfinite()
    assert torch.equal(here[finite], there[finite])
    assert torch.equal(special_codes(tiles), special_codes(tiles.cuda()).cpu())


# Robust limits.


def robust(groups: torch.Tensor) -> list[tuple[float, float]]:
    low, high, _ = robust_range(groups)
    return list(zip(low.tolist(), high.tolist(), strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["signed", "rectified", "shifted", "negative", "not finite"])
def test_robust_limits_are_values_of_the_right_rank(kind, dtype):
    values = torch.randn(4, 3001, dtype=torch.float64)
    values[0, 7], values[1, 8] = 200.0, -300.0
    values = {
        "signed": values,
        "rectified": values.relu(),
        "shifted": values.abs() + 5,
        "negative": -values.abs(),
        "not finite": values.masked_fill(torch.rand(4, 3001) < 0.1, math.nan),
    }[kind].to(dtype)
    values[3, 5:9] = math.inf if kind == "not finite" else values[3, 5:9]
    rows = [row[np.isfinite(row)] for row in values.double().numpy()]
    expected = [robust_ends(row) for row in rows]
    assert robust(values) == expected
    assert [robust(row[None])[0] for row in values] == expected  # selected, where the others are sorted
    low, high, all_finite = finite_range(values)
    assert all(low[i] <= ends[0] < ends[1] <= high[i] for i, ends in enumerate(expected))
    assert robust_range(values)[2] == all_finite == (kind != "not finite")


def test_robust_limits_leave_out_an_outlier_and_tell_how_many_values_lie_beyond():
    tiles = torch.linspace(-1, 1, 10_000).reshape(1, 1, 100, 100).clone()
    tiles[0, 0, 50, 50] = 200.0
    limits = find(tiles, value_range="robust")
    assert limits.low.item() == pytest.approx(-0.99, abs=1e-3)
    assert limits.high.item() == pytest.approx(0.99, abs=1e-3)
    assert share_beyond(tiles, limits) == pytest.approx(98 / 10_000)  # 49 at either end
    assert find(tiles).high.item() == 200.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0] * 500, (0.0, 0.0)),
        ([0.0] * 5000 + [3.0], (0.0, 3.0)),  # what fires once in 5,000 is no outlier among zeros
        ([5.0] * 999 + [7.0], (5.0, 7.0)),  # nothing would be left
        ([2.0, 3.0] * 500 + [-0.5, -9.0], (-0.5, 3.0)),  # both signs stay, by the value next to zero
        ([-2.0, -3.0] * 500 + [0.5, 9.0], (-3.0, 0.5)),
        ([1.0, 2.0, 9.0], (1.0, 9.0)),  # too few to cut any
        ([math.nan] * 4, (0.0, 1.0)),
        ([math.nan, 0.0], (0.0, 0.0)),
        ([1.0, 2.0] * 300 + [0.0], (0.0, 2.0)),  # zero stays within, where it occurs
    ],
)
def test_robust_limits_of_rare_values(values, expected):
    row = torch.tensor(values)[None]
    assert robust(row) == [expected]
    assert robust(torch.cat([row, row])) == [expected] * 2


def test_values_are_not_changed_by_looking_for_their_limits():
    values = torch.randn(1, 1000)
    before = values.clone()
    robust_range(values)
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    ("beyond", "robust", "line"),
    [
        (None, True, None),
        (0.0, False, None),
        (0.0, True, "limits at 0.5% and 99.5%, no value beyond"),
        (0.0001, True, "limits at 0.5% and 99.5%, under 0.1% of the values beyond"),
        (0.0093, True, "limits at 0.5% and 99.5%, 0.9% of the values beyond"),
        (0.25, False, "25.0% of the values beyond"),
    ],
)
def test_what_is_said_of_values_beyond(beyond, robust, line):
    assert words_for(beyond, robust=robust) == ([] if line is None else [line])


@pytest.mark.parametrize("word", ["Robust", "full", "", "ab"])
def test_other_words_are_no_range(word):
    with pytest.raises(InvalidArgumentError, match=rf"or \"robust\", got '{word}'"):
        find(column([1.0]), value_range=word)


def test_robust_limits_need_normalize():
    with pytest.raises(InvalidArgumentError, match="`value_range` has no effect with `normalize=False`"):
        find(column([1.0]), value_range="robust", normalize=False)


@pytest.mark.cuda
def test_robust_limits_on_cuda_are_those_on_the_cpu():
    values = torch.cat([torch.randn(3, 3001), torch.randn(1, 3001).relu()])
    assert robust(values.cuda()) == robust(values)
    assert robust(values[:1].cuda()) == robust(values[:1])
