"""PNG for sheets: two filters, chosen without trying, and the quickest compression that suits them.

General encoders try five filters on every row, which costs more than all the rest. Sheets are enlarged pixels
and smooth maps, also as palette indices, since neighbouring levels are neighbouring entries: taking the
difference to the row above compresses nearly as well as the best choice per row, and takes less than half
the time of Pillow's fastest settings. Where pixels are enlarged, most rows are the row above again; those
that are not take the difference to the pixel on the left, which is zero but at the edges of an enlarged
pixel. Runs are what remains to be compressed. Of a large picture two threads compress one half each.
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES: Final = {"L": 0, "RGB": 2, "P": 3}
_SUB: Final = 1  # the filters' names in the standard: to the left, and to the row above
_UP: Final = 2
_WORTH_A_THREAD: Final = 1 << 20  # bytes; below it a thread costs more than it saves


def can_encode(image: Image.Image) -> bool:
    """Tell whether `encode` keeps all there is to an image: 8 bits, no transparency and no metadata."""
    return image.mode in _COLOUR_TYPES and not image.info and min(image.size) > 0


def encode(image: Image.Image) -> bytes:
    """Encode an image of mode "L", "P" or "RGB" without loss, as of PNG, second edition (ISO/IEC 15948).

    Args:
        image: An image for which `can_encode` holds.

    Returns:
        The bytes of a PNG file.
    """
    rows = _filtered(np.asarray(image).reshape(image.height, -1), len(image.getbands()))
    header = struct.pack(">IIBBBBB", *image.size, 8, _COLOUR_TYPES[image.mode], 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if image.mode == "P":
        chunks.append((b"PLTE", bytes(image.getpalette("RGB") or ())))
    chunks += [(b"IDAT", _compress(rows)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _filtered(pixels: npt.NDArray[np.uint8], bands: int) -> npt.NDArray[np.uint8]:
    """Return pixels (H, W * bands) as rows of differences, each with the byte that names its filter."""
    rows = np.empty((len(pixels), pixels.shape[1] + 1), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    if 2 * np.count_nonzero(rows) < rows.size:  # pixels are enlarged
        new = rows[:, 1:].any(1)
        lines = pixels[new]
        rows[new, 0] = _SUB
        rows[new, 1 : 1 + bands] = lines[:, :bands]
        rows[new, 1 + bands :] = lines[:, bands:] - lines[:, :-bands]
    return rows


def _compress(rows: npt.NDArray[np.uint8]) -> bytes:
    """Return rows of bytes as one zlib stream (RFC 1950)."""
    if rows.nbytes < _WORTH_A_THREAD:
        compressor = _compressor(zlib.MAX_WBITS)
        return compressor.compress(rows.data) + compressor.flush()
    middle = len(rows) // 2
    with ThreadPoolExecutor(1) as pool:  # zlib lets go of the interpreter's lock
        first = pool.submit(_deflate, rows[:middle], zlib.Z_SYNC_FLUSH)
        last = _deflate(rows[middle:], zlib.Z_FINISH)
        header, checksum = b"\x78\x01", struct.pack(">I", zlib.adler32(rows.data))
        return b"".join((header, first.result(), last, checksum))


def _deflate(rows: npt.NDArray[np.uint8], ending: int) -> bytes:
    compressor = _compressor(-zlib.MAX_WBITS)  # without header and checksum
    return compressor.compress(rows.data) + compressor.flush(ending)


def _compressor(window: int) -> zlib._Compress:
    return zlib.compressobj(1, zlib.DEFLATED, window, 9, zlib.Z_RLE)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
