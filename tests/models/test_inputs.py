"""One image as what a model takes: every mode of a picture, tensors, and preprocessing of either kind."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz import explain, maximize, overlay_grid, pair_grid, project
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.calls import called_with, inputs_like
from torchlens_viz.models.images import as_batch, image_batch, model_input, require_usual_shape
from torchlens_viz.models.inputs import images_in, input_of, shown_to
from torchlens_viz.nested import map_tensors, tensors

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (8, 1))


def in_mode(mode):
    """A ramp from black to white in a mode, and what it is in [0, 1]."""
    gray = Image.fromarray(RAMP)
    if mode == "I;16":
        return Image.fromarray(RAMP.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32))
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    if mode == "1":
        return gray.point(lambda value: 255 * (value > 127)).convert("1")
    return gray.convert("P") if mode == "P" else gray.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]
)
def test_a_picture_of_any_mode_is_the_same_ramp(mode, tmp_path):
    picture = in_mode(mode)
    expected = torch.from_numpy((RAMP > 127).astype(np.float32) if mode == "1" else RAMP / np.float32(255))
    for channels in (1, 3, None):
        batch = image_batch(picture, channels)
        assert batch.shape == (1, channels or 3, 8, 16)
        assert (batch - expected).abs().max() <= 1.01 / 255
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):  # what a PNG holds
        picture.save(tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as opened:
            same = torch.from_numpy(np.array(read_image(tmp_path / "x.png"))).movedim(2, 0)[None] / 255
            assert image_batch(opened).equal(same)


def test_a_tiff_that_counts_from_white_is_not_a_negative(tmp_path):
    for tag, values in ((0, 65535 - RAMP.astype(np.uint16) * 257), (1, RAMP.astype(np.uint16) * 257)):
        Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo={0x0106: tag})
        assert np.array_equal(np.array(read_image(tmp_path / "x.tif"))[..., 0], RAMP)
        with Image.open(tmp_path / "x.tif") as opened:
            assert torch.equal(image_batch(opened, 1)[0, 0], torch.from_numpy(RAMP) / 255)


def test_transparency_is_white_and_exif_is_obeyed(tmp_path):
    assert (image_batch(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(RAMP).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        assert image_batch(opened).shape == (1, 3, 16, 8)


def test_bytes_count_to_255_and_other_tensors_are_as_they_are():
    values = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert image_batch(values).equal(values[None] / 255)
    assert image_batch(values.float()[None]).equal(values[None].float())
    with pytest.raises(InvalidArgumentError, match=r"`image` must be one image .*got shape \(2, 3, 4, 4\)"):
        image_batch(torch.zeros(2, 3, 4, 4))
    with pytest.raises(InvalidTypeError, match="`image` must be a tensor or a picture, got str"):
        as_batch("cat.jpg")


def normalise(images):
    """As `torchvision.transforms.Normalize`: of tensors alone."""
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"img should be Tensor Image. Got {type(images)}")
    return (images - 0.5) / 0.25


def from_picture(image):
    """As most preprocessing: of pictures alone, and turned into a tensor with one row."""
    return normalise(torch.from_numpy(np.array(image.convert("RGB"))).movedim(2, 0)[None] / 255)


def test_preprocessing_of_pictures_and_of_tensors_means_the_same_everywhere():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    assert model_input(picture, normalise).equal(model_input(picture, from_picture))
    for draw in (overlay_grid, pair_grid):
        sheets = [draw(net, "0", picture, preprocess=each) for each in (normalise, from_picture)]
        assert sheets[0].tobytes() == sheets[1].tobytes()
    options = {"size": 8, "steps": 6, "precision": "float32"}
    results = [maximize(net, "0", preprocess=each, **options) for each in (normalise, from_picture)]
    torch.testing.assert_close(results[0].images, results[1].images, rtol=0, atol=1e-4)
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-4, atol=1e-4)


def test_preprocessing_that_takes_nothing_says_what_it_said():
    def broken(image):
        raise ValueError(f"not a {type(image).__name__}, please")

    with pytest.raises(
        InvalidArgumentError, match=r"fails for the picture \(ValueError: not a Image.*Tensor"
    ):
        overlay_grid(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", Image.new("RGB", (9, 9)), preprocess=broken)
    with pytest.raises(
        InvalidArgumentError, match=r"`preprocess` must make of images.*not a Tensor.*not a Image"
    ):
        maximize(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", size=9, preprocess=broken)


@pytest.mark.parametrize("draw", [overlay_grid, pair_grid])
def test_gray_networks_take_gray_pictures(draw):
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    gray = Image.fromarray(RAMP)
    assert draw(net, "0", gray).tobytes() == draw(net, "0", gray.convert("RGB")).tobytes()
    assert draw(net, "0", gray).tobytes() == draw(net, "0", torch.from_numpy(RAMP)[None]).tobytes()
    result = maximize(net, "0", [0], image=gray, steps=1)
    assert result.images.shape == (1, 1, 8, 16)


def opened(mode, path):
    """An upright ramp, as PIL opens it of a file that says that it lies on its side."""
    exif = Image.Exif()
    exif[274] = 6
    turned = in_mode(mode).transpose(Image.Transpose.ROTATE_90)
    turned.save(path, exif=exif)
    with Image.open(path) as picture:
        picture.load()
    return picture


def as_it_is(image):
    """As `torchvision.transforms.ToTensor`: of pictures alone, with the channels that they have."""
    values = np.atleast_3d(np.array(image))
    return torch.from_numpy(values.astype(np.float32) / 255).movedim(2, 0)


class Brightness(nn.Module):
    """Puts out, in `0`, the images that it takes."""

    def __init__(self, channels):
        super().__init__()
        self.same = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.same.weight)

    def forward(self, x):
        return self.same(x).mean((2, 3))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("P", "png"), ("RGB", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("RGBA", "png")],
)
def test_preprocessing_gets_an_upright_picture_in_rgb_of_every_mode(mode, suffix, tmp_path):
    picture, expected = opened(mode, tmp_path / f"x.{suffix}"), torch.from_numpy(RAMP / np.float32(255))
    close = 0.05 if suffix == "jpg" else 1.01 / 255
    given = []

    def to_tensor(image):
        given.append(image)
        return as_it_is(image)

    for channels in (3, 1) if mode in ("L", "I;16") else (3,):
        model = Brightness(channels)
        seen = explain(model, picture, 0, method="gradient", preprocess=to_tensor)
        assert (seen.images - expected).abs().max() <= close
        assert float((seen.scores - expected.mean()).abs().max()) <= close
        assert seen.heatmaps.shape == (1, 8, 16)
        assert project(model, "same", picture, preprocess=to_tensor).images.shape[2:] == (8, 16)
        overlay_grid(model, "same", picture, preprocess=to_tensor)
        pair_grid(model, "same", picture, preprocess=to_tensor)
        seen_by = {image.mode for image in given if isinstance(image, Image.Image)}
        assert seen_by == ({"RGB"} if channels == 3 else {"L"})
        given.clear()


def test_a_network_of_four_channels_gets_pictures_of_four_channels():
    picture = Image.new("RGBA", (6, 5), (255, 0, 0, 128))
    seen = explain(Brightness(4), picture, lambda out: out[:, 3], method="gradient", preprocess=as_it_is)
    torch.testing.assert_close(seen.scores, torch.tensor([128 / 255]))


def test_a_long_thin_picture_is_refused_before_preprocessing_enlarges_it():
    def enlarge(image):
        raise AssertionError("it was enlarged")

    with pytest.raises(InvalidArgumentError, match=r"`image` must be at most 250 times as long .* 1 x 20000"):
        model_input(Image.new("RGB", (1, 20000)), enlarge)


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (torch.zeros(3, 4, 4, device="meta"), "plain values, got torch.float32 on meta; load its values"),
        (torch.zeros(3, 4, 4).to_sparse(), "a dense tensor"),
    ],
)
def test_tensors_without_plain_values_are_no_images(image, what):
    with pytest.raises(InvalidTypeError, match=f"`image` must (hold|be) {what}"):
        as_batch(image)


def test_a_model_that_fails_says_what_it_was_given():
    net = torch.nn.Conv2d(4, 1, 1)
    batch = torch.zeros(1, 3, 2, 2)
    with pytest.raises(
        InvalidArgumentError, match=r"`x` must be what the model takes: Conv2d fails for .* \(1, 3"
    ):
        with shown_to(net, batch, "x"):
            net(batch)


def test_a_rule_that_is_neither_key_nor_place_nor_function_is_refused():
    with pytest.raises(InvalidTypeError, match="`input_of` must be a key, a place or a function, got range"):
        input_of(torch.zeros(2, 3), range(2))


def test_pictures_that_preprocessing_would_enlarge_beyond_memory_are_refused():
    require_usual_shape(Image.new("RGB", (2, 500)), "image")
    for size in ((2, 501), (20000, 1)):
        with pytest.raises(
            InvalidArgumentError, match=r"`image` must be at most 250 times as long as .* crop it"
        ):
            require_usual_shape(Image.new("RGB", size), "image")


IMAGES, WORDS = torch.rand(2, 3, 4, 4), torch.ones(2, 5)
WITH_WORDS = [
    (IMAGES, None),
    ((IMAGES, WORDS), (None, WORDS[:1])),
    ((WORDS, IMAGES), (WORDS[:1], None)),
    ({"words": WORDS, "image": IMAGES, "mode": "m"}, {"words": WORDS[:1], "image": None, "mode": "m"}),
    ({"a": IMAGES + 1, "pixel_values": IMAGES}, {"a": IMAGES[:1] + 1, "pixel_values": None}),
    (({"pixels": IMAGES, "words": [WORDS, 3]},), ({"pixels": None, "words": [WORDS[:1], 3]},)),
    ((IMAGES, torch.ones(3, 3)), None),  # of which image is that a part?
    ((IMAGES, None), None),
    ([*IMAGES], list),
    (([*IMAGES], WORDS), None),
]


@pytest.mark.parametrize(("given", "expected"), WITH_WORDS)
def test_what_a_model_was_called_with_is_known_for_other_images(given, expected):
    images = images_in(given)
    assert torch.equal(torch.stack(images) if isinstance(images, list) else images, IMAGES)
    found = inputs_like(given)
    if expected in (None, list):
        assert found is expected
    else:
        assert_close(found, expected)
        (args, kwargs), (theirs, named) = (
            called_with(nn.Identity(), each).arguments(IMAGES[1:]) for each in (found, expected)
        )
        assert_close((args, kwargs), (theirs, named))


def assert_close(found, expected):
    assert map_tensors(lambda each: None, found) == map_tensors(lambda each: None, expected)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("draw", [overlay_grid, pair_grid])
@pytest.mark.parametrize("kind", ["cut", "closed"])
def test_a_picture_that_was_opened_and_cannot_be_read_is_refused(draw, kind):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "PNG")
    picture = Image.open(io.BytesIO(file.getvalue()[:2000] if kind == "cut" else file.getvalue()))
    if kind == "closed":
        picture.close()
    with pytest.raises(PictureError, match=r"the pixels of the picture cannot be read .*; open it again"):
        draw(nn.Sequential(nn.Conv2d(3, 2, 3)), "0", picture)
