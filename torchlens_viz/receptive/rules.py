"""Dependence: what each operation of a network makes of extents, its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import torch

from torchlens_viz.nested import map_tensors, tensors
from torchlens_viz.receptive.extents import (
    Extents,
    UnknownOperationError,
    mixing,
    spread,
    union,
)
from torchlens_viz.receptive.places import Grid, Place, common_places, standings, thin
from torchlens_viz.receptive.spatial import (
    adaptive_pooling,
    as_extents,
    bound,
    convolution,
    extents_in,
    interpolate,
    pad,
    pooling,
    shape_of,
)

_Rule: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _is_in_place(func: Callable[..., Any]) -> bool:
    return func.__name__.endswith("_") and not func.__name__.endswith("__")


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every element depends on itself; what is learned or fixed does not count."""
    x = args[0] if args else kwargs.get("input")
    if len(known := extents_in(args, kwargs)) > 1 or not isinstance(x, Extents):
        raise UnknownOperationError(f"`{func.__name__}` of {len(known)} tensors")
    # A new object over the same memory, which is never written to.
    return x if _is_in_place(func) else Extents(x.parts, x.places)


def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    known = extents_in(args, kwargs)
    shapes = [tensor.shape for tensor in tensors((args, kwargs))]
    shape = shapes[0]
    if any(each != shape for each in shapes):  # asking takes longer than all else here
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    parts = [union(each, shape) for each in zip(*(x.parts for x in known), strict=True)]
    made = Extents(parts, common_places([x.places for x in known], shape))
    if _is_in_place(func):
        target = as_extents(args[0])
        target.parts, target.places = made.parts, made.places
        return target
    return made


