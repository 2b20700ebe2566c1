"""Pictures are read as upright RGB or refused in one sentence, and written whole or not at all."""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from torch import nn

from tests.pixels import colours
from torchlens_viz import feature_grid, kernel_grid, pair_grid
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError
from torchlens_viz.files.pictures import (
    as_chw,
    as_rgb,
    pictures_in,
    read_image,
    save_animation,
    save_picture,
)
from torchlens_viz.grids.features import feature_sheet
from torchlens_viz.models.images import image_batch

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def as_array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def entries(folder: Path) -> set[str]:
    return {str(place.relative_to(folder)) for place in folder.rglob("*")}


def png_header_only(path: Path, width: int, height: int) -> Path:
    """Write a PNG that claims a size and holds no pixels: only a check of the header can refuse it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    return path


# Reading: what every kind of file becomes


def test_an_rgb_picture_is_read_as_it_is(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert np.array_equal(as_array(read_image(tmp_path / "a.png")), PIXELS)
    assert np.array_equal(as_array(read_image(str(tmp_path / "a.png"))), PIXELS)


def test_the_image_outlives_its_file(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert np.array_equal(as_array(image), PIXELS)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(tmp_path, orientation, suffix):
    shown = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(PIXELS).save(path, exif=exif.tobytes(), **options)
    assert np.array_equal(as_array(read_image(path)), shown)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"this is no TIFF header")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(as_array(read_image(tmp_path / "a.png")), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])  # most versions of pillow cut YCbCr in TIFF short
def test_other_modes_are_converted(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert np.array_equal(as_array(read_image(tmp_path / "a.tiff")), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_keeps_its_colour(tmp_path):
    Image.new("RGB", (16, 16), (250, 20, 30)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    mean = as_array(read_image(tmp_path / "a.jpg")).reshape(-1, 3).mean(0)
    assert np.abs(mean - [250, 20, 30]).max() < 6


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert as_array(read_image(tmp_path / "rgba.png")).tolist() == [[[10, 20, 30], [255] * 3, [204] * 3]]
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert as_array(read_image(tmp_path / "la.png"))[0, 1:].tolist() == [[255] * 3, [204] * 3]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_transparency_is_laid_on_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparency)
    assert as_array(read_image(tmp_path / "a.png")).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_16_bit_gray_is_scaled_from_its_full_range(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        assert as_array(read_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert as_array(read_image(tmp_path / "a.png")).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([-3.0, -3.0, -3.0], [0, 0, 0]),
        ([float("nan"), float("inf"), 0.2], [0, 255, 51]),
        ([float("nan"), float("nan"), float("inf")], [0, 0, 255]),
    ],
)
def test_floating_point_pictures_follow_the_stated_white(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert as_array(read_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 100, 255], [0, 100, 255]), ([0, 257, 65535], [0, 1, 255]), ([-100, 0, 100], [0, 128, 255])],
)
def test_32_bit_pictures_follow_the_stated_white(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "a.tiff")
    assert as_array(read_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == expected


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    assert as_array(read_image(tmp_path / "a.tiff"))[0, 0].tolist() == [255, 0, 0]


# What reading refuses


def refusal(path: Path, **options) -> str:
    with pytest.raises(PictureError, match=r"[;,] ") as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(str(path)) in message
    return message


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    message = refusal(path)
    assert "truncated, damaged" in message or "no format that Pillow reads" in message


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    assert "no format that Pillow reads" in refusal(path)


def test_a_missing_file_is_refused(tmp_path):
    assert f"relative paths start at {str(Path.cwd())!r}" in refusal(tmp_path / "missing.png")
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file" / "inside.png")
    refusal(tmp_path / "nul\0.png")
    assert "check the path" in refusal(tmp_path / ("long" * 100))


def test_a_folder_is_refused(tmp_path):
    assert "which is a folder" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "no regular file" in refusal(tmp_path / "pipe.png")


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "check its permissions" in refusal(path)


def test_the_pixel_limit_is_inclusive_and_read_from_the_header(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=35).size == (7, 5)
    assert "7 x 5 = 35 pixels, more than `max_pixels` = 34" in refusal(tmp_path / "a.png", max_pixels=34)
    assert "more than `max_pixels` = 1000" in refusal(
        png_header_only(tmp_path / "b.png", 40, 30), max_pixels=1000
    )


@pytest.mark.parametrize("side", [10_001, 12_000, 20_000, 2**31 - 1])
def test_absurd_sizes_are_refused_whether_pillow_warns_or_raises(tmp_path, side):
    path = png_header_only(tmp_path / "bomb.png", side, side)
    assert "shrink" in refusal(path)


def test_pillows_own_limit_holds_too(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for limit in (30, 10):  # 35 pixels: Pillow warns above its limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert f"PIL.Image.MAX_IMAGE_PIXELS ({limit})" in refusal(tmp_path / "a.png")


def test_reading_changes_no_global_of_pillow(tmp_path):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    refusal(png_header_only(tmp_path / "bomb.png", 20_000, 20_000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_pixel_limit_below_one_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="`max_pixels` must be at least 1, got 0"):
        read_image(tmp_path / "a.png", max_pixels=0)


# Writing


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_png_holds_the_same_pixels_and_mode(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    given = str(tmp_path / "a.png")
    assert save_picture(image, given) == Path(given)
    with Image.open(given) as read:
        assert read.mode == mode
        assert np.array_equal(np.asarray(read.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_the_path_comes_back_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save_picture(Image.new("L", (2, 2)), "sub/a.png") == Path("sub/a.png")
    assert entries(tmp_path) == {"sub", "sub/a.png"}


def test_a_palette_picture_can_be_a_jpeg(tmp_path):
    save_picture(Image.fromarray(PIXELS).convert("P"), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as read:
        assert (read.format, read.mode) == ("JPEG", "RGB")


def test_options_reach_pillow(tmp_path):
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    save_picture(image, tmp_path / "fast.png")
    save_picture(image, tmp_path / "plain.png", compress_level=0)
    assert (tmp_path / "fast.png").stat().st_size < (tmp_path / "plain.png").stat().st_size


def test_an_existing_file_is_replaced(tmp_path):
    (tmp_path / "a.png").write_text("old")
    save_picture(Image.new("L", (2, 2), 7), tmp_path / "a.png")
    assert as_array(read_image(tmp_path / "a.png")).tolist() == [[[7] * 3] * 2] * 2
    assert entries(tmp_path) == {"a.png"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask_and_an_existing_file_keeps_its_own(tmp_path, umask, expected):
    path = tmp_path / "a.png"
    before = os.umask(umask)
    try:
        save_picture(Image.new("L", (2, 2)), path)
        assert stat.S_IMODE(path.stat().st_mode) == expected
        path.chmod(0o640)
        save_picture(Image.new("L", (2, 2)), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges there")
def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_text("old")
    (tmp_path / "link.png").symlink_to("real/a.png")
    save_picture(Image.new("L", (2, 2), 7), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert read_image(tmp_path / "real" / "a.png").getpixel((0, 0)) == (7, 7, 7)
    assert entries(tmp_path) == {"real", "real/a.png", "link.png"}


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.txt", ".png", "a.", "a.psd"])
def test_a_suffix_that_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(
        PictureError, match=r"`path` must end in a picture suffix such as \.png.*append \.png"
    ):
        save_picture(Image.new("L", (2, 2)), tmp_path / "new" / name)
    assert entries(tmp_path) == set()


def test_a_folder_as_path_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PictureError, match=r"got the folder .*; append a file name"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "folder.png")
    assert entries(tmp_path) == {"folder.png"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PictureError, match=r"cannot write .*choose a path in a folder you can write to"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "file" / "deep" / "a.png")
    assert entries(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match=r"can be replaced, got .*no regular file"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "pipe.png")
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("kept")
    monkeypatch.setattr(os, "access", lambda *_args: False)  # root may write anything, so ask as someone else
    with pytest.raises(PictureError, match="is read-only; choose another name"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "kept"


@pytest.mark.parametrize("step", ["open", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_everything_as_it_was(tmp_path, monkeypatch, step, error):
    (tmp_path / "a.png").write_text("old")

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(Path, step, fail)
    raised = PictureError if isinstance(error, OSError) else KeyboardInterrupt
    for name in ("a.png", "new/deep/b.png"):
        with pytest.raises(raised, match=r"No space left|^$"):
            save_picture(Image.new("L", (2, 2)), tmp_path / name)
    monkeypatch.undo()
    assert entries(tmp_path) == {"a.png"}
    assert (tmp_path / "a.png").read_text() == "old"


def test_a_picture_that_the_format_cannot_hold_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a.jpg").write_text("old")
    with pytest.raises(PictureError, match=r"JPEG cannot hold this 2 x 3 .* mode RGBA .*use a \.png path"):
        save_picture(Image.new("RGBA", (2, 3)), tmp_path / "a.jpg")
    with pytest.raises(PictureError, match="JPEG cannot hold this 70000 x 1 picture"):
        save_picture(Image.new("L", (70_000, 1)), tmp_path / "new" / "a.jpg")
    assert entries(tmp_path) == {"a.jpg"}
    assert (tmp_path / "a.jpg").read_text() == "old"


def test_an_array_is_not_a_picture(tmp_path):
    with pytest.raises(InvalidTypeError, match=r"`image` must be a PIL\.Image\.Image, got ndarray"):
        save_picture(PIXELS, tmp_path / "a.png")
    assert entries(tmp_path) == set()


def moving(count: int = 5) -> list[Image.Image]:
    steps = torch.arange(64.0).reshape(1, 8, 8)
    frames = [feature_grid(steps.roll(shift, 2), cmap="viridis") for shift in range(count - 1)]
    return [*frames, kernel_grid(torch.arange(192.0).reshape(1, 3, 8, 8))]


# Moving pictures, and arrays


@pytest.mark.parametrize(("suffix", "duration"), [(".webp", 125), (".gif", 120)])  # GIF counts in 10 ms
@pytest.mark.parametrize("loop", [True, False])
def test_every_frame_of_a_moving_picture_can_be_read_back(tmp_path, suffix, duration, loop):
    frames = moving()
    path = save_animation(frames, tmp_path / f"moving{suffix}", fps=8, loop=loop)
    assert path == tmp_path / f"moving{suffix}"
    with Image.open(path) as image:
        assert image.n_frames == len(frames)
        assert (image.info.get("loop") == 0) == loop
        for index, frame in enumerate(frames):
            image.seek(index)
            image.load()
            assert image.info["duration"] == duration
            assert np.array_equal(colours(image), colours(frame)), index


def test_webp_animation_keeps_every_pixel_of_noise_and_gif_comes_close(tmp_path):
    noise = [Image.fromarray(np.uint8(torch.rand(40, 40, 3).numpy() * 255)) for _ in range(3)]
    for suffix, most in ((".webp", 0.0), (".gif", 24.0)):
        with Image.open(save_animation(noise, tmp_path / f"noise{suffix}")) as image:
            for index, frame in enumerate(noise):
                image.seek(index)
                assert np.abs(colours(image).astype(int) - colours(frame)).mean() <= most


def test_one_frame_makes_a_picture(tmp_path):
    frame = moving()[0]
    for suffix in (".webp", ".gif"):
        with Image.open(save_animation(iter([frame]), tmp_path / f"one{suffix}")) as image:
            assert np.array_equal(colours(image), colours(frame))


FRAME = Image.new("L", (4, 4))


@pytest.mark.parametrize(
    ("frames", "name", "fps", "error", "message"),
    [
        (
            [],
            "a.gif",
            10,
            InvalidArgumentError,
            r"`frames` must be one or more pictures of one size, got sizes \[\]",
        ),
        (
            [FRAME, Image.new("L", (4, 5))],
            "a.gif",
            10,
            InvalidArgumentError,
            r"of one size, got sizes \[\(4, 4\), ",
        ),
        ([FRAME, 3], "a.gif", 10, InvalidTypeError, r"`frames` must be PIL\.Image\.Image objects, got int"),
        ([FRAME], "a.gif", 0, InvalidArgumentError, r"`fps` must be above 0 and at most 1000, got 0"),
        (
            [FRAME],
            "a.gif",
            math.nan,
            InvalidArgumentError,
            r"`fps` must be above 0 and at most 1000, got nan",
        ),
        ([FRAME], "a.gif", 1001, InvalidArgumentError, r"`fps` must be above 0 and at most 1000, got 1001"),
        ([FRAME], "a.png", 10, PictureError, r"`path` must end in \.webp or \.gif, got '.*a\.png'"),
    ],
)
def test_moving_pictures_that_cannot_be_raise_and_write_nothing(tmp_path, frames, name, fps, error, message):
    with pytest.raises(error, match=message):
        save_animation(frames, tmp_path / name, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_arrays_for_tensorboard_are_channels_first():
    maps, weight = torch.rand(3, 4, 5), torch.rand(3, 3, 4, 5)
    for image, channels in (
        (feature_sheet(maps), 1),
        (feature_sheet(maps - 0.5), 3),
        (feature_grid(maps), 3),
        (kernel_grid(weight), 3),
        (pair_grid(nn.Conv2d(3, 2, 3), None, torch.rand(3, 9, 9)), 3),
    ):
        array = as_chw(image)
        assert (array.dtype, array.shape) == (np.uint8, (channels, image.height, image.width))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        for channel in range(channels):
            assert np.array_equal(array[channel], colours(image)[..., channel])


# Folders


def test_pictures_behind_links_count_and_sheets_of_an_earlier_run_do_not(tmp_path):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (folder / "out" / "top").mkdir(parents=True)
    elsewhere.mkdir()
    for place in (folder / "a.png", elsewhere / "b.png", folder / "out" / "top" / "conv.png"):
        Image.new("RGB", (4, 4)).save(place)
    (folder / "._a.png").write_bytes(b"no picture")
    (folder / "notes.pdf").write_bytes(b"no picture")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    found = pictures_in(folder, but_not_in=folder / "out" / "top")
    assert [path.relative_to(folder).as_posix() for path in found] == ["a.png", "link/b.png"]


def test_a_picture_in_memory_that_is_rgb_already_is_itself():
    plain = Image.fromarray(PIXELS)
    assert as_rgb(plain) is plain
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 6
    assert as_rgb(turned).size == (5, 7)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_premultiplied_transparency_is_laid_on_white_too(mode):
    levels = RNG.integers(0, 256, (5, 7, len(mode)), dtype=np.uint8)
    image = Image.fromarray(levels, mode.upper()).convert(mode)
    alpha = levels[..., -1:] / 255.0
    expected = np.broadcast_to(levels[..., :-1] * alpha + 255 * (1 - alpha), (5, 7, 3))
    assert np.abs(as_array(as_rgb(image)) - expected).max() < 1.5


def test_16_bit_transparency_is_laid_on_white(tmp_path):
    levels = RNG.permutation(35).reshape(5, 7).astype(np.uint16) * 1800
    Image.fromarray(levels).save(tmp_path / "one.png")
    data, chunk = (tmp_path / "one.png").read_bytes(), b"tRNS" + struct.pack(">H", 1800 * 20)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))  # not every Pillow writes it
    place = data.index(b"IDAT") - 4
    (tmp_path / "one.png").write_bytes(data[:place] + chunk + data[place:])
    expected = np.where(levels == 1800 * 20, 255, np.rint(levels / 65535 * 255))
    for image in (read_image(tmp_path / "one.png"), as_rgb(Image.open(tmp_path / "one.png"))):
        np.testing.assert_array_equal(as_array(image), np.repeat(expected[..., None], 3, 2))


def test_floating_point_that_counts_from_white_is_turned(tmp_path):
    levels = RNG.random((5, 7)).astype(np.float32)
    Image.fromarray(levels).save(tmp_path / "one.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "one.tif") as image:
        assert (image.mode, image.tag_v2[262]) == ("F", 0)
    expected = 255 - np.rint(levels.astype(np.float64) * 255)
    np.testing.assert_array_equal(as_array(read_image(tmp_path / "one.tif"))[..., 0], expected)


def test_transparency_is_laid_on_white_in_strips_as_at_once(monkeypatch):
    pixels = RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    at_once = as_array(as_rgb(Image.fromarray(pixels)))
    monkeypatch.setattr("torchlens_viz.files.pictures._CHUNK", 15)
    assert np.array_equal(as_array(as_rgb(Image.fromarray(pixels))), at_once)
    palette = Image.fromarray(pixels[..., :3]).quantize(5)
    palette.info["transparency"] = 2
    strips = as_array(as_rgb(palette))
    monkeypatch.undo()
    assert np.array_equal(strips, as_array(as_rgb(palette)))


@pytest.mark.parametrize("value", [None, 3, b"x.png", object()])
def test_what_is_no_path_is_refused(value):
    for act in (read_image, lambda path: save_picture(Image.fromarray(PIXELS), path)):
        with pytest.raises(InvalidTypeError, match="`path` must be a string or a path"):
            act(value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_what_was_read_is_not_turned_again(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))).save(path, exif=exif.tobytes())
    once = read_image(path)
    assert once.size == (5 * 8, 7 * 8)
    assert np.array_equal(as_array(as_rgb(once)), as_array(once))
    assert torch.equal(image_batch(once)[0], torch.from_numpy(as_array(once) / 255.0).movedim(2, 0).float())
    again = tmp_path / "again.png"
    save_picture(once, again, compress_level=1)
    assert np.array_equal(as_array(read_image(again)), as_array(once))
