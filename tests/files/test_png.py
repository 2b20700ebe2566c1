"""The PNG encoder, read back by Pillow."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torchlens_viz.files import png


def read_back(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.verify()  # checks every chunk's checksum
    return Image.open(io.BytesIO(data))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "P", "RGB"]), st.integers(0, 2**32 - 1))
def test_pillow_reads_back_every_pixel_and_colour(width, height, mode, seed):
    rng = np.random.default_rng(seed)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(rng.bytes(768))
    assert png.can_encode(image)
    again = read_back(png.encode(image))
    assert again.mode == mode
    assert np.array_equal(np.asarray(again), pixels)
    assert again.getpalette() == image.getpalette()


@pytest.mark.parametrize("height", [1, 2, 700, 701])
def test_large_picture_is_compressed_in_two_parts_without_loss(height):
    rng = np.random.default_rng(height)
    pixels = rng.integers(0, 256, (height, (1 << 20) // height + 8), dtype=np.uint8)
    pixels[:, ::2] = 7
    assert pixels.nbytes >= png._WORTH_A_THREAD
    assert np.array_equal(np.asarray(read_back(png.encode(Image.fromarray(pixels)))), pixels)


@pytest.mark.parametrize("times", [3, 40])
def test_enlarged_colours_are_small_and_without_loss(times):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    enlarged = pixels.repeat(times, 0).repeat(times, 1)
    data = png.encode(Image.fromarray(enlarged))
    assert np.array_equal(np.asarray(read_back(data)), enlarged)
    with io.BytesIO() as stream:
        Image.fromarray(enlarged).save(stream, "PNG", compress_level=1)
        assert len(data) < 1.1 * stream.tell()


@pytest.mark.parametrize("bands", [1, 3])
def test_of_enlarged_pixels_only_new_rows_are_taken_pixel_by_pixel(bands):
    pixels = np.random.default_rng(0).integers(1, 256, (5, 9, bands), dtype=np.uint8)
    enlarged = pixels.repeat(4, 0).repeat(4, 1)
    data = png.encode(Image.fromarray(enlarged.squeeze()))
    length, place = int.from_bytes(data[33:37]), 41  # after the signature and IHDR
    rows = np.frombuffer(zlib.decompress(data[place : place + length]), np.uint8).reshape(20, -1)
    assert rows[:, 0].tolist() == [1, 2, 2, 2] * 5
    assert not rows.reshape(5, 4, -1)[:, 1:, 1:].any()
    assert np.count_nonzero(rows[::4, 1:]) <= pixels.size


def test_short_palette_is_kept():
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([1, 2, 3, 4, 5, 6])
    again = read_back(png.encode(image)).convert("RGB")
    assert [again.getpixel((x, 0)) for x in (0, 1)] == [(1, 2, 3), (4, 5, 6)]


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_other_modes_are_left_to_pillow(mode):
    assert not png.can_encode(Image.new(mode, (2, 2)))


def test_metadata_is_left_to_pillow():
    image = Image.new("P", (2, 2))
    image.info["transparency"] = 0
    assert not png.can_encode(image)


def test_flat_sheet_is_as_small_as_pillows():
    tile = np.kron(
        np.random.default_rng(0).integers(0, 251, (32, 32), dtype=np.uint8), np.ones((8, 8), np.uint8)
    )
    image = Image.fromarray(tile)
    other = io.BytesIO()
    image.save(other, "PNG", compress_level=1)
    assert len(png.encode(image)) < 1.1 * len(other.getvalue())
