"""`Maximization`: the images that gradient ascent found, and how well each drives its channel."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Unpack, final, get_args

import numpy as np
import torch
from PIL import Image

from torchlens_viz.arguments import integer, pair, shown
from torchlens_viz.ascent.plan import Status, axes_letters
from torchlens_viz.draw.canvas import draw
from torchlens_viz.draw.rows import pictures_of, slices_note
from torchlens_viz.draw.style import Style, StyleOptions, lists_options
from torchlens_viz.errors import ArchiveError, InvalidArgumentError, one_line
from torchlens_viz.files.paths import as_path, write_whole
from torchlens_viz.files.pictures import save_animation, save_picture
from torchlens_viz.files.tensors import read_npz, require_tensors, require_values, write_npz
from torchlens_viz.models.colours import Bands, bands_note, checked_bands, in_bands
from torchlens_viz.notebook import Page, number, profile

_TENSORS: Final = ("channels", "images", "scores", "history", "means", "reference_means")
_SHAPES: Final = {
    "channels": (torch.int64, "K"),
    "scores": (torch.float32, "K"),
    "history": (torch.float32, "KT"),
    "means": (torch.float32, "KM"),
}
_TOLD: Final = {
    "layer": str, "objective": str, "status": list, "evidence": list, "limits": list, "is_complete": bool,
    "names_channels": bool,
}  # fmt: skip
_FILE: Final = "maximization.npz"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Maximization:
    """What `maximize` found: K images, one for each channel that was asked for, in that order.

    Attributes:
        layer: The layer's name.
        objective: What was maximised, as it is written.
        channels: (K,) int64, the channel of each image; every other field is aligned with it.
        images: (K, C, H, W) float32, before `preprocess`, in [0, 1] unless other limits were asked for;
            (K, C, L) of a network that takes signals, (K, C, D, H, W) of one that takes volumes.
        scores: (K,) float32, the objective in true float32 on the untransformed image.
        history: (K, steps) float32, the objective before each step, as the optimiser saw it (transformed, in
            the precision of the ascent); NaN after an image stopped.
        means: (K, C_layer) float32, the mean of every channel of the layer on each image.
        status: Why each ended: `"threshold"` was passed; all `"steps"` were made; `"stalled"`, there was a
            gradient and nothing gained over the last quarter of the steps, as where the best image is found;
            `"dead"`, no gradient from any start, with and after redirected ReLUs, under the transforms and
            without them; `"nonfinite"`, a score or gradient was NaN or infinite, and the image is the last
            one before that.
        evidence: What each status rests on, in words.
        limits: The smallest and largest value of a pixel as it is drawn: those of the parametrization, or
            where it has none those that occur.
        is_complete: Whether every image that was asked for is there; not so after Ctrl-C.
        names_channels: Whether the objective looks at the channel at all; else `channels` numbers the images.
        reference_means: (R, C_layer) float32, the means of every channel on the reference images; None
            without them.
        frames: For each image (F, C, ...) uint8, the image on its way, the last one included; or None.
    """

    layer: str
    objective: str
    channels: torch.Tensor
    images: torch.Tensor
    scores: torch.Tensor
    history: torch.Tensor
    means: torch.Tensor
    status: tuple[Status, ...]
    evidence: tuple[str, ...]
    limits: tuple[float, float] = (0.0, 1.0)
    is_complete: bool = True
    names_channels: bool = True
    reference_means: torch.Tensor | None = None
    frames: tuple[torch.Tensor, ...] | None = None

    @property
    def ranks(self) -> torch.Tensor:
        """(K,) int64: how many channels have a larger mean on the image than its own; 0 is first.

        -1 where the objective looks at no channel.
        """
        return self._ranks_in(self.means)

    @property
    def z_means(self) -> torch.Tensor:
        """(K, C_layer): `means` in standard deviations from what each channel has on the reference images.

        Channels that do not vary over those have 0 where the mean is the same, else an infinity.

        Raises:
            InvalidArgumentError: The method of `maximize` had no two `references`.
        """
        if self.reference_means is None or len(self.reference_means) < 2:
            raise InvalidArgumentError(
                "z-scores need two or more images to compare with: `method=Normalized(references=images)`"
            )
        usual = self.reference_means.double()
        distance = self.means.double() - usual.mean(0)
        return (distance / usual.std(0)).nan_to_num(0.0, torch.inf, -torch.inf).float()

    @property
    def z_ranks(self) -> torch.Tensor:
        """(K,) int64: `ranks` by `z_means`, so that channels that are always large do not count as driven."""
        return self._ranks_in(self.z_means)

    @lists_options
    def grid(self, *, bands: Bands = None, **options: Unpack[StyleOptions]) -> Image.Image:
        """Draw the images as one sheet, each with its channel and score as a title.

        Volumes are drawn as up to nine slices, from left to right and from top to bottom, and signals as
        curves over `limits`, one channel below the other. The title says what is left out.

        Args:
            bands: The channels to show as red, green and blue, or the one to show in gray; of signals, one or
                three. None is all channels of signals, and of images all of 3, else their mean in gray.
            options: What `torchlens_viz.kernel_grid` takes for drawing; `labels` are on by default.

        Returns:
            An image of mode "RGB".

        Raises:
            InvalidArgumentError: A band is out of range, or an option does not fit.
        """
        title = ", ".join([self.layer, *self._notes(bands)])
        own: dict[str, Any] = {"value_range": self.limits, "labels": True, "title": title, **options}
        tiles = self._pictures(self.images, bands)
        if tiles.shape[1] == 1:
            own = {"cmap": "gray", **own}
        style = Style.of(own)
        rows = zip(self.channels.tolist(), self.scores.tolist(), self.status, strict=True)
        labels = [
            f"{channel}: {score:.4g}" + (f" {status}" if status in ("dead", "nonfinite") else "")
            for channel, score, status in rows
        ]
        return draw(
            tiles.clamp(*self.limits), style, labels=labels, notes=[f"{self.objective} at {self.layer}"]
        )

    def save(self, directory: str | os.PathLike[str], *, bands: Bands = None) -> Path:
        """Write everything to a folder: a picture per channel, the sheet, a table, and what `load` reads.

        Args:
            directory: The folder; it is made where it is missing, and files of other names stay.
            bands: The channels that are shown, as in `grid`.

        Returns:
            The folder. In it are `CHANNEL.png` (a second image of the same channel is `CHANNEL-2.png`), which
            shows what `grid` shows of it, `grid.png`, `scores.csv` and, with all values, `maximization.npz`.

        Raises:
            InvalidArgumentError: A band is out of range.
            PictureError: The folder cannot be written.
        """
        folder = as_path(directory, "directory")
        grid = self.grid(bands=bands)
        for image, name in zip(self.images, self._names(), strict=True):
            save_picture(self._picture(image, bands), folder / f"{name}.png")
        save_picture(grid, folder / "grid.png")
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("channel", "score", "rank", "status", "evidence"))
        columns = (
            self.channels.tolist(),
            self.scores.tolist(),
            self.ranks.tolist(),
            self.status,
            self.evidence,
        )
        writer.writerows(zip(*columns, strict=True))
        write_whole(folder / "scores.csv", table.getvalue().encode(), ArchiveError)
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _TENSORS}
        told.pop("frames")
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        tensors.update((f"frames{place}", frames) for place, frames in enumerate(self.frames or ()))
        write_npz(folder / _FILE, tensors, told)
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Maximization:
        """Read what `save` wrote.

        Raises:
            ArchiveError: The folder holds no such file, or a damaged one.
        """
        path = as_path(directory, "directory") / _FILE
        remedy = "give a folder that `Maximization.save` wrote"
        tensors, told = read_npz(path, remedy=remedy)
        try:
            filmed = range(len(tensors["channels"]) if "frames0" in tensors else 0)
            frames = tuple(tensors.pop(f"frames{place}") for place in filmed)
            parts: dict[str, Any] = {**require_values(told, _TOLD), **tensors}
            for name in ("status", "evidence"):
                parts[name] = tuple(parts[name])
            parts["limits"] = pair(told["limits"], "limits")
            found = cls(**parts, frames=frames or None)
            found._check()
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveError(
                f"cannot read {str(path)!r}: its header is damaged ({one_line(error)}); {remedy}"
            ) from error

    def _check(self) -> None:
        """Refuse what no ascent makes, and no reader could draw.

        Raises:
            ValueError: A field is of another type or shape, or has values that it cannot have.
        """
        optional = {} if self.reference_means is None else {"reference_means": (torch.float32, "RM")}
        axes = min(max(getattr(self.images, "ndim", 4) - 2, 1), 3)
        image = "C" + axes_letters(axes)
        images = {"images": (torch.float32, f"K{image}")}
        sizes = require_tensors(vars(self), {**_SHAPES, **images, **optional})
        count = sizes["K"]
        if not all(sizes[letter] for letter in f"K{image}") or not bool(self.images.isfinite().all()):
            raise ValueError("`images` must be one or more, of finite values")
        beyond = sizes["M"] if self.names_channels else 2**31
        if not bool(((self.channels >= 0) & (self.channels < beyond)).all()):
            raise ValueError(f"`channels` must be from 0 to {beyond - 1}")
        if len(self.status) != count or not set(self.status) <= set(get_args(Status)):
            raise ValueError(f"`status` must be {count} of {', '.join(get_args(Status))}")
        if len(self.evidence) != count or not all(isinstance(each, str) for each in self.evidence):
            raise ValueError(f"`evidence` must be {count} strings")
        greatest = torch.finfo(torch.float32).max
        if not -greatest < self.limits[0] < self.limits[1] < greatest:
            raise ValueError("`limits` must be (low, high) with low < high, in float32")
        for frames in self.frames or ():
            require_tensors(
                {"frames": frames}, {"frames": (torch.uint8, f"F{image}")}, {n: sizes[n] for n in image}
            )

    def save_animation(self, path: str | os.PathLike[str], place: int = 0, *, fps: float = 10.0) -> Path:
        """Write the ascent of one image as a moving picture, .webp or .gif.

        Args:
            path: The file.
            place: Which of the K images.
            fps: Frames per second.

        Raises:
            InvalidArgumentError: `maximize` was not asked for `frames`, or there is no such image.
            PictureError: The file cannot be written.
        """
        if self.frames is None:
            raise InvalidArgumentError(
                "there are no frames; give `maximize` the option `method=Normalized(frames=1)`, or every n "
                "steps"
            )
        if not -len(self.frames) <= integer(place, "place") < len(self.frames):
            raise InvalidArgumentError(f"`place` must be below {len(self.frames)}, got {shown(place)}")
        low, high = self.limits
        frames = [low + frame * ((high - low) / 255) for frame in self.frames[place]]
        return save_animation([self._picture(frame) for frame in frames], path, fps=fps)

    def __repr__(self) -> str:
        rows = zip(
            self.channels.tolist(), self.scores.tolist(), self.ranks.tolist(), self.status, strict=True
        )
        lines = [
            f"  {channel:>6}  {score:>12.5g}  {rank:>5}  {status}" for channel, score, rank, status in rows
        ]
        more = [f"  ... {len(lines) - 20} more"] if len(lines) > 20 else []
        head = f"Maximization of {self.objective} at {self.layer}, images {tuple(self.images.shape)}"
        return "\n".join([head, f"  {'channel':>6} {'score':>12}  {'rank':>5}  status", *lines[:20], *more])

    def _repr_html_(self) -> str:
        page = Page(f"Maximization of {self.objective} at {self.layer}")
        side = 96 if len(self.channels) <= 16 else 48

        def cells() -> Iterator[Sequence[str]]:
            rows = zip(
                self.channels.tolist(), self.scores.tolist(), self.ranks.tolist(), self.status, strict=True
            )
            for place, (channel, score, rank, status) in enumerate(rows):
                drawn = page.picture(self._picture(self.images[place]), f"channel {channel}", side=side)
                history = [value for value in self.history[place].tolist() if not math.isnan(value)]
                curve = profile(history, f"scores of channel {channel} on the way")
                yield drawn, number(channel), number(score), number(rank), status, curve

        heads = ("image", "channel", "score", "rank, 0 is first", "ended by", "score on the way")
        page.table(heads, cells(), len(self.channels))
        return str(page)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, "PNG")
        return buffer.getvalue()

    def _ranks_in(self, means: torch.Tensor) -> torch.Tensor:
        if not self.names_channels:
            return torch.full_like(self.channels, -1)
        own = means.gather(1, self.channels[:, None])
        return (means > own).sum(1)

    def _names(self) -> list[str]:
        seen: dict[int, int] = {}
        names = []
        for channel in self.channels.tolist():
            seen[channel] = seen.get(channel, 0) + 1
            names.append(str(channel) if seen[channel] == 1 else f"{channel}-{seen[channel]}")
        return names

    def _picture(self, image: torch.Tensor, bands: Bands = None) -> Image.Image:
        low, high = self.limits
        plane = self._pictures(image[None], bands)[0]
        pixels = ((plane - low) * (255 / (high - low))).clamp(0, 255).round().to(torch.uint8)
        if len(pixels) == 3:
            return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        return Image.fromarray(pixels[0].numpy())

    def _pictures(self, images: torch.Tensor, bands: Bands) -> torch.Tensor:
        """Return what is shown of images: pictures (N, 3, H, W), or (N, 1, H, W) in gray."""
        if images.ndim == 3:
            chosen = checked_bands(bands, images.shape[1])
            return pictures_of(images if chosen is None else images[:, chosen], self.limits)
        return pictures_of(in_bands(images, bands), self.limits)

    def _notes(self, bands: Bands) -> list[str]:
        """Say what is shown, where that is not all."""
        if self.images.ndim == 3 and bands is None:
            return []
        return [*bands_note(self.images.shape[1], bands), *slices_note(self.images.shape)]
