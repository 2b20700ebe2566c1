"""How tiles are drawn: the options that all sheets share, checked once, and which tiles make a page."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, Final, Literal, TypeAlias, TypedDict, TypeVar, get_args

import torch

from torchlens_viz.arguments import flag, integer, listed, made_of, one_of, shown, wide
from torchlens_viz.draw.palette import Colormap, Table, colormap
from torchlens_viz.draw.scale import ValueRange
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]
SortBy: TypeAlias = Literal["norm", "mean", "std", "max"]

_MATRIX_SIZE: Final = 768  # about as large as a matrix is enlarged to, and each of its cells
_MATRIX_CELL: Final = 12


_MOST: Final = 2**31  # beyond that no picture is


class StyleOptions(TypedDict, total=False):
    """The drawing options that every sheet takes; `torchlens_viz.kernel_grid` explains them."""

    normalize: bool
    scale_each: bool
    value_range: ValueRange | None
    cmap: str | Table | Colormap
    nrow: int | None
    padding: int
    upscale: int | None
    interpolation: Interpolation
    labels: bool | Sequence[str]
    legend: bool
    title: str | None
    sort_by: SortBy | None
    max_tiles: int | None
    page: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """Drawing options with their defaults, checked."""

    normalize: bool = True
    scale_each: bool = False
    value_range: ValueRange | None = None
    cmap: str | Table | Colormap = "auto"
    nrow: int | None = None
    padding: int = 1
    upscale: int | None = None
    interpolation: Interpolation = "nearest"
    labels: bool | Sequence[str] = False
    legend: bool = False
    max_tiles: int | None = None
    page: int = 0
    sort_by: SortBy | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("nrow", self.nrow, 1),
            ("upscale", self.upscale, 1),
            ("max_tiles", self.max_tiles, 1),
            ("padding", self.padding, 0),
            ("page", self.page, 0),
        ):
            if value is not None or name in ("padding", "page"):
                object.__setattr__(self, name, integer(value, name, least=least, most=_MOST))
        for name in ("normalize", "scale_each", "legend"):
            object.__setattr__(self, name, flag(getattr(self, name), name))
        if self.title is not None and not isinstance(self.title, str):
            raise InvalidTypeError(f"`title` must be a string or None, got {shown(self.title)}")
        one_of(self.interpolation, "interpolation", get_args(Interpolation))
        if self.interpolation != "nearest" and self.upscale == 1:
            raise InvalidArgumentError(
                f"`interpolation={self.interpolation!r}` has no effect with `upscale=1`; leave one out"
            )
        if self.has_own_colours:
            colormap(self.cmap)
        if self.sort_by is not None and not (
            isinstance(self.sort_by, str) and self.sort_by in get_args(SortBy)
        ):
            raise InvalidArgumentError(
                f"`sort_by` must be one of {', '.join(get_args(SortBy))}, or None, got {shown(self.sort_by)}"
            )
        if self.page and self.max_tiles is None:
            raise InvalidArgumentError(
                "`page` has no effect without `max_tiles`, the number of tiles per page"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Style:
        """Return the style with some options, by name.

        Raises:
            InvalidTypeError: There is no such option, or one has another type.
            InvalidArgumentError: One is out of range or has no effect.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}"
                raise InvalidTypeError(f"there is no option `{name}`; {hint}")
        return cls(**options)

    @property
    def has_own_colours(self) -> bool:
        """Whether a colour map was asked for."""
        return not (isinstance(self.cmap, str) and self.cmap == "auto")


Drawing = TypeVar("Drawing", bound=Callable[..., Any])


