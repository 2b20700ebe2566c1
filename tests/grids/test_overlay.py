"""`overlay_grid`: the sheet of maps over an image, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.pixels import overlay, robust_ends, written
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.grids.overlay import overlay_grid, save_overlay_grid
from torchlens_viz.grids.pairs import pair_grid
from torchlens_viz.receptive.find import receptive_field

PLAIN = {"labels": False, "upscale": 1, "backdrop": "color"}


def pixels_of(picture: Image.Image) -> np.ndarray:
    """The only tile of a sheet, without the padding around the sheet."""
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


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


# The sheet


def test_robust_limits_leave_an_outlier_out_and_the_legend_says_so(monkeypatch):
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    image = torch.rand(1, 40, 40)
    image[0, 3, 3] = 200.0
    ends = robust_ends(image.numpy())
    lines = written(monkeypatch)
    sheet = overlay_grid(conv, "", image, value_range="robust", legend=True, **PLAIN)
    fixed = overlay_grid(conv, "", image, value_range=(0.0, ends[1]), **PLAIN)
    assert np.array_equal(pixels_of(sheet)[: fixed.height, : fixed.width], pixels_of(fixed))
    assert lines[0] == f"hot: from 0, clear, to {ends[1]:.3g}"
    assert lines[1] == "limits at 0.5% and 99.5%, 0.4% of the values beyond"
    full = overlay_grid(conv, "", image, **PLAIN)
    assert pixels_of(full).std() != pixels_of(fixed).std()


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
    ranked = overlay_grid(
        net, "1", image, sort_by="mean", max_tiles=2, labels=[f"unit {i}" for i in range(6)]
    )
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


def test_pairs_take_the_same_images():
    conv = nn.Conv2d(3, 2, 3)
    with pytest.raises(InvalidArgumentError, match=r"`image` must be one image \(1, C, H, W\)"):
        pair_grid(conv, "", torch.rand(2, 3, 8, 8))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"`alpha` must be at most 1, got 1.5"),
        ({"alpha": float("nan")}, r"`alpha` must be finite, got nan"),
        ({"cmap": "sunny"}, r"`cmap` must be"),
        ({"interpolation": "cubic"}, r"`interpolation` must be"),
        ({"backdrop": "grey"}, r'`backdrop` must be "gray" or "color", got \'grey\''),
        ({"channels": 6}, r"`channels` must be indices from 0 to 5, got 6"),
        ({"channels": []}, r"`channels` must choose at least one"),
        ({"nrow": 0}, r"`nrow` must be at least 1"),
        ({"upscale": 0}, r"`upscale` must be at least 1"),
        ({"max_tiles": 0}, r"`max_tiles` must be at least 1"),
        ({"sort_by": "size"}, r"`sort_by` must be one of"),
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
    with pytest.raises(InvalidTypeError, match=r"`model` must be a torch.nn.Module, got Tensor"):
        overlay_grid(image, "1", image)
    with pytest.raises(InvalidTypeError, match=r"`image` must be a tensor or a picture, got ndarray"):
        overlay_grid(net, "1", image.numpy())
    with pytest.raises(InvalidTypeError, match=r"`alpha` must be a number, got '1'"):
        overlay_grid(net, "1", image, alpha="1")
    with pytest.raises(InvalidTypeError, match=r"`alpha` must be a number, got True"):
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


# Tokens


class Tokens(nn.Module):
    """Patches of 4 x 4 pixels as tokens (N, L, C), behind as many others as there are prefixes."""

    def __init__(self, channels: int = 5, prefixes: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, stride=4)
        self.norm = nn.LayerNorm(channels)
        self.prefixes = prefixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.norm(torch.cat((tokens.new_ones(len(x), self.prefixes, tokens.shape[2]), tokens), 1))


@pytest.mark.parametrize("prefixes", [0, 1, 5])
def test_tokens_lie_side_by_side_over_the_image(prefixes):
    torch.manual_seed(0)
    net, image = Tokens(prefixes=prefixes).eval(), torch.rand(3, 16, 24)
    options = {"channels": [2], "cmap": "gray", "interpolation": "nearest", "alpha": 1.0, **PLAIN}
    sheet = overlay_grid(net, "norm", image, grid=(4, 6), invert=torch.zeros_like, **options)
    with torch.no_grad():
        values = net(image[None])[0, prefixes:, 2].view(4, 6)
    expected = torch.where(values > 0, values, 0).numpy().repeat(4, 0).repeat(4, 1)
    drawn = pixels_of(sheet)[..., 0]
    top, left = (drawn.shape[0] - 16) // 2, (drawn.shape[1] - 24) // 2
    drawn = drawn[top : top + 16, left : left + 24]
    assert all(len(set(patch.flatten())) == 1 for row in np.split(drawn, 4) for patch in np.split(row, 6, 1))
    assert np.unravel_index(drawn.argmax(), drawn.shape) == np.unravel_index(expected.argmax(), drawn.shape)


@pytest.mark.parametrize(
    ("layer", "grid", "match"),
    [
        ("norm", None, "puts out shape .1, 25, 5.; say with `grid` how these tokens lie"),
        ("norm", (6, 6), "`grid`"),
        ("patches", (4, 6), "`grid` has no effect on `patches`"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(layer, grid, match):
    with pytest.raises(InvalidArgumentError, match=match):
        overlay_grid(Tokens().eval(), layer, torch.rand(3, 16, 24), grid=grid)


def test_the_legend_says_how_tokens_lie(monkeypatch):
    lines = written(monkeypatch)
    overlay_grid(Tokens().eval(), "norm", torch.rand(3, 16, 24), grid=(4, 6), legend=True)
    assert lines[-1] == "norm: tokens, 4 x 6"


def test_windows_that_are_folded_into_the_batch_are_not_drawn_over_the_whole_image():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)

        def forward(self, x):
            maps = self.stem(x).unfold(2, 2, 2).unfold(3, 2, 2)  # (1, 6, 4, 4, 2, 2)
            return self.inner(maps.permute(0, 2, 3, 4, 5, 1).flatten(0, 2).flatten(1, 2))

    with pytest.raises(
        InvalidArgumentError, match=r"one row per image, but `inner` puts out 16 .*\(16, 4, 5\)"
    ):
        overlay_grid(Windows(), "inner", torch.rand(3, 32, 32), grid=(2, 2))
