"""`make_grid`: the composer, pixel for pixel torchvision's, as a handful of whole-tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import inf

import torch

from torchlens_viz.arguments import check_dense, flag, has_values, integer, made_of, real, shown, wide
from torchlens_viz.draw.scale import finite_range
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

# torchvision does not stretch a range narrower than this, and neither does its drop-in.
_NARROWEST = 1e-5
_MOST_PIXELS = 2**30


@torch.no_grad()
def make_grid(
    tensor: torch.Tensor | Sequence[torch.Tensor],
    nrow: int = 8,
    padding: int = 2,
    normalize: bool = False,
    value_range: Sequence[float] | None = None,
    scale_each: bool = False,
    pad_value: float = 0.0,
) -> torch.Tensor:
    """Compose a batch of images into one image; a drop-in for `torchvision.utils.make_grid`.

    The pixels are torchvision's bit for bit on CPU, for every dtype. It differs only where torchvision fails:
    with `normalize`, the range is that of the finite values, NaN stays NaN and +-Inf become 1 and 0; integers
    are normalised in float32; an empty batch raises; a batch of one is a copy, never the input itself.

    Args:
        tensor: Images (N, C, H, W), one image (C, H, W) or (H, W), or a list of images of one shape. One
            channel becomes three.
        nrow: Images per row, that is, the number of columns.
        padding: Pixels between images and around them; a batch of one gets none.
        normalize: Shift and stretch values to [0, 1].
        value_range: Limits (low, high) to normalise by, instead of the least and the greatest value. Values
            beyond are clipped.
        scale_each: Normalise each image by its own range.
        pad_value: Value of the padding.

    Returns:
        A new tensor (C, H', W') of the input's dtype and device (float32 where integers were normalised).

    Raises:
        InvalidTypeError: `tensor` is not a tensor or a list of tensors, or not one of dense numbers.
        InvalidArgumentError: The batch is empty or has another rank, or an option has no meaning.

    Example:
        >>> import torch
        >>> make_grid(torch.rand(6, 1, 4, 4), nrow=3).shape
        torch.Size([3, 14, 20])
    """
    images = _as_batch(tensor)
    nrow, padding = integer(nrow, "nrow"), integer(padding, "padding")
    if nrow < 1:
        raise InvalidArgumentError(f"`nrow` (the number of columns) must be at least 1, got {nrow}")
    if padding < 0:
        raise InvalidArgumentError(f"`padding` must not be negative, got {padding}")
    normalize, scale_each = flag(normalize, "normalize"), flag(scale_each, "scale_each")
    if value_range is not None:
        value_range = _two_numbers(value_range)
    if value_range is not None and not -inf < value_range[0] <= value_range[1] < inf:
        raise InvalidArgumentError(
            f"`value_range` must be (low, high) with low <= high, both finite, got {tuple(value_range)}"
        )
    height = -(-len(images) // nrow) * (images.shape[2] + padding)
    width = min(nrow, len(images)) * (images.shape[3] + padding)
    if height * width > _MOST_PIXELS:
        raise InvalidArgumentError(
            f"the grid would have {height:,} x {width:,} pixels; use less `padding`, or compose fewer images"
        )
    pad_value = real(pad_value, "pad_value")
    if images.dtype.is_floating_point and torch.finfo(images.dtype).max < abs(pad_value) < inf:
        raise InvalidArgumentError(f"`pad_value` must be a number of {images.dtype}, got {pad_value}")
    if normalize:
        images = _normalized(images, value_range, scale_each)
    channels = 3 if images.shape[1] == 1 else images.shape[1]
    if len(images) == 1:
        return images[0].expand(channels, -1, -1).clone(memory_format=torch.contiguous_format)
    if images.is_quantized:
        raise InvalidTypeError(f"`tensor` must hold plain numbers, got {images.dtype}; pass `.dequantize()`")
    return compose(images.expand(-1, channels, -1, -1), columns=nrow, padding=padding, pad_value=pad_value)


def compose(
    tiles: torch.Tensor,
    *,
    columns: int,
    padding: int,
    pad_value: float,
    upscale: int = 1,
    header: int = 0,
    gap: int = 0,
    frame: float | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """Lay tiles out in rows, each enlarged by itself, with padding between and around them.

    Args:
        tiles: (N, C, H, W), any dtype; an expanded channel dimension is laid out once and copied.
        columns: Tiles per row; no more than N are used.
        padding: Pixels between tiles and around the whole.
        pad_value: Value of the padding and of places without a tile.
        upscale: Each pixel of a tile becomes `upscale` x `upscale` pixels.
        header: Rows of padding that each tile gets above it, for a label.
        gap: Columns of padding that each tile gets to its right besides, for a label wider than the tile.
        frame: Value of a line, one pixel wide, around each tile, where there is padding; None for none.
        channels_last: Have the channels of a pixel lie side by side in memory, as pictures have them.

    Returns:
        (C, H', W') with H' = rows * (upscale * H + padding) + padding, and W' alike.
    """
    count, channels, height, width = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cell_height, cell_width = header + height * upscale + padding, width * upscale + gap + padding
    grid_height, grid_width = cell_height * rows + padding, cell_width * columns + padding
    if channels_last:
        grid = tiles.new_empty((grid_height, grid_width, channels)).movedim(2, 0)
    else:
        grid = tiles.new_empty((channels, grid_height, grid_width))
    distinct = 1 if tiles.stride(1) == 0 else channels
    grid[:distinct].fill_(pad_value)
    if frame is not None and padding:
        step, size = (cell_height, cell_width), (height * upscale, width * upscale)
        in_last = count - (rows - 1) * columns
        for first, tiled in ((0, (rows - 1, columns)), (rows - 1, (1, in_last))):
            corner = padding + header + first * cell_height, padding
            _frame(grid[:distinct], corner, tiled, step, size, frame)
    plane, row, pixel = grid.stride()
    top = (padding + header) * row
    cells = grid.as_strided(
        (distinct, rows, height, columns, width, upscale),
        (plane, cell_height * row, upscale * row, cell_width * pixel, upscale * pixel, pixel),
        top + padding * pixel,
    )
    full, rest = divmod(count, columns)
    sources = tiles[:, :distinct, :, :, None]
    if full:
        by_row = sources[: full * columns].view(full, columns, distinct, height, width, 1)
        cells[:, :full].copy_(by_row.permute(2, 0, 3, 1, 4, 5))
    if rest:
        cells[:, full, :, :rest].copy_(sources[full * columns :].permute(1, 2, 0, 3, 4))
    if upscale > 1:  # whole lines of the grid, which lie in one piece
        lines = grid.as_strided(
            (distinct, rows, height, upscale, grid_width),
            (plane, cell_height * row, upscale * row, row, pixel),
            top,
        )
        lines[:, :, :, 1:] = lines[:, :, :, :1]
    grid[distinct:] = grid[:1]
    return grid


def _frame(
    grid: torch.Tensor,
    corner: tuple[int, int],
    cells: tuple[int, int],
    step: tuple[int, int],
    size: tuple[int, int],
    value: float,
) -> None:
    """Draw a line, one pixel wide, around tiles that stand in rows and columns of a grid (C, H, W).

    Args:
        grid: Where to.
        corner: Row and column of the first pixel of the first tile.
        cells: How many rows of how many tiles.
        step: How many pixels from one to the next, down and across.
        size: Height and width of a tile.
        value: Of the line.
    """
    plane, row, pixel = grid.stride()
    height, width = size
    strides = (plane, step[0] * row, step[1] * pixel)
    begin = grid.storage_offset() + (corner[0] - 1) * row + (corner[1] - 1) * pixel
    for side in (0, (height + 1) * row):
        grid.as_strided((len(grid), *cells, width + 2), (*strides, pixel), begin + side).fill_(value)
    for side in (0, (width + 1) * pixel):
        grid.as_strided((len(grid), *cells, height), (*strides, row), begin + row + side).fill_(value)


def _two_numbers(value_range: Sequence[float]) -> tuple[float, float]:
    rule = f"`value_range` must be (low, high), got {shown(value_range)}"
    low, high = made_of(value_range, _two_floats, rule)
    return low, high


def _two_floats(given: Sequence[float]) -> tuple[float, float]:
    low, high = (float(end) for end in islice(given, 3))
    return low, high


def _as_batch(tensor: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    if isinstance(tensor, list | tuple):
        for image in tensor:
            if not isinstance(image, torch.Tensor):
                raise InvalidTypeError(
                    f"`tensor` must be a tensor or a list of tensors, got a list with {type(image).__name__}"
                )
            check_dense(image, "`tensor`")
        if not tensor:
            raise InvalidArgumentError("`tensor` must hold at least one image, got an empty list")
        if len({image.shape for image in tensor}) > 1:
            shapes = sorted({tuple(image.shape) for image in tensor})
            raise InvalidArgumentError(f"`tensor` must hold images of one shape, got shapes {shapes}")
        tensor = torch.stack(list(tensor))
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"`tensor` must be a tensor or a list of tensors, got {type(tensor).__name__}")
    check_dense(tensor, "`tensor`")
    if not 2 <= tensor.ndim <= 4:
        raise InvalidArgumentError(
            "`tensor` must be images (N, C, H, W), one image (C, H, W) or (H, W), "
            f"got shape {tuple(tensor.shape)}"
        )
    images = tensor[(None,) * (4 - tensor.ndim)]
    if images.shape[0] == 0 or images.shape[1] == 0:
        raise InvalidArgumentError(f"`tensor` must hold at least one image, got shape {tuple(tensor.shape)}")
    return images


def _normalized(images: torch.Tensor, value_range: Sequence[float] | None, scale_each: bool) -> torch.Tensor:
    if images.is_complex():
        raise InvalidTypeError(f"`normalize` needs real values, got {images.dtype}; pass `tensor.abs()`")
    if images.is_quantized:
        raise InvalidTypeError(f"`normalize` needs plain numbers, got {images.dtype}; pass `.dequantize()`")
    if not has_values(images):
        raise InvalidTypeError("`normalize` needs values, got a tensor on meta; load its values first")
    if images.is_floating_point() and images.dtype.itemsize == 1:
        raise InvalidTypeError(f"`normalize` needs a type to compute in, got {images.dtype}; pass `.float()`")
    if images.numel() == 0:
        raise InvalidArgumentError(f"`normalize` needs at least one pixel, got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        images = images.float()
    if value_range is not None:
        low, high = value_range
        return images.clamp(min=low, max=high).sub_(low).div_(max(high - low, _NARROWEST))
    groups = (images if scale_each else images[None]).flatten(1)
    lows, highs, all_finite = finite_range(groups)
    lows, highs = lows[:, None, None, None], highs[:, None, None, None]
    if not all_finite:
        images = images.clamp(lows, highs)
    # As torchvision does it: the width in double precision, the division in the type that the CPU computes
    # half precision in, and a rounding to the dtype after each of the two steps.
    compute = torch.promote_types(images.dtype, torch.float32)
    widths = (wide(highs) - wide(lows)).clamp_(min=_NARROWEST).to(images.device, compute)
    return (images - lows).to(compute).div_(widths).to(images.dtype)
