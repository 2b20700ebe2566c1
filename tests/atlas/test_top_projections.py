"""ZFNet's figure: each tile is what `Survey.patches` cuts, or the projection that `project` makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import assert_as_before, quiet, small_net, snapshot
from torchlens_viz import project, survey, top_projections
from torchlens_viz.atlas import top_projections as top_projections_module
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

IMAGES = torch.rand(30, 3, 16, 18, generator=torch.Generator().manual_seed(0))
STYLE = {"labels": False, "padding": 0, "upscale": 1}


def by_project(net, layer, sample, channel, place, rule) -> np.ndarray:
    """The picture of one projection, (h, w, 3): 99.5 % of the values lie within the grays."""
    seen = project(net, layer, IMAGES[sample], [channel], rule=rule, position=tuple(place))
    values = seen.images[0][:, *seen.regions[0]]
    sizes = np.sort(values.abs().flatten().numpy())
    reach = sizes[max(1, round(0.995 * sizes.size)) - 1] or sizes[-1] or 1.0
    return (255 * (0.5 + values / (2 * reach)).clamp(0, 1)).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("rule", ["deconvnet", "guided", "gradient"])
def test_patches_stand_beside_the_projections_of_their_peaks(rule):
    net = small_net()
    before = snapshot(net)
    found = survey(net, IMAGES.split(8), "2", top_k=9, **quiet)
    sheet = np.asarray(top_projections(found, "2", [4, 1], IMAGES, rule=rule, **STYLE), dtype=float)
    side = 5  # what a position of the layer sees
    assert sheet.shape == (2 * 3 * side, 6 * side, 3)
    for block, channel in enumerate((4, 1)):
        patches = found.patches("2", channel, IMAGES)
        top = found.top["2"]
        for number in range(9):
            row, column = block * 3 + number // 3, number % 3
            rows = slice(row * side, (row + 1) * side)
            left = sheet[rows, column * side : (column + 1) * side]
            right = sheet[rows, (column + 3) * side : (column + 4) * side]
            expected = 255 * patches[number].pixels.permute(1, 2, 0).numpy()
            np.testing.assert_allclose(left, expected, atol=1.01)
            sample, place = int(top.samples[channel, number]), top.positions[channel, number].tolist()
            np.testing.assert_allclose(right, by_project(net, "2", sample, channel, place, rule), atol=1.01)
    assert_as_before(net, before)


def test_inputs_by_relevance_and_fewer_of_them():
    net = small_net()
    found = survey(
        net, IMAGES.split(8), "2", top_k=3, target=lambda output, batch: output[:, 0].mean((1, 2)), **quiet
    )
    ours, theirs = (
        np.asarray(top_projections(found, "2", 0, IMAGES, by=by, **STYLE))
        for by in ("relevance", "activation")
    )
    assert ours.shape == theirs.shape == (10, 20, 3)  # two rows of two; the last place is empty
    first = found.patches("2", 0, IMAGES, by="relevance")[0].pixels.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours[:5, :5], 255 * first, atol=1.01)
    assert not np.array_equal(ours, theirs)


def test_images_of_other_sizes_and_pictures_by_their_preprocessing():
    net = small_net()
    images = [IMAGES[:4], IMAGES[4:8, :, :14, :15]]
    found = survey(net, images, "2", top_k=4, **quiet)
    each = [image for batch in images for image in batch]
    assert top_projections(found, "2", [0], each, **STYLE).size == (20, 10)
    scaled = survey(net, [(image[None] - 0.5) * 2 for image in IMAGES[:4]], "2", top_k=4, **quiet)
    sheet = top_projections(scaled, "2", [0], IMAGES[:4], preprocess=lambda image: (image - 0.5) * 2, **STYLE)
    assert sheet.size == (20, 10)


def test_what_does_not_fit_is_refused():
    net = small_net()
    found = survey(net, IMAGES.split(8), "2", top_k=2, **quiet)
    with pytest.raises(InvalidTypeError, match="`found` must be a Survey, got Sequential"):
        top_projections(net, "2", 0, IMAGES)
    with pytest.raises(InvalidArgumentError, match='`rule` must be "deconvnet", "guided" or "gradient"'):
        top_projections(found, "2", 0, IMAGES, rule="backwards")
    with pytest.raises(InvalidArgumentError, match="no top inputs by relevance"):
        top_projections(found, "2", 0, IMAGES, by="relevance")
    with pytest.raises(InvalidArgumentError, match="`channels` must be indices from 0 to 6, got 7"):
        top_projections(found, "2", 7, IMAGES)


def test_the_rule_stands_beside_and_units_that_did_not_fire_are_told():
    net = nn.Sequential(nn.Conv2d(3, 3, 5), nn.ReLU()).eval()
    net[0].weight.data[0] = -net[0].weight.data[0].abs()
    net[0].bias.data[0] = -1.0  # never on
    net[0].bias.data[1:] = 5.0  # always on
    found = survey(net, IMAGES.split(8), "1", top_k=4, **quiet)
    words = []
    with pytest.MonkeyPatch.context() as patch:
        draw = top_projections_module.draw_rows
        patch.setattr(
            top_projections_module,
            "draw_rows",
            lambda rows, told, **more: words.append(told) or draw(rows, told, **more),
        )
        top_projections(found, "1", [0, 2], IMAGES, rule="guided")
    (told,) = words
    assert [row[2:] for row in told] == [["did not fire"] * 2] * 2 + [["guided", ""], ["", ""]]
