"""What preprocessing does to colours, found by trying: applied to images, and undone for pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from PIL import Image

from torchlens_viz.arguments import function, indices_of, shown
from torchlens_viz.errors import InvalidArgumentError, calling, one_line
from torchlens_viz.models.inputs import as_batch, model_input
from torchlens_viz.models.keeping import same_random_numbers

Preprocess: TypeAlias = Callable[[Any], torch.Tensor]
Bands: TypeAlias = int | Sequence[int] | None

_CORNERS: Final = tuple((r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255))
CHECKS: Final = ((128, 128, 128), (200, 30, 90))
CLOSE: Final = 1.5 / 255  # of the range of a channel: conversions between colour spaces round to 8 bits


@final
@dataclass(frozen=True, eq=False)
class Colours:
    """What preprocessing makes of colours: `matrix @ rgb + offset`, for rgb in [0, 1].

    Attributes:
        matrix: (C, 3) float32, for the C channels that the model takes.
        offset: (C,) float32.
        size: Height and width that it makes of a square picture of 256 pixels a side; of a clip, its frames
            come first.
    """

    matrix: torch.Tensor
    offset: torch.Tensor
    size: tuple[int, ...]

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the model takes of images (N, 3, ...) in [0, 1]; gradients pass through."""
        matrix, offset = (part.to(images.device, images.dtype) for part in (self.matrix, self.offset))
        if images.shape[1] == 1:  # gray: all three are the same
            mixed = images * _column(matrix.sum(1), images)
        elif self._is_diagonal:
            mixed = images * _column(matrix.diagonal(), images)
        else:
            mixed = torch.einsum("ck,nk...->nc...", matrix, images)
        return mixed + _column(offset, images)

    def undo(self, batch: torch.Tensor, bands: Sequence[int] | None = None) -> torch.Tensor:
        """Return the pictures (N, 3, ...) that become a batch (N, C, ...); gray where colours are lost.

        Args:
            batch: What the model takes, of any number of spatial axes.
            bands: Return these channels instead, (N, len(bands), ...), each by itself: as what a gray picture
                had there that becomes its values.

        Raises:
            InvalidArgumentError: Different pictures become the same, and no gray one is among them.
        """
        values = batch.detach().cpu().double() - _column(self.offset.double(), batch)
        matrix = self.matrix.double()
        gray = matrix.sum(1)
        if bands is not None:
            if bool((gray[list(bands)] != 0).all()):
                return (values / _column(gray, batch))[:, list(bands)].float()
        elif matrix.shape[0] == 3 and torch.linalg.cond(matrix) < 1e4:
            return torch.einsum("kc,nc...->nk...", torch.linalg.inv(matrix), values).float()
        elif torch.linalg.matrix_rank(matrix, rtol=1e-2) == 1 and bool((gray.abs() > 0).all()):
            mean = (values / _column(gray, batch)).mean(1, keepdim=True)
            return mean.expand(-1, 3, *mean.shape[2:]).float()
        raise InvalidArgumentError(
            "`preprocess` makes the same of different colours, so that the picture cannot be told from the "
            "model's input; pass `invert`, which makes pixels in [0, 1] of it"
        )

    @property
    def _is_diagonal(self) -> bool:
        return self.matrix.shape == (3, 3) and bool((self.matrix == self.matrix.diagonal().diag()).all())


def colours_of(
    preprocess: Preprocess, like: torch.Tensor | Image.Image | None = None, axes: int = 2
) -> Colours:
    """Find what preprocessing does to colours, by giving it pictures of one colour each.

    Args:
        preprocess: Makes of a picture what the model takes, (1, C, H, W) or (C, H, W). What it does to sizes
            is left out.
        like: What it is made for: a picture or a tensor; None is a picture of 256 x 256 pixels.
        axes: How many spatial axes the model's input has.

    Raises:
        InvalidArgumentError: It fails for such pictures, or what it does to a colour is no straight line.
    """
    made = {colour: _of_plain(preprocess, like, colour, axes) for colour in (*_CORNERS, *CHECKS)}
    # What one primary changes is the mean of its four edges, in which the rounding to 8 bits averages out.
    corners = torch.stack([made[colour][0] for colour in _CORNERS]).double()
    is_on = torch.tensor(_CORNERS, device="cpu") > 0
    matrix = torch.stack([corners[on].mean(0) - corners[~on].mean(0) for on in is_on.unbind(1)], dim=1)
    black = corners.mean(0) - matrix.sum(1) / 2
    reach = corners.amax(0) - corners.amin(0)
    for colour in made:
        told = matrix @ (torch.tensor(colour, device="cpu").double() / 255) + black
        if not bool(((told - made[colour][0]).abs() <= CLOSE * reach.clamp(min=1e-6)).all()):
            raise InvalidArgumentError(
                "the preprocessing must take every colour along a straight line, which this one does not: "
                f"{tuple(colour)} becomes {_shown(made[colour][0])} where {_shown(told)} lies on the line"
            )
    if not bool((reach > 1e-6).any()):
        raise InvalidArgumentError("the preprocessing makes the same of every picture of one colour")
    # Where a channel comes from one colour alone, what 8 bits left of the others is none of it.
    matrix = matrix.masked_fill(matrix.abs() < 1e-6 * matrix.abs().amax(), 0.0)
    return Colours(matrix.float(), black.float(), made[_CORNERS[0]][1])


