"""Which dimension of what a layer puts out counts its channels: one answer for the whole library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final, final

import torch
from torch import nn
from torch.nn.modules import batchnorm, instancenorm

from torchlens_viz.arguments import integer
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.axes import ChannelAxes
from torchlens_viz.models.layers import Layer

# What these put out has channels before as many dimensions of positions as their names say.
_BEFORE_POSITIONS: Final[dict[type, int]] = {
    getattr(nn, f"{kind}{rank}d"): rank
    for rank in (1, 2, 3)
    for kind in ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
}
_CONVOLUTIONS: Final[tuple[Any, ...]] = tuple(kind for kind in _BEFORE_POSITIONS if "Conv" in kind.__name__)
_SECOND: Final = (batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm)
_LAST: Final = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip
# Where a tensor that `capture` hands out says which dimension it is.
_MARK: Final = "_torchlens_viz_channel_dim"
_DOUBT: Final = "_torchlens_viz_doubtful_layer"


@final
class Layout:
    """Knows of chosen layers which dimension of what they put out, or take, counts channels.

    The kind of a layer says it where it can: convolutions and batch normalisation count channels in the
    second dimension, dense and recurrent layers and attention in the last. Of others, such as a ReLU or a
    block that was written by hand, the operations say it that led to the tensor: see `ChannelAxes`.

    Args:
        layers: The layers.
        told: The dimension of all of them, where the caller says it.
        finds_inputs: Whether operations are to be followed for `input_dim` too.

    Raises:
        InvalidTypeError: `told` is no integer.
    """

    def __init__(
        self, layers: Sequence[Layer], told: int | None = None, *, finds_inputs: bool = False
    ) -> None:
        self._told = None if told is None else integer(told, "channel_dim")
        self._modules = {layer.name: layer.module for layer in layers}
        self._axes: ChannelAxes | None = None
        self._known: dict[tuple[str, int], int] = {}
        self._says = {name for name, module in self._modules.items() if _by_kind(module, 4) is not None}
        self._is_open = set(self._modules) if finds_inputs else self._modules.keys() - self._says
        self._inputs: dict[tuple[str, int], int] = {}

    @property
    def must_follow(self) -> bool:
        """Whether there is anything that the kind of a layer does not say."""
        return self._told is None and bool(self._is_open)

    def doubts(self, tensor: torch.Tensor, layer: str) -> bool:
        """Whether it was looked for where a tensor, of a layer, has its channels, and nothing said it."""
        return self._axes is not None and tensor.ndim > 2 and self.found(tensor, layer) is None

    def begin(self) -> None:
        """Follow operations of this thread, where that is needed, until each layer has run once."""
        if self.must_follow:
            self._axes = ChannelAxes()
            self._axes.begin()

    def end(self) -> None:
        """Follow no longer; may be called again."""
        if self._axes is not None:
            self._axes.end()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow within the block."""
        if not self.must_follow:
            yield
            return
        self._axes = ChannelAxes()
        with self._axes.on():
            yield

    def channel_dim(self, tensor: torch.Tensor, layer: str) -> int:
        """Return the dimension of a tensor, of a layer, that counts channels: an index from 0.

        Where nothing says it, that is the second dimension, and a warning says so.

        Raises:
            InvalidArgumentError: The caller named a dimension that the tensor does not have.
        """
        if self._told is not None:
            return told_dim(tensor, self._told, f"what `{layer}` puts out")
        found = self.found(tensor, layer)
        if found is not None:
            return found
        warnings.warn(
            f"nothing tells which dimension of what `{layer}` puts out counts channels (shape "
            f"{tuple(tensor.shape)}): the second one is taken; say which it is with `channel_dim=`",
            stacklevel=2,
        )
        self._known[layer, tensor.ndim] = 1
        return 1

    def found(self, tensor: torch.Tensor, layer: str) -> int | None:
        """Return the same where something says it, else None."""
        if self._told is not None:
            return self._told % tensor.ndim if -tensor.ndim <= self._told < tensor.ndim else None
        known = self._known.get((layer, tensor.ndim))
        if known is None:
            if layer in self._says:
                known = _by_kind(self._modules[layer], tensor.ndim)
            elif self._axes is not None:
                known = self._axes.of(tensor)
                if known is None and tensor.ndim > 1 and self._axes.is_untouched(tensor):
                    known = 1  # what a network takes is (N, C, ...)
            if known is None:
                return 1 if tensor.ndim <= 2 else None  # (N, C), whatever made it
            self._known[layer, tensor.ndim] = known
            self._is_open.discard(layer)
        elif self._axes is not None and not self._is_open:  # all are known, and the first of them runs again
            self._axes.stop()
        return known

    def input_dim(self, tensor: torch.Tensor, layer: str) -> int:
        """Return the dimension of a tensor, of a layer, that counts inputs: the first where none is known."""
        found = None if self._axes is None else self._axes.inputs_of(tensor)
        if found is None:
            found = self._inputs.get((layer, tensor.ndim))
        if found is None:
            found = int(layer in self._says and tensor.ndim == 3 and _is_sequence_first(self._modules[layer]))
        self._inputs[layer, tensor.ndim] = found
        return found


def told_dim(tensor: torch.Tensor, told: int, what: str) -> int:
    """Return a dimension that the caller named as an index from 0.

    Raises:
        InvalidArgumentError: The tensor has no such dimension.
    """
    if not -tensor.ndim <= told < tensor.ndim:
        raise InvalidArgumentError(
            f"`channel_dim` must be a dimension of {what}, got {told} (shape {tuple(tensor.shape)})"
        )
    return told % tensor.ndim


def mark(tensor: torch.Tensor, dim: int) -> None:
    """Note in a tensor of our own which of its dimensions counts channels, for `marked_dim`."""
    setattr(tensor, _MARK, dim)


