"""The moments of one tensor: the same by every way through memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nets import gathered, seeded
from torchlens_viz import RunningStats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_way_of_other_devices_gives_the_same(monkeypatch, dtype):
    from torchlens_viz.stats import measure as measuring

    values = (30 + seeded(9, 5, 70, 31)).to(dtype)  # not so far from zero that a CPU would go the same way
    assert isinstance(measuring.measure(values, 1, None).moments, measuring.Sums)
    expected = gathered(values).to_dict()
    monkeypatch.setattr(measuring, "_is_odd", lambda sums: np.ones(5, bool))
    assert isinstance(measuring.measure(values, 1, None).moments, measuring.Moments)
    found = gathered(values).to_dict()
    for name in ("total", "finite", "zeros", "low", "high"):
        assert torch.equal(found[name], expected[name])
    torch.testing.assert_close(found["mean"], expected["mean"], rtol=1e-13, atol=0)
    torch.testing.assert_close(found["squares"], expected["squares"], rtol=1e-9, atol=0)


def test_a_view_across_rows_is_measured_like_its_copy():
    values = torch.randn(8, 10)[:, :5]
    stats = RunningStats()
    stats.update(values)
    np.testing.assert_allclose(stats.compute().mean, values.double().numpy().mean(0))
    np.testing.assert_allclose(stats.compute().std, values.double().numpy().std(0))