def as_pixels(
    batch: torch.Tensor,
    image: torch.Tensor | Image.Image,
    *,
    preprocess: Preprocess | None = None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    colours: Colours | None = None,
    bands: Bands = None,
) -> torch.Tensor:
    """Return a model's input as the picture that a person would see.

    What `preprocess` did to the colours is undone, where it takes each along a straight line: scales,
    another order of channels, another colour space. Where it does not, the range of the values is spread
    over [0, 1], unless they lie in it. Resizing and cropping stay.

    Args:
        batch: (1, C, ...), the input, with one to three spatial axes.
        image: What it was made from.
        preprocess: What made it.
        invert: Makes of `batch` pixels in [0, 1], in place of all that.
        colours: What `colours_of` found for images like this one, so as not to find it anew.
        bands: The channels to show as red, green and blue, or the one to show in gray.

    Returns:
        (3, ...) float32 on the CPU in [0, 1]. Without `bands`, of images with other than 1 or 3 channels the
        mean, of which `bands_note` says so.

    Raises:
        InvalidArgumentError: Different colours become the same, `invert` changes the size, or a band is none
            of the channels.
    """
    pixels, axes = inverted(batch, invert), batch.ndim - 2
    chosen = checked_bands(bands, pixels.shape[1])
    pixels = pixels.cpu().float() / (255 if pixels.dtype == torch.uint8 else 1)
    if preprocess is not None and invert is None and colours is None:
        colours = known_colours(preprocess, image, axes)
    if colours is not None:
        pixels = colours.undo(pixels, chosen)[0]
    else:
        pixels = pixels[0] if chosen is None else pixels[0, chosen]
    pixels = pixels.nan_to_num(0.0, 1.0, 0.0)
    if colours is None and invert is None and (pixels.min() < 0 or pixels.max() > 1):
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low)
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, *pixels.shape[1:])
    return pixels.clamp(0, 1)


def as_signal(
    batch: torch.Tensor, invert: Callable[[torch.Tensor], torch.Tensor] | None = None, bands: Bands = None
) -> tuple[torch.Tensor, list[int]]:
    """Return a model's input (1, C, L) as the curves to draw, (K, L) float32 on the CPU, and their channels.

    Args:
        batch: The input.
        invert: Makes of it what is shown.
        bands: The channels to draw; None is all.

    Raises:
        InvalidArgumentError: `invert` changes the length, or there is no such channel.
        InvalidTypeError: `bands` are no integers.
    """
    values = inverted(batch, invert)[0]
    chosen = indices_of(bands, len(values), "bands")
    return values[chosen].cpu().float(), chosen


def inverted(batch: torch.Tensor, invert: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """Return what `invert` makes of a model's input (1, C, ...), or where there is none, the input.

    Raises:
        InvalidArgumentError: It changes the size.
    """
    values = batch.detach()
    if function(invert, "invert") is not None:
        assert invert is not None
        with calling("invert(batch)", "make pixels in [0, 1] of what the model takes"):
            values = as_batch(invert(values.clone()), batch.ndim - 2)  # it may work in place
        if values.shape[2:] != batch.shape[2:]:
            raise InvalidArgumentError(
                f"`invert` must keep the height and width of {tuple(batch.shape)}, got {tuple(values.shape)}"
            )
    return values


def checked_bands(bands: Bands, channels: int) -> list[int] | None:
    """Return the channels to show as red, green and blue, or the one to show in gray; None where all count.

    Raises:
        InvalidArgumentError: They are neither one nor three, or an image does not have them.
        InvalidTypeError: They are no integers.
    """
    if bands is None:
        return None
    chosen = indices_of(bands, channels, "bands")
    if len(chosen) not in (1, 3):
        raise InvalidArgumentError(
            f"`bands` must be three channels, to show as red, green and blue, or one to show in gray, got "
            f"{shown(bands)}"
        )
    return chosen


def in_bands(images: torch.Tensor, bands: Bands = None) -> torch.Tensor:
    """Return the channels of images (N, C, ...) that are shown: (N, 3, ...) or, in gray, (N, 1, ...).

    Args:
        images: The images.
        bands: The channels to show as red, green and blue, or the one to show in gray. None is all of 1 or 3
            channels, and of other numbers the mean, of which `bands_note` says so.

    Raises:
        InvalidArgumentError: As `checked_bands`.
        InvalidTypeError: As `checked_bands`.
    """
    chosen = checked_bands(bands, images.shape[1])
    if chosen is not None:
        return images[:, chosen]
    return images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)