def lists_options(function: Drawing) -> Drawing:
    """Have `help` list the drawing options that a function takes as `**options`."""
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    drawing = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=field.type)
        for field in fields(Style)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *drawing])  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of so many tiles a sheet shows.

    Attributes:
        places: Their places, in the order in which they are shown.
        count: How many there are to choose from.
        lines: What is to be said of it: nothing where all are shown.
    """

    places: list[int]
    count: int
    lines: list[str]

    def labels(self, all_labels: Sequence[str]) -> list[str]:
        """Return the labels of those that are shown."""
        return [all_labels[place] for place in self.places]


def choose(style: Style, count: int, order: Sequence[int] | None = None) -> Choice:
    """Choose the tiles of a page.

    Args:
        style: Says how many, and which page.
        count: How many tiles there are.
        order: Their order, where it is not their own.

    Raises:
        InvalidArgumentError: There is no such page.
    """
    size = count if style.max_tiles is None else style.max_tiles
    pages = max(1, ceil(count / size))
    if style.page >= pages:
        raise InvalidArgumentError(
            f"`page` must be below {pages} ({count} tiles, {size} on each), got {style.page}"
        )
    shown = range(style.page * size, min((style.page + 1) * size, count))
    lines = []
    if len(shown) < count:
        first = f"{len(shown)}" if shown.start == 0 else f"{shown.start + 1} to {shown.stop}"
        by = f", ranked by {style.sort_by}" if style.sort_by else ""
        lines.append(f"{first} of {count} shown{by}")
    return Choice([index if order is None else order[index] for index in shown], count, lines)


def ranking(values: torch.Tensor, sort_by: SortBy | None) -> list[int] | None:
    """Return the order of K things by a figure of theirs, the greatest first, or None for no ranking.

    Args:
        values: (K, ...), the numbers of each; those that are not finite count as zero.
        sort_by: Which figure.
    """
    if sort_by is None:
        return None
    flat = wide(values.detach().flatten(1)).nan_to_num(0, 0, 0)
    figures = {
        "norm": torch.linalg.vector_norm(flat, dim=1),
        "mean": flat.mean(1),
        "std": flat.std(1, correction=0),
        "max": flat.amax(1),
    }[sort_by]
    order: list[int] = figures.sort(descending=True, stable=True).indices.tolist()
    return order


def in_rows(style: Style, each: int, *, row: str = "filter", several: str = "channels") -> Style:
    """Return a style for a row of `each` tiles per filter, whose pages hold whole rows.

    Args:
        style: The style.
        each: How many.
        row: What has a row.
        several: What the tiles in it are.

    Raises:
        InvalidArgumentError: `nrow` is given, or no row fits on a page.
    """
    if each == 1:
        return style
    if style.nrow is not None:
        raise InvalidArgumentError(
            f"`nrow` has no effect where several {several} are drawn: each {row} has a row; leave it out"
        )
    if style.max_tiles is None:
        return replace(style, nrow=each)
    if style.max_tiles < each:
        raise InvalidArgumentError(
            f"`max_tiles` must be at least {each}, the tiles in the row of a {row}, got {style.max_tiles}; "
            f"raise it, or choose fewer `{several}`"
        )
    return replace(style, nrow=each, max_tiles=style.max_tiles // each * each)


def as_matrix(style: Style, rows: int, columns: int) -> Style:
    """Return a style for numbers (rows, columns) that are drawn as one picture."""
    if style.labels is not False or style.nrow is not None or style.max_tiles is not None:
        raise InvalidArgumentError(
            "`labels`, `nrow` and `max_tiles` have no effect on kernels of a single pixel, which are drawn "
            "as one picture; leave them out"
        )
    if style.upscale is not None:
        return style
    return replace(style, upscale=max(1, min(_MATRIX_CELL, _MATRIX_SIZE // max(rows, columns))))


def own_labels(style: Style, count: int) -> list[str] | Literal[False]:
    """Return the labels that the caller brought for `count` tiles, or False where there are none."""
    if isinstance(style.labels, bool):
        return False
    if isinstance(style.labels, str) or not isinstance(style.labels, Iterable):
        raise InvalidTypeError(
            f"`labels` must be True or a list of {count} strings, got {shown(style.labels)}"
        )
    rule = f"`labels` must be {count} strings, one per tile, got {shown(style.labels)}"
    labels = [" ".join(made_of(label, str, rule).split()) for label in listed(style.labels, "labels")]
    if len(labels) != count:
        raise InvalidArgumentError(f"`labels` must be {count} strings, one per tile, got {len(labels)}")
    return labels
