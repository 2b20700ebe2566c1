"""What operations of torch make of dimensions: which name channels, and which pass them on, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from torchlens_viz.dimensions.factors import (
    CHANNEL,
    Dims,
    Shape,
    broadcast,
    channel_dim,
    dropped,
    indexed,
    inserted,
    kind_of,
    laid_out,
    multiplied,
    permuted,
    repeated,
    reshaped,
    resized,
    sizes_of,
    unfolded,
    unknown,
)


class Seen(NamedTuple):
    """What is known of a tensor: its dimensions, and the operation that said so, by its number.

    That is assumed of what a network takes, (N, C, ...), and of what comes of it, until an operation says it.
    """

    dims: Dims
    since: int
    is_assumed: bool


class Known(NamedTuple):
    """A tensor that an operation takes, and what was known of it before."""

    tensor: torch.Tensor
    seen: Seen


class Called(NamedTuple):
    """An operation, with what it is given and the shape of a tensor that it made."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    made: Shape

    def given(self, name: str) -> Any:
        """Return an argument by the name that it has in the operation's schema; None where it has none."""
        place, default = _place_of(self.func, name)
        return self.kwargs.get(name, self.args[place] if -1 < place < len(self.args) else default)


@lru_cache(1024)
def _place_of(func: Any, name: str) -> tuple[int, Any]:
    """Return which argument of an operation has a name, and its default; -1 where none has."""
    for place, each in enumerate(getattr(getattr(func, "_schema", None), "arguments", ())):
        if each.name == name:
            return place, each.default_value
    return -1, None


def indexed_places(called: Called) -> tuple[set[int], int]:
    """Return the dimensions that an advanced index takes the place of, and how many it speaks of."""
    places: set[int] = set()
    at = 0
    for index in called.args[1]:
        covers = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        places |= set() if index is None else set(range(at, at + covers))
        at += covers
    return places, at


# Of an operation, and of the dimensions of what it takes, those of what it makes; None where nobody knows.
_Rule: TypeAlias = Callable[[Called, Dims], Dims | None]


def followed(name: str, called: Called, known: Sequence[Known], now: int) -> Seen | None:
    """Return what is known of a tensor that was made; None where nothing led to it but weights.

    Args:
        name: The operation.
        called: The same, with what it was given and the shape of the tensor.
        known: Every tensor among what it was given of which something is known.
        now: The number of the operation.
    """
    args, made = called.args, called.made
    if name == "copy":  # what was there before is written over
        known = [each for each in known if each.tensor is not args[0]]
    name = name if name == "index_copy" else name.removesuffix("_copy")  # views, where these are copied
    said = [each for each in known if not each.seen.is_assumed] or list(known)
    if name in _SOURCES:
        return _from_source(name, called, said, now)
    if not said:
        return None
    since, is_assumed = min(each.seen.since for each in said), said[0].seen.is_assumed
    if name in _PRODUCTS:
        left, right = (
            next((each.seen.dims for each in said if each.tensor is operand), None)
            for operand in args[_PRODUCTS[name] :][:2]
        )
        if left is not None and right is not None and is_assumed:
            right = None  # weights that are no parameters
        found, is_new = multiplied(left, right, made)
        return Seen(found, now if is_new else since, is_assumed and not is_new)
    # Of several inputs the one that is shaped most alike passes its channels on; of a sum, the one that had
    # them first: a branch that mixes tokens, by a layer to which these are channels, ends where it began.
    first = (
        args[0][0] if args and isinstance(args[0], list | tuple) and args[0] else args[0] if args else None
    )
    best = min(
        said,
        key=lambda each: (
            channel_dim(each.seen.dims) is None,
            sizes_of(each.seen.dims) != made,
            each.seen.since,
        ),
    )
    rule = _RULES.get(name)
    if rule is not None:
        best = next((each for each in said if each.tensor is first), best)
        try:
            dims = rule(called, best.seen.dims)
        except (LookupError, TypeError, ValueError):  # another overload: no reason to stop the network
            dims = None
    elif sizes_of(best.seen.dims) == made:
        dims = best.seen.dims
    else:
        others = [each.seen.dims for each in said if each is not best]
        dims = _by_dim(called, best.seen.dims) or broadcast(best.seen.dims, made, others)
        if dims is None and len(best.seen.dims) == len(made):
            dims = resized(best.seen.dims, made)
    if dims is None or len(dims) != len(made):
        dims = unknown(made)
    return Seen(dims, since, is_assumed)


