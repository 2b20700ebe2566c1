"""`Projection`: the patterns that made units fire, each beside the part of the image that it explains."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, final, get_args

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from torchlens_viz.arguments import a_name, flag, integer, one_of
from torchlens_viz.backprop.rules import Rule
from torchlens_viz.draw.canvas import check_size, draw_chosen
from torchlens_viz.draw.palette import SPECIAL_COLOURS
from torchlens_viz.draw.scale import special_codes
from torchlens_viz.draw.style import Choice, Style, choose
from torchlens_viz.errors import ArchiveError, one_line
from torchlens_viz.files.paths import as_path, write_whole
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.files.tensors import read_npz, write_npz
from torchlens_viz.models.colours import bands_note, checked_bands, mixed
from torchlens_viz.notebook import Page, number

Position: TypeAlias = Literal["max", "all"] | tuple[int, int]

_FILE: Final = "projection.npz"
_TENSORS: Final = ("channels", "images", "positions", "scores", "pixels", "colours")
_LARGEST: Final = 160  # the side to which patches are shrunk
_SMALLEST: Final = 64  # and the one to which they are enlarged, by whole factors
_GAP: Final = 2  # between a projection and its patch
_UNCLIPPED: Final = 0.995  # of all values; few pixels would else leave the rest of a projection faint
_RULES: Final[dict[str, str]] = {
    "deconvnet": "deconvnet: shows edges of the image even where the weights are random",
    "guided": "guided: shows edges of the image even where the weights are random",
    "gradient": "gradient: what a small change of each pixel adds to the unit",
}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """What `project` found: K projections, one for each channel, in that order.

    Attributes:
        layer: The layer's name.
        rule: What passed ReLUs on the way back: `"deconvnet"`, `"guided"` or `"gradient"`.
        position: From which unit of each map it began, as `project` was told: `"max"`, `"all"`, or row and
            column.
        channels: (K,) int64, the channel of each; every other field is aligned with it.
        images: (K, C, H, W) float32, the projections, in the terms of what the model takes: what a small
            change of each of its values adds to the unit, or of that what the rule keeps.
        positions: (K, 2) int64, row and column of each unit; -1 and -1 for the sum of a map.
        regions: Rows and columns of the image that each unit sees, as two slices: `image[..., *region]`.
        scores: (K,) float32, the value of each unit, or the sum of each map.
        pixels: (3, H, W) float32 in [0, 1], the image as a person sees it.
        colours: (C, 3) float32, how much of red, green and blue the preprocessing puts into each channel that
            the model takes; None where there is none, or that cannot be told.
        bands: The channels that are shown as red, green and blue, or the one in gray; None where all count.
    """

    layer: str
    rule: Rule
    position: Position
    channels: torch.Tensor
    images: torch.Tensor
    positions: torch.Tensor
    regions: tuple[tuple[slice, slice], ...]
    scores: torch.Tensor
    pixels: torch.Tensor
    colours: torch.Tensor | None = None
    bands: tuple[int, ...] | None = None

    def grid(
        self,
        *,
        scale_each: bool = True,
        nrow: int | None = None,
        padding: int = 6,
        upscale: int | None = None,
        labels: bool | Sequence[str] = True,
        legend: bool = True,
        title: str | None = None,
        max_tiles: int | None = None,
        page: int = 0,
    ) -> Image.Image:
        """Draw each projection beside the part of the image that it explains, cropped to what the unit sees.

        Zero is the middle gray, and what is stronger than 99.5 % of a projection as light or dark as can be.
        Of images with other than 1 or 3 channels, projections are drawn in gray, the mean of their channels,
        which a line below says, unless `project` was given `bands`. Parts at the border of the image are
        smaller, and stand in the middle of gray.

        Args:
            scale_each: Give each projection its own range; else the strongest one's is that of all.
            nrow: Projections per row; None is near-square.
            padding: Pixels between them.
            upscale: Enlarge by this whole factor; None brings the longer side of the largest part to at least
                64 pixels. What is larger than 160 is shrunk.
            labels: Write channel and score above each, or these strings.
            legend: Write below what is seen.
            title: A line above; None is the layer's name.
            max_tiles: Draw no more projections than this, and say below how many there are.
            page: With `max_tiles`, which of the pages, from 0.

        Returns:
            An image of mode "RGB". Pixels of a projection that are NaN are magenta, those that are infinite
            green and cyan.

        Raises:
            InvalidArgumentError: An option does not fit, or the sheet would be too large.
        """
        scale_each, legend = flag(scale_each, "scale_each"), flag(legend, "legend")
        style = Style(
            nrow=nrow, padding=padding, upscale=upscale, labels=labels, max_tiles=max_tiles, page=page,
            title=self.layer if title is None else title,
        )  # fmt: skip
        choice = choose(style, len(self.channels))
        lines = [
            _RULES[self.rule],
            f"left: projection (gray is 0), right: what the unit sees; {self._where()}",
        ]
        if bool((self.scores <= 0).any()):
            lines.append("where the score is not above 0 the unit did not fire: what would have made it")
        words = [
            f"{channel}: {score:.3g}"
            for channel, score in zip(self.channels.tolist(), self.scores.tolist(), strict=True)
        ]
        tiles = self._tiles(choice, style, scale_each=scale_each)
        lines = [*(lines if legend else []), *bands_note(self.images.shape[1], self.bands)]
        return draw_chosen(tiles, choice, style, labels=words, lines=lines)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write everything to a folder: a picture per channel, the sheet, a table, and what `load` reads.

        Args:
            directory: The folder; it is made where it is missing, and files of other names stay.

        Returns:
            The folder. In it are `CHANNEL.png`, the projection beside what it explains (a second one of the
            same channel is `CHANNEL-2.png`), `grid.png`, `scores.csv` and `projection.npz`.

        Raises:
            PictureError: The folder cannot be written.
        """
        folder = as_path(directory, "directory")
        grid = self.grid()
        style = Style()
        tiles = self._tiles(choose(style, len(self.channels)), style, scale_each=True)
        for tile, name in zip(tiles, self._names(), strict=True):
            pixels = np.ascontiguousarray(tile.permute(1, 2, 0).numpy())
            save_picture(Image.fromarray(pixels), folder / f"{name}.png")
        save_picture(grid, folder / "grid.png")
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("channel", "score", "row", "column", "top", "bottom", "left", "right"))
        for channel, score, place, (rows, columns) in zip(
            self.channels.tolist(), self.scores.tolist(), self.positions.tolist(), self.regions, strict=True
        ):
            box = (rows.start, rows.stop, columns.start, columns.stop)
            writer.writerow((channel, score, *place, *box))
        write_whole(folder / "scores.csv", table.getvalue().encode(), ArchiveError)
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _TENSORS}
        told["regions"] = [[[side.start, side.stop] for side in region] for region in self.regions]
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        write_npz(folder / _FILE, tensors, told)
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Projection:
        """Read what `save` wrote.

        Raises:
            ArchiveError: The folder holds no such file, or a damaged one.
        """
        path = as_path(directory, "directory") / _FILE
        remedy = "give a folder that `Projection.save` wrote"
        tensors, told = read_npz(path, remedy=remedy)
        try:
            place = told["position"]
            told["position"] = place if isinstance(place, str) else tuple(place)
            told["bands"] = None if told.get("bands") is None else tuple(told["bands"])
            told["regions"] = tuple((slice(*rows), slice(*columns)) for rows, columns in told["regions"])
            parts: dict[str, Any] = {**told, **tensors}
            found = cls(**parts)
            _check(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArchiveError(
                f"cannot read {str(path)!r}: its header is damaged ({one_line(error)}); {remedy}"
            ) from error
        return found

    def __repr__(self) -> str:
        rows = zip(self.channels.tolist(), self.scores.tolist(), self.positions.tolist(), strict=True)
        lines = [f"  {channel:>7}  {score:>12.5g}  {tuple(place)}" for channel, score, place in rows]
        more = [f"  ... {len(lines) - 20} more"] if len(lines) > 20 else []
        head = f"Projection of {self.layer} by {self.rule}, images {tuple(self.images.shape)}"
        return "\n".join([head, f"  {'channel':>7}  {'score':>12}  (row, column)", *lines[:20], *more])

    def _repr_html_(self) -> str:
        page = Page(f"Projection of {self.layer} by {self.rule}, {self._where()}")
        page.text(_RULES[self.rule])

        def cells() -> Iterator[Sequence[str]]:
            style = Style()
            for place, channel in enumerate(self.channels.tolist()):
                tile = self._tiles(Choice([place], 1, []), style, scale_each=True)[0]
                picture = Image.fromarray(np.ascontiguousarray(tile.permute(1, 2, 0).numpy()))
                row, column = self.positions[place].tolist()
                where = "all" if row < 0 else f"{row}, {column}"
                shown = page.picture(
                    picture, f"projection of channel {channel} beside what it sees", side=160
                )
                yield shown, number(channel), number(self.scores[place].item()), where

        heads = ("projection, and what the unit sees", "channel", "score", "row, column")
        page.table(heads, cells(), len(self.channels))
        return str(page)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()

    def _where(self) -> str:
        if isinstance(self.position, str):
            return {"max": "the highest unit of each map", "all": "the sum of each map"}[self.position]
        return f"the unit at {self.position}"

    def _tiles(self, choice: Choice, style: Style, *, scale_each: bool) -> torch.Tensor:
        """Return each chosen projection beside its patch, (K, 3, h, w) uint8."""
        sizes = [[max(1, side.stop - side.start) for side in region] for region in self.regions]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        shrink = max(1.0, max(height, width) / _LARGEST)
        side = ceil(height / shrink), ceil(width / shrink)
        factor = style.upscale or ceil(_SMALLEST / max(side))
        shape = (len(choice.places), 3, side[0] * factor, 2 * side[1] * factor + _GAP)
        check_size(shape, replace(style, upscale=1, max_tiles=None, page=0))
        shown = [
            mixed(self.images[place], self.colours, self.bands)[:, *self.regions[place]]
            for place in choice.places
        ]
        reaches = [_reach(values) for values in shown]
        tiles = torch.full(shape, 255, dtype=torch.uint8, device="cpu")
        for tile, place, values, own in zip(tiles, choice.places, shown, reaches, strict=True):
            reach = own if scale_each else max(reaches)
            tile[:, :, : side[1] * factor] = _fitted(0.5 + values / (2 * reach), side, shrink, factor)
            patch = self.pixels[:, *self.regions[place]]
            tile[:, :, side[1] * factor + _GAP :] = _fitted(patch, side, shrink, factor)
        return tiles

    def _names(self) -> list[str]:
        seen = Counter[int]()
        names = []
        for channel in self.channels.tolist():
            seen[channel] += 1
            names.append(str(channel) if seen[channel] == 1 else f"{channel}-{seen[channel]}")
        return names


def _check(found: Projection) -> None:
    """Refuse parts that no projection has, such as an edited file may hold.

    Raises:
        TypeError: A part is of another kind.
        ValueError: The parts do not belong together.
    """
    a_name(found.layer, "layer")
    one_of(found.rule, "rule", get_args(Rule))
    if isinstance(found.position, str):
        one_of(found.position, "position", ("max", "all"))
    else:
        row, column = found.position
        integer(row, "position", least=0)
        integer(column, "position", least=0)
    count, channels, height, width = found.images.shape
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "channels": (torch.int64, (count,)),
        "images": (torch.float32, (count, channels, height, width)),
        "positions": (torch.int64, (count, 2)),
        "scores": (torch.float32, (count,)),
        "pixels": (torch.float32, (3, height, width)),
        "colours": (torch.float32, (channels, 3)),
    }
    for name, (dtype, shape) in shapes.items():
        part = getattr(found, name)
        if part is None and name == "colours":
            continue
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(f"`{name}` must be {dtype} of shape {shape}")
    checked_bands(found.bands, channels)
    if len(found.regions) != count:
        raise ValueError("`regions` must be as many as images")
    for region in found.regions:
        for side, size in zip(region, (height, width), strict=True):
            start = integer(side.start, "regions", least=0, most=size)
            integer(side.stop, "regions", least=start, most=size)


