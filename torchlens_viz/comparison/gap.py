"""How far apart two tensors are, gathered over batches: in all, by channel, and where it is worst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, isfinite, sqrt
from typing import Final, NamedTuple, final

import torch

from torchlens_viz.arguments import plain, wide

_BLOCK_ON_CPU: Final = 2**16  # values; in float64 a few of such are at hand in the cache
_BLOCK_ELSEWHERE: Final = 2**24


class Exhibit(NamedTuple):
    """What is to be shown of a layer: where its worst value is.

    Attributes:
        channels: (K,) which channels, the worst first; none where the channels themselves are the map.
        a: (K, H, W) float32, what they are in the one network.
        b: (K, H, W) float32, and in the other.
    """

    channels: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor


@final
class Gap:
    """The gap between what two layers put out.

    Args:
        maps: How many channels to keep for a picture.

    Attributes:
        shapes: Those of both, the first time.
        max_abs: The largest distance of two values; inf where one of them is not finite.
        excess: The largest distance in parts of what was allowed.
        channel: The channel where that is.
        sample: The input where that is.
        by_channel: (C,) float64, the largest distance in each channel.
        exhibit: What is to be shown.
        rtol: The tolerance, in parts of the value, the last time.
    """

    def __init__(self, maps: int) -> None:
        self._maps = maps
        self._squares = [0.0, 0.0, 0.0, 0.0]  # of a, of b, of their product and of their distance
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.max_abs = self.excess = 0.0
        self.channel: int | None = None
        self.sample: int | None = None
        self.by_channel: torch.Tensor | None = None
        self.exhibit: Exhibit | None = None
        self.rtol = 0.0

    @property
    def relative(self) -> float:
        """The root mean square of the distance, in parts of that of `a`."""
        of_a, _, _, of_gap = self._squares
        if of_gap == 0 or of_a == 0:
            return 0.0 if of_gap == 0 else float("inf")
        return sqrt(of_gap / of_a)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both; of two that are zero everywhere it is 1."""
        of_a, of_b, product, _ = self._squares
        if of_a == 0 or of_b == 0:
            return float(of_a == of_b)
        return max(-1.0, min(1.0, product / (sqrt(of_a) * sqrt(of_b))))

    def add(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        dim: int | None,
        *,
        rtol: float,
        atol: float,
        inputs: int,
        before: int,
    ) -> None:
        """Take in what both put out for one batch.

        Args:
            a: A tensor of any shape.
            b: The other, on any device.
            dim: The dimension that counts channels.
            rtol: What is allowed, in parts of the value or of the root mean square of `a`, if that is larger.
            atol: What is allowed besides.
            inputs: How many inputs the batch has.
            before: How many there were before.
        """
        self.rtol = rtol
        self.shapes = self.shapes or (tuple(a.shape), tuple(b.shape))
        if a.shape != b.shape:
            self.shapes = (tuple(a.shape), tuple(b.shape))
            self.max_abs = self.excess = float("inf")
            self._squares[3] = float("inf")
            return
        if a.numel() == 0:
            return
        ours = numbers_of(a)  # on the host, where the device of `a` has no float64
        theirs = numbers_of(b).to(ours.device)
        distance, ratio = self._measure(ours, theirs, rtol, atol)
        has_rows = ours.ndim > 0 and len(ours) == inputs and dim != 0
        if dim is not None:
            largest = distance.movedim(dim, 0).flatten(1).amax(1).cpu()
            before_this = self.by_channel
            self.by_channel = largest if before_this is None else torch.maximum(before_this, largest)
        worst, place = ratio.flatten().max(0)
        if self.exhibit is not None and not worst.item() > self.excess:
            return
        self.excess = worst.item()
        index = [int(each) for each in torch.unravel_index(place.cpu(), ratio.shape)]
        self.channel = None if dim is None else index[dim]
        self.sample = before + index[0] if has_rows else None
        if has_rows and dim is not None and a.ndim <= 5:
            self.exhibit = self._shown(ours[index[0]], theirs[index[0]], ratio[index[0]], dim - 1)

    def _measure(
        self, a: torch.Tensor, b: torch.Tensor, rtol: float, atol: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance of every two values, and in parts of what is allowed."""
        count, distance = a.numel(), (a - b).abs_()
        of_a, of_b = _dot(a, a), _dot(b, b)
        if not isfinite(of_a + of_b):
            is_same = (a == b) | (a.isnan() & b.isnan())
            distance.masked_fill_(is_same, 0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
            is_finite = a.isfinite() & b.isfinite()
            a, b = (side.masked_fill(~is_finite, 0) for side in (a, b))
            count = max(1, int(is_finite.sum()))
            of_a, of_b = _dot(a, a), _dot(b, b)
        for place, value in enumerate((of_a, of_b, _dot(a, b), _dot(distance, distance))):
            self._squares[place] += value
        self.max_abs = max(self.max_abs, distance.max().item())
        level = sqrt(of_a / count)
        allowed = a.abs().clamp_(min=level).mul_(rtol).add_(atol)
        ratio = torch.div(distance, allowed, out=allowed)
        if not level * rtol + atol:  # where nothing is allowed, 0 of it is no excess
            ratio.masked_fill_(distance == 0, 0)
        return distance, ratio

    def _shown(self, a: torch.Tensor, b: torch.Tensor, ratio: torch.Tensor, dim: int) -> Exhibit:
        """Choose what is to be shown of one input: (C, H, W), (L, C) or (C,)."""
        a, b, ratio = (each.movedim(dim, 0) for each in (a, b, ratio))
        if a.ndim == 1:
            return Exhibit((), *(_as_map(side[None]) for side in (a, b)))
        order = ratio.flatten(1).amax(1).sort(descending=True, stable=True).indices[: self._maps]
        return Exhibit(tuple(order.tolist()), *(_as_map(side[order]) for side in (a, b)))


def _as_map(values: torch.Tensor) -> torch.Tensor:
    """Return K channels as (K, H, W) float32; a row of values is folded near-square, zeros at the end."""
    values = values.float().cpu()
    if values.ndim > 2:
        return values.reshape(len(values), -1, values.shape[-1])
    count = values.shape[1]
    least = ceil(sqrt(count))
    fitting = (columns for columns in range(least, 3 * least) if count % columns == 0)
    columns = next(fitting, least)
    rows = ceil(count / columns)
    return torch.nn.functional.pad(values, (0, rows * columns - count)).reshape(len(values), rows, columns)


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest distance, in parts of `a` or of its root mean square, if that is larger.

    Values that are not finite in both are left out.
    """
    if a.numel() == 0:
        return 0.0
    squares, count = 0.0, 0
    for ours, _, finite in _in_blocks(a, b):
        squares += _dot(ours, ours)
        count += finite
    level = sqrt(squares / max(1, count))
    largest = 0.0
    for ours, theirs, _ in _in_blocks(a, b):
        ratio = theirs.sub_(ours).abs_().div_(ours.abs_().clamp_(min=level))
        largest = max(largest, ratio.nan_to_num_(0, 0, 0).max().item())
    return largest


def _in_blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield the numbers of both in float64, block by block, and how many are finite in both; others are 0."""
    for of_a, of_b in zip(*(blocks(plain(side.detach()).flatten()) for side in (a, b)), strict=True):
        ours, theirs = _copy_of_numbers(of_a), _copy_of_numbers(of_b)
        finite = ours.numel()
        if not isfinite(_dot(ours, ours) + _dot(theirs, theirs)):
            inside = ours.isfinite() & theirs.isfinite()
            finite = int(inside.sum())
            ours, theirs = (side.masked_fill_(~inside, 0) for side in (ours, theirs))
        yield ours, theirs, finite


def blocks(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return parts of a tensor of one dimension that are worth working on one after the other."""
    size = _BLOCK_ON_CPU if flat.device.type == "cpu" else _BLOCK_ELSEWHERE
    return torch.split(flat, size)


def _copy_of_numbers(tensor: torch.Tensor) -> torch.Tensor:
    numbers = numbers_of(tensor)
    is_same = numbers.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return numbers.clone() if is_same else numbers


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.dot(a.flatten(), b.flatten()).item()


def numbers_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of any tensor in float64; of complex ones real and imaginary parts side by side."""
    values = plain(tensor.detach())
    return wide(torch.view_as_real(values.resolve_conj()) if values.is_complex() else values)
