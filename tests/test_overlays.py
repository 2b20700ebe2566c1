"""Overlays: every value over the pixel it comes from, and nothing over the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from torchlens_viz.draw.blend import Blend
from torchlens_viz.draw.palette import colormap
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.grids.overlay import overlay_grid, save_overlay_grid
from torchlens_viz.grids.pairs import pair_grid
from torchlens_viz.models.demo_net import preprocess as demo_preprocess
from torchlens_viz.models.inputs import as_batch, as_pixels
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field

PLAIN = {"labels": False, "upscale": 1, "backdrop": "colour"}


def pixels_of(picture: Image.Image) -> np.ndarray:
    """The only tile of a sheet, without the padding around the sheet."""
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def overlay(
    image: torch.Tensor,
    maps: torch.Tensor,
    field: ReceptiveField,
    *,
    interpolation: str = "bicubic",
    upscale: int = 1,
    **colours: object,
) -> torch.Tensor:
    """Maps over an image, (K, 3, H, W), each value over the pixel that its position stands over."""
    options = {"alpha": 0.6, "cmap": "auto", "scale_each": False, "value_range": None, **colours}
    return Blend.of(maps, **options).tiles(
        image,
        maps,
        origins=field.center((0, 0)),
        steps=field.stride,
        interpolation=interpolation,
        upscale=upscale,
    )


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


def test_a_gate_over_the_image_keeps_the_places():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1, stride=4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x * (1 + x.mean((2, 3), keepdim=True))

    net = Gated()
    nn.init.ones_(net.conv.weight)
    image = torch.zeros(3, 17, 17)
    image[:, 8, 12] = 1.0
    drawn = pixels_of(overlay_grid(net, "", image, alpha=1.0, cmap="gray", interpolation="bilinear", **PLAIN))
    strength = drawn[1:-1, 1:-1].sum(2) if drawn.shape[0] > 17 else drawn.sum(2)
    assert np.unravel_index(strength.argmax(), strength.shape) == (8, 12)


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


# The sheet


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 64, 2))


def test_the_sheet_shows_what_overlay_draws(net):
    image = torch.rand(3, 16, 16)
    sheet = overlay_grid(net, "1", image, channels=[4, 1], nrow=2, **PLAIN)
    assert sheet.size == (1 + 2 * 17, 18)
    maps = net[:2](image[None])[0].detach()[[4, 1]]
    tiles = overlay(image, maps, receptive_field(net, "1", (1, 3, 16, 16)))
    for place in (0, 1):
        tile = np.asarray(sheet)[1:17, 1 + 17 * place : 17 + 17 * place]
        assert np.array_equal(tile, tiles[place].permute(1, 2, 0).numpy())


def test_ranked_limited_and_labelled(net):
    image = torch.rand(3, 16, 16)
    means = net[:2](image[None])[0].mean((1, 2))
    best = means.argsort(descending=True)[:2].tolist()
    ranked = overlay_grid(net, "1", image, rank="mean", max_tiles=2, labels=[f"unit {i}" for i in range(6)])
    chosen = overlay_grid(net, "1", image, channels=best, labels=[f"unit {i}" for i in best])
    assert np.array_equal(np.asarray(ranked)[: chosen.height, : chosen.width], np.asarray(chosen))
    assert ranked.height > chosen.height  # a line says how many there are
    assert overlay_grid(net, "1", image, legend=True).height > overlay_grid(net, "1", image).height


def test_small_images_are_enlarged_and_gray_is_the_default(net):
    image = torch.rand(3, 16, 16)
    sheet = np.asarray(overlay_grid(net, "1", image, channels=0, labels=False, alpha=0.0))
    assert sheet.shape == (128, 128, 3) or sheet.shape == (130, 130, 3)
    inner = sheet[1:-1, 1:-1] if sheet.shape[0] == 130 else sheet
    assert (inner[..., 0] == inner[..., 1]).all()
    luminance = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert np.abs(inner[4::8, 4::8, 0] - 255 * luminance.numpy()).max() <= 1


def test_the_model_stays_as_it_was(net):
    net.train()
    state = torch.get_rng_state()
    overlay_grid(net, "1", torch.rand(1, 3, 16, 16, generator=torch.Generator()), channels=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_half_precision_and_other_numbers_of_channels():
    for channels, dtype in ((1, torch.float16), (5, torch.float32)):
        conv = nn.Conv2d(channels, 2, 3).to(dtype)
        assert overlay_grid(conv, "", torch.rand(channels, 12, 20), labels=False, upscale=1).mode == "RGB"


def test_saving(net, tmp_path):
    image = Image.new("RGB", (16, 16), "gray")
    path = save_overlay_grid(net, "1", image, tmp_path / "new" / "over.png", channels=[0], alpha=0.5)
    with Image.open(path) as written:
        expected = overlay_grid(net, "1", image, channels=[0], alpha=0.5)
        assert np.array_equal(np.asarray(written), np.asarray(expected))


# The picture under the maps


def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(60, 190, (16, 24, 3), dtype=np.uint8))


def test_normalisation_is_undone():
    image = photograph()
    pixels = as_pixels(demo_preprocess(image), image, preprocess=demo_preprocess)
    expected = np.asarray(image).transpose(2, 0, 1) / 255
    assert np.abs(pixels.numpy() - expected).max() < 1e-5


def test_cropping_and_borders_stay_and_normalisation_is_undone_all_the_same():
    def crop(image: Image.Image) -> torch.Tensor:
        batch = demo_preprocess(image.crop((0, 0, 12, 16)))
        return nn.functional.pad(batch, (1, 1, 1, 1), value=-2.0)

    image = photograph()
    pixels = as_pixels(crop(image), image, preprocess=crop)
    assert (
        np.abs(pixels.numpy()[:, 1:-1, 1:-1] - np.asarray(image)[:, :12].transpose(2, 0, 1) / 255).max()
        < 1e-5
    )
    assert (pixels[:, 0] == 0).all()


def test_tensors_are_undone_too_and_bytes_are_bytes():
    image = torch.rand(3, 5, 7)
    bytes_ = (255 * image).to(torch.uint8)
    assert torch.allclose(
        as_pixels((image[None] - 0.3) / 2, image, preprocess=lambda x: (x - 0.3) / 2), image
    )
    assert torch.equal(as_pixels(bytes_[None], bytes_), bytes_ / 255)
    half = as_pixels((bytes_[None] / 510), bytes_, preprocess=lambda x: x / 510)
    assert torch.allclose(half, bytes_ / 255)


def standardised(image: object) -> torch.Tensor:
    batch = as_batch(image)
    return (batch - batch.mean()) / batch.std()


def picky(image: Image.Image) -> torch.Tensor:
    if len(set(image.getdata())) == 1:
        raise ValueError("a picture of one colour")
    return standardised(image)


@pytest.mark.parametrize("preprocess", [standardised, picky])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_undone_is_spread(preprocess):
    image = photograph()
    batch = preprocess(image)
    pixels = as_pixels(batch, image, preprocess=preprocess)
    low, high = batch.min(), batch.max()
    assert torch.allclose(pixels, (batch[0] - low) / (high - low))


def test_a_given_inverse_comes_first():
    image = torch.rand(3, 4, 4)
    pixels = as_pixels(image[None] * 3, image, preprocess=lambda x: x * 3, invert=lambda x: 1 - x / 3)
    assert torch.allclose(pixels, 1 - image)
    with pytest.raises(
        InvalidArgumentError, match=r"`invert` must keep the height and width of \(1, 3, 4, 4\)"
    ):
        as_pixels(image[None], image, invert=lambda x: x[..., 1:])


def test_pairs_take_the_same_images():
    conv = nn.Conv2d(3, 2, 3)
    with pytest.raises(InvalidArgumentError, match=r"`image` must be one image \(1, C, H, W\)"):
        pair_grid(conv, "", torch.rand(2, 3, 8, 8))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"`alpha` must be from 0 to 1, got 1.5"),
        ({"alpha": float("nan")}, r"`alpha` must be from 0 to 1, got nan"),
        ({"cmap": "sunny"}, r"`cmap` must be"),
        ({"interpolation": "cubic"}, r"`interpolation` must be"),
        ({"backdrop": "grey"}, r'`backdrop` must be "gray" or "colour", got \'grey\''),
        ({"channels": 6}, r"`channels` must be indices from 0 to 5, got 6"),
        ({"channels": []}, r"`channels` must choose at least one"),
        ({"nrow": 0}, r"`nrow` must be at least 1"),
        ({"upscale": 0}, r"`upscale` must be at least 1"),
        ({"max_tiles": 0}, r"`max_tiles` must be at least 1"),
        ({"rank": "size"}, r"`rank` must be one of"),
        ({"labels": ["a"]}, r"`labels` must be 6 strings"),
        ({"value_range": (1, 0)}, r"`value_range` must be \(low, high\)"),
        ({"value_range": (0, 1), "scale_each": True}, r"`scale_each` and `value_range` exclude each other"),
    ],
)
def test_options_that_cannot_be(net, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        overlay_grid(net, "1", torch.rand(3, 16, 16), **options)


def test_arguments_of_other_types(net):
    image = torch.rand(3, 16, 16)
    with pytest.raises(InvalidTypeError, match=r"`model` must be an nn.Module, got Tensor"):
        overlay_grid(image, "1", image)
    with pytest.raises(InvalidTypeError, match=r"`image` must be a tensor or a picture, got ndarray"):
        overlay_grid(net, "1", image.numpy())
    with pytest.raises(InvalidTypeError, match=r"`alpha` must be a number from 0 to 1, got '1'"):
        overlay_grid(net, "1", image, alpha="1")
    with pytest.raises(InvalidTypeError, match=r"`alpha` must be a number from 0 to 1, got True"):
        overlay_grid(net, "1", image, alpha=True)
    with pytest.raises(InvalidTypeError, match=r"`channels` must be an int or a list of ints"):
        overlay_grid(net, "1", image, channels="0")


def test_layers_and_images_that_do_not_fit(net):
    image = torch.rand(3, 16, 16)
    with pytest.raises(LayerNotFoundError, match="no layer is named `9`"):
        overlay_grid(net, "9", image)
    with pytest.raises(InvalidArgumentError, match=r"`3` puts out shape \(1, 2\); choose a convolution"):
        overlay_grid(net, "3", image)
    with pytest.raises(InvalidArgumentError, match="`layer` must find one layer, got 5"):
        overlay_grid(net, [0, 1, 2, 3, ""], image)
    with pytest.raises(
        InvalidArgumentError, match=r"`image` must be one image .* got shape \(2, 3, 16, 16\)"
    ):
        overlay_grid(net, "1", torch.rand(2, 3, 16, 16))
