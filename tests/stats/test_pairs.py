"""Sums in pairs of float32 are as good as those in float64, for values of any size and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchlens_viz.stats.pairs import measured_in_pairs

VALUES = {
    "usual": lambda: torch.randn(5, 10_007),
    "far from zero": lambda: 1e6 + torch.randn(5, 10_007),
    "very far from zero": lambda: 3e7 + 4 * torch.randint(0, 5, (5, 4099)).float(),
    "large": lambda: 1e30 * torch.randn(3, 999),
    "huge": lambda: 3e38 * torch.rand(3, 999),
    "small": lambda: 1e-30 * torch.randn(3, 999),
    "of all sizes": lambda: torch.randn(3, 999) * torch.logspace(-15, 15, 999),
    "constant": lambda: torch.full((2, 77), 0.1),
    "one": lambda: torch.tensor([[3.0], [-2.0]]),
    "two": lambda: torch.tensor([[1.0, 2.0], [5.0, 5.0]]),
    "zeros": lambda: torch.zeros(2, 9),
    "rectified": lambda: torch.randn(4, 5001).relu(),
}


@pytest.mark.parametrize("name", VALUES)
def test_moments_are_those_of_numpy_in_float64(name):
    torch.manual_seed(0)
    values = VALUES[name]()
    found, exact = measured_in_pairs(values).moments(), values.double().numpy()
    spread = exact.std(1)
    np.testing.assert_allclose(found.mean, exact.mean(1), rtol=1e-13, atol=1e-13 * float(np.abs(exact).max()))
    np.testing.assert_allclose((found.squares / found.finite).sqrt(), spread, rtol=1e-11, atol=0)
    assert np.array_equal(found.low, exact.min(1))
    assert np.array_equal(found.high, exact.max(1))
    assert np.array_equal(found.zeros, (exact == 0).sum(1))


def test_what_is_not_finite_is_counted_and_touches_nothing_else():
    values = torch.randn(4, 1001)
    clean = measured_in_pairs(values[:, 3:]).moments()
    values[:, 0], values[:, 1], values[:, 2] = torch.nan, torch.inf, -torch.inf
    spoilt = measured_in_pairs(values).moments()
    assert spoilt.total.tolist() == [1001] * 4
    assert spoilt.finite.tolist() == [998] * 4
    for name in ("low", "high", "mean", "squares", "zeros"):
        torch.testing.assert_close(getattr(spoilt, name), getattr(clean, name), rtol=1e-13, atol=1e-15)
    nothing = measured_in_pairs(torch.full((2, 5), torch.nan)).moments()
    assert nothing.finite.tolist() == [0, 0]
    assert nothing.low.tolist() == [torch.inf] * 2
    assert nothing.mean.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
def test_other_types_are_measured_too(dtype):
    values = (torch.rand(3, 50) * 9).to(dtype)
    found = measured_in_pairs(values).moments()
    np.testing.assert_allclose(found.mean, values.double().mean(1), rtol=1e-13)