def mixed(
    values: torch.Tensor, colours: torch.Tensor | None, bands: Sequence[int] | None = None
) -> torch.Tensor:
    """Return a gradient or the like (C, h, w) in red, green and blue, (3, h, w).

    Args:
        values: A number for each channel that the model takes.
        colours: (C, 3), how much of red, green and blue is in each channel; None where that is the channel.
        bands: The channels to show, in place of all of 3 or the mean of others.
    """
    if bands is not None or len(values) != 3:
        return in_bands(values[None], bands)[0].expand(3, -1, -1)
    return values if colours is None else torch.einsum("ck,chw->khw", colours, values)


def bands_note(channels: int, bands: Bands = None) -> list[str]:
    """Return a line that says what of images with so many channels is shown, where that is not all."""
    chosen = checked_bands(bands, channels)
    if chosen is None:
        mean = f"shown: the mean of {channels} channels; choose three of them with `bands`"
        return [] if channels in (1, 3) else [mean]
    if len(chosen) == 1:
        return [f"shown: channel {chosen[0]} of {channels}"]
    return [f"red, green, blue: channels {', '.join(map(str, chosen))} of {channels}"]


def known_colours(preprocess: Preprocess, like: torch.Tensor | Image.Image, axes: int = 2) -> Colours | None:
    """Return what `colours_of` finds; None where that cannot be told, which a warning says."""
    try:
        return colours_of(preprocess, like, axes)
    except InvalidArgumentError as error:
        warnings.warn(
            f"colours are shown as the model gets them, for they cannot be told from its input: {error}; "
            "pass `invert`, which makes pixels in [0, 1] of it",
            stacklevel=2,
        )
        return None


def _of_plain(
    preprocess: Preprocess, like: torch.Tensor | Image.Image | None, colour: tuple[int, int, int], axes: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return what becomes of one colour, (C,), and the size that it comes in."""
    if isinstance(like, torch.Tensor):
        given: Any = _plain_tensor(like, colour, axes)
    else:
        size = (256, 256) if like is None else like.size
        given = Image.new("RGB", size, colour)
        if like is not None and like.mode == "L":
            given = given.convert("L")
    try:
        with same_random_numbers():
            batch = model_input(given, preprocess, axes=axes)
    except Exception as error:
        raise InvalidArgumentError(
            f"the preprocessing fails for a picture of one colour ({one_line(error)})"
        ) from error
    return typical(batch), tuple(batch.shape[2:])


def typical(batch: torch.Tensor) -> torch.Tensor:
    """Return what becomes of a picture of one colour, (C,): the median, as a border may have been added."""
    return batch.detach().cpu().float().flatten(2).median(dim=2).values[0]


def _plain_tensor(like: torch.Tensor, colour: tuple[int, int, int], axes: int) -> torch.Tensor:
    if like.is_floating_point() and (like.min() < 0 or like.max() > 1):
        raise InvalidArgumentError("values beyond [0, 1] have no known white")
    axes = min(axes, like.ndim - 1)  # a clip may be made of an image
    channels = like.shape[-axes - 1]
    values = torch.tensor(colour if channels == 3 else [sum(colour) / 3] * channels, device="cpu")
    values = values / 255 if like.is_floating_point() else values
    return values.to(like.device, like.dtype).view(-1, *[1] * axes).expand(like.shape).clone()


def _column(values: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Return a value for each channel, (C,), as it stands before the spatial axes of a batch (N, C, ...)."""
    return values.view(-1, *[1] * (batch.ndim - 2))


def _shown(values: torch.Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values.tolist()) + ")"