def _each(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply what only moves elements, or asks for the shape, to every part."""
    if func.__name__ in ("view", "contiguous"):  # broadcast memory cannot always be viewed
        func = torch.Tensor.reshape if func.__name__ == "view" else torch.Tensor.detach
        args, kwargs = (args if func is torch.Tensor.reshape else args[:1]), {}
    known = extents_in(args, kwargs)

    def run(choose: Callable[[Extents], torch.Tensor]) -> Any:
        def chosen(tensor: torch.Tensor) -> torch.Tensor:
            return choose(tensor) if isinstance(tensor, Extents) else tensor.cpu()

        return func(*map_tensors(chosen, args), **map_tensors(chosen, kwargs))

    first = run(partial(_part, index=0))
    is_one = isinstance(first, torch.Tensor)
    if not is_one and not (
        isinstance(first, tuple | list) and any(isinstance(each, torch.Tensor) for each in first)
    ):
        return first
    outputs = [first, *(run(partial(_part, index=index)) for index in range(1, len(known[0].parts)))]
    axes = range(len(known[0].places))
    numbers = [run(partial(_number, axis=axis)) for axis in axes]
    grids = [place.grid for place in known[0].places]
    if is_one:
        return Extents(outputs, [Place(number, grid) for number, grid in zip(numbers, grids, strict=True)])
    made = zip(zip(*outputs, strict=True), zip(*numbers, strict=True), strict=True)
    return type(first)(
        Extents(parts, [Place(number, grid) for number, grid in zip(each, grids, strict=True)])
        for parts, each in made
    )


def _cat(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = bound("tensors dim", args, kwargs)
    dim = (given["dim"] or 0) % max(each.ndim for each in given["tensors"])
    return _joined(given["tensors"], dim, is_new=False)


def _joined(given: Sequence[Any], dim: int, *, is_new: bool) -> Extents:
    """Put tensors side by side, along a dimension that they had or a new one."""
    known = extents_in(given)
    parts = []
    for index in range(len(known[0].parts)):
        # A constant depends on no pixel.
        each = [
            x.parts[index]
            if isinstance(x, Extents)
            else torch.tensor(-torch.inf, device="cpu").expand(x.shape)
            for x in given
        ]
        joined = torch.cat(thin(each, keep=[dim]), dim)
        parts.append(joined.expand(*known[0].shape[:dim], -1, *known[0].shape[dim + 1 :]))
    return Extents(parts, _joined_places(given, dim, parts[0].shape, is_new=is_new))


def _part(x: Extents, *, index: int) -> torch.Tensor:
    return x.parts[index]


def _number(x: Extents, *, axis: int) -> torch.Tensor:
    return x.places[axis].number


def _joined_places(given: Sequence[Any], dim: int, shape: torch.Size, *, is_new: bool) -> list[Place]:
    """Return the places of what was put side by side: those of each along an axis, else common ones."""
    known = extents_in(given)
    apart = [
        is_new or any(dim in x.places[axis].dims() for x in known) for axis in range(len(known[0].places))
    ]
    sides = [[place.moved(lambda number: number.narrow(dim, 0, 1)) for place in x.places] for x in known]
    common = common_places(sides, [*shape[:dim], 1, *shape[dim + 1 :]])
    found = []
    for axis, place in enumerate(common):
        if not apart[axis]:
            found.append(place.moved(lambda number: number.expand(shape)))
            continue
        pixels = [x.places[axis].pixels() if isinstance(x, Extents) else None for x in given]
        middle = torch.stack([each.mean() for each in pixels if each is not None]).mean()
        filled = [  # a constant stands nowhere
            middle.expand(x.shape) if each is None else each for x, each in zip(given, pixels, strict=True)
        ]
        found.append(Place(torch.cat(thin(filled, keep=[dim]), dim).expand(shape), Grid(0.0, 1.0)))
    return found


def _stack(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = bound("tensors dim", args, kwargs)
    dim, shape = given["dim"] or 0, given["tensors"][0].shape
    dim = dim % (len(shape) + 1)
    known = [
        x.moved(lambda part: part.unsqueeze(dim)) if isinstance(x, Extents) else x.unsqueeze(dim)
        for x in given["tensors"]
    ]
    return _joined(known, dim, is_new=True)


def _item(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = as_extents(args[0]), args[1]
    made: Extents = _each(func, args, kwargs)
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(entry, slice) or entry is Ellipsis for entry in entries):
        return made
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (x.ndim - len(entries) + 1)
    places = list(made.places)
    for axis, how in enumerate(standings(x.places)):
        if how.varies and how.dim is not None and how.grid is not None and how.dim < len(entries):
            first, _, step = entries[how.dim].indices(x.shape[how.dim])
            if made.shape[how.dim] == 1:  # whose distance to the next one would not be known any more
                origin, distance = how.grid
                places[axis] = Place.at(made.shape, Grid(origin + first * distance, distance * step))
    return Extents(made.parts, places)


def _set_item(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, index, value = args
    target = as_extents(target)
    nothing = torch.tensor(-torch.inf, device="cpu")  # a constant depends on no pixel
    values = value.parts if isinstance(value, Extents) else [nothing] * len(target.parts)
    parts = [part.clone(memory_format=torch.contiguous_format) for part in target.parts]
    for part, new in zip(parts, values, strict=True):
        part[index] = new
    target.parts = tuple(parts)


def _shuffle(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    made: Extents = _each(func, args, kwargs)
    factor = args[1] if len(args) > 1 else next(iter(kwargs.values()))
    step = 1 / factor if func.__name__ == "pixel_shuffle" else float(factor)
    places = []
    for axis, how in enumerate(standings(as_extents(args[0]).places)):
        if how.grid is None or how.dim != axis + 2 or made.ndim != len(made.places) + 2:
            raise UnknownOperationError(f"`{func.__name__}` of a tensor whose axes have changed places")
        grid = Grid(how.grid.origin + (step / 2 - 0.5) * how.grid.step, step * how.grid.step)
        places.append(Place.along(how.dim, made.shape, grid))
    return Extents(made.parts, places)


def _reduction(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = bound("input dim keepdim", args, kwargs)
    x, dim = as_extents(given["input"]), given["dim"]
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return mixing(x, list(dims), keepdim=bool(given["keepdim"]))


def _softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = "input p dim" if func.__name__ == "normalize" else "input dim"
    given = bound(names, args, kwargs)
    x, dim = as_extents(given["input"]), given["dim"]
    if func.__name__ == "normalize" and dim is None:
        dim = 1
    if not isinstance(dim, int):
        raise UnknownOperationError(f"`{func.__name__}` without `dim`")
    return Extents(mixing(x, [dim], x.shape).parts, x.places)  # each value still belongs where it stood


def _layer_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = bound("input normalized_shape", args, kwargs)
    x = as_extents(given["input"])
    parts = mixing(x, [-1], x.shape).parts if len(given["normalized_shape"]) == 1 else x.parts
    return Extents(parts, x.places)


def _linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = as_extents(bound("input weight bias", args, kwargs)["input"])
    return mixing(x, [-1], shape_of(func, args, kwargs))


def _matmul(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or min(each.ndim for each in args) < 2:
        raise UnknownOperationError(f"`{func.__name__}` of vectors")
    rows = [mixing(x, [-1]) for x in args[:1] if isinstance(x, Extents)]
    columns = [mixing(x, [-2]) for x in args[1:] if isinstance(x, Extents)]
    return spread([*rows, *columns], shape_of(func, args, kwargs))


def _einsum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    equation, operands = args[0], args[1:]
    left, arrow, right = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("",) * 3
    terms = left.split(",")
    if not arrow or len(terms) != len(operands) or any(len(set(term)) < len(term) for term in terms):
        raise UnknownOperationError(f"`einsum` of {equation!r}")
    known = []
    for term, x in zip(terms, operands, strict=True):
        if isinstance(x, Extents):
            summed = [dim for dim, letter in enumerate(term) if letter not in right]
            order = [term.index(letter) for letter in right if letter in term]
            index: list[Any] = [slice(None) if letter in term else None for letter in right]
            index += [0] * len(summed)
            known.append(mixing(x, summed).moved(partial(_arranged, dims=order + summed, index=index)))
    return spread(known, shape_of(func, args, kwargs))


def _arranged(part: torch.Tensor, *, dims: list[int], index: list[Any]) -> torch.Tensor:
    return part.permute(dims)[tuple(index)]


def _constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take only the shape of extents."""
    return func(as_extents(args[0]).parts[0], *args[1:], **kwargs)


def _like(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the shape, or only the type, of a second tensor."""
    x = as_extents(args[0])
    shape = x.shape if func.__name__ == "type_as" else args[1].shape
    move = torch.Tensor.reshape if func.__name__ in ("reshape_as", "view_as") else torch.Tensor.expand
    return x.moved(lambda part: move(part, shape))


def _attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    query, *others = (bound("query key value", args, kwargs)[name] for name in ("query", "key", "value"))
    if func.__name__ == "scaled_dot_product_attention":
        shape = torch.Size([*query.shape[:-1], others[1].shape[-1]])
        everywhere = [mixing(x, [-1, -2]) for x in others if isinstance(x, Extents)]
        return spread([mixing(query, [-1]), *everywhere], shape)
    first = 0 if query.ndim == 3 else -2  # sequences lie along dimension 0 here
    everywhere = [mixing(x, [-1, first]) for x in others if isinstance(x, Extents)]
    return spread([mixing(query, [-1]), *everywhere], query.shape), None


# By name, because the same operation is a method, a function of torch and one of torch.nn.functional.
_NAMES: Final[dict[_Rule, str]] = {
    _same: """
        alpha_dropout batch_norm bfloat16 celu clone cos cpu cuda data detach double dropout dropout1d
        dropout2d dropout3d elu elu_ erf exp feature_alpha_dropout feature_dropout float gelu group_norm
        half hardshrink hardsigmoid hardswish hardtanh hardtanh_ instance_norm leaky_relu leaky_relu_
        local_response_norm log log1p logsigmoid mish prelu relu relu6 relu_ requires_grad_
        rrelu rsqrt selu selu_ sigmoid sigmoid_ silu sin softplus softsign sqrt square tanh tanh_ tanhshrink
        threshold to type
    """,
    _elementwise: """
        abs add add_ addcmul clamp clamp_ clamp_max clamp_min clip div div_ fmax fmin lerp maximum minimum mul
        mul_ multiply neg pow reciprocal rsub sub sub_ subtract true_divide where __add__ __radd__ __mul__
        __rmul__ __sub__ __rsub__ __truediv__ __rtruediv__ __pow__
    """,
    _each: """
        __get__ __len__ broadcast_to channel_shuffle chunk contiguous dim expand flatten flip is_complex
        is_contiguous is_floating_point movedim moveaxis narrow native_channel_shuffle ndimension nelement
        numel permute ravel repeat repeat_interleave reshape roll select size split split_with_sizes squeeze
        swapaxes swapdims t tensor_split tile transpose unbind unflatten unsqueeze view
    """,
    _cat: "cat concat concatenate",
    _stack: "stack",
    _item: "__getitem__",
    _set_item: "__setitem__",
    _shuffle: "pixel_shuffle pixel_unshuffle",
    _like: "expand_as reshape_as type_as view_as",
    _constant: "new_empty new_full new_ones new_zeros ones_like zeros_like",
    _reduction: "amax amin mean sum",
    _softmax: "log_softmax normalize softmax softmin",
    _layer_norm: "layer_norm rms_norm",
    _linear: "linear",
    _matmul: "__matmul__ bmm matmul",
    _einsum: "einsum",
    _attention: "multi_head_attention_forward scaled_dot_product_attention",
    convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    pooling: "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d",
    adaptive_pooling: """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    """,
    pad: "pad",
    interpolate: "interpolate",
}
RULES: Final = {name: rule for rule, names in _NAMES.items() for name in names.split()}
