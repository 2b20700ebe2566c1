"""Where the channels of each tensor are: followed from operation to operation while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, final

import torch
from torch.utils._pytree import tree_leaves

from torchlens_viz.models.watching import Following

# How a tensor is known again: not as an object, of which autograd makes new ones, but by its place in memory.
_Key: TypeAlias = tuple[int | tuple[int, int], tuple[int, ...], tuple[int, ...]]
# The dimensions that count channels: several where groups or heads stand in a dimension of their own.
_Axes: TypeAlias = frozenset[int]
_Shape: TypeAlias = Sequence[int]
# Given the arguments, the shape and the channels of what was taken, and the shape of what was made.
_Rule: TypeAlias = Callable[[Sequence[Any], dict[str, Any], _Shape, _Axes, _Shape], Iterable[int]]

# The dimensions that count channels, and the operation that said so, by its number in the order of running.
_Seen: TypeAlias = tuple[_Axes, int]

_NONE: Final[_Axes] = frozenset()
_LOST: Final[_Axes] = frozenset({-1})  # there were channels, and now nobody knows where


class _Known(NamedTuple):
    """A tensor that an operation takes, of which the channels are known, as it was before."""

    shape: tuple[int, ...]
    axes: _Axes
    since: int
    tensor: torch.Tensor


@final
class ChannelAxes(Following):  # type: ignore[no-untyped-call]
    """Within it, knows of every tensor which dimension counts channels.

    Convolutions, normalisations and dense layers say it; every other operation passes on where its input has
    them: moved by `permute`, split and joined by `reshape`, kept by the sum of two maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[_Key, _Seen] = {}
        self._clock = 0

    def stop(self) -> None:
        """Follow no longer, and forget."""
        self._is_on = False
        self._found.clear()

    def of(self, tensor: torch.Tensor) -> int | None:
        """Return the dimension of a tensor that counts channels, from 0; None where that is not known."""
        axes = self._axes_of(tensor)
        return min(axes) if len(axes) == 1 and axes != _LOST else None

    def is_untouched(self, tensor: torch.Tensor) -> bool:
        """Tell whether no operation with channels led to a tensor, as to what a network takes."""
        return not self._axes_of(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_on:
            return func(*args, **kwargs)
        known = [  # before it runs: it may change the shape of what it is given
            _Known(tuple(each.shape), *seen, each)
            for each in tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor) and (seen := self._seen(each))[0]
        ]
        result = func(*args, **kwargs)
        name = operation(func)
        self._clock += 1
        is_new = name in _CHANNELS_SECOND | _CHANNELS_LAST | _LAYER_NORMS
        since = self._clock if is_new else min((each.since for each in known), default=self._clock)
        for made in tree_leaves(result):
            key = key_of(made) if isinstance(made, torch.Tensor) else None
            if key is not None:
                axes = frozenset(_followed(name, args, kwargs, known, tuple(made.shape)))
                self._found[key] = axes or (_LOST if known else _NONE), since
        return result

    def _axes_of(self, tensor: torch.Tensor) -> _Axes:
        return self._seen(tensor)[0]

    def _seen(self, tensor: torch.Tensor) -> _Seen:
        key = key_of(tensor)
        return (_NONE, 0) if key is None else self._found.get(key, (_NONE, 0))


def operation(func: Any) -> str:
    """Return the name of what is dispatched, without a sign that it is done in place."""
    schema = getattr(func, "_schema", None)  # what takes functions, such as `cond`, has none
    return str(func) if schema is None else str(schema.name).removeprefix("aten::").rstrip("_")


def key_of(tensor: torch.Tensor) -> _Key | None:
    """Return what tells the values of a tensor from those of others, while they are there."""
    try:
        # What is on the meta device has no address, and still what would be its memory.
        place = tensor.data_ptr() if not tensor.is_meta else _place_of(tensor)
        return place, tuple(tensor.shape), tensor.stride()
    except Exception:  # sparse, without memory, or what stands for a tensor
        return None


