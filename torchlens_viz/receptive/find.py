"""Receptive fields: which region of the input a position of a layer sees."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import islice
from math import ceil, floor, isfinite, log
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from torchlens_viz.arguments import made_of, shown
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import capture
from torchlens_viz.hooks.layout import Layout, mixes_layouts
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.layers import Selector, select
from torchlens_viz.models.state import inference, like_parameters, refuse_quantized
from torchlens_viz.nested import tensors
from torchlens_viz.receptive.dependence import Dependence
from torchlens_viz.receptive.extents import Extents
from torchlens_viz.receptive.field import ReceptiveField, Span
from torchlens_viz.receptive.places import Grid, Standing, standings, thin

_PROBES: Final = 5
_LONGEST: Final = 2**24  # positions along an axis, each of which has a region


def receptive_field(
    model: nn.Module,
    layer: Selector,
    input_shape: Sequence[int],
    *,
    inputs: ModelInputs = None,
    channel_dim: int | None = None,
) -> ReceptiveField:
    """Find which region of the input each position of a layer sees.

    The model runs once, in eval mode, as far as the layer, on what stands for an image of that shape and
    knows which pixels every value depends on. Convolutions (dilated, strided, padded, grouped, transposed),
    pooling, resizing, branches that are added or concatenated, gates and attention are followed exactly.
    If the model does anything else, the region is measured instead: where the gradient of some positions is
    not zero.

    All channels of the layer count together, and weights count as if none were zero. The statistics that
    instance and group normalisation take over the whole image do not count, or else every layer would see
    everything. The model, its flags and the random numbers stay as they are; its own forward hooks run.

    Args:
        model: A model that takes one image batch, or more, see `inputs`.
        layer: Which layer, by a selector that finds exactly one. Of several calls, the first counts.
        input_shape: (N, C, ...) of the input, with one to three spatial axes; N does not matter.
        inputs: What the model takes beside the image, as in `torchlens_viz.maximize`.
        channel_dim: The dimension that counts channels in what the layer puts out: 1 in (N, C, H, W), -1 in
            (N, H, W, C). None finds it, as in `torchlens_viz.capture`.

    Returns:
        Size, stride and start per spatial axis, and the region of every position.

    Raises:
        LayerNotFoundError: The model has no such layer.
        InvalidArgumentError: Several layers match, the shape is none, or the layer does not depend on the
            image or puts out several tensors.
        InvalidTypeError: An argument has another type.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        >>> field = receptive_field(net, "2", (1, 3, 64, 64))
        >>> field.size, field.stride, field.start
        ((11, 11), (4.0, 4.0), (-5, -5))
        >>> field.region((0, 2)), field.center((0, 2))
        ((slice(0, 6, None), slice(3, 14, None)), (0.0, 8.0))

    Source:
        Araujo, Norris & Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019.
    """
    followed = _followed(called_with(model, inputs), layer, input_shape, channel_dim)
    return followed if isinstance(followed, ReceptiveField) else _measured(*followed)


def followed_field(model: nn.Module, layer: Selector, input_shape: Sequence[int]) -> ReceptiveField | None:
    """Find the same as `receptive_field` in one pass; None where it would have to be measured.

    Raises:
        LayerNotFoundError: The model has no such layer.
        InvalidArgumentError: As in `receptive_field`.
    """
    followed = _followed(model, layer, input_shape, None)
    return followed if isinstance(followed, ReceptiveField) else None


def _followed(
    model: nn.Module, layer: Selector, input_shape: Sequence[int], channel_dim: int | None
) -> ReceptiveField | tuple[nn.Module, str, tuple[int, ...], Layout]:
    """Return the field, or what `_measured` takes where the model does something that cannot be followed."""
    found = select(model, layer)
    if len({id(module) for _, module in found}) > 1:
        names = ", ".join(f"`{name}`" for name, _ in found[:4]) + (", ..." if len(found) > 4 else "")
        raise InvalidArgumentError(f"`layer` must find one layer, got {len(found)}: {names}")
    name = found[0].name
    shape = _checked_shape(input_shape)
    layout = Layout(found, channel_dim)
    try:
        output = _traced(model, name, shape)
    except Exception:  # whatever it is that extents cannot do, the model may be able to do with numbers
        output = None
    if output is None:
        return model, name, shape, layout
    if layout.must_follow and mixes_layouts(model):
        _follow(model, name, shape, layout)
    return field_of(output, name, shape, layout.found(output.parts[0], name))


def _checked_shape(given: Sequence[int]) -> tuple[int, ...]:
    rule = f"`input_shape` must be (N, C, ...) with one to three spatial axes, got {shown(given)}"
    shape = made_of(given, lambda sizes: tuple(map(operator.index, islice(sizes, 6))), rule)
    if not 3 <= len(shape) <= 5 or min(shape) < 1 or max(shape) > _LONGEST:
        raise InvalidArgumentError(f"{rule}; pass `tuple(batch.shape)`")
    return (1, *shape[1:])


def _traced(model: nn.Module, name: str, shape: tuple[int, ...]) -> Extents | None:
    """Run the model on extents; None where its output is a constant to them."""
    # Told where channels are, which does not matter here, the capture need not follow every operation.
    recording = capture(model, name, copy=False, stop=True, channel_dim=1)
    with inference(model), Dependence(), recording as acts:
        model(Extents.of_input(shape))
    output = next(tensors(acts.calls(name)[0]), None) if acts.calls(name) else None
    is_single = len(list(tensors(acts.calls(name)[:1]))) == 1
    return output if isinstance(output, Extents) and is_single else None


def _follow(model: nn.Module, name: str, shape: tuple[int, ...], layout: Layout) -> None:
    """Let the layout see how the layer's output is made of an image."""
    image = like_parameters(torch.zeros(shape, device="cpu"), model)
    with inference(model), capture(model, name, copy=False, stop=True) as acts, layout.following():
        model(image)
        for output in tensors(acts.calls(name)[:1]):
            layout.found(output, name)


