"""What a kernel lets through, in numbers: the picture itself, its edges, or its colours."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch.nn import functional as F

from torchlens_viz.errors import InvalidArgumentError

_LUMINANCE: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Patterns(NamedTuple):
    """Three numbers for each of K pairs of a kernel and its map, float32 on the CPU.

    `picture` (K,) in [0, 1]: how clearly the picture is still there, as the absolute correlation of the map
    with the luminance of the input. `edges` (K,) in [-1, 1]: how much only its outlines are, as the
    correlation of the map's distance from its mean with the strength of the edges in the luminance.
    `colour` (K,) in [0, 1]: the share of the kernel's energy in differences between the input's three
    channels; NaN for kernels with other than three. A constant map correlates with nothing: 0.
    """

    picture: torch.Tensor
    edges: torch.Tensor
    colour: torch.Tensor


def measure_patterns(kernels: torch.Tensor, maps: torch.Tensor, image: torch.Tensor) -> Patterns:
    """Measure what each kernel of a layer keeps of an image.

    Args:
        kernels: (K, I, kH, kW).
        maps: (K, H, W), what the kernels make of the image.
        image: The network's input (C, H', W'); luminance is taken from three channels, of others their mean.

    Returns:
        The numbers, aligned with the kernels.

    Raises:
        InvalidArgumentError: The numbers of kernels and maps differ.

    Example:
        >>> import torch
        >>> image = torch.rand(3, 32, 32)
        >>> gray, red = torch.full((3, 1, 1), 1 / 3), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
        >>> kernels = torch.stack([gray, red])
        >>> maps = torch.nn.functional.conv2d(image[None], kernels)[0]
        >>> [round(share, 2) for share in measure_patterns(kernels, maps, image).colour.tolist()]
        [0.0, 0.67]
    """
    if len(kernels) != len(maps):
        raise InvalidArgumentError(
            f"each kernel needs its map, got {len(kernels)} kernels and {len(maps)} maps"
        )
    kernels, maps, image = (value.detach().double().nan_to_num().cpu() for value in (kernels, maps, image))
    luminance = _luminance(image)
    # As large as the maps, with antialiasing: a map has one value where the input has many.
    seen = F.interpolate(luminance[None, None], maps.shape[1:], mode="bilinear", antialias=True)[0, 0]
    values = maps.flatten(1)
    return Patterns(
        picture=_correlation(values, seen.flatten()).abs().float(),
        edges=_correlation((values - values.mean(1, keepdim=True)).abs(), _edges(seen).flatten()).float(),
        colour=_colour_share(kernels).float(),
    )


def _luminance(image: torch.Tensor) -> torch.Tensor:
    if len(image) != 3:
        return image.mean(0)
    return (torch.tensor(_LUMINANCE, dtype=image.dtype)[:, None, None] * image).sum(0)


def _edges(plane: torch.Tensor) -> torch.Tensor:
    """Return the strength of the edges in (H, W), by the Sobel operator."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=plane.dtype)
    padded = F.pad(plane[None, None], (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(padded, torch.stack([sobel, sobel.T])[:, None])[0]
    return slopes.square().sum(0).sqrt()


def _correlation(rows: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of each row (K, P) with a reference (P,)."""
    rows = rows - rows.mean(1, keepdim=True)
    reference = reference - reference.mean()
    spread = rows.norm(dim=1) * reference.norm()
    return torch.where(spread > 0, rows @ reference / spread, 0).clamp(-1, 1)


def _colour_share(kernels: torch.Tensor) -> torch.Tensor:
    if kernels.shape[1] != 3:
        return torch.full((len(kernels),), torch.nan, dtype=kernels.dtype)
    energy = kernels.square().sum((1, 2, 3))
    gray = kernels.mean(1).square().sum((1, 2)) * 3
    return torch.where(energy > 0, 1 - gray / energy, 0).clamp(0, 1)
