"""How far apart two tensors are: what a few lines of numpy in float64 say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torchlens_viz import compare
from torchlens_viz.comparison.gap import deviation


def by_numpy(a, b):
    a, b = (np.asarray(each.resolve_conj().numpy()).reshape(-1) for each in (a, b))
    if np.iscomplexobj(a):
        a, b = (each.view(each.real.dtype) for each in (a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    inside = np.isfinite(a) & np.isfinite(b)
    a, b = a[inside], b[inside]
    level = np.sqrt(np.square(a).mean())
    return float((np.abs(b - a) / np.maximum(np.abs(a), level)).max())


def pair(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=generator, dtype=dtype)
    return a, a + 0.01 * torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.complex64, torch.complex128]
)
@pytest.mark.parametrize("shape", [(3,), (2, 5, 7, 7), (3, 40, 31, 37)], ids=["few", "some", "blocks"])
def test_a_deviation_is_that_of_numpy_and_changes_nothing(shape, dtype):
    a, b = pair(shape, dtype)
    before = a.clone(), b.clone()
    assert deviation(a, b) == pytest.approx(by_numpy(a, b), rel=1e-9)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_values_that_are_not_finite_in_both_are_left_out_of_a_deviation():
    a, b = pair((3, 40, 31, 37))
    a[0, 3], a[2, 7, 5], b[1, 1] = torch.nan, torch.inf, -torch.inf
    assert deviation(a, b) == pytest.approx(by_numpy(a, b), rel=1e-9)
    assert deviation(torch.full((4,), torch.nan), torch.zeros(4)) == 0


def test_a_deviation_looks_at_memory_in_any_order():
    a, b = pair((4, 8, 30, 90))
    expected = by_numpy(a, b)
    for change in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: torch.cat((x, x))[:4],
    ):
        assert deviation(change(a), b) == pytest.approx(expected, rel=1e-9)


def test_a_deviation_of_zeros_and_of_no_values():
    assert deviation(torch.zeros(5), torch.zeros(5)) == 0
    assert deviation(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_what_rounding_grows_to_does_not_depend_on_the_order_in_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    images = torch.rand(4, 3, 64, 60)
    one, other = (
        compare(model, model, images.contiguous(memory_format=layout))
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert one.first is None
    assert other.first is None
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert 1e-6 < mine.rtol < 1e-4
        assert 0.5 < mine.rtol / theirs.rtol < 2
