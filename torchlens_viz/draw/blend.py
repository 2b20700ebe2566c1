"""Blending: maps over an image, each value where its position stands, the more visible the stronger it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Final

import numpy as np
import torch

from torchlens_viz.arguments import number
from torchlens_viz.draw.palette import LEVELS, Colormap, Table, colormap
from torchlens_viz.draw.planes import Slicing
from torchlens_viz.draw.scale import (
    Limits,
    ValueRange,
    find_limits,
    is_robust,
    share_beyond,
    special_codes,
    to_levels,
    words_for,
)
from torchlens_viz.draw.style import Interpolation

_AT_ONCE: Final = 2**21  # pixels that are worked on together
_DENSE: Final = 2**22  # weights of positions for pixels, of which nearly all are zero
_ZERO: Final = LEVELS // 2
_PALEST: Final = 0.4  # of the way from white to the end of a diverging map


@dataclass(frozen=True, slots=True)
class Blend:
    """Colours and visibility of values, decided for some maps together."""

    limits: Limits
    colours: Colormap
    alpha: float
    clipped: list[str]

    @classmethod
    def of(
        cls,
        maps: torch.Tensor,
        *,
        alpha: float,
        cmap: str | Table | Colormap,
        scale_each: bool,
        value_range: ValueRange | None,
    ) -> Blend:
        """Decide for maps (K, h, w).

        Args:
            maps: The values, (K, h, w).
            alpha: How much of the image the strongest value hides, from 0 to 1; weaker ones hide less, and
                zero nothing.
            cmap: A colour map as in `kernel_grid`. `"auto"` is `"RdBu_r"` if there are negative values, else
                `"hot"` from 0 on.
            scale_each: Give each map its own range.
            value_range: The range (low, high) to show, or `"robust"`.

        Raises:
            InvalidArgumentError: An option has a value that it cannot have.
            InvalidTypeError: An option has another type.
        """
        alpha = number(alpha, "alpha", least=0, most=1)
        tiles = maps.float()[:, None]
        limits = find_limits(tiles, normalize=True, scale_each=scale_each, value_range=value_range)
        signed = bool(limits.low.min() < 0)
        colours = colormap(
            ("RdBu_r" if signed else "hot") if isinstance(cmap, str) and cmap == "auto" else cmap
        )
        if colours.diverging:
            limits = limits.symmetric()
        elif not signed and (value_range is None or is_robust(value_range)):
            limits = Limits(np.zeros_like(limits.low), limits.high, limits.all_finite)
        beyond = None if value_range is None else share_beyond(tiles, limits)
        return cls(limits, colours, float(alpha), words_for(beyond, robust=is_robust(value_range)))

    def tiles(
        self,
        image: torch.Tensor,
        maps: torch.Tensor,
        *,
        origins: Sequence[float],
        steps: Sequence[float],
        interpolation: Interpolation,
        upscale: int,
    ) -> torch.Tensor:
        """Lay each map over the image.

        Between positions values are interpolated; beyond the outermost ones they stay as they are there.

        Args:
            image: (3, H, W) floating point in [0, 1]; or one for each map, (K, 3, H, W).
            maps: (K, h, w).
            origins: The pixel (row, column) that the first position stands over; 0.0 is the middle of the
                first pixel. Where it is not finite, the positions are spread evenly.
            steps: Pixels from one position to the next, per axis; likewise where it is not positive.
            interpolation: `"bicubic"` or `"bilinear"` between positions, or the value of the `"nearest"` one.
            upscale: Enlarge the image by this whole factor.

        Returns:
            (K, 3, upscale * H, upscale * W) uint8 on the CPU.
        """
        maps = maps.detach().cpu().float()
        counts = maps.shape[1:]
        places = _places_of(image.shape[-2:], counts, origins, steps, upscale)
        weights = [_weights(at, count, interpolation) for at, count in zip(places, counts, strict=True)]
        nearest = [_nearest(at, count) for at, count in zip(places, counts, strict=True)]
        images = (image if image.ndim == 4 else image[None]).detach().cpu()
        drawn: list[torch.Tensor] = []
        for first, part, limits in self._parts(maps, images[0, 0].numel() * upscale**2):
            under = 255 * (images[first : first + len(part)] if len(images) > 1 else images).float()
            under = under.repeat_interleave(upscale, 2).repeat_interleave(upscale, 3)
            values = _smooth(part, weights)
            over, strength = self._coloured(values[:, None], limits)
            if not limits.all_finite:
                codes = special_codes(part[:, None])[:, 0][:, nearest[0]][:, :, nearest[1]].long()
                palette = torch.from_numpy(self.colours.palette).float()
                is_special = codes != 0
                over[is_special] = palette[codes[is_special]]
                strength[is_special] = 1.0
            strength = strength[:, None]
            blended = under + strength * (over.movedim(3, 1) - under)
            drawn.append(blended.add_(0.5).clamp_(0, 255).to(torch.uint8))
        return torch.cat(drawn)

    def legend(self) -> list[str]:
        """Return lines that say what the colours mean."""
        lines = []
        if len(self.limits.low) > 1:
            lines.append("each map has its own range")
        else:
            low, high = self.limits.low.item(), self.limits.high.item()
            clear = 0.0 if self.colours.diverging else low
            names = {"RdBu_r": ("blue", "red"), "seismic": ("blue", "red")}.get(self.colours.name)
            if names:
                lines.append(f"{names[0]}: {low:.3g}, clear: {clear:.3g}, {names[1]}: {high:.3g}")
            else:
                lines.append(f"{self.colours.name}: from {clear:.3g}, clear, to {high:.3g}")
        lines += self.clipped
        if not self.limits.all_finite:
            lines.append("magenta: NaN, green: +Inf, cyan: -Inf")
        return lines

    def _parts(self, maps: torch.Tensor, pixels: int) -> Iterator[tuple[int, torch.Tensor, Limits]]:
        each = max(1, _AT_ONCE // pixels)
        for first in range(0, len(maps), each):
            limits = self.limits
            if len(limits.low) > 1:
                low, high = (value[first : first + each] for value in (limits.low, limits.high))
                limits = Limits(low, high, limits.all_finite)
            yield first, maps[first : first + each], limits

    def _coloured(self, values: torch.Tensor, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
        """Return colours (K, H, W, 3) and how much they hide, (K, H, W)."""
        limits = replace(limits, all_finite=True)  # what is not has a colour of its own
        levels = to_levels(values, limits, levels=LEVELS, signed=self.colours.diverging)[:, 0].long()
        if self.colours.diverging:
            strength = (levels - _ZERO).abs() / _ZERO
            # What is clear need not be white as well: weak colours would only bleach the image.
            offset = (levels - _ZERO) * (1 - _PALEST) + (levels - _ZERO).sign() * _PALEST * _ZERO
            levels = _ZERO + offset.long()
        else:
            # Not in proportion: these colours darken towards zero too, and medium values would hardly show.
            strength = (levels / (LEVELS - 1)).sqrt()
        return torch.from_numpy(self.colours.levels.copy()).float()[levels], strength * self.alpha


def placed(
    maps: torch.Tensor,
    size: Sequence[int],
    *,
    origins: Sequence[float],
    steps: Sequence[float],
    interpolation: Interpolation,
    keeps_nonfinite: bool = False,
) -> torch.Tensor:
    """Return maps in the pixels of an image, each value where its position stands.

    Args:
        maps: (K, ...) of one to three axes.
        size: Of the image, along every axis.
        origins: As in `Blend.tiles`.
        steps: As in `Blend.tiles`.
        interpolation: As in `Blend.tiles`.
        keeps_nonfinite: Leave what is not finite at the nearest position as it is.

    Returns:
        (K, *size) float32 on the CPU; no value is beyond those of its map, and those that are not finite
        count as zero.
    """
    maps = maps.detach().cpu().float()
    places = _places_of(size, maps.shape[1:], origins, steps, 1)
    weights = [_weights(at, count, interpolation) for at, count in zip(places, maps.shape[1:], strict=True)]
    smooth = _smooth(maps, weights)
    if keeps_nonfinite:
        for axis, at in enumerate(places, 1):
            maps = maps.index_select(axis, _nearest(at, maps.shape[axis]))
        smooth = torch.where(maps.isfinite(), smooth, maps)
    return smooth


def placed_across(
    maps: torch.Tensor,
    slicing: Slicing,
    *,
    origin: float,
    step: float,
    interpolation: Interpolation,
) -> torch.Tensor:
    """Return what maps of volumes have at slices of the volume; within a slice, positions stay as they are.

    Args:
        maps: (K, d, h, w).
        slicing: Which slices of the volume; the maximum is that over all of them.
        origin: The slice that the first position across stands over, as in `Blend.tiles`.
        step: Slices from one position to the next.
        interpolation: As in `Blend.tiles`.

    Returns:
        (K, P, ...) float32 on the CPU. What is not finite at the nearest position stays so.
    """
    values = maps.detach().cpu().float().movedim(slicing.axis + 1, 1)
    places = _places(slicing.count, values.shape[1], origin, step, 1)
    places = places[list(slicing.places)] if slicing.places else places
    smooth = _smooth(values.flatten(2), [_weights(places, values.shape[1], interpolation), None])
    smooth = smooth.unflatten(2, values.shape[2:])  # type: ignore[no-untyped-call]
    nearest = values[:, _nearest(places, values.shape[1])]
    smooth = torch.where(nearest.isfinite(), smooth, nearest)
    return smooth if slicing.places else smooth.amax(1, keepdim=True)


def _places_of(
    size: Sequence[int], counts: Sequence[int], origins: Sequence[float], steps: Sequence[float], upscale: int
) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    return [_places(*axis, upscale) for axis in zip(size, counts, origins, steps, strict=True)]


def _places(
    size: int, count: int, origin: float, step: float, upscale: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the position of the map, as a fraction, that each output pixel lies over."""
    pixels = (np.arange(size * upscale) + 0.5) / upscale - 0.5
    if step == 0 or not isfinite(origin):
        origin, step = (size / count - 1) / 2, size / count
    return (pixels - origin) / step


