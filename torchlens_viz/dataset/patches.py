"""Patches: the part of an input that a position of a layer sees, cut from the input itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Final, NamedTuple, final

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from torchlens_viz.arguments import indices_of
from torchlens_viz.dataset.loader import InputOf, input_of
from torchlens_viz.draw.canvas import check_size, draw
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.inputs import as_batch, as_pixels
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field
from torchlens_viz.stats.topk import Top

_REMEMBERED: Final = 64  # inputs that are kept, because several channels may like the same


class Patch(NamedTuple):
    """A part of an input.

    Attributes:
        values: (C, h, w), as the model takes it.
        pixels: (3, h, w) float32 in [0, 1], as a person would see it.
        box: The rows and columns of the input that these are.
    """

    values: torch.Tensor
    pixels: torch.Tensor
    box: tuple[slice, ...]


class Source(NamedTuple):
    """The inputs that were surveyed, and how to make of one what the model takes and what a person sees.

    Attributes:
        inputs: What `pick` finds inputs in.
        preprocess: Makes of an input what the model takes, (C, H, W) or (1, C, H, W).
        invert: Makes of the model's input, (1, C, H, W), pixels in [0, 1].
        input_of: Which part of an item is the input.
    """

    inputs: Any
    preprocess: Callable[[Any], torch.Tensor] | None
    invert: Callable[[torch.Tensor], torch.Tensor] | None
    input_of: InputOf


class View(NamedTuple):
    """What looks at the inputs.

    Attributes:
        model: The model that was surveyed.
        layer: The layer whose positions are meant.
        shape: (C, H, W) of the inputs that were surveyed; None where they differed.
    """

    model: nn.Module
    layer: str
    shape: tuple[int, ...] | None


@final
class Cutter:
    """Cuts patches from the inputs of a survey.

    Args:
        view: What looks at the inputs.
        source: How pictures are made of them.
        inputs: The inputs by index, from `pick`.
    """

    def __init__(self, view: View, source: Source, inputs: Mapping[int, Any]) -> None:
        self._model, self._layer, self._shape = view
        self._preprocess, self._invert, self._inputs = source.preprocess, source.invert, inputs
        self._fields: dict[tuple[int, ...], ReceptiveField] = {}
        self._read: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def cut(self, sample: int, position: Sequence[int]) -> Patch:
        """Return what a position sees of an input; at the border, as far as the input goes.

        Raises:
            InvalidArgumentError: The input is no image, is another one than was surveyed as far as its shape
                tells, or the position is none of the layer's.
        """
        values, pixels = self._input(sample)
        field = self._field(tuple(values.shape))
        axes = len(field.map_shape)
        try:
            box = field.region(tuple(position)[len(position) - axes :] if axes else ())
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"`source` must hold the inputs that were surveyed: position {tuple(position)} of "
                f"`{self._layer}` is not in the map of input {sample}, {field.map_shape}"
            ) from error
        inside: tuple[Any, ...] = (slice(None), *box)
        return Patch(values[inside].clone(), pixels[inside].clone(), box)  # views would hold all of the input

    def _input(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        if sample not in self._read:
            image = self._inputs[sample]
            batch = as_batch(image if self._preprocess is None else self._preprocess(image))
            shape = tuple(batch.shape[1:])
            if self._shape is not None and shape != self._shape:
                raise InvalidArgumentError(
                    f"`source` must hold the inputs that were surveyed, of shape {self._shape}, got {shape} "
                    f"at index {sample}; pass `preprocess` if it holds what the inputs are made from"
                )
            pixels = as_pixels(batch, image, preprocess=self._preprocess, invert=self._invert)
            self._read[sample] = (batch[0].detach().cpu(), pixels)
            if len(self._read) > _REMEMBERED:
                self._read.popitem(last=False)
        return self._read[sample]

    def _field(self, shape: tuple[int, ...]) -> ReceptiveField:
        if shape not in self._fields:
            self._fields[shape] = receptive_field(self._model, self._layer, (1, *shape))
        return self._fields[shape]


def cut_patches(top: Top, channels: Sequence[int], source: Source, view: View) -> list[list[Patch]]:
    """Cut what the peaks of channels see: a list per channel, the highest peak first.

    Raises:
        InvalidArgumentError: A channel is out of range, or the source holds other inputs.
    """
    chosen = indices_of(list(channels), len(top.values), "channels")
    samples, positions = top.samples[chosen].tolist(), top.positions[chosen].tolist()
    wanted = [sample for row in samples for sample in row if sample >= 0]
    cutter = Cutter(view, source, pick(source.inputs, wanted, source.input_of))
    return [
        [cutter.cut(sample, place) for sample, place in zip(row, places, strict=True) if sample >= 0]
        for row, places in zip(samples, positions, strict=True)
    ]


def draw_patches(
    top: Top, channels: Sequence[int], source: Source, view: View, *, tile: int, style: Style
) -> Image.Image:
    """Draw what the peaks of channels see: a row per channel, each patch with its peak and its input's index.

    Raises:
        InvalidArgumentError: As in `cut_patches`, the channels have no peak, or the sheet would be too large.
    """
    is_there = top.samples[list(channels)] >= 0
    columns = int(is_there.sum(1).amax()) if is_there.numel() else 0
    if columns == 0:
        raise InvalidArgumentError(
            f"these channels of `{view.layer}` have no top inputs, because they put out nothing but NaN"
        )
    rows = cut_patches(top, channels, source, view)
    words = [
        [
            f"{channel}: {value:.3g} #{sample}"
            for value, sample in zip(top.values[channel].tolist(), top.samples[channel].tolist(), strict=True)
            if sample >= 0
        ]
        for channel in channels
    ]
    pixels = [[patch.pixels for patch in row] for row in rows]
    return draw_rows(pixels, words, tile=tile, style=replace(style, nrow=columns))


def pick(source: Any, samples: Iterable[int], rule: InputOf) -> Mapping[int, Any]:
    """Return the inputs with the given indices, by index; where it can be, each is read when it is looked up.

    Args:
        source: A dataset, a tensor (N, C, H, W), anything else that `source[index]` gives an input of, or an
            iterable of inputs in the order of their indices. Of a DataLoader, its dataset.
        samples: The indices.
        rule: Which part of an item is the input, where it is neither a picture nor as `input_of` finds it.

    Raises:
        InvalidArgumentError: There is no such input.
    """
    wanted = sorted(set(samples))
    source = source.dataset if isinstance(source, DataLoader) else source
    if hasattr(source, "__getitem__") and not isinstance(source, IterableDataset):
        return _Lookup(source, wanted, rule)
    found: dict[int, Any] = {}
    for index, item in enumerate(source):
        if len(found) == len(wanted):
            break
        if index == wanted[len(found)]:
            found[index] = _image(item, rule)
    if len(found) < len(wanted):
        raise InvalidArgumentError(
            f"`source` must hold the inputs that were surveyed, but ends before index {wanted[len(found)]}"
        )
    return found


@final
class _Lookup(Mapping[int, Any]):
    def __init__(self, source: Any, samples: Sequence[int], rule: InputOf) -> None:
        self._source, self._samples, self._rule = source, samples, rule

    def __getitem__(self, index: int) -> Any:
        try:
            item = self._source[index]
        except (LookupError, ValueError) as error:
            raise InvalidArgumentError(
                f"`source` must hold the inputs that were surveyed, but there is no index {index}"
            ) from error
        return _image(item, self._rule)

    def __iter__(self) -> Iterator[int]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)


def _image(item: Any, rule: InputOf) -> Any:
    if isinstance(item, Image.Image) and rule is None:
        return item
    if rule is None and isinstance(item, tuple | list) and item and isinstance(item[0], Image.Image):
        return item[0]
    return input_of(item, rule)


def draw_rows(
    rows: Sequence[Sequence[torch.Tensor]], words: Sequence[Sequence[str]], *, tile: int, style: Style
) -> Image.Image:
    """Draw patches of any size, each in the middle of a tile.

    Args:
        rows: Patches (3, h, w), or (3, w) of signals, in [0, 1]; a row for each channel.
        words: A label for each.
        tile: The longer side to which all are shrunk by one factor, where the largest is larger.
        style: How to draw them; its number of columns is that of the longest row.

    Returns:
        An image of mode "RGB", gray where a patch ends and white where there is none.

    Raises:
        InvalidArgumentError: It would be too large.
    """
    planes = [[patch[:, None] if patch.ndim == 2 else patch for patch in row] for row in rows]
    columns = max(map(len, rows))
    extents = [patch.shape[1:] for row in planes for patch in row]
    height, width = (max([1, *(extent[axis] for extent in extents)]) for axis in (0, 1))
    shrink = max(1.0, max(height, width) / tile)
    height, width = ceil(height / shrink), ceil(width / shrink)
    check_size((len(rows) * columns, 3, height, width), style)
    tiles, labels = [], []
    for row, own in zip(planes, words, strict=True):
        missing = columns - len(row)
        tiles += [_tile(patch, height, width, shrink) for patch in row]
        tiles += [torch.ones(3, height, width)] * missing
        labels += [*own, *[""] * missing]
    return draw(torch.stack(tiles), style, labels=labels, notes=())


def _tile(patch: torch.Tensor, height: int, width: int, shrink: float) -> torch.Tensor:
    tile = torch.full((3, height, width), 0.5)
    if patch.numel() == 0:
        return tile
    if shrink > 1:
        size = [max(1, round(extent / shrink)) for extent in patch.shape[1:]]
        patch = F.interpolate(patch[None], size=size, mode="area")[0]
    rows, columns = patch.shape[1:]
    top, left = (height - rows) // 2, (width - columns) // 2
    tile[:, top : top + rows, left : left + columns] = patch
    return tile
