"""A batch back to the pixels it was made from, whatever the preprocessing did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz import maximize, overlay_grid, survey
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.colours import as_pixels, colours_of
from torchlens_viz.models.demo_net import preprocess as demo_preprocess
from torchlens_viz.models.images import image_batch


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
    batch = image_batch(image)
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
    with pytest.warns(UserWarning, match="colours are shown as the model gets them.*pass `invert`"):
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


RGB = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
# What preprocessing makes of colours: a matrix, an offset, and whether the picture can be told from it.
PLANTED = {
    "as it is": (RGB, (0, 0, 0), True),
    "ImageNet": (RGB / torch.tensor([0.229, 0.224, 0.225])[:, None], (-2.1, -2.0, -1.8), True),
    "Caffe": (255 * RGB[[2, 1, 0]], (-104, -117, -124), True),
    "GBR": (RGB[[1, 2, 0]], (0, 0, 0), True),
    "RBG, one scale each": (RGB[[0, 2, 1]] * torch.tensor([2.0, 3, 0.5])[:, None], (0, 1, 2), True),
    "negative": (-2 * RGB, (1, 1, 1), True),
    "-1 to 1": (2 * RGB, (-1, -1, -1), True),
    "YCbCr": (YCBCR, (0, 0.5, 0.5), True),
    "opponents": (torch.tensor([[1.0, -1, 0], [1, 1, -2], [1, 1, 1]]), (0, 0, 0), True),
    "gray": (YCBCR[:1], (0,), False),
    "gray, three times": (YCBCR[[0, 0, 0]], (0, 0, 0), False),
    "red, three times": (RGB[[0, 0, 0]], (-0.5, 0, 0.5), False),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_done_to_colours_is_done_to_every_frame_of_a_clip(name):
    one = planted(name)

    def clip(image):
        return one(image)[:, :, None].expand(-1, -1, 5, -1, -1)

    found = colours_of(clip, axes=3)
    assert found.size == (5, 256, 256)
    frames = torch.rand(2, 3, 5, 6, 4)
    made = torch.stack([planted(name, tensors=True)(frame) for frame in frames.unbind(2)], 2)
    torch.testing.assert_close(found.apply(frames), made, rtol=1e-4, atol=1e-2)
    undone = found.undo(made)
    alone = torch.stack([colours_of(one).undo(frame) for frame in made.unbind(2)], 2)
    torch.testing.assert_close(undone, alone, rtol=1e-4, atol=1e-4)
    assert undone.shape == frames.shape


def planted(name, *, tensors=False):
    """A preprocessing of pictures, or of tensors in [0, 1], that does this to colours."""
    matrix, offset, _ = PLANTED[name]

    def preprocess(image):
        if isinstance(image, torch.Tensor) != tensors:
            raise TypeError(f"takes no {type(image).__name__}")
        pixels = image if tensors else torch.from_numpy(np.array(image.convert("RGB"))).movedim(2, 0) / 255
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        return torch.einsum("ck,nkhw->nchw", matrix, pixels) + torch.tensor(offset)[:, None, None]

    return preprocess


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_done_to_colours_is_found_and_undone(name, tensors):
    matrix, offset, can_be_told = PLANTED[name]
    found = colours_of(planted(name, tensors=tensors))
    torch.testing.assert_close(found.matrix, matrix, rtol=1e-4, atol=1e-4 * float(matrix.abs().max()))
    torch.testing.assert_close(found.offset, torch.tensor(offset).float())
    images = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(
        found.apply(images),
        planted(name, tensors=True)(images),
        rtol=1e-4,
        atol=1e-4 * float(matrix.abs().max()),
    )
    picture = photograph()
    batch = planted(name)(picture)
    shown = as_pixels(batch, picture, preprocess=planted(name))
    if can_be_told:
        assert np.abs(shown.numpy() - np.asarray(picture).transpose(2, 0, 1) / 255).max() < 1e-4
    else:  # a gray picture, which is the same to the model
        assert torch.equal(shown[0], shown[1])
        torch.testing.assert_close(planted(name, tensors=True)(shown[None]), batch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat([x[:, :1], x[:, :1] * 2, x[:, 1:2]], 1),  # blue is gone
        lambda x: x - x.mean(),  # and so is the brightness
    ],
)
def test_colours_that_no_picture_tells_are_refused(change):
    def preprocess(image):
        return change(planted("as it is")(image))

    with pytest.raises(InvalidArgumentError, match=r"makes the same of different colours.*pass `invert`"):
        as_pixels(preprocess(photograph()), photograph(), preprocess=preprocess)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (lambda x: x**2.2, r"along a straight line.*becomes \(0.22.* lies on the line"),
        (lambda x: (x > 0.5).float(), "along a straight line"),
        (lambda x: x * 0, "the same of every picture of one colour"),
        (lambda x: x[:, :, :0], "fails for a picture of one colour"),
    ],
)
def test_what_is_no_straight_line_is_refused(curve, message):
    with pytest.raises(InvalidArgumentError, match=message):
        colours_of(lambda image: curve(planted("as it is")(image)))


@pytest.mark.parametrize("name", PLANTED)
def test_the_picture_that_is_saved_reaches_the_score_that_is_told(name, tmp_path):
    """Through the very preprocessing that the caller gave."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(len(PLANTED[name][0]), 4, 3, bias=False), nn.Conv2d(4, 3, 3))
    result = maximize(net, "1", size=10, steps=24, preprocess=planted(name), precision="float32")
    result.save(tmp_path)
    for channel in range(3):
        with Image.open(tmp_path / f"{channel}.png") as picture, torch.no_grad():
            score = float(net(planted(name)(picture))[0, channel].mean())
        told = float(result.scores[channel])
        assert abs(score - told) < 0.01 * abs(told) + 0.005 * float(PLANTED[name][0].abs().max())


@pytest.mark.parametrize("name", PLANTED)
def test_overlays_and_patches_show_the_picture_itself(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(len(PLANTED[name][0]), 2, 3, padding=1))
    pictures = [photograph().resize((12, 9)), photograph().rotate(180).resize((12, 9))]
    plain = {"alpha": 0.0, "labels": False, "upscale": 1, "backdrop": "color", "channels": 0}
    drawn = np.asarray(overlay_grid(net, "0", pictures[0], preprocess=planted(name), **plain))[1:-1, 1:-1]
    batch = torch.cat([planted(name)(picture) for picture in pictures])
    found = survey(net, [batch], "0", top_k=2, progress=False)
    patch = found.patches("0", 0, pictures, preprocess=planted(name))[0]
    sample = int(found.top["0"].samples[0, 0])
    for pixels, picture in ((drawn, pictures[0]), (patch.pixels.movedim(0, 2) * 255, pictures[sample])):
        expected = np.asarray(picture).astype(float)
        if pixels is not drawn:
            expected = expected[patch.box]
        if not PLANTED[name][2]:
            weights = [1, 0, 0] if name.startswith("red") else PLANTED["gray"][0][0].numpy()
            expected = np.repeat((expected @ weights)[..., None], 3, axis=2)
        assert np.abs(np.asarray(pixels) - expected).max() <= 1.01
