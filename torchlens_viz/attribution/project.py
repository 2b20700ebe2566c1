"""`project`: the pattern in an image that made a unit fire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, get_args

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import function, indices_of, integer, one_of, shown
from torchlens_viz.attribution.projection import Position, Projection
from torchlens_viz.attribution.units import Unit, Units
from torchlens_viz.backprop.device import isolated
from torchlens_viz.backprop.rules import Rule
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.hooks.forward import refuse_torchscript
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.colours import Bands, as_pixels, checked_bands, known_colours
from torchlens_viz.models.images import as_shown, model_input
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.kernels import image_channels
from torchlens_viz.models.layers import Selector
from torchlens_viz.models.state import device_of
from torchlens_viz.receptive.field import ReceptiveField

_STRONGEST: Final = 16


def project(
    model: nn.Module,
    layer: Selector,
    image: torch.Tensor | Image.Image,
    channels: int | Sequence[int] | None = None,
    *,
    rule: Rule = "deconvnet",
    position: Position = "max",
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    inputs: ModelInputs = None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channel_dim: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    bands: Bands = None,
) -> Projection:
    """Show which pattern in an image made units of a layer fire, by going back from each to the pixels.

    Backwards, a convolution becomes the transposed one, a max pooling puts its value where the maximum was,
    and a ReLU does what `rule` says; batch normalisation, sums, concatenations, average pooling and all else
    pass gradients as they are. ReLUs are found however they are written: as modules, functions, methods, in
    place, as `clamp(min=0)` or ReLU6. What comes out is what a small change of each pixel would add to the
    unit (`"gradient"`), or of that what the rule keeps.

    The network ends at the layer, and runs in eval mode and true float32 on a copy that shares its weights:
    nothing about the model changes, and it may be frozen, compiled (it runs eagerly), in half precision, or
    used under `torch.no_grad()`. Where units see but a small part of the image, many such parts are gone
    through at a time, which changes nothing but rounding.

    Args:
        model: A model that takes one image batch, or more, see `inputs`.
        layer: Which layer, by a selector that finds exactly one. A convolution's own name means before its
            ReLU, the ReLU's name after it. Of several calls, the first counts.
        image: A picture, or a tensor (C, H, W) or (1, C, H, W).
        channels: Channels, by index from 0. None is the 16 that respond most to the image, the strongest
            first.
        rule: What passes a ReLU on the way back: `"deconvnet"`, what is positive, as Zeiler & Fergus did;
            `"guided"`, what is positive where the ReLU was open; `"gradient"`, everything where it was open.
            For the first two the path may hold no other activation function.
        position: From which unit of the channel's map to go back: the highest, of several the first in row
            order (`"max"`), the sum of them (`"all"`), or the one at (row, column). Tokens are a map of one
            row.
        preprocess: Makes of `image` what the model takes, (1, C, H, W) or (C, H, W); where it does not take
            pictures, of the picture as a tensor in [0, 1]. Without it, pixels are in [0, 1]: a picture is
            RGB, or gray where the model takes one channel, and a tensor is taken as it is, but for uint8.
        inputs: What the model takes beside the image, as in `torchlens_viz.maximize`.
        invert: Makes of the model's input, (1, C, H, W), the pixels in [0, 1] to show beside the projections.
            Without it, the change of colours by `preprocess` is undone where it can be told.
        channel_dim: The dimension that counts channels in what the layer puts out: 1 in (N, C, H, W), -1 in
            (N, H, W, C) and tokens (N, L, C). None finds it, as in `torchlens_viz.capture`.
        batch_size: At most how many parts of the image at a time; "auto" is what fits into memory.
        bands: The channels to show as red, green and blue, or the one to show in gray, of the image and of
            the projections. None is all of 1 or 3, and of other numbers their mean, which the sheet says.

    Returns:
        K projections, with the place, the receptive field and the value of each unit. They are as large as
        what the model takes and in its terms, after `preprocess`; to multiply them by the unit's value gives
        what Zeiler & Fergus draw, whose pictures are scaled anyway.

    Raises:
        LayerNotFoundError: The model has no such layer.
        CaptureError: The model is TorchScript or was made by torch.export, or the layer does not run.
        CaptureMemoryError: There is no room for the image.
        InvalidArgumentError: The layer puts out no maps or does not depend on the image; on the way there is
            something that the rule is not defined for; or an argument does not fit.
        InvalidTypeError: An argument has another type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
        >>> seen = project(net, "3", torch.rand(3, 32, 32), [2, 0], position=(5, 6))
        >>> seen.images.shape, seen.regions[0]
        (torch.Size([2, 3, 32, 32]), (slice(10, 20, None), slice(12, 22, None)))

    Source:
        Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 ("deconvnet");
        Springenberg, Dosovitskiy, Brox & Riedmiller, "Striving for Simplicity: The All Convolutional Net",
        ICLR workshop 2015 ("guided"); Simonyan, Vedaldi & Zisserman, "Deep Inside Convolutional Networks",
        ICLR workshop 2014 ("gradient"). Of the first two, Adebayo et al., "Sanity Checks for Saliency Maps",
        NeurIPS 2018, and Nie, Zhang & Patel, "A Theoretical Explanation for Perplexing Behaviors of
        Backpropagation-based Visualizations", ICML 2018, show that they say more of the image's edges than of
        what the network does with them.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    one_of(rule, "rule", get_args(Rule))
    function(preprocess, "preprocess")
    function(invert, "invert")
    wanted = _position(position)
    is_auto = isinstance(batch_size, str) and batch_size == "auto"
    most = None if is_auto else integer(batch_size, "batch_size", least=1)
    refuse_torchscript(model)
    model = called_with(model, inputs)
    taken = image_channels(model)
    image = as_shown(image, taken)
    batch = model_input(image, preprocess, taken)
    device = device_of(model, batch.device)
    with same_random_numbers(), isolated(device):
        given = batch.detach().to(device, torch.float32)
        units = Units(model, layer, given, rule, channel_dim=channel_dim)
        maps = units.maps
        chosen, places, scores = _chosen(maps, channels, wanted, units.layer)
        positions = [None if wanted == "all" else divmod(place, maps.shape[2]) for place in places]
        images = units.gradients(
            [Unit(channel, place) for channel, place in zip(chosen, positions, strict=True)], batch_size=most
        )
    colours = None if preprocess is None or invert is not None else known_colours(preprocess, image)
    shown_bands = checked_bands(bands, given.shape[1])
    return Projection(
        layer=units.layer,
        rule=rule,
        position=wanted,
        channels=torch.tensor(chosen, device="cpu"),
        images=images,
        positions=torch.tensor([place or (-1, -1) for place in positions], device="cpu"),
        regions=tuple(_region(units.field, place, given.shape) for place in positions),
        scores=scores.float().cpu(),
        pixels=as_pixels(
            given, image, preprocess=preprocess, invert=invert, colours=colours, bands=shown_bands
        ),
        bands=None if shown_bands is None else tuple(shown_bands),
        colours=None if colours is None else colours.matrix.float(),
    )


