"""Reading photographs from files safely, and writing pictures so that no failure leaves half a file."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from torchlens_viz.arguments import integer, real
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError, reason_of
from torchlens_viz.files import png
from torchlens_viz.files.paths import as_path, is_there, replacing

_ORIENTATION_TAG = 0x0112
_TELL_ORIENTATION: Final = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_PHOTOMETRIC_TAG: Final = 0x0106
_SLOWEST: Final = 0.02  # pictures per second: a GIF holds no pause beyond 655 seconds
_CHUNK: Final = 2**20  # pixels that are scaled at a time
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NO_PICTURES: Final = {"BUFR", "GRIB", "HDF5", "MPEG"}  # what Pillow knows by name and cannot read by itself


def read_image(path: str | os.PathLike[str], *, max_pixels: int = 100_000_000) -> Image.Image:
    """Read a picture file as an upright 8-bit RGB image.

    The EXIF rotation is applied and transparency is laid on white. 16-bit images are scaled from
    [0, 65535]; 32-bit and floating-point ones from [0, white], where white is the first of 1 (floating
    point only), 255 and 65535 that no pixel passes, or from their own range where no such white exists.
    Of several frames the first is taken.

    Args:
        path: The picture file, in any format that Pillow reads.
        max_pixels: Width times height above which the file is refused, before it is decoded. Pillow's own
            limit, `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.

    Returns:
        An image of mode "RGB" that no longer depends on the file.

    Raises:
        PictureError: If the file is missing, unreadable, not a picture, damaged, or too large.
        InvalidArgumentError: If `max_pixels` is less than 1.
    """
    max_pixels = integer(max_pixels, "max_pixels", least=1)
    source = as_path(path)
    shown = repr(str(source))
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise PictureError(
            f"`path` must name an existing picture file, got {shown}; "
            f"check the spelling (relative paths start at {str(Path.cwd())!r})"
        ) from None
    except OSError as error:
        raise PictureError(f"cannot read {shown}: {reason_of(error)}; check the path") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise PictureError(f"`path` must name a picture file, got {shown}, which is {kind}; name one file")

    try:
        # Pillow reports odd metadata by warning; none of it keeps the pixels from being used.
        with source.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(file, shown, max_pixels)
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PictureError(
            f"`path` must name a picture file, got {shown}, which is in no format that Pillow reads; "
            "use a PNG or JPEG"
        ) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureError(
            f"{shown} has more pixels than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}); "
            "shrink it, or raise that limit if you trust the file"
        ) from error
    except PermissionError as error:
        raise PictureError(f"cannot read {shown}: {reason_of(error)}; check its permissions") from error
    except (
        Exception
    ) as error:  # decoders of damaged data raise nearly anything, struct.error and KeyError included
        raise PictureError(
            f"cannot decode {shown}: the file is truncated, damaged or of an unsupported kind "
            f"({reason_of(error)}); fetch it again or save it as PNG"
        ) from error


def save_picture(image: Image.Image, path: str | os.PathLike[str], **options: object) -> Path:
    """Write an image to a file that appears whole or not at all.

    `torchlens_viz.files.paths.replacing` says what becomes of folders, links and permissions.

    Args:
        image: The picture. A palette image is written to JPEG as RGB.
        path: The file; its suffix chooses the format.
        **options: What `PIL.Image.Image.save` takes. Without any, PNG is written by our own
            encoder, and WebP without loss.

    Returns:
        `path` as a `Path`, as it was given.

    Raises:
        PictureError: If the suffix names no format that can be written, the format cannot hold the image, or
            the folder or file cannot be written. A file of that name is then as it was before.
        InvalidTypeError: If `image` is not a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise InvalidTypeError(
            f"`image` must be a PIL.Image.Image, got {type(image).__name__}; "
            "make one from an array with PIL.Image.fromarray"
        )
    given = as_path(path)
    data = _encode(image, given, options)
    with replacing(given, PictureError) as temporary:
        temporary.write_bytes(data)
    return given


def save_animation(
    frames: Sequence[Image.Image], path: str | os.PathLike[str], *, fps: float = 10.0, loop: bool = True
) -> Path:
    """Write pictures as one moving picture, which appears whole or not at all.

    Args:
        frames: Pictures of one size.
        path: A file that ends in `.webp` (without loss) or `.gif` (256 colours).
        fps: Pictures per second.
        loop: Start again at the end.

    Returns:
        `path` as a `Path`, as it was given.

    Raises:
        InvalidArgumentError: There is no frame, they differ in size, or `fps` is not positive.
        InvalidTypeError: A frame is no PIL image.
        PictureError: The suffix is another, or the file cannot be written.
    """
    frames = list(frames)
    if not all(isinstance(frame, Image.Image) for frame in frames):
        kinds = sorted({type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)})
        raise InvalidTypeError(f"`frames` must be PIL.Image.Image objects, got {', '.join(kinds)}")
    if not frames or len({frame.size for frame in frames}) > 1:
        sizes = sorted({frame.size for frame in frames})
        raise InvalidArgumentError(f"`frames` must be one or more pictures of one size, got sizes {sizes}")
    if not 0 < real(fps, "fps") <= 1000:
        raise InvalidArgumentError(f"`fps` must be above 0 and at most 1000, got {fps}")
    pause = round(1000 / max(fps, _SLOWEST))
    is_webp = as_path(path).suffix.lower() == ".webp"
    if not is_webp and as_path(path).suffix.lower() != ".gif":
        raise PictureError(f"`path` must end in .webp or .gif, got {str(path)!r}")
    first, *rest = (frame.convert("RGB") for frame in frames)
    own = {"lossless": True, "loop": 0 if loop else 1}
    if not is_webp:
        own = {"loop": 0} if loop else {}  # a GIF without the entry is shown once
    return save_picture(first, path, save_all=True, append_images=rest, duration=pause, **own)


def as_chw(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return a picture as (3, H, W) uint8, as TensorBoard's `add_image` takes it; a gray one as (1, H, W)."""
    pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decode(file: io.BufferedReader, shown: str, max_pixels: int) -> Image.Image:
    with Image.open(file) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(
                f"{shown} has {width} x {height} = {width * height} pixels, more than "
                f"`max_pixels` = {max_pixels}; shrink the picture, or pass a larger `max_pixels`"
            )
        image.load()
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as an upright 8-bit RGB image, by the rules of `read_image`.

    Where it is one already, and in memory, it is the picture itself.
    """
    is_plain = type(image) is Image.Image and image.mode == "RGB" and "transparency" not in image.info
    if is_plain and _orientation(image) not in _UPRIGHT:
        return image
    return upright(_in_colours(image), _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block does not say which way is up, and its pixels are still good
        return 1


def upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Return a picture turned as its EXIF orientation says, or another one does, and no longer saying so."""
    orientation = _orientation(image) if orientation is None else orientation
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    for name in _TELL_ORIENTATION:  # or whoever reads it next would turn it once more
        turned.info.pop(name, None)
    return turned


def _in_colours(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        gray = Image.fromarray(_to_8_bit(image))
        whole = (ImageOps.invert(gray) if _is_white_zero(image) else gray).convert("RGB")
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            whole.paste("white", mask=Image.fromarray(np.asarray(image) == transparent))
        return whole
    if image.mode == "La":  # which Pillow turns into nothing else
        return _in_colours(image.convert("LA"))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        whole = Image.new("RGB", image.size)
        rows = max(1, _CHUNK // max(1, image.width))
        for top in range(0, image.height, rows):  # in little memory
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            opaque = Image.new("RGBA", strip.size, "white")
            opaque.alpha_composite(strip.convert("RGBA"))
            whole.paste(opaque.convert("RGB"), (0, top))
        return whole
    return image.convert("RGB")


def _is_white_zero(image: Image.Image) -> bool:
    """Tell whether a deep TIFF counts from white to black, which Pillow undoes for up to 8 bits only."""
    tags: Any = getattr(image, "tag_v2", None) or {}
    return bool(tags.get(_PHOTOMETRIC_TAG) == 0)


def _to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    values = np.asarray(image)
    low, high = _black_and_white(image, values)
    levels = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), max(1, _CHUNK // max(1, values[:1].size))):  # in little memory
        part = slice(rows, rows + max(1, _CHUNK // max(1, values[:1].size)))
        scaled = np.clip((values[part].astype(np.float64) - low) / (high - low) * 255.0, 0.0, 255.0)
        levels[part] = np.rint(np.nan_to_num(scaled, nan=0.0)).astype(np.uint8)
    return levels


def _black_and_white(image: Image.Image, values: npt.NDArray[Any]) -> tuple[float, float]:
    # Pillow before 11 opens 16-bit PNG and PPM as 32-bit "I", but their white is still 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0.0, 65535.0
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    for white in whites:
        if low >= 0.0 and high <= white:
            return 0.0, white
    return low, high if high > low else low + 1.0


def _encode(image: Image.Image, path: Path, options: dict[str, object]) -> bytes:
    name = Image.registered_extensions().get(path.suffix.lower())
    # Writers register along with the extensions, so that this lookup must come second.
    if name is None or name not in Image.SAVE:
        raise PictureError(
            f"`path` must end in a picture suffix such as .png, .jpg or .webp, got {str(path)!r}; append .png"
        )
    if name == "PNG" and not options and png.can_encode(image):
        return png.encode(image)
    if name == "WEBP" and not options:
        options = {"lossless": True}
    buffer = io.BytesIO()
    try:
        (image.convert("RGB") if name == "JPEG" and image.mode == "P" else image).save(
            buffer, name, **options
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise PictureError(
            f"cannot write {str(path)!r}: {name} cannot hold this {image.width} x {image.height} picture "
            f"of mode {image.mode} with these options ({reason_of(error)}); use a .png path"
        ) from error
    return buffer.getvalue()


def pictures_in(folder: Path, *, but_not_in: Path) -> list[Path]:
    """List the files with the ending of a picture in a folder and all below it, in the order of their paths.

    Links to folders are followed, each folder once.

    Args:
        folder: The folder.
        but_not_in: A folder whose pictures do not count.

    Raises:
        PictureError: There is no such folder, one cannot be read, or no picture is in it.
    """
    if not is_there(folder, PictureError) or not folder.is_dir():
        raise PictureError(
            f"IMAGE_FOLDER must name a folder of pictures, got {str(folder)!r}; check the spelling"
        )
    endings = {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PICTURES
    }
    found = sorted(
        (
            path
            for path in _files_below(folder, but_not_in.resolve())
            if path.suffix.lower() in endings and not path.name.startswith("._") and path.is_file()
        ),
        key=lambda path: path.relative_to(folder).parts,
    )
    if not found:
        raise PictureError(
            f"IMAGE_FOLDER must hold pictures, but there is none in {str(folder)!r} or below it; name "
            "another folder"
        )
    return found


def _files_below(folder: Path, but_not_in: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise PictureError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error

    visited = {but_not_in}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(place).resolve()
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield from (Path(place) / name for name in names)