def _from_source(name: str, called: Called, said: Sequence[Known], now: int) -> Seen | None:
    """Return what is known of what a layer made that says where channels are."""
    made = called.made
    channel = _SOURCES[name](called)
    is_convolution = name in _CONVOLUTIONS
    if not 0 <= channel < len(made) or (len(made) < 2 and not is_convolution):
        return Seen(unknown(made), now, is_assumed=False) if said else None
    before = next((each.seen for each in said if each.tensor is called.args[0]), None)
    if name in _NORMS and made != tuple(called.args[0].shape):  # figures beside the values
        return Seen(unknown(made), now, is_assumed=False)
    if before is None or len(before.dims) != len(made):
        return Seen(laid_out(made, channel), now, is_assumed=False)
    others = (*before.dims[:channel], *before.dims[channel + 1 :])
    if name in _NORMS and kind_of(before.dims[channel]) >= CHANNEL and CHANNEL not in map(kind_of, others):
        return before._replace(is_assumed=False)
    return Seen(laid_out(made, channel, before.dims), now, is_assumed=False)


def _by_dim(called: Called, dims: Dims) -> Dims | None:
    """Drop or insert the dimension that an operation names, as reductions, `select` and `stack` do."""
    given, made, rank = called.given("dim"), called.made, len(dims)
    if isinstance(given, int) and len(made) == rank + 1:
        place = given % (rank + 1)
        return inserted(dims, place, made[place])
    if not isinstance(given, int | list | tuple) or not rank:
        return None
    places = {dim % rank for dim in ([given] if isinstance(given, int) else given)}
    return dropped(dims, places) if places and len(made) == rank - len(places) else None


def _permuted(called: Called, dims: Dims) -> Dims:
    return permuted(dims, called.args[1])


def _swapped(called: Called, dims: Dims) -> Dims:
    order = list(range(len(dims)))
    if order:
        first, second = called.args[1:3] if len(called.args) > 2 else (0, -1)
        order[first], order[second] = order[second], order[first]
    return permuted(dims, order)


def _reshaped(called: Called, dims: Dims) -> Dims | None:
    return reshaped(dims, called.made)


def _squeezed(called: Called, dims: Dims) -> Dims:
    given = called.given("dim")
    places = range(len(dims)) if given is None else [given] if isinstance(given, int) else given
    sizes = sizes_of(dims)
    return dropped(dims, {place % len(dims) for place in places if sizes[place] == 1})


def _expanded(called: Called, dims: Dims) -> Dims | None:
    return broadcast(dims, called.made)


def _repeated(called: Called, dims: Dims) -> Dims:
    return repeated(dims, called.args[1])


def _windows(called: Called, dims: Dims) -> Dims:
    *most, last = called.made
    window = () if not dims else resized((dims[called.args[1]],), [0])
    return (*resized(dims, most), *resized(window, [last])) if dims else ()


def _indexed(called: Called, dims: Dims) -> Dims | None:
    places, covered = indexed_places(called)
    return indexed(dims, places, called.made) if covered <= len(dims) else None


def _strided(called: Called, dims: Dims) -> Dims | None:
    return dims if sizes_of(dims) == called.made else None  # pooling gives itself strides


def _nobody_knows(called: Called, dims: Dims) -> None:
    return None


def _before_positions(called: Called) -> int:
    return len(called.made) - int(called.args[1].ndim) + 1


def _second(called: Called) -> int:
    return 1


def _last(called: Called) -> int:
    return len(called.made) - 1


def _before_normalised(called: Called) -> int:
    return len(called.made) - len(called.args[1])


_CONVOLUTIONS: Final = frozenset(
    {
        *("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "cudnn_convolution"),
        *("convolution_overrideable", "miopen_convolution", "cudnn_convolution_transpose"),
    }
)
_OVER_INPUTS: Final = frozenset(
    {
        *("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_batch_norm_with_update"),
        *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "instance_norm"),
        *("group_norm", "native_group_norm", "_batch_norm_no_update", "miopen_batch_norm"),
    }
)
_OVER_CHANNELS: Final = frozenset({"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"})
_NORMS: Final = _OVER_INPUTS | _OVER_CHANNELS
_DENSE: Final = frozenset(
    {
        *("embedding", "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn"),
        *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    }
)
# What says where channels are, and the dimension in which it has them.
_SOURCES: Final[dict[str, Callable[[Called], int]]] = {
    **dict.fromkeys(_CONVOLUTIONS, _before_positions),
    **dict.fromkeys(_OVER_INPUTS, _second),
    **dict.fromkeys(_DENSE, _last),
    **dict.fromkeys(_OVER_CHANNELS, _before_normalised),
    "col2im": lambda called: len(called.made) - 3,
}
# Products of matrices, and which argument is the first of the two.
_PRODUCTS: Final = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_RULES: Final[dict[str, _Rule]] = {
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t"), _swapped),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _reshaped),
    "squeeze": _squeezed,
    "expand": _expanded,
    "repeat": _repeated,
    "unfold": _windows,
    "index": _indexed,
    "mv": lambda called, dims: dims[:-1],
    "view_as_real": lambda called, dims: inserted(dims, len(dims), 2),
    "view_as_complex": lambda called, dims: dims[:-1],
    "as_strided": _strided,
    "im2col": lambda called, dims: unfolded(dims, called.made),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist", "diagonal"), _nobody_knows),
}
SOURCES: Final = frozenset(_SOURCES)
