"""Maps over an image: every value over the pixel it comes from, and nothing over the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.pixels import overlay
from torchlens_viz.draw.blend import placed
from torchlens_viz.draw.palette import colormap
from torchlens_viz.receptive.find import receptive_field


def single(maps: torch.Tensor, layer: nn.Module, size: tuple[int, int], **options: object) -> np.ndarray:
    """One map over a black image, (3, H, W)."""
    field = receptive_field(layer, "", (1, 1, *size))
    return overlay(torch.zeros(3, *size), maps, field, **options)[0].numpy().astype(int)


# Where a value is drawn


@settings(max_examples=30)
@given(
    st.integers(0, 3).map(lambda half: 2 * half + 1),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(["nearest", "bilinear", "bicubic"]),
    st.integers(1, 3),
    st.data(),
)
def test_a_bright_pixel_is_found_again_at_its_place(kernel, stride, padding, interpolation, upscale, data):
    conv = nn.Conv2d(1, 1, kernel, stride, padding, bias=False)
    nn.init.dirac_(conv.weight)  # each position takes the pixel in the middle of its window
    image = torch.zeros(1, 30, 41)
    maps = conv(image[None])[0].detach()
    middle = (kernel - 1) // 2 - padding  # the pixel under position 0, by hand
    # Not the outermost positions, whose values reach as far as the border; and not those over padding.
    row, column = (
        data.draw(
            st.sampled_from([middle + at * stride for at in range(1, count - 1)]).filter(
                lambda place, size=size: 0 <= place < size
            )
        )
        for count, size in zip(maps.shape[1:], (30, 41), strict=True)
    )
    image[0, row, column] = 1.0
    maps = conv(image[None])[0].detach()
    assert (maps != 0).sum() == 1
    drawn = single(maps, conv, (30, 41), alpha=1.0, interpolation=interpolation, upscale=upscale)
    strength = drawn.sum(0)
    peak = np.argwhere(strength == strength.max()).mean(0)
    found = (peak + 0.5) / upscale - 0.5
    slack = 0.5 if interpolation != "nearest" else max(0.5, stride / 2)
    assert np.abs(found - (row, column)).max() <= slack


def test_interpolation_by_hand():
    layer = nn.AvgPool2d(4)  # positions over 1.5, 5.5, ...
    maps = torch.tensor([[[0.0, 4.0]]])
    gray = {"cmap": "gray", "alpha": 1.0, "value_range": (0.0, 4.0)}

    def values(interpolation: str) -> list[float]:
        drawn = single(maps, layer, (4, 8), interpolation=interpolation, **gray)
        return [float(value) for value in drawn[0, 0]]

    def shown(value: float) -> float:  # colour times visibility, over black
        return 255 * value / 4 * np.sqrt(value / 4)

    assert values("nearest") == [0, 0, 0, 0, 255, 255, 255, 255]
    linear = [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
    assert values("bilinear") == pytest.approx([shown(value) for value in linear], abs=2)
    smooth = values("bicubic")
    assert smooth[:2] == pytest.approx([0, 0], abs=2)
    assert smooth[-2:] == pytest.approx([255, 255], abs=2)
    assert smooth == sorted(smooth)


def test_it_is_not_merely_stretched():
    layer = nn.Conv2d(1, 1, 3, stride=4, padding=1)  # positions over 0, 4, 8, 12: not 1.5, 5.5, ...
    maps = torch.tensor([[[1.0, 0, 0, 0]]])
    drawn = single(maps, layer, (1, 16), cmap="gray", alpha=1.0, interpolation="bilinear")[0, 0]
    assert drawn[0] == 255
    assert list(drawn) == sorted(drawn, reverse=True)
    assert drawn[3] > 0
    assert list(drawn[4:]) == [0] * 12


def test_beyond_the_outermost_positions_values_stay():
    layer = nn.Conv2d(1, 1, 9)  # positions over 4 to 11
    maps = torch.zeros(1, 8, 8)
    maps[0, 0, :] = 1.0
    drawn = single(maps, layer, (16, 16), cmap="gray", alpha=1.0)[0]
    assert (drawn[:5] == 255).all()
    assert (drawn[5:][1:] == 0).all()


# How much a value hides


def test_zero_is_clear_and_alpha_is_how_much_the_strongest_hides():
    image = torch.full((3, 4, 8), 0.4)
    field = receptive_field(nn.AvgPool2d(4), "", (1, 3, 4, 8))
    maps = torch.tensor([[[0.0, 3.0]]])
    for alpha in (0.0, 0.25, 1.0):
        drawn = overlay(image, maps, field, alpha=alpha, cmap="gray", interpolation="nearest")[0]
        assert (drawn[:, :, :4] == 102).all()
        assert (drawn[:, :, 4:] - (102 + alpha * 153)).abs().max() <= 1


def test_signed_maps_are_blue_and_red_and_zero_is_clear():
    image = torch.full((3, 4, 12), 0.5)
    field = receptive_field(nn.AvgPool2d(4), "", (1, 3, 4, 12))
    drawn = overlay(image, torch.tensor([[[-1.0, 0, 1.0]]]), field, alpha=1.0, interpolation="nearest")[0]
    ends = colormap("RdBu_r").levels
    assert drawn[:, 0, 0].tolist() == ends[0].tolist()
    assert drawn[:, 0, 5].tolist() == [128] * 3
    assert drawn[:, 0, 11].tolist() == ends[-1].tolist()


def test_negative_maps_are_blue():
    field = receptive_field(nn.AvgPool2d(4), "", (1, 3, 4, 8))
    drawn = overlay(torch.zeros(3, 4, 8), torch.tensor([[[-2.0, -1.0]]]), field, alpha=1.0)[0]
    assert (drawn[2] > drawn[0]).all()


def test_one_range_for_all_maps_or_one_for_each():
    image = torch.zeros(3, 4, 4)
    field = receptive_field(nn.AvgPool2d(4), "", (1, 3, 4, 4))
    maps = torch.tensor([[[1.0]], [[4.0]]])
    options = {"alpha": 1.0, "cmap": "gray"}
    together = overlay(image, maps, field, **options)[:, 0, 0, 0].tolist()
    apart = overlay(image, maps, field, scale_each=True, **options)[:, 0, 0, 0].tolist()
    fixed = overlay(image, maps, field, value_range=(0, 16), **options)[:, 0, 0, 0].tolist()
    assert together == pytest.approx([255 / 4 / 2, 255], abs=2)
    assert apart == [255, 255]
    assert fixed == pytest.approx([255 / 16 / 4, 255 / 4 / 2], abs=2)


def test_a_constant_zero_map_is_clear():
    field = receptive_field(nn.AvgPool2d(4), "", (1, 3, 8, 8))
    image = torch.rand(3, 8, 8)
    drawn = overlay(image, torch.zeros(2, 2, 2), field)
    assert torch.equal(drawn[1], (255 * image + 0.5).to(torch.uint8))


def test_values_that_are_not_finite_show_and_do_not_spread():
    field = receptive_field(nn.AvgPool2d(4), "", (1, 3, 4, 16))
    maps = torch.tensor([[[torch.nan, 1.0, torch.inf, -torch.inf]]])
    drawn = overlay(torch.zeros(3, 4, 16), maps, field, alpha=0.3)[0, :, 0]
    assert drawn[:, 1].tolist() == [255, 0, 255]
    assert drawn[:, 9].tolist() == [0, 255, 0]
    assert drawn[:, 13].tolist() == [0, 255, 255]
    clean = overlay(torch.zeros(3, 4, 16), torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), field, alpha=0.3)[0, :, 0]
    assert torch.equal(drawn[:, 4:8], clean[:, 4:8])


def test_many_maps_are_drawn_as_each_alone():
    field = receptive_field(nn.AvgPool2d(8), "", (1, 3, 256, 256))
    maps, image = torch.randn(40, 32, 32), torch.rand(3, 256, 256)  # more than are worked on together
    drawn = overlay(image, maps, field, scale_each=True)
    for index in (0, 31, 32, 39):
        assert torch.equal(drawn[index], overlay(image, maps[index : index + 1], field)[0])


# Bad input


def test_maps_in_the_pixels_of_an_image_stand_where_their_positions_do():
    maps = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[0.0, -2.0], [0.0, 0.0]]])
    found = placed(maps, (4, 5), origins=(1.0, 0.0), steps=(2.0, 4.0), interpolation="bilinear")
    across = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0])
    assert torch.equal(found[0], torch.stack([across, across, across + 2, across + 4]))
    assert torch.equal(found[1, 3], torch.zeros(5))
    assert found[1, 0].tolist() == [0.0, -0.5, -1.0, -1.5, -2.0]
    nearest = placed(maps[:1], (4, 5), origins=(1.0, 0.0), steps=(2.0, 4.0), interpolation="nearest")
    assert nearest[0, 0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]
    evenly = placed(
        maps[:1], (4, 4), origins=(torch.nan, torch.nan), steps=(0.0, 0.0), interpolation="nearest"
    )
    assert evenly[0].tolist() == [[1.0, 1.0, 3.0, 3.0]] * 2 + [[5.0, 5.0, 7.0, 7.0]] * 2


def test_a_mirrored_map_is_turned_back():
    maps = torch.rand(1, 3, 5)
    options = {"size": (7, 10), "interpolation": "bilinear"}
    mirrored = placed(maps.flip(2), origins=(1.0, 8.5), steps=(2.0, -2.0), **options)
    torch.testing.assert_close(mirrored, placed(maps, origins=(1.0, 0.5), steps=(2.0, 2.0), **options))