def project_units(
    model: nn.Module,
    layer: str,
    images: Iterable[tuple[torch.Tensor, Sequence[Unit]]],
    *,
    rule: Rule,
    channel_dim: int | None,
) -> Iterator[torch.Tensor]:
    """Yield the projections of units of a layer, (K, C, H, W) float32, one image after the other.

    Args:
        model: The model.
        layer: The layer's name.
        images: Images as the model takes them, (1, C, H, W), each with K of its units.
        rule: As in `project`.
        channel_dim: As in `project`.

    Raises:
        CaptureError: As in `project`.
        CaptureMemoryError: As in `project`.
        InvalidArgumentError: As in `project`.
    """
    refuse_torchscript(model)
    units: Units | None = None
    for image, wanted in images:
        device = device_of(model, image.device)
        with same_random_numbers(), isolated(device):
            given = image.detach().to(device, torch.float32)
            if units is None:
                units = Units(model, layer, given, rule, channel_dim=channel_dim)
            else:
                units = units.on(given)
            found = units.gradients(wanted, batch_size=None)
        yield found


def _position(given: Any) -> Position:
    """Return the option `position`, checked as far as it can be without the maps."""
    if isinstance(given, str):
        return one_of(given, "position", ("max", "all"))
    try:
        row, column = given
    except Exception:
        raise InvalidTypeError(
            f'`position` must be "max", "all" or (row, column), got {shown(given)}'
        ) from None
    return integer(row, "position", least=0), integer(column, "position", least=0)


def _chosen(
    maps: torch.Tensor, channels: int | Sequence[int] | None, position: Position, layer: str
) -> tuple[list[int], list[int], torch.Tensor]:
    """Return which channels to go back from, the flat place of the unit of each, and its value, (K,)."""
    count, height, width = maps.shape
    if maps.numel() == 0:
        raise InvalidArgumentError(
            f"`layer` must put out maps with values, but `{layer}` puts out empty ones"
        )
    flat = maps.flatten(1)
    if position == "max":
        places = flat.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax(1)
        values = flat.gather(1, places[:, None])[:, 0]
    elif position == "all":
        places = torch.zeros(count, dtype=torch.int64, device=maps.device)
        values = flat.sum(1)
    else:
        row, column = position
        if row >= height or column >= width:
            raise InvalidArgumentError(
                f"`position` must lie in the map of `{layer}`, {height} x {width}, got {(row, column)}; rows "
                "and columns count from 0"
            )
        places = torch.full((count,), row * width + column, device=maps.device)
        values = flat[:, row * width + column]
    if channels is None:
        ranked = values.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True)
        chosen = ranked.indices[:_STRONGEST].tolist()
    else:
        chosen = indices_of(channels, count, "channels")
    return chosen, places[chosen].tolist(), values[chosen]


def _region(
    field: ReceptiveField | None, position: tuple[int, int] | None, shape: Sequence[int]
) -> tuple[slice, slice]:
    """Return the rows and columns that a unit sees; all of the image where it has no place of its own."""
    if field is None or position is None or len(field.map_shape) not in (0, 2):
        return slice(0, shape[2]), slice(0, shape[3])
    rows, columns = field.region(position if field.map_shape else ())
    return rows, columns
