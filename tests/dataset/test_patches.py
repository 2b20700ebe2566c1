"""What a peak sees is cut from the input it was found in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.nets import quiet
from tests.pixels import written
from torchlens_viz import survey
from torchlens_viz.draw.text import text_width
from torchlens_viz.errors import InvalidArgumentError


def test_patches_are_cut_from_the_input_where_the_peak_looks(net):
    images = torch.randn(8, 3, 12, 10)
    found = survey(net, images.split(3), "0", top_k=3, **quiet)
    kernel = net[0].weight
    for channel in range(5):
        patches = found.patches("0", channel, TensorDataset(images))
        for patch, value, sample in zip(
            patches, found.top["0"].values[channel], found.top["0"].samples[channel], strict=True
        ):
            assert patch.values.equal(images[sample][:, patch.box[0], patch.box[1]])
            if patch.values.shape == kernel.shape[1:]:
                score = (patch.values * kernel[channel]).sum() + net[0].bias[channel]
                torch.testing.assert_close(score, value, rtol=1e-4, atol=1e-5)
    assert any(patch.values.shape == kernel.shape[1:] for patch in patches)
    sheet = found.grid("0", iter(images), channels=[1, 4], labels=False, upscale=1, padding=1)
    assert sheet.size == (3 * 3 + 4, 2 * 3 + 3)
    shown = found.patches("0", 4, images)[0].pixels
    corner = torch.from_numpy(np.array(sheet.convert("RGB")))[5:8, 1:4].permute(2, 0, 1)
    if shown.shape == (3, 3, 3):
        torch.testing.assert_close(corner / 255, shown, rtol=0, atol=0.5 / 255 + 1e-6)
    assert found.grid("0", DataLoader(TensorDataset(images)), labels=True).mode == "RGB"


def test_labels_of_small_patches_are_whole(net, monkeypatch):
    images = torch.randn(12, 3, 12, 10)
    found = survey(net, images.split(3), "0", top_k=3, **quiet)
    lines = written(monkeypatch)
    sheet = found.grid("0", images, channels=[1, 4])
    top = found.top["0"]
    assert lines == [
        f"{channel}: {value:.3g} #{sample}"
        for channel in (1, 4)
        for value, sample in zip(top.values[channel].tolist(), top.samples[channel].tolist(), strict=True)
    ]
    cell = max(66 + 2, *(text_width(line) + 6 for line in lines))  # a patch of 3 x 3 is drawn as 66 x 66
    assert sheet.size == (3 * cell + 2, 2 * (66 + 22 + 2) + 2)
    assert found.grid("0", images, channels=[1], labels=False, tile=30).height == 30 + 2 * 2


def test_patches_of_other_inputs_are_refused(net):
    images = torch.randn(8, 3, 12, 10)
    found = survey(net, images.split(3), "2", top_k=3, **quiet)
    with pytest.raises(InvalidArgumentError, match=r"of shape \(3, 12, 10\), got \(3, 9, 9\)"):
        found.patches("2", 0, torch.randn(8, 3, 9, 9))
    with pytest.raises(InvalidArgumentError, match=r"there is no index|ends before"):
        found.patches("2", 0, images[:1][: int(found.top["2"].samples[0, 0] == 0)])
    with pytest.raises(InvalidArgumentError, match="ends before index"):
        found.patches("2", 0, iter([]))
    with pytest.raises(InvalidArgumentError, match="`channels` must be indices from 0 to 3, got 9"):
        found.grid("2", images, channels=9)
    with pytest.raises(LookupError, match="knows nothing of `1`"):
        found.patches("1", 0, images)


def test_rows_of_channels_with_fewer_peaks_stay_rows():
    class Gaps(nn.Module):
        def forward(self, x):
            y = x.clone()
            y[3:, 0] = torch.nan
            y[:, 2] = torch.nan
            return y

    images = torch.rand(8, 3, 10, 10)
    found = survey(nn.Sequential(Gaps()), [images], "0", top_k=5, progress=False)
    one = found.grid("0", images, channels=[0])
    both = found.grid("0", images, channels=[0, 0])
    assert (both.width, both.height) == (one.width, 2 * one.height - 2)
    with pytest.raises(InvalidArgumentError, match="have no top inputs"):
        found.grid("0", images, channels=[2])
