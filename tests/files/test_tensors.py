"""Tensors in files: a checksum tells the values of every type apart."""

from __future__ import annotations

import torch
from torch import nn

from torchlens_viz.files.tensors import checksum


def test_a_checksum_tells_values_of_every_type_apart():
    values = torch.rand(3, 4)
    assert checksum(values) == checksum(values.clone())
    assert checksum(values) == checksum(values.t().contiguous().t())
    changed = values.clone()
    changed[1, 2] += 1e-7
    assert checksum(values) != checksum(changed)
    assert checksum(None) == checksum(torch.zeros(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
        assert isinstance(checksum(torch.ones(3).to(dtype)), int)
    model = nn.BatchNorm2d(3)
    before = checksum(model)
    model(torch.rand(2, 3, 4, 4))
    assert checksum(model) != before  # buffers count