def field_of(output: Extents, name: str, shape: tuple[int, ...], dim: int | None) -> ReceptiveField:
    """Return the receptive field of a layer that puts out these extents.

    Args:
        output: What it puts out, for an input of extents.
        name: Its name, for the error.
        shape: The shape of the input.
        dim: Which dimension of the output counts channels, if that is known.

    Raises:
        InvalidArgumentError: It does not depend on the input.
    """
    sizes, axes = output.parts[0].shape, shape[2:]
    has_positions = len(sizes) == len(shape)
    # With channels last, what an axis sees changes along the dimension before.
    firsts = {1: (2,), len(shape) - 1: (1,)}.get(dim or 0, (2, 1))
    first_dim = max(firsts, key=lambda first: _likeness(output, first, shape)) if has_positions else 2
    spans: list[list[Span]] = []  # of all axes, with padding and then without
    for index in range(0, len(output.parts), 2):
        keep = first_dim + index // 2 % len(axes) if has_positions else None
        lows, highs = (_along(part, keep) for part in output.parts[index : index + 2])
        spans.append([_whole(-low, high) for low, high in zip(lows, highs, strict=True)])
    outer, inner = spans[: len(axes)], spans[len(axes) :]
    if any(all(first > last for first, last in each) for each in inner):
        raise InvalidArgumentError(f"`{name}` does not depend on the image; choose a layer that does")
    map_shape = sizes[first_dim : first_dim + len(axes)] if has_positions else ()
    grids = []
    others = [each for each in range(len(sizes)) if not first_dim <= each < first_dim + len(axes)]
    places = [place.mean(others) for place in output.places]  # all channels count together
    for axis, (each, how) in enumerate(zip(outer, standings(places), strict=True)):
        grid = _grid_along(how, first_dim + axis, len(each)) if has_positions else None
        grids.append(grid or _even(len(each), shape[axis + 2]))
    return _field(map_shape, shape, outer, grids, inner)


def _grid_along(how: Standing, dim: int, count: int) -> Grid | None:
    """Return the grid of the positions along a dimension; None where they lie elsewhere, or not evenly."""
    return how.grid if how.dim == dim or (not how.varies and count == 1) else None


def _along(part: torch.Tensor, dim: int | None) -> list[float]:
    """Return the maximum over all dimensions but one."""
    (part,) = thin([part], keep=() if dim is None else [dim])  # what is broadcast is looked at once
    values: list[float] = part.amax([each for each in range(part.ndim) if each != dim]).reshape(-1).tolist()
    return values