def _place_of(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _followed(
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Sequence[_Known],
    made: _Shape,
) -> Iterable[int]:
    """Return which dimensions of a tensor that was made count channels.

    Args:
        name: The operation.
        args: What it was given.
        kwargs: What it was given by name.
        known: Every tensor among these of which the channels are known, and where they are.
        made: The shape of the tensor.
    """
    rank = len(made)
    if name in _CHANNELS_SECOND:
        return [1] if rank > 1 else []
    if name in _CHANNELS_LAST:
        return [rank - 1] if rank > 1 else []
    if name in _LAYER_NORMS:
        return [rank - len(args[1])]
    if name == "matmul" and args[1].ndim < 3:  # a dense layer, where torch does not take it apart
        return [rank - 1] if rank > 1 and args[1].ndim == 2 else []
    sure = [each for each in known if each.axes != _LOST]
    if not sure:
        return []
    if name in _PRODUCTS and all(each.ndim == rank for each in args[:2]):
        return _multiplied(args[0], args[1], sure)
    # The input that passes its channels on is the one that is shaped most alike. Of a sum it is the one that
    # had them first: a branch that mixes tokens, by a layer to which these are channels, ends where it began.
    shape, axes, *_ = min(
        sure, key=lambda each: ((each.shape != made) + (len(each.shape) != rank), each.since)
    )
    rule = _RULES.get(name)
    if rule is not None:
        return rule(args, kwargs, shape, axes, made)
    return axes if len(shape) == rank else []


def _multiplied(left: torch.Tensor, right: torch.Tensor, known: Sequence[_Known]) -> Iterable[int]:
    """Keep rows of the left and columns of the right matrix; what is summed over is gone.

    Queries times keys have no channels, and what weighs values with them has those of the values.
    """
    rows, columns = left.ndim - 2, left.ndim - 1
    ours = next((each.axes for each in known if each.tensor is left), _NONE)
    theirs = next((each.axes for each in known if each.tensor is right), _NONE)
    return (ours - {columns}) | (theirs - {rows})


def _permuted(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    order = [dim % len(shape) for dim in args[1]]
    return [place for place, dim in enumerate(order) if dim in axes]


def _moved(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    sources, targets = (
        [dim % len(shape) for dim in ([given] if isinstance(given, int) else given)] for given in args[1:3]
    )
    rest = iter(dim for dim in range(len(shape)) if dim not in sources)
    places = [sources[targets.index(dim)] if dim in targets else next(rest) for dim in range(len(shape))]
    return [place for place, dim in enumerate(places) if dim in axes]


def _swapped(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    first, second = (dim % len(shape) for dim in (args[1:3] if len(args) > 2 else (-2, -1)))
    return [{first: second, second: first}.get(axis, axis) for axis in axes]


def _reshaped(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    """Match runs of dimensions with as many elements; channels that are mixed with others are lost."""
    if made == shape:
        return axes
    found: list[int] = []
    ours, theirs = _runs(shape, made)
    for before, after in zip(ours, theirs, strict=True):
        channels = {dim for dim in before if dim in axes and shape[dim] > 1}
        if channels and channels == {dim for dim in before if shape[dim] > 1}:
            found += [dim for dim in after if made[dim] > 1]
    return found


def _runs(old: _Shape, new: _Shape) -> tuple[list[list[int]], list[list[int]]]:
    """Cut two shapes of as many elements into the shortest runs of dimensions with as many elements each."""
    ours: list[list[int]] = []
    theirs: list[list[int]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [i], [j]
        mine, other = old[i], new[j]
        i, j = i + 1, j + 1
        while mine != other and (i < len(old) if mine < other else j < len(new)):
            if mine < other:
                mine, left, i = mine * old[i], [*left, i], i + 1
            else:
                other, right, j = other * new[j], [*right, j], j + 1
        ours.append(left)
        theirs.append(right)
    return ours, theirs


def _inserted(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    place = args[1] % (len(shape) + 1)
    return [axis + (place <= axis) for axis in axes]


def _squeezed(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    given = args[1] if len(args) > 1 else list(range(len(shape)))
    dims = [given] if isinstance(given, int) else given
    return _without({dim % len(shape) for dim in dims if shape[dim] == 1}, axes)


def _dropped(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    return _without({(args[1] if len(args) > 1 else 0) % len(shape)}, axes)


def _reduced(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(given, int | list | tuple):
        return []
    dims = {dim % len(shape) for dim in ([given] if isinstance(given, int) else given)}
    keeps = args[2] if len(args) > 2 and isinstance(args[2], bool) else kwargs.get("keepdim", False)
    return axes - dims if keeps else _without(dims, axes)


def _without(dims: set[int], axes: _Axes) -> Iterable[int]:
    return [axis - sum(dim < axis for dim in dims) for axis in axes - dims]


def _from_the_right(
    args: Sequence[Any], kwargs: dict[str, Any], shape: _Shape, axes: _Axes, made: _Shape
) -> Iterable[int]:
    return [axis + len(made) - len(shape) for axis in axes]


_CHANNELS_SECOND: Final = frozenset(
    {
        *("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "cudnn_convolution"),
        *("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_batch_norm_with_update"),
        *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "instance_norm"),
        *("group_norm", "native_group_norm"),
    }
)
_CHANNELS_LAST: Final = frozenset(
    {
        *("linear", "addmm", "mm", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer"),
        *("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "mkldnn_linear", "_cudnn_rnn"),
    }
)
_LAYER_NORMS: Final = frozenset({"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"})
_PRODUCTS: Final = frozenset({"bmm", "matmul"})
_RULES: Final[dict[str, _Rule]] = {
    "permute": _permuted,
    **dict.fromkeys(("movedim", "moveaxis"), _moved),
    **dict.fromkeys(("transpose", "t", "mT", "swapaxes", "swapdims"), _swapped),
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "_reshape_alias",
            "flatten",
            "unflatten",
            "view_as",
            "reshape_as",
        ),
        _reshaped,
    ),
    "unsqueeze": _inserted,
    "squeeze": _squeezed,
    **dict.fromkeys(("select", "unbind"), _dropped),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm"), _reduced),
    **dict.fromkeys(("expand", "expand_as", "repeat", "tile"), _from_the_right),
}
