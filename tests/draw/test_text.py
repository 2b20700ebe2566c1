"""Words on a sheet: labels, titles, legends and counts, in any script, beside pixels that do not change."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from torchlens_viz import lettering

TEXTS = ("features.0: scale of step 0, 0.0% beyond", "-0.123", "jgyÅÇ _", "ffi AVATAR", "", "  a ", "ó…/")


@pytest.mark.parametrize("size", lettering.SIZES)
@pytest.mark.parametrize(
    ("mode", "fill", "ground"),
    [("P", 3, 0), ("L", 0, 255), ("L", 255, 10), ("RGB", (255, 10, 99), (3, 200, 30))],
)
def test_a_line_is_written_as_pillow_writes_it(mode, fill, ground, size):
    for text in TEXTS:
        for at in ((4, 5), (0, 0), (-3, -2), (190, 8)):  # cut off at an edge, too
            expected = Image.new(mode, (200, 20), ground)
            written, font = lettering._lettered(text, size)
            ImageDraw.Draw(expected).text(at, written, fill=fill, font=font)
            for _ in range(2):  # the second time from memory
                found = Image.new(mode, (200, 20), ground)
                lettering.write_line(found, at, text, fill, size)
                assert np.array_equal(np.asarray(found), np.asarray(expected)), (text, at)
