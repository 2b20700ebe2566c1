"""Which maps of a batch are drawn: (C, ...) of one input, wherever its channels stand."""

from __future__ import annotations

import operator

import torch

from torchlens_viz.arguments import integer, real_numbers, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError


def maps_of(
    activation: torch.Tensor,
    sample: int,
    *,
    channel_dim: int | None = None,
    grid: tuple[int, int] | None = None,
    what: str = "`activation`",
) -> torch.Tensor:
    """Return the maps (C, H, W), (C, L) or (C, D, H, W) of one input of a batch, checked to be drawable.

    Args:
        activation: (N, C, H, W), (C, H, W) or (N, C, D, H, W); where `channel_dim` says so, (N, C, L), (C, L)
            or (C, D, H, W); with `grid`, tokens (N, L, C) or (L, C).
        sample: Which input of the batch.
        channel_dim: The dimension that counts channels; None is that of these shapes.
        grid: Rows and columns in which the last rows * columns of the tokens lie; those before them, such as
            a class token, are left out.
        what: What the caller calls the activation.
    """
    if not isinstance(activation, torch.Tensor):
        raise InvalidTypeError(
            f"{what} must be a tensor (N, C, H, W) or (C, H, W), got {type(activation).__name__}; of a layer "
            "that puts out several tensors, choose one"
        )
    batch = real_numbers(activation, what)
    shape, is_batch = batch.shape, batch.ndim > 3
    if channel_dim is not None:
        batch, is_batch = _channels_first(batch, channel_dim, grid, what)
    elif grid is not None:
        batch = _folded(batch, grid, what)
        is_batch = batch.ndim > 3
    if batch.numel() == 0 or (channel_dim is None and batch.ndim not in (3, 4, 5)):
        raise InvalidArgumentError(
            f"{what} must be (N, C, H, W) or (C, H, W) with at least one pixel, got shape "
            f"{tuple(batch.shape)}"
            + ("; tokens (N, L, C) need `grid=(rows, columns)`" if batch.ndim in (2, 3) else "")
        )
    if not is_batch:
        batch = batch[None]
    index = integer(sample, "sample")
    if not 0 <= index < len(batch):
        raise InvalidArgumentError(
            f"`sample` must be an index from 0 to {len(batch) - 1}, got {shown(index)} (shape {tuple(shape)})"
        )
    return batch[index]


def _channels_first(
    batch: torch.Tensor, channel_dim: int, grid: tuple[int, int] | None, what: str
) -> tuple[torch.Tensor, bool]:
    """Return values that count channels in the given dimension as (N, C, ...) or (C, ...), and which."""
    rank, channel_dim = batch.ndim, integer(channel_dim, "channel_dim")
    if not -rank <= channel_dim < rank:
        raise InvalidArgumentError(
            f"`channel_dim` must be a dimension of {what}, got {shown(channel_dim)} "
            f"(shape {tuple(batch.shape)})"
        )
    dim = channel_dim % rank
    if grid is not None:
        if rank not in (2, 3) or (rank == 3 and dim == 0):
            raise InvalidArgumentError(f"`grid` needs tokens (N, L, C), got shape {tuple(batch.shape)}")
        return _folded(batch.movedim(dim, -1), grid, what), rank == 3
    if dim == 0 and 2 <= rank <= 4:  # (C, L), (C, H, W), (C, D, H, W)
        return batch, False
    if (rank in (4, 5) and dim > 0) or (rank, dim) == (3, 1):
        return batch.movedim(dim, 1), True
    raise InvalidArgumentError(
        f"{what} must be maps with rows and columns, got shape {tuple(batch.shape)} with channels in "
        f"dimension {dim}" + ("; tokens (N, L, C) need `grid=(rows, columns)`" if rank in (2, 3) else "")
    )


def _folded(tokens: torch.Tensor, grid: tuple[int, int], what: str) -> torch.Tensor:
    try:
        rows, columns = (operator.index(size) for size in grid)
    except Exception:
        raise InvalidTypeError(f"`grid` must be (rows, columns), got {shown(grid)}") from None
    if tokens.ndim not in (2, 3) or rows < 1 or columns < 1 or tokens.shape[-2] < rows * columns:
        raise InvalidArgumentError(
            f"`grid` must have at most as many places as {what} has tokens (N, L, C), got {rows} x {columns} "
            f"(shape {tuple(tokens.shape)})"
        )
    places = tokens[..., tokens.shape[-2] - rows * columns :, :]
    return places.transpose(-2, -1).reshape(*places.shape[:-2], places.shape[-1], rows, columns)
