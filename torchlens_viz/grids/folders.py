"""Folders of pictures: every kernel and every feature map of the chosen layers, each in a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import indices_of, maps_of
from torchlens_viz.draw.canvas import check_size, check_size_of_each, draw_each
from torchlens_viz.draw.palette import Colormap, Table
from torchlens_viz.draw.scale import finite_range
from torchlens_viz.draw.style import Interpolation, Style, StyleOptions, as_matrix, in_rows, own_labels
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.paths import safe_names
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.grids.kernels import kernel_grid
from torchlens_viz.hooks.activations import Activations
from torchlens_viz.models.kernels import convolutions, kernels_of
from torchlens_viz.models.layers import Selector, select
from torchlens_viz.progress import tracked

# How to draw a picture, and where it goes. Drawn late, so that a folder of any size takes little memory.
_Job: TypeAlias = tuple[Callable[[], Image.Image], Path]


class FeatureMapOptions(TypedDict, total=False):
    """The options of `save_feature_maps`: those of a sheet that concern a single map."""

    normalize: bool
    scale_each: bool
    value_range: Sequence[float] | None
    cmap: str | Table | Colormap
    upscale: int | None
    interpolation: Interpolation


def save_kernel_sheets(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layers: Selector | None = None,
    *,
    filters: int | Sequence[int] | None = None,
    channels: int | Sequence[int] | None = None,
    progress: bool = False,
    **options: Unpack[StyleOptions],
) -> list[Path]:
    """Draw the kernels of every chosen layer, one sheet per input channel: `DIR/<layer>/<channel>.png`.

    A layer's sheets share one range of values, so that they can be compared. Kernels of a single pixel go
    into one picture, `DIR/<layer>/matrix.png`, with a row per filter and a column per input channel. Files
    are written by several threads; files that are in the folder already stay, unless they have the name of
    one that is written.

    Args:
        model: The network.
        directory: The folder; it is made where it is missing.
        layers: Which layers; None is every convolution.
        filters: Show only these filters, by index from 0.
        channels: Write the sheets of these input channels only, by index from 0.
        progress: Show a bar on stderr (needs tqdm).
        options: As in `kernel_grid`. With `max_tiles`, further filters go to `<channel>-page2.png` and so on.

    Returns:
        The files in the order of layers, channels and pages.

    Raises:
        LayerNotFoundError: The model has no such layer, or no convolution.
        InvalidArgumentError: A layer has no kernels, an option does not fit, or a sheet would be too large;
            then nothing is written.
        InvalidTypeError: The kernels of a layer are no dense real numbers; then nothing is written.
        PictureError: A file cannot be written. Files written before it stay.
    """
    style = Style(**options)
    if "page" in options:
        raise InvalidArgumentError("`page` has no effect where every page is saved; leave it out")
    found = convolutions(model) if layers is None else select(model, layers)
    folders = safe_names([name or "model" for name, _ in found])
    jobs = [
        (draw, Path(directory) / folder / f"{name}.png")
        for (_, module), folder in zip(found, folders, strict=True)
        for draw, name in _kernel_sheets(kernels_of(model, module).weight, filters, channels, style, options)
    ]
    return _save_all(jobs, progress)


def save_feature_maps(
    acts: Activations,
    directory: str | os.PathLike[str],
    *,
    sample: int = 0,
    channels: int | Sequence[int] | None = None,
    grid: tuple[int, int] | None = None,
    progress: bool = False,
    **options: Unpack[FeatureMapOptions],
) -> list[Path]:
    """Draw every feature map of every recorded layer into a file of its own: `DIR/<layer>/<channel>.png`.

    A layer's maps share one range of values unless `scale_each` is given. Files are written by several
    threads; files that are in the folder already stay, unless they have the name of one that is written.

    Args:
        acts: What `capture` recorded: maps (N, C, H, W) or (C, H, W) of each layer; with `grid`, maps
            (N, C, H, W) or the tokens (N, L, C) of a transformer. A layer that ran several times gets a
            folder per call, `<layer>-call0` and so on.
        directory: The folder; it is made where it is missing.
        sample: Which input of the batch, by index from 0.
        channels: Only these channels, by index from 0.
        grid: Rows and columns in which the last rows * columns tokens lie, as in `feature_grid`. Layers that
            put out maps (N, C, H, W) are drawn as they are.
        progress: Show a bar on stderr (needs tqdm).
        options: `normalize`, `scale_each`, `value_range`, `cmap`, `upscale` and `interpolation` as in
            `feature_grid`.

    Returns:
        The files in the order of layers and channels.

    Raises:
        InvalidArgumentError: A layer put out something else than maps, an option does not fit, or a picture
            would be too large; then nothing is written.
        InvalidTypeError: A layer put out no dense real numbers; then nothing is written.
        PictureError: A file cannot be written. Files written before it stay.
    """
    style = Style(**options)
    recorded = [
        (name if len(acts.calls(name)) == 1 else f"{name}-call{index}", value)
        for name in acts
        for index, value in enumerate(acts.calls(name))
    ]
    if not recorded:
        raise InvalidArgumentError("`acts` must hold activations; run the model inside the `capture` block")
    if grid is not None and not any(_are_tokens(value) for _, value in recorded):
        raise InvalidArgumentError(
            "`grid` has no effect where no layer put out tokens (N, L, C); leave it out, or select others"
        )
    layers = []
    folders = safe_names([name or "model" for name, _ in recorded])
    for (name, value), folder in zip(recorded, folders, strict=True):
        if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4):
            wanted = "maps (N, C, H, W)" + ("" if grid is None else " and no tokens (N, L, C)")
            raise InvalidArgumentError(f"`{name}` put out no {wanted}; select other layers")
        what = f"`{name}`" if name else "the model's output"
        maps = maps_of(value, sample, grid=grid if _are_tokens(value) else None, what=what)
        check_size_of_each(maps[:, None].shape, style)
        layers.append((maps, indices_of(channels, len(maps), "channels"), folder))
    jobs: list[_Job] = []
    for maps, chosen, folder in layers:
        own = replace(style, value_range=_range_of(maps)) if _shares_range(style) else style
        pictures = _Shared(maps[chosen], own)
        jobs += [
            (pictures.taker(place), Path(directory) / folder / f"{index}.png")
            for place, index in enumerate(chosen)
        ]
    return _save_all(jobs, progress)


class _Shared:
    """The pictures of one layer, drawn together when the first of them is needed and let go one by one."""

    def __init__(self, maps: torch.Tensor, style: Style) -> None:
        self._maps: torch.Tensor | None = maps
        self._style = style
        self._pictures: dict[int, Image.Image] = {}

    def taker(self, place: int) -> Callable[[], Image.Image]:
        return lambda: self._take(place)

    def _take(self, place: int) -> Image.Image:
        if self._maps is not None:
            self._pictures = dict(enumerate(draw_each(self._maps[:, None], self._style)))
            self._maps = None
        return self._pictures.pop(place)


def _are_tokens(value: object) -> bool:
    """Tell whether `grid` concerns an output: (L, C) could as well be the (N, C) of a classifier."""
    return isinstance(value, torch.Tensor) and value.ndim == 3


def _kernel_sheets(
    weight: torch.Tensor,
    filters: int | Sequence[int] | None,
    channels: int | Sequence[int] | None,
    style: Style,
    options: StyleOptions,
) -> Iterator[tuple[Callable[[], Image.Image], str]]:
    """Yield how to draw each sheet of a layer, and its name."""
    planes = indices_of(channels, weight.shape[1], "channels")
    rows = indices_of(filters, len(weight), "filters")
    shared: dict[str, Any] = {**options, "filters": rows}
    if _shares_range(style):
        shared["value_range"] = _range_of(weight)
    if weight.shape[2:].numel() == 1:  # one picture holds all channels, and has no tiles
        for option in ("labels", "nrow", "max_tiles"):
            shared.pop(option, None)
        tiles = (1, 1, len(rows), len(planes))
        check_size(tiles, as_matrix(replace(style, labels=False, nrow=None, max_tiles=None), *tiles[2:]))
        yield partial(kernel_grid, weight, **{**shared, "channels": planes}), "matrix"
        return
    slices = weight.shape[2] if weight.ndim == 5 else 1
    if slices > 1:
        shared.pop("nrow", None)  # each filter has a row
        style = replace(style, nrow=None)
    style = in_rows(style, slices)
    count = len(rows) * slices
    own_labels(style, count)
    check_size((count, 1, *weight.shape[-2:]), style)
    pages = ceil(count / (style.max_tiles or count))
    for plane in planes:
        for page in range(pages):
            own = {**shared, "channels": plane, "page": page}
            yield partial(kernel_grid, weight, **own), f"{plane}-page{page + 1}" if page else str(plane)


def _shares_range(style: Style) -> bool:
    return style.normalize and not style.scale_each and style.value_range is None


def _range_of(values: torch.Tensor) -> tuple[float, float]:
    has_order = values.is_floating_point() and values.dtype.itemsize > 1  # torch compares no float8
    low, high, _ = finite_range((values if has_order else values.double()).reshape(1, -1))
    return low.item(), high.item()


def _save_all(jobs: Sequence[_Job], progress: bool) -> list[Path]:
    """Draw in this thread and write in others, a bounded number of pictures ahead."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        under_way: list[Future[Path]] = []
        for draw, path in tracked(jobs, shown=progress, total=len(jobs), unit="file"):
            if len(under_way) >= 64:
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                _raise_first(future for future in under_way if future in done)
                under_way = [future for future in under_way if future not in done]
            under_way.append(pool.submit(save_picture, draw(), path))
        _raise_first(under_way)
    return [path for _, path in jobs]


def _raise_first(done: Iterable[Future[Path]]) -> None:
    for future in done:
        future.result()