def _likeness(output: Extents, first_dim: int, shape: tuple[int, ...]) -> tuple[int, int, float]:
    """Tell how much the dimensions from `first_dim` on look like the axes of the input.

    First counts which of them lie there, then what changes along them, and where neither tells, how alike
    their scales are.
    """
    lying = sum(
        how.varies and how.dim == first_dim + axis for axis, how in enumerate(standings(output.places))
    )
    varying = sum(
        len(set(_along(part, first_dim + index // 2))) > 1
        for index, part in enumerate(output.parts[: 2 * len(shape) - 4])
    )
    sizes = output.parts[0].shape[first_dim:]
    scales = [log(size / count) for size, count in zip(shape[2:], sizes, strict=False)]
    return lying, varying, min(scales) - max(scales)


def _even(count: int, size: int) -> Grid:
    """Return the grid that divides an axis of the input evenly."""
    step = size / count
    return Grid((step - 1) / 2, step)


def _whole(first: float, last: float) -> Span:
    """Return a span in whole pixels; one that holds nothing is (0, -1)."""
    return (floor(first), ceil(last)) if isfinite(first) and isfinite(last) else (0, -1)


def _field(
    map_shape: Sequence[int],
    shape: tuple[int, ...],
    spans: Sequence[Sequence[Span]],
    grids: Sequence[Grid],
    inner: Sequence[Sequence[Span]] | None = None,
) -> ReceptiveField:
    return ReceptiveField(
        stride=tuple(grid.step for grid in grids),
        input_shape=shape[2:],
        map_shape=tuple(map_shape),
        is_exact=inner is not None,
        _origin=tuple(grid.origin for grid in grids),
        _spans=tuple(tuple(each) for each in spans),
        _inner=tuple(tuple(each) for each in (inner or spans)),
    )


def _measured(model: nn.Module, name: str, shape: tuple[int, ...], layout: Layout) -> ReceptiveField:
    """Look where the gradient of a few positions along the diagonal of the map is not zero."""
    with inference(model), torch.inference_mode(False), torch.enable_grad():
        noise = torch.rand((2, *shape[1:]), generator=_seeded(0), device="cpu")
        image = like_parameters(noise, model).requires_grad_()
        with capture(model, name, grad=True, stop=True) as acts, layout.following():
            with shown_to(model, image, "input_shape"):
                model(image * 1)  # a model may work in place on its input, but not on a leaf
        output = _only_tensor(acts.calls(name), name)
        if output.ndim == len(shape):
            output = output.movedim(layout.channel_dim(output, name), 1)
        if not output.requires_grad:
            refuse_quantized(model)
            raise InvalidArgumentError(
                f"`{name}` has no gradient with respect to the image, so that what it sees cannot be "
                "measured; choose a layer that depends on the image differentiably"
            )
        has_positions = output.ndim == len(shape)
        sizes = tuple(output.shape[2:]) if has_positions else ()
        probes = [[round(part * (size - 1)) for size in sizes] for part in np.linspace(0, 1, _PROBES)]
        hulls = [_hull(output, probe, image) for probe in (probes if has_positions else [[]])]
    spans, grids = [], []
    for axis, size in enumerate(shape[2:]):
        seen = [hull[axis] for hull in hulls if hull]
        if not seen:
            raise InvalidArgumentError(f"`{name}` does not depend on the image; choose a layer that does")
        if not has_positions:
            spans.append(seen)
            grids.append(_even(1, size))
            continue
        at = [probe[axis] for probe, hull in zip(probes, hulls, strict=True) if hull]
        table, grid = _between(at, seen, sizes[axis], size)
        spans.append(table)
        grids.append(grid)
    return _field(sizes, shape, spans, grids)


def _only_tensor(calls: tuple[Any, ...], name: str) -> torch.Tensor:
    found = list(tensors(calls[:1]))
    if len(found) != 1:
        what = f"puts out {len(found)} tensors" if calls else "did not run"
        raise InvalidArgumentError(f"`layer` must put out one tensor, but `{name}` {what}; choose another")
    return found[0]


def _hull(output: torch.Tensor, probe: Sequence[int], image: torch.Tensor) -> list[Span]:
    """Return the first and last pixel along each axis with a gradient, or an empty list."""
    index: tuple[Any, ...] = (slice(None), slice(None), *probe)
    chosen = output[index].float()
    weights = torch.rand(chosen.shape, generator=_seeded(1), device="cpu").to(chosen.device) + 0.5
    (gradient,) = torch.autograd.grad(
        (chosen * weights).sum(), image, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    is_seen = (gradient != 0).any(1).any(0).cpu()
    places = is_seen.nonzero()
    return [(int(place.min()), int(place.max())) for place in places.T] if len(places) else []


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def _between(at: Sequence[int], seen: Sequence[Span], count: int, size: int) -> tuple[list[Span], Grid]:
    """Fill in the positions between the probed ones, from edges that do not lie at the border."""
    step = size / count
    edges = []
    for side, border in ((0, 0), (1, size - 1)):
        inner = sorted(
            {(place, span[side]) for place, span in zip(at, seen, strict=True) if span[side] != border}
        )
        places, values = [place for place, _ in inner], [value for _, value in inner]
        if len(set(places)) > 1:
            slope, base = np.polyfit(places, values, 1)
        else:
            slope, base = (step, values[0] - step * places[0]) if inner else (0.0, float(border))
        edges.append((float(slope), float(base)))
    (low_slope, low), (high_slope, high) = edges
    spans = [
        (floor(low + low_slope * index + 0.01), ceil(high + high_slope * index - 0.01))
        for index in range(count)
    ]
    if low_slope > 0 and high_slope > 0:
        slope = round((low_slope + high_slope) / 2, 6)
        return spans, Grid(round((low + high) / 2, 6), slope)
    return spans, _even(count, size)
