"""Curves: signals as lines, with what a layer makes of them as the colour of the page behind."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw

from torchlens_viz.draw.blend import Blend, placed
from torchlens_viz.draw.planes import strongest
from torchlens_viz.draw.rows import limits_of
from torchlens_viz.draw.style import Interpolation

_NARROWEST: Final = 512  # pixels that a signal is drawn in, unless the caller says how much to enlarge it
_WIDEST: Final = 2048
_LANES: Final = 256  # about what all curves of a signal are high together
_LANE: Final = 32  # and each of them at least
_THICK: Final = 2
_ZERO: Final = 176  # the gray of the line at zero
_EVENLY: Final = (float("nan"), 0.0)


def size_of(signal: torch.Tensor, upscale: int | None) -> tuple[int, int]:
    """Return the height and width, in pixels, of the picture of a signal (C, L).

    Args:
        signal: C curves.
        upscale: Pixels from one sample to the next; None is a whole number that makes at least 512, or what
            makes 2048 of more samples than that.
    """
    count, length = signal.shape
    height = count * max(_LANE, _LANES // (count + 1))
    if upscale is not None:
        return height, length * upscale
    return height, min(length * ceil(_NARROWEST / length), _WIDEST)


def curves(signal: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Draw a signal (C, L) as black lines on white, one below the other in one range, with a line at zero.

    A line is broken where a sample is not finite.

    Args:
        signal: C curves.
        size: Height and width.

    Returns:
        (height, width) uint8.
    """
    height, width = size
    values = signal.detach().cpu().double().numpy()
    low, high = limits_of([signal])
    image = Image.new("L", (width, height), 255)
    pen = ImageDraw.Draw(image)
    lane = height // len(values)
    x = (np.arange(values.shape[1]) + 0.5) * width / values.shape[1] - 0.5
    span = lane - 2 * _THICK
    for place, curve in enumerate(values):
        y = place * lane + _THICK + (high - curve) / (high - low) * (span - 1)
        if low <= 0 <= high:
            zero = round(place * lane + _THICK + high / (high - low) * (span - 1))
            pen.line([(0, zero), (width, zero)], fill=_ZERO)
        known = np.flatnonzero(np.isfinite(curve))
        for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            points = list(zip(x[part].tolist(), y[part].tolist(), strict=True))
            pen.line([*points[:1], *points], fill=0, width=_THICK)
    return torch.from_numpy(np.array(image))


def over_curves(
    signal: torch.Tensor,
    maps: torch.Tensor,
    blend: Blend,
    *,
    origin: float,
    step: float,
    interpolation: Interpolation,
    size: tuple[int, int],
) -> torch.Tensor:
    """Draw a signal once for each of some maps, whose values colour the page behind it.

    Where a pixel is narrower than a sample, it has the colour of the value farthest from zero in its place.

    Args:
        signal: (C, L).
        maps: (K, l).
        blend: The colours of their values.
        origin: The sample that the first position stands over, as in `Blend.tiles`.
        step: Samples from one position to the next.
        interpolation: As in `Blend.tiles`.
        size: Height and width.

    Returns:
        (K, 3, height, width) uint8 on the CPU.
    """
    height, width = size
    length = signal.shape[1]
    if width < length:
        maps = placed(
            maps,
            (length,),
            origins=(origin,),
            steps=(step,),
            interpolation=interpolation,
            keeps_nonfinite=True,
        )
        maps, origin, step = strongest(maps, width), 0.0, 1.0
    else:
        origin, step = (origin + 0.5) * width / length - 0.5, step * width / length
    tiles = blend.tiles(
        torch.ones(3, height, width, device="cpu"),
        maps[:, None],
        origins=(_EVENLY[0], origin),
        steps=(_EVENLY[1], step),
        interpolation=interpolation,
        upscale=1,
    )
    return torch.minimum(tiles, curves(signal, size))


def legend_of(signal: torch.Tensor, channels: Sequence[int]) -> str:
    """Return a line that says which curves these are, and how far they reach."""
    low, high = limits_of([signal])
    names = f"channel {channels[0]}"
    if len(channels) > 1:
        runs = list(channels) == list(range(channels[0], channels[-1] + 1))
        listed = f"{channels[0]} to {channels[-1]}" if runs else ", ".join(map(str, channels))
        names = f"channels {listed} from top to bottom"
    return f"curve: {names}, from {low:.3g} to {high:.3g}; gray line: zero"
