"""A batch back to the pixels it was made from, whatever the preprocessing did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.demo_net import preprocess as demo_preprocess
from torchlens_viz.models.inputs import as_batch, as_pixels


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
