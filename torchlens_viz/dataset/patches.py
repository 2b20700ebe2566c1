"""Patches: the part of an input that a position of a layer sees, cut from the input itself: `Gallery`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, final

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from torchlens_viz.arguments import indices_of, shown
from torchlens_viz.dataset.tally import Tally
from torchlens_viz.draw.rows import draw_rows
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.models.colours import Bands, Colours, as_pixels, checked_bands, inverted, known_colours
from torchlens_viz.models.images import model_input
from torchlens_viz.models.inputs import InputOf, images_in, input_of, part_of
from torchlens_viz.models.kernels import image_axes, image_channels
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field
from torchlens_viz.stats.topk import Top

_REMEMBERED: Final = 64  # inputs that are kept, because several channels may like the same


class Patch(NamedTuple):
    """A part of an input.

    Attributes:
        values: (C, h, w), as the model takes it; (C, l) of a signal and (C, d, h, w) of a volume.
        pixels: (3, h, w) or (3, d, h, w) float32 in [0, 1], as a person would see it; of a signal its values,
            (C, l) float32, after `invert` if there is one.
        box: The part of the input that these are, a slice for each of its spatial axes.
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
        bands: The channels to show as red, green and blue, or the one to show; None as `Survey.grid` says.
    """

    inputs: Any
    preprocess: Callable[[Any], torch.Tensor] | None
    invert: Callable[[torch.Tensor], torch.Tensor] | None
    input_of: InputOf
    bands: Bands = None


class View(NamedTuple):
    """What looks at the inputs.

    Attributes:
        model: The model that was surveyed.
        layer: The layer whose positions are meant.
        shape: (C, ...) of the inputs that were surveyed; None where they differed.
        channel_dim: The dimension that counts channels in what the layer puts out.
    """

    model: nn.Module
    layer: str
    shape: tuple[int, ...] | None
    channel_dim: int | None


def view_of(tally: Tally, layer: str, model: nn.Module | None, shape: tuple[int, ...] | None) -> View:
    """Return what looks at the inputs of a layer.

    Args:
        tally: What is known of the layer.
        layer: Its name.
        model: The model that was surveyed.
        shape: (C, ...) of the inputs; None where they differed.

    Raises:
        InvalidArgumentError: There is no model, or the layer ran several times for one batch.
    """
    if model is None:
        raise InvalidArgumentError("`model` must be given, since a survey from a file comes without one")
    if tally.most_calls > 1:
        raise InvalidArgumentError(
            f"`{layer}` ran {tally.most_calls} times for one batch, so that it cannot be told what a peak of "
            "it sees; survey a layer that runs once"
        )
    return View(model, layer, shape, tally.stats.channel_dim)


@final
class Cutter:
    """Cuts patches from the inputs of a survey.

    Args:
        view: What looks at the inputs.
        source: How pictures are made of them.
        inputs: The inputs by index, from `pick`.
    """

    def __init__(self, view: View, source: Source, inputs: Mapping[int, Any]) -> None:
        self._model, self._layer, self._shape, self._channel_dim = view
        self._preprocess, self._invert, self._inputs = source.preprocess, source.invert, inputs
        self._bands = source.bands
        self._channels = image_channels(self._model)
        self._axes = image_axes(self._model) if self._shape is None else len(self._shape) - 1
        self._fields: dict[tuple[int, ...], ReceptiveField] = {}
        self._colours: dict[tuple[Any, ...], Colours | None] = {}
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

    def whole(self, sample: int) -> torch.Tensor:
        """Return an input as the model takes it, (C, ...)."""
        return self._input(sample)[0]

    def colours(self, sample: int) -> torch.Tensor | None:
        """Return how much of red, green and blue the preprocessing puts into each channel, (C, 3)."""
        found = self._colours_of(self._inputs[sample])
        return None if found is None else found.matrix.float()

    def _input(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        if sample not in self._read:
            image = self._inputs[sample]
            batch = model_input(image, self._preprocess, self._channels, self._axes)
            shape = tuple(batch.shape[1:])
            if self._shape is not None and shape != self._shape:
                raise InvalidArgumentError(
                    f"`source` must hold the inputs that were surveyed, of shape {self._shape}, got {shape} "
                    f"at index {sample}; pass `preprocess` if it holds what the inputs are made from"
                )
            self._read[sample] = (batch[0].detach().cpu(), self._pixels(batch, image))
            if len(self._read) > _REMEMBERED:
                self._read.popitem(last=False)
        return self._read[sample]

    def _pixels(self, batch: torch.Tensor, image: torch.Tensor | Image.Image) -> torch.Tensor:
        """Return an input as a person would see it: in colours, or of signals as it is."""
        if self._axes > 1:
            colours = self._colours_of(image)
            return as_pixels(batch, image, invert=self._invert, colours=colours, bands=self._bands)
        values = inverted(batch, self._invert)[0].float().cpu()
        chosen = checked_bands(self._bands, len(values))
        return values if chosen is None else values[chosen]

    def _colours_of(self, image: torch.Tensor | Image.Image) -> Colours | None:
        """Return what the preprocessing does to the colours of such an image; found once for each kind."""
        if self._preprocess is None or self._invert is not None:
            return None
        if isinstance(image, Image.Image):
            kind: tuple[Any, ...] = (image.mode, image.size)
        else:
            kind = (image.dtype, image.shape, bool(image.min() < 0 or image.max() > 1))
        if kind not in self._colours:
            self._colours[kind] = known_colours(self._preprocess, image, self._axes)
        return self._colours[kind]

    def _field(self, shape: tuple[int, ...]) -> ReceptiveField:
        if shape not in self._fields:
            self._fields[shape] = receptive_field(
                self._model, self._layer, (1, *shape), channel_dim=self._channel_dim
            )
        return self._fields[shape]


class Sight(NamedTuple):
    """What one peak of a channel sees.

    Attributes:
        sample: The index of the input.
        value: The peak.
        position: Where it stands in the map.
        patch: What it sees of the input.
    """

    sample: int
    value: float
    position: tuple[int, ...]
    patch: Patch


@final
class Gallery:
    """The top inputs of channels of a layer, as pictures; each is read when it is looked at.

    Args:
        top: The top inputs of all channels.
        channels: Which channels are wanted.
        source: The inputs that were surveyed.
        view: What looks at them.

    Raises:
        InvalidArgumentError: A channel is out of range, or the source ends before an input that is wanted.
    """

    def __init__(self, top: Top, channels: int | Sequence[int] | None, source: Source, view: View) -> None:
        self.channels: tuple[int, ...] = tuple(indices_of(channels, len(top.values), "channels"))
        self.view = view
        self._top = top
        wanted = [sample for sample in top.samples[list(self.channels)].flatten().tolist() if sample >= 0]
        self._cutter = Cutter(view, source, pick(source.inputs, wanted, source.input_of))

    def sights(self, channel: int) -> list[Sight]:
        """Return what the peaks of a channel see, the highest first.

        Raises:
            InvalidArgumentError: The source holds other inputs.
        """
        parts = (self._top.samples, self._top.values, self._top.positions)
        rows = zip(*(part[channel].tolist() for part in parts), strict=True)
        return [
            Sight(sample, value, tuple(place), self._cutter.cut(sample, place))
            for sample, value, place in rows
            if sample >= 0
        ]

    def whole(self, sample: int) -> torch.Tensor:
        """Return an input as the model takes it, (1, C, H, W)."""
        return self._cutter.whole(sample)[None]

    def colours(self, sample: int) -> torch.Tensor | None:
        """Return how much of red, green and blue the preprocessing puts into each channel, (C, 3)."""
        return self._cutter.colours(sample)

    def draw(self, *, tile: int, style: Style) -> Image.Image:
        """Draw a row per channel, each patch with its peak and its input's index.

        Volumes are drawn as slices, and signals as curves, which reach from the smallest value of all of them
        to the largest.

        Raises:
            InvalidArgumentError: The channels have no peak, or the sheet would be too large.
        """
        rows = [self.sights(channel) for channel in self.channels]
        self.require_some(rows)
        words = [
            [f"{channel}: {sight.value:.3g} #{sight.sample}" for sight in row]
            for channel, row in zip(self.channels, rows, strict=True)
        ]
        pixels = [[sight.patch.pixels for sight in row] for row in rows]
        return draw_rows(pixels, words, tile=tile, style=replace(style, nrow=max(map(len, rows))))

    def require_some(self, rows: Sequence[Sequence[Sight]]) -> None:
        """Refuse channels without any peak.

        Raises:
            InvalidArgumentError: They have none.
        """
        if not any(rows):
            raise InvalidArgumentError(
                f"these channels of `{self.view.layer}` have no top inputs, because they put out nothing but "
                "NaN"
            )


def pick(source: Any, samples: Iterable[int], rule: InputOf) -> Mapping[int, Any]:
    """Return the inputs with the given indices, by index; where it can be, each is read when it is looked up.

    Args:
        source: A dataset, a tensor (N, C, ...), anything else that `source[index]` gives an input of, or an
            iterable of inputs in the order of their indices. Of a DataLoader, its dataset.
        samples: The indices.
        rule: Which part of an item is the input, where it is neither a picture nor as `input_of` finds it.

    Raises:
        InvalidArgumentError: There is no such input.
    """
    wanted = sorted(set(samples))
    source = source.dataset if isinstance(source, DataLoader) else source
    has_items = any("__getitem__" in vars(kind) for kind in type(source).__mro__)
    if has_items and not isinstance(source, IterableDataset):
        return _Lookup(source, wanted, rule)
    if not isinstance(source, Iterable):
        raise InvalidTypeError(f"`source` must be a dataset or a tensor of inputs, got {shown(source)}")
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
    found = part_of(item, rule)
    if isinstance(found, Image.Image):
        return found
    image = input_of(item, rule)
    return image if isinstance(image, torch.Tensor) else images_in(image)