def _nearest(places: np.ndarray[tuple[int], np.dtype[np.float64]], count: int) -> torch.Tensor:
    return torch.from_numpy(np.floor(places + 0.5).clip(0, count - 1).astype(np.int64))


def _weights(
    places: np.ndarray[tuple[int], np.dtype[np.float64]], count: int, mode: Interpolation
) -> torch.Tensor:
    """Return how much each position counts for each output pixel, (pixels, positions); rows sum to 1.

    It is sparse where it would be large, as for signals, and slower then.
    """
    if mode == "nearest":
        taps, parts = [np.floor(places + 0.5)], [np.ones_like(places)]
    else:
        first = np.floor(places)
        t = places - first
        if mode == "bilinear":
            taps, parts = [first, first + 1], [1 - t, t]
        else:  # Catmull and Rom's cubic
            taps = [first - 1, first, first + 1, first + 2]
            parts = [
                t * (-0.5 + t * (1 - 0.5 * t)),
                1 + t * t * (1.5 * t - 2.5),
                t * (0.5 + t * (2 - 1.5 * t)),
                t * t * (0.5 * t - 0.5),
            ]
    rows = np.tile(np.arange(len(places)), len(taps))
    columns = np.concatenate(taps).clip(0, count - 1).astype(np.int64)
    shares = torch.from_numpy(np.concatenate(parts)).float()
    places_in_it = torch.from_numpy(np.stack([rows, columns]))
    size = (len(places), count)
    weights = torch.sparse_coo_tensor(
        places_in_it, shares, size, device="cpu", check_invariants=False
    ).coalesce()
    return weights if len(places) * count > _DENSE else weights.to_dense()


def _smooth(maps: torch.Tensor, weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return the maps interpolated along each axis with weights, and no further than their own values go."""
    smooth = torch.where(maps.isfinite(), maps, 0.0)
    column = (-1, *[1] * len(weights))
    low, high = smooth.flatten(1).amin(1).view(column), smooth.flatten(1).amax(1).view(column)
    for axis, each in enumerate(weights, 1):
        if each is not None:
            first = smooth.movedim(axis, 0)
            found = each @ first.flatten(1)
            smooth = found.unflatten(1, first.shape[1:]).movedim(0, axis)  # type: ignore[no-untyped-call]
    return smooth.clamp(low, high)
