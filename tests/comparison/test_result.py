"""What a comparison shows of itself: pictures, a table, rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.comparison.nets import altered, small
from torchlens_viz import compare
from torchlens_viz.errors import InvalidArgumentError

IMAGES = torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """Puts out tokens (N, L, C)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 4)

    def forward(self, images):
        return self.mix(images.flatten(2).transpose(1, 2))


def test_the_grid_has_a_row_per_channel_with_both_and_the_difference():
    a = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    with torch.no_grad():
        a[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    b = altered(a, "0", lambda layer: layer.weight[1].mul_(2))
    image = torch.zeros(1, 1, 2, 2)
    image[0, 0, 0, 0] = 1
    found = compare(a, b, image)
    sheet = np.asarray(found.grid("0", upscale=1, padding=0).convert("RGB")).reshape(2, 2, 3, 2, 3)
    # axes: row of the sheet, row of the map, column of the sheet, column of the map, colour
    white, red, blue = (255, 255, 255), (103, 0, 31), (5, 48, 97)
    worst, other = sheet
    assert tuple(worst[0, 1, 0]) == blue  # b makes -2 of it, the lowest on the range of both
    assert tuple(worst[0, 2, 0]) == blue  # b is 1 below a, the largest difference there is
    assert tuple(worst[1, 1, 1]) == tuple(worst[1, 2, 1]) == white
    assert tuple(other[0, 0, 0]) == tuple(other[0, 1, 0])  # where both make 1 of it
    assert other[0, 0, 0][0] > other[0, 0, 0][2]
    assert (other[:, 2] == 255).all()
    assert tuple(worst[0, 0, 0]) not in (white, blue, red)
    wide = found.grid("0", upscale=1, padding=0, value_range=(-100.0, 100.0)).convert("RGB")
    wide = np.asarray(wide).reshape(2, 2, 3, 2, 3)
    assert (wide[:, :, :2] > 240).all()  # 2 in 100 is next to white
    assert np.array_equal(wide[:, :, 2], sheet[:, :, 2])  # the difference keeps a range of its own
    assert found.grid("0", upscale=1, padding=0, value_range="robust").size == (6, 4)


def test_the_grid_of_the_first_layer_is_drawn_unless_another_is_named():
    a = small()
    b = altered(a, "3", lambda layer: layer.bias.add_(1))
    found = compare(a, b, IMAGES, maps=5)
    assert found.grid().tobytes() == found.grid("3").tobytes()
    assert found.grid("0").size != found.grid("6").size
    assert found.grid("3", max_tiles=6, labels=True, legend=True, title="3").width >= 3 * 96
    with pytest.raises(InvalidArgumentError, match=r"`call` has no effect without `layer`"):
        found.grid(call=0)
    with pytest.raises(InvalidArgumentError, match=r"`sort_by` has no effect: the worst channel comes first"):
        found.grid(sort_by="norm")


def test_networks_without_a_difference_are_drawn_too():
    a = small()
    sheet = compare(a, a, IMAGES).grid("3", padding=0, upscale=4)
    pixels = np.asarray(sheet.convert("RGB"))
    assert (pixels[:, -24:] == 255).all()
    assert (pixels[:, :24] == pixels[:, 24:48]).all()


def test_tokens_and_vectors_are_drawn_as_one_map():
    a = Tokens()
    found = compare(a, altered(a, "mix", lambda layer: layer.bias[2].add_(1)), IMAGES)
    assert (found["mix"].channel, len(found["mix"].by_channel)) == (2, 4)
    assert found.grid("mix", upscale=1, padding=0).size == (30, 40)  # 100 tokens as 10 x 10, of 4 channels
    head = compare(small(), small(), IMAGES).grid("6", upscale=1, padding=0)
    assert head.size == (3 * 5, 1)


def test_the_table_names_the_first_layer():
    a = small()
    found = compare(a, altered(a, "3", lambda layer: layer.bias[6].add_(1)), IMAGES)
    lines = repr(found).splitlines()
    assert lines[0] == "Comparison of 8 layers on 3 inputs: 5 beyond the tolerance, the first is `3`"
    marked = [line.split() for line in lines if line.endswith("<- first")]
    assert [(cells[0], cells[5]) for cells in marked] == [("3", "6")]
    assert repr(compare(a, a, IMAGES)).splitlines()[0].endswith("none beyond the tolerance")


def test_rows_are_plain_numbers():
    a = small()
    rows = compare(a, altered(a, "3", lambda layer: layer.bias[6].add_(1)), IMAGES).rows()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["layer"] for row in rows if row["is_beyond"]] == ["3", "4", "5", "6", "(output)"]
    assert rows[3]["max_abs"] == pytest.approx(1, rel=1e-6)