def as_picture(values: torch.Tensor, colours: torch.Tensor | None) -> torch.Tensor:
    """Return a projection (C, h, w) as it is drawn, (3, h, w) in [0, 1]: zero is the middle gray.

    Args:
        values: The projection, cropped to what is shown of it.
        colours: As in `torchlens_viz.models.colours.mixed`.
    """
    shown = mixed(values, colours)
    return (0.5 + shown / (2 * _reach(shown))).clamp(0, 1)


def _reach(values: torch.Tensor) -> float:
    """Return how far from zero all values lie but the strongest few, which few pixels are; 1 for none."""
    sizes = values.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
    if not sizes.numel():
        return 1.0
    most = float(sizes.kthvalue(max(1, round(_UNCLIPPED * len(sizes)))).values)
    return most or float(sizes.amax()) or 1.0


def _fitted(values: torch.Tensor, side: tuple[int, int], shrink: float, factor: int) -> torch.Tensor:
    """Return values (3, h, w) in [0, 1], shrunk, amid gray of a size (rows, columns), enlarged, as uint8."""
    tile = torch.full((3, *side), 0.5, device="cpu")
    if values.numel():
        if shrink > 1:
            size = [max(1, round(extent / shrink)) for extent in values.shape[1:]]
            values = F.interpolate(values[None], size=size, mode="area")[0]
        rows, columns = values.shape[1:]
        top, left = (side[0] - rows) // 2, (side[1] - columns) // 2
        tile[:, top : top + rows, left : left + columns] = values
    codes = special_codes(tile[None])[0, 0]
    pixels = (tile.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    for code, colour in SPECIAL_COLOURS.items():
        pixels[:, codes == code] = torch.tensor(colour, dtype=torch.uint8, device="cpu")[:, None]
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
