"""`Explanation`: where in images the evidence for an output lies."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from PIL import Image

from torchlens_viz.arguments import flag, integer
from torchlens_viz.attribution.trust import Trust, shares, verdict
from torchlens_viz.draw.blend import Blend
from torchlens_viz.draw.canvas import check_size, draw_chosen, in_colour
from torchlens_viz.draw.curves import curves, over_curves, size_of
from torchlens_viz.draw.palette import Colormap, Table
from torchlens_viz.draw.planes import Plane, Slices, Slicing
from torchlens_viz.draw.rows import limits_of
from torchlens_viz.draw.style import Style, choose
from torchlens_viz.errors import ArchiveError
from torchlens_viz.files.paths import as_path, write_whole
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.files.tensors import write_npz
from torchlens_viz.notebook import Page, number

_TILE_SIZE: Final = 128
_ALPHA: Final = 0.6
_SHOWN: Final = 160  # the longer side of a picture in a notebook's table
_DRAWN_SHARE: Final = 0.995  # of the pixels, where each has a value of its own
_FILE: Final = "explanation.npz"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """What `explain` found: N images, and for each where the evidence lies.

    Attributes:
        method: How it was found.
        layers: The names of the layers whose maps it was made of; none for methods at the pixels.
        heatmaps: (N, H, W) float32 on the CPU, or (N, L) of signals and (N, D, H, W) of volumes and clips, in
            the pixels of the images as the model takes them, and not rescaled: the larger, the more a pixel
            speaks for the target. None is negative but with `"integrated_gradients"`, where negative values
            speak against it. Of several layers, each is divided by its largest value, and the maximum is
            taken.
        targets: (N,) int64, the output that was explained of each image; None where `target` was a function.
        scores: (N,) float32, its value.
        notes: What is to be said of it, in sentences.
    """

    method: str
    layers: tuple[str, ...]
    heatmaps: torch.Tensor
    targets: torch.Tensor | None
    scores: torch.Tensor
    notes: tuple[str, ...]
    _pixels: Callable[[], torch.Tensor] = field(repr=False)
    _measure: Callable[[], Trust] = field(repr=False)

    @cached_property
    def images(self) -> torch.Tensor:
        """The images as the model takes them, as a person sees them.

        (N, 3, H, W) or (N, 3, D, H, W) float32 in [0, 1]; of signals the curves that are drawn, (N, K, L).
        """
        return self._pixels()

    @cached_property
    def trust(self) -> Trust:
        """What the score keeps of the heatmap, loses without it, and how much random weights change it.

        It is computed when it is first read, with the weights that the model then has: four forward passes,
        and the explanation once more.
        """
        return self._measure()

    def overlay(
        self,
        index: int = 0,
        *,
        alpha: float = _ALPHA,
        cmap: str | Table | Colormap = "auto",
        upscale: int | None = None,
        plane: Plane | None = None,
        slices: Slices = None,
    ) -> Image.Image:
        """Draw one heatmap over its image; of a signal, behind its curve.

        Args:
            index: Which image, from 0.
            alpha: How much of the image the strongest value hides, from 0 to 1; weaker ones hide less.
            cmap: As in `torchlens_viz.kernel_grid`; `"auto"` is `"RdBu_r"` if there are negative values,
                else `"hot"` from 0 on; of signals always `"RdBu_r"`.
            upscale: Enlarge the image by this whole factor; None brings its longer side to at least 128
                pixels, and a signal to 512 to 2048 pixels.
            plane: Of a volume or clip, the axis across which slices lie, as in `torchlens_viz.feature_grid`.
            slices: Which slices, as there; of several a sheet is drawn. None is the one with the heatmap's
                value farthest from zero.

        Returns:
            An image of mode "RGB".

        Raises:
            InvalidArgumentError: There is no such image, or an option has a value that it cannot have.
        """
        place = integer(index, "index", least=0, most=len(self.heatmaps) - 1)
        style, slicing = Style(upscale=upscale), self._slicing(place, plane, slices)
        size = self._size(slicing, style)
        count = 1 if slicing is None else len(slicing.labels())
        check_size((count, 3, *size), Style(upscale=1))
        tiles = self._drawn(place, slicing, style, alpha=alpha, cmap=cmap)[:, 2]
        if count > 1:
            return draw_chosen(tiles, choose(Style(), count), Style(), labels=[""] * count, lines=[])
        return Image.fromarray(tiles[0].movedim(0, 2).contiguous().numpy())

    def grid(
        self,
        *,
        alpha: float = _ALPHA,
        cmap: str | Table | Colormap = "auto",
        upscale: int | None = None,
        labels: bool | Sequence[str] = True,
        names: Sequence[str] | None = None,
        legend: bool = True,
        title: str | None = None,
        plane: Plane | None = None,
        slices: Slices = None,
    ) -> Image.Image:
        """Draw a row for each image: the image, the heatmap, and the heatmap over the image.

        Of volumes and clips, each slice has a row. Of signals, the curve with the heatmap behind it stands
        above the heatmap as a curve. Each heatmap has a range of its own, whichever slices of it are shown.

        Args:
            alpha: As in `overlay`.
            cmap: As in `overlay`.
            upscale: As in `overlay`.
            labels: Write above the heatmaps what was explained, with its score; or these strings, one for
                each tile.
            names: What the model's outputs are called, by index.
            legend: Write the method, the layers, the notes, and `trust` where that was read, below.
            title: A line above the sheet.
            plane: As in `overlay`.
            slices: As in `overlay`.

        Returns:
            An image of mode "RGB".

        Raises:
            InvalidArgumentError: An option has a value that it cannot have, or the sheet would be too large.
        """
        legend = flag(legend, "legend")
        has_curves = self.heatmaps.ndim == 2
        columns = (2, 1) if has_curves else (0, 1, 2)
        style = Style(nrow=1 if has_curves else 3, upscale=upscale, labels=labels, title=title)
        slicings = [self._slicing(place, plane, slices) for place in range(len(self.heatmaps))]
        count = len(columns) * sum(1 if each is None else len(each.labels()) for each in slicings)
        check_size((count, 3, *self._size(slicings[0], style)), replace(style, upscale=1))
        tiles, words = [], []
        for place, slicing in enumerate(slicings):
            tiles.append(self._drawn(place, slicing, style, alpha=alpha, cmap=cmap)[:, columns].flatten(0, 1))
            what = "score" if self.targets is None else "output"
            score = f"{self.label(place, names)}: {what} {self.scores[place].item():.4g}"
            if has_curves:
                low, high = limits_of([self.heatmaps[place]])
                words += [score, f"{self.method}: {low:.3g} to {high:.3g}"]
            for suffix in [] if has_curves else [""] if slicing is None else slicing.labels():
                words += [f"image{suffix}", score, self.method]
        lines = self.legend() if legend else []
        if legend and slicings[0] is not None:
            lines.append(
                slicings[0].note() if count == 3 else f"after @: the slice, along {plane or 'depth'}"
            )
        return draw_chosen(torch.cat(tiles), choose(style, count), style, labels=words, lines=lines)

    def label(self, index: int, names: Sequence[str] | None = None) -> str:
        """Return what was explained of an image, in a word.

        Args:
            index: Which image, from 0.
            names: What the model's outputs are called, by index.
        """
        if self.targets is None:
            return "target"
        found = int(self.targets[index])
        return names[found] if names is not None and found < len(names) else f"target {found}"

    def legend(self) -> list[str]:
        """Return lines that say what a picture of it shows."""
        lines = [f"{self.method}{' at ' if self.layers else ''}{', '.join(self.layers)}", *self.notes]
        if not self.layers:
            lines.append(f"{1 - _DRAWN_SHARE:.1%} of the pixels are beyond the strongest colour")
        if "trust" in self.__dict__:
            for place in range(len(self.heatmaps)):
                trust, score = self.trust, self.scores[place].item()
                kept, lost, like, blurred = (
                    each[place].item()
                    for each in (trust.kept, trust.lost, trust.rank_correlation, trust.blurred)
                )
                which = f"{place}: " if len(self.heatmaps) > 1 else ""
                lines += [f"{which}{shares(kept, lost, score, blurred)}", f"{which}{verdict(like)}"]
        return lines

    def save(self, directory: str | os.PathLike[str], *, names: Sequence[str] | None = None) -> Path:
        """Write everything to a folder: an overlay per image, the sheet, a table and the numbers.

        Args:
            directory: The folder; it is made where it is missing, and files of other names stay.
            names: What the model's outputs are called, by index.

        Returns:
            The folder. In it are `INDEX.png`, `grid.png`, `scores.csv` (with `trust` where that was read) and
            `explanation.npz` with heatmaps, targets and scores, which numpy reads.

        Raises:
            PictureError: A picture cannot be written.
            ArchiveError: Another file cannot be written.
        """
        folder = as_path(directory, "directory")
        sheet = self.grid(names=names)
        for place in range(len(self.heatmaps)):
            save_picture(self.overlay(place), folder / f"{place}.png")
        save_picture(sheet, folder / "grid.png")
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        measured = "trust" in self.__dict__
        writer.writerow(
            ("image", "target", "score", *(("kept", "lost", "rank_correlation") if measured else ()))
        )
        columns = [self.trust.kept, self.trust.lost, self.trust.rank_correlation] if measured else []
        for place, score in enumerate(self.scores.tolist()):
            writer.writerow(
                (place, self.label(place, names), score, *(each[place].item() for each in columns))
            )
        write_whole(folder / "scores.csv", table.getvalue().encode(), ArchiveError)
        tensors = {"heatmaps": self.heatmaps, "scores": self.scores}
        if self.targets is not None:
            tensors["targets"] = self.targets
        header = {"method": self.method, "layers": self.layers, "notes": self.notes}
        write_npz(folder / _FILE, tensors, header)
        return folder

    def __repr__(self) -> str:
        lines = [
            f"  {self.label(place):>12}  {score:>12.5g}"
            for place, score in enumerate(self.scores.tolist()[:20])
        ]
        more = [f"  ... {len(self.scores) - 20} more"] if len(self.scores) > 20 else []
        where = f" at {', '.join(self.layers)}" if self.layers else ""
        head = f"Explanation by {self.method}{where}, heatmaps {tuple(self.heatmaps.shape)}"
        return "\n".join([head, f"  {'target':>12}  {'score':>12}", *lines, *more])

    def _repr_html_(self) -> str:
        page = Page(f"Explanation of {len(self.scores)} image{'' if len(self.scores) == 1 else 's'}")
        for line in self.legend():
            page.text(line)

        def cells() -> Iterator[Sequence[str]]:
            for place, score in enumerate(self.scores.tolist()):
                slicing = self._slicing(place, None, None)
                tiles = self._drawn(place, slicing, Style(), alpha=_ALPHA, cmap="auto")[0].movedim(1, 3)
                image, _, over = (Image.fromarray(tile.contiguous().numpy()) for tile in tiles)
                shown = page.picture(image, f"image {place}", side=_SHOWN)
                covered = page.picture(over, f"heatmap over image {place}", side=_SHOWN)
                yield shown, covered, self.label(place), number(score)

        page.table(("image", "evidence", "target", "score"), cells(), len(self.scores))
        return str(page)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()

    def _slicing(self, place: int, plane: Plane | None, slices: Slices) -> Slicing | None:
        """Return which slices of an image are shown."""
        heat = self.heatmaps[place]
        sizes = heat.shape
        if heat.ndim != 3 or slices is not None:
            return Slicing.of(sizes, plane, slices)
        axis = Slicing.of(sizes, plane, None)
        assert axis is not None
        hottest = int(heat.nan_to_num(0.0, 0.0, 0.0).abs().argmax())
        return Slicing.of(sizes, plane, int(np.unravel_index(hottest, sizes)[axis.axis]))

    def _size(self, slicing: Slicing | None, style: Style) -> tuple[int, int]:
        """Return height and width of a tile."""
        if self.heatmaps.ndim == 2:
            return size_of(self.images[0], style.upscale)
        sizes = self.heatmaps.shape[1:]
        height, width = sizes if slicing is None else slicing.within(sizes)
        factor = style.upscale or ceil(_TILE_SIZE / max(height, width))
        return factor * height, factor * width

    def _range(self, heat: torch.Tensor) -> tuple[float, float] | None:
        """Return the values to draw: at pixels, a few are so large that the others would not show."""
        if self.layers:
            return None
        sizes = heat[heat.isfinite()].abs().sort().values
        most = sizes[round(_DRAWN_SHARE * (len(sizes) - 1))].item() if len(sizes) else 0.0
        return (-most if bool((heat < 0).any()) else 0.0, most) if most > 0 else None

    def _drawn(
        self,
        place: int,
        slicing: Slicing | None,
        style: Style,
        *,
        alpha: float,
        cmap: str | Table | Colormap,
    ) -> torch.Tensor:
        """Return the image, the heatmap and both together of each slice, (P, 3, 3, H', W') uint8."""
        heat, image, size = self.heatmaps[place], self.images[place], self._size(slicing, style)
        if heat.ndim == 1 and isinstance(cmap, str) and cmap == "auto":
            cmap = "RdBu_r"  # the page is white
        whole = heat.reshape(1, -1, heat.shape[-1])
        blend = Blend.of(whole, alpha=alpha, cmap=cmap, scale_each=False, value_range=self._range(heat))
        if heat.ndim == 1:
            over = over_curves(
                image, heat[None], blend, origin=0.0, step=1.0, interpolation="bilinear", size=size
            )
            alone, plain = (curves(each, size).expand(1, 3, *size) for each in (heat[None], image))
            return torch.stack([plain, alone, over], 1)
        planes, images = heat[None], image[None]
        if slicing is not None:
            planes, images = slicing.take(heat), slicing.take(image).movedim(1, 0)
        factor = size[0] // planes.shape[1]
        over = blend.tiles(
            images, planes, origins=(0.0, 0.0), steps=(1.0, 1.0), interpolation="bilinear", upscale=factor
        )
        low, high = blend.limits.low.item(), blend.limits.high.item()
        limits = (low, high) if high > low else (low, low + 1.0)
        alone = in_colour(planes[:, None], Style(cmap=blend.colours, value_range=limits), upscale=factor)
        pixels = (255 * images).round().to(torch.uint8)
        pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return torch.stack([pixels, alone, over], 1)
