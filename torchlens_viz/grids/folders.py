"""Folders of pictures: every kernel and every feature map of the chosen layers, each in a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypedDict, Unpack

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import indices_of, shown, wide
from torchlens_viz.draw.canvas import check_size_of_each, draw_each
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.draw.palette import Colormap, Table
from torchlens_viz.draw.planes import Plane, Slices, planes_of
from torchlens_viz.draw.scale import ValueRange, finite_range, is_robust, robust_range
from torchlens_viz.draw.style import Interpolation, Style, StyleOptions, lists_options
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.files.paths import as_path, safe_names
from torchlens_viz.files.pictures import save_picture
from torchlens_viz.grids.kernels import Sheet, is_matrix, kernel_sheet
from torchlens_viz.hooks.activations import Activations
from torchlens_viz.hooks.layout import drawn_dim
from torchlens_viz.models.kernels import convolutions, kernels_of
from torchlens_viz.models.layers import Selector, select
from torchlens_viz.progress import is_shown, tracked

# How to draw a picture, and where it goes. Drawn late, so that a folder of any size takes little memory.
_Job: TypeAlias = tuple[Callable[[], Image.Image], Path]


class FeatureMapOptions(TypedDict, total=False):
    """The options of `save_feature_maps`: those of a sheet that concern a single map."""

    normalize: bool
    scale_each: bool
    value_range: ValueRange | None
    cmap: str | Table | Colormap
    upscale: int | None
    interpolation: Interpolation


@lists_options
def save_kernel_sheets(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layers: Selector | None = None,
    *,
    filters: int | Sequence[int] | None = None,
    channels: int | Sequence[int] | None = None,
    progress: bool | None = None,
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
        progress: Show a bar on stderr; None does where tqdm is installed and somebody can see it.
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
    style = Style.of(options)
    if "page" in options:
        raise InvalidArgumentError("`page` has no effect where every page is saved; leave it out")
    has_bar, folder = is_shown(progress), as_path(directory, "directory")
    found = convolutions(model) if layers is None else select(model, layers)
    names = safe_names([name or "model" for name, _ in found])
    jobs = [
        (draw, folder / place / f"{name}.png")
        for (_, module), place in zip(found, names, strict=True)
        for draw, name in _kernel_sheets(kernels_of(model, module).weight, filters, channels, style)
    ]
    return _save_all(jobs, has_bar=has_bar)


def save_feature_maps(
    acts: Activations,
    directory: str | os.PathLike[str],
    *,
    sample: int = 0,
    channels: int | Sequence[int] | None = None,
    channel_dim: int | None = None,
    grid: tuple[int, int] | None = None,
    plane: Plane | None = None,
    slices: Slices = None,
    progress: bool | None = None,
    **options: Unpack[FeatureMapOptions],
) -> list[Path]:
    """Draw every feature map of every recorded layer into a file of its own: `DIR/<layer>/<channel>.png`.

    A layer's maps share one range of values unless `scale_each` is given. Files are written by several
    threads; files that are in the folder already stay, unless they have the name of one that is written.

    Args:
        acts: What `capture` recorded: maps (N, C, H, W), (C, H, W), (N, C, D, H, W) or (N, C, L) of each
            layer; with `grid`, maps or the tokens (N, L, C) of a transformer. A layer that ran several times
            gets a folder per call, `<layer>-call0` and so on.
        directory: The folder; it is made where it is missing.
        sample: Which input of the batch, by index from 0.
        channels: Only these channels, by index from 0.
        channel_dim: The dimension that counts channels in every layer; None as in `feature_grid`.
        grid: Rows and columns in which the last rows * columns tokens lie, as in `feature_grid`. Layers that
            put out maps (N, C, H, W) are drawn as they are.
        plane: As in `feature_grid`.
        slices: As in `feature_grid`; several slices are `<channel>@<slice>.png` each.
        progress: Show a bar on stderr; None does where tqdm is installed and somebody can see it.
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
    style = Style.of(options)
    has_bar, root = is_shown(progress), as_path(directory, "directory")
    if not isinstance(acts, Activations):
        raise InvalidTypeError(f"`acts` must be what `capture` recorded, got {shown(acts)}")
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
        if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4, 5):
            wanted = "maps (N, C, H, W)" + ("" if grid is None else " and no tokens (N, L, C)")
            raise InvalidArgumentError(f"`{name}` put out no {wanted}; select other layers")
        what = f"`{name}`" if name else "the model's output"
        lies = grid if _are_tokens(value) else None
        dim = drawn_dim(value, channel_dim, is_folded=lies is not None)
        maps = maps_of(value, sample, channel_dim=dim, grid=lies, what=what)
        chosen = indices_of(channels, len(maps), "channels")
        tiles, suffixes, _, own = planes_of(maps, style, plane, slices)
        check_size_of_each((1, 1, *tiles.shape[2:]), own)
        if _shares_range(style):
            own = replace(own, value_range=_range_of(tiles, style))
        names = [f"{index}{suffix if len(suffixes) > 1 else ''}" for index in chosen for suffix in suffixes]
        layers.append((tiles[chosen].flatten(0, 1), own, names, folder))
    jobs: list[_Job] = []
    for maps, own, names, folder in layers:
        pictures = _Shared(maps, own)
        jobs += [(pictures.taker(place), root / folder / f"{name}.png") for place, name in enumerate(names)]
    return _save_all(jobs, has_bar=has_bar)


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
) -> Iterator[tuple[Callable[[], Image.Image], str]]:
    """Yield how to draw each sheet of a layer, and its name."""
    planes = indices_of(channels, weight.shape[1], "channels")
    if _shares_range(style):
        style = replace(style, value_range=_range_of(weight, style))
    if weight.ndim == 5 and weight.shape[2] > 1:
        style = replace(style, nrow=None)  # each filter has a row
    sheet = partial(kernel_sheet, weight, None, style, filters=filters)
    if is_matrix(weight):  # one picture holds all channels, and has no tiles
        whole = replace(style, labels=False, nrow=None, max_tiles=None)
        sheet = partial(kernel_sheet, weight, None, whole, filters=filters, channels=planes)
        sheet().check()
        yield partial(_draw_page, sheet, 0), "matrix"
        return
    first = sheet(channels=planes[0])  # all are of one size
    first.check()
    for plane in planes:
        for page in range(first.pages):
            name = f"{plane}-page{page + 1}" if page else str(plane)
            yield partial(_draw_page, partial(sheet, channels=plane), page), name


def _draw_page(sheet: Callable[[], Sheet], page: int) -> Image.Image:
    return sheet().draw(page)


def _shares_range(style: Style) -> bool:
    is_found = style.value_range is None or is_robust(style.value_range)
    return style.normalize and not style.scale_each and is_found


def _range_of(values: torch.Tensor, style: Style) -> tuple[float, float]:
    values = (values if values.is_floating_point() else wide(values)).detach().reshape(1, -1)
    low, high, _ = robust_range(values) if is_robust(style.value_range) else finite_range(values)
    return low.item(), high.item()


def _save_all(jobs: Sequence[_Job], *, has_bar: bool) -> list[Path]:
    """Draw in this thread and write in others, a bounded number of pictures ahead."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        under_way: list[Future[Path]] = []
        for draw, path in tracked(jobs, shown=has_bar, total=len(jobs), unit="file"):
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