def mark_doubt(tensor: torch.Tensor, layer: str) -> None:
    """Note in a tensor of our own that nothing said which of its dimensions counts channels."""
    setattr(tensor, _DOUBT, layer)


def doubtful_layer(tensor: torch.Tensor) -> str | None:
    """Return the layer of a tensor that `capture` handed out and where nothing said it; else None."""
    found: str | None = getattr(tensor, _DOUBT, None)
    return found


def drawn_dim(tensor: torch.Tensor, told: int | None, *, is_folded: bool = False) -> int | None:
    """Return which dimension of a tensor is to be drawn as channels; None leaves it to its shape.

    A warning says so where that is a guess about a tensor that `capture` handed out.

    Args:
        tensor: What is to be drawn.
        told: The dimension that the caller named.
        is_folded: Whether the caller said that these are tokens, (N, L, C).
    """
    found = marked_dim(tensor) if told is None else told
    layer = doubtful_layer(tensor)
    if found is None and layer is not None and not is_folded:
        place = "first" if tensor.ndim == 3 else "second"
        warnings.warn(
            f"nothing tells which dimension of what `{layer}` puts out counts channels (shape "
            f"{tuple(tensor.shape)}): the {place} one is drawn; say which it is with `channel_dim=`",
            stacklevel=2,
        )
    return found


def marked_dim(tensor: torch.Tensor) -> int | None:
    """Return which dimension counts channels in a tensor that `capture` handed out, where that is known."""
    found: int | None = getattr(tensor, _MARK, None)
    return found


def mixes_layouts(model: nn.Module) -> bool:
    """Tell whether a model has parts that count channels in the last dimension of what has positions.

    Normalisation, attention and recurrence over the last dimension say so, and so do dense layers, but for
    those of a classifier, of which it is certain that they take (N, C). Matrices that are no layer's of
    torch may be multiplied with anything.
    """
    return _has_dense_maps(model) or any(
        _has_matrices(module)
        or isinstance(module, nn.LayerNorm | nn.MultiheadAttention | nn.Embedding | nn.RNNBase)
        or "Permute" in type(module).__name__
        or "RMSNorm" in type(module).__name__
        for module in model.modules()
    )


def _has_matrices(module: nn.Module) -> bool:
    """Tell whether a module that somebody wrote has weights of its own with two dimensions or more."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    parameters = [each for each in module._parameters.values() if each is not None]
    return any(sum(size > 1 for size in each.shape) > 1 for each in parameters)


def _has_dense_maps(model: nn.Module) -> bool:
    """Tell whether a dense layer may take maps or tokens: unless it is the last layer, or has vectors.

    It has vectors behind a global pooling or a `Flatten` of the same part of the model, behind a dense layer
    that has, and where it takes other numbers than there are channels before it.
    """
    modules = list(model.modules())
    dense = [each for each in modules if isinstance(each, nn.Linear)]
    if not dense or dense == modules[-1:]:
        return False
    leaves = [(name, each) for name, each in model.named_modules() if not each._modules]
    pooled: str | None = None  # the part of the model in which positions are gone
    before: int | None = None
    for place, (name, each) in enumerate(leaves):
        part = name.rpartition(".")[0]
        if isinstance(each, nn.Linear):
            is_within = pooled is not None and (not pooled or f"{name}.".startswith(f"{pooled}."))
            is_last = place == len(leaves) - 1
            if not is_last and not is_within and before in (None, each.in_features):
                return True
            pooled, before = part if pooled is None else pooled, each.out_features
        elif isinstance(each, nn.Flatten) or _pools_all(each):
            # The pooling itself is often wrapped, as in a module with a flattening beside it.
            pooled = part.rpartition(".")[0] if "pool" in part.rpartition(".")[2] else part
        elif isinstance(each, _CONVOLUTIONS):
            pooled, before = None, each.out_channels
    return False


def _pools_all(module: nn.Module) -> bool:
    size = getattr(module, "output_size", None)
    return "Adaptive" in type(module).__name__ and size is not None and {size} <= {1, (1,), (1, 1), (1, 1, 1)}


def _is_sequence_first(module: nn.Module) -> bool:
    """Tell whether a layer of torch's own puts out (L, N, C)."""
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = module.layers[0]
    return not getattr(getattr(module, "self_attn", module), "batch_first", True)


def has_signals(model: nn.Module) -> bool:
    """Tell whether a model has parts that put out (N, C, L), which looks like (C, H, W) and like tokens."""
    return any(isinstance(module, nn.Conv1d | nn.ConvTranspose1d) for module in model.modules())


def _by_kind(module: nn.Module, rank: int) -> int | None:
    """Return where a layer of torch's own, as torch made it, has the channels of `rank` dimensions."""
    forward = getattr(type(module), "forward", None)
    home = getattr(forward, "__module__", None) or ""  # what torch.fx generates has none
    if "forward" in vars(module) or not home.startswith("torch.nn.modules."):
        return None
    rule = _rule_of(type(module).__mro__)
    return None if rule is None else max(rule(module, rank), 0)


@lru_cache
def _rule_of(kinds: tuple[type, ...]) -> Callable[[Any, int], int] | None:
    """Return what tells of a layer of these kinds, and of a number of dimensions, where the channels are."""
    kind = kinds[0]
    for known, positions in _BEFORE_POSITIONS.items():
        if issubclass(kind, known):
            return lambda _, rank: rank - positions - 1
    if issubclass(kind, _SECOND):
        return lambda _, rank: min(1, rank - 1)
    if issubclass(kind, nn.LayerNorm):
        return lambda norm, rank: rank - len(norm.normalized_shape)
    if issubclass(kind, _LAST):
        return lambda _, rank: rank - 1
    return None
