"""What comes after a layer: whether a channel that never exceeds zero is off, or nothing of the kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch.utils._pytree import tree_leaves

from torchlens_viz.hooks.axes import key_of, operation
from torchlens_viz.models.watching import Following
from torchlens_viz.stats.channels import ChannelStats

Follower: TypeAlias = Literal["", "normalisation", "activation", "output", "sum"]

_KINDS: Final[Mapping[str, Follower]] = {
    **dict.fromkeys(
        (
            *("batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
            *("_batch_norm_with_update", "_native_batch_norm_legit", "_batch_norm_no_update"),
            *("_native_batch_norm_legit_no_training", "instance_norm", "group_norm", "native_group_norm"),
            *("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
        ),
        "normalisation",
    ),
    **dict.fromkeys(
        (
            *("gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "elu", "celu", "selu", "leaky_relu"),
            *("prelu", "_prelu_kernel", "rrelu_with_noise", "hardswish", "hardsigmoid", "log_sigmoid"),
            *("log_sigmoid_forward", "softmax", "_softmax", "log_softmax", "_log_softmax"),
        ),
        "activation",
    ),
    **dict.fromkeys(
        (
            *(
                "add",
                "sub",
                "rsub",
                "cat",
                "stack",
                "convolution",
                "_convolution",
                "conv1d",
                "conv2d",
                "conv3d",
            ),
            *("convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "linear", "addmm", "mm"),
            *("bmm", "matmul", "baddbmm", "mkldnn_linear"),
        ),
        "sum",
    ),
}
# What hands its input on, value by value or the largest or the mean of several.
_PASSES: Final = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t", "unsqueeze", "squeeze"),
        *("clone", "contiguous", "_to_copy", "to", "detach", "alias", "expand", "slice", "mean"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    }
)


@final
class Followers(Following):  # type: ignore[no-untyped-call]
    """From `begin` to `end`, notes which operation first takes what each layer put out.

    A layer before a rectifier is off where it never exceeds zero. Before a normalisation, before another
    activation, where it is added to something, by itself or times weights, and where its (N, C) are the
    network's answer it is not: negative values say as much as others.

    Args:
        found: What is known of layers already, and what becomes known; "" is anything else.
    """

    def __init__(self, found: dict[str, Follower] | None = None) -> None:
        super().__init__()
        self._waiting: dict[Any, tuple[set[str], int]] = {}
        self._looks = True
        self.found = {} if found is None else found

    def end(self) -> None:
        """Look no longer; may be called again. What nothing took is what the network puts out."""
        super().end()
        for layers, rank in self._waiting.values():
            self.found.update(dict.fromkeys(layers, "output" if rank <= 2 else ""))
        self._waiting.clear()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is done within the block does not count."""
        self._looks = False
        try:
            yield
        finally:
            self._looks = True

    @contextmanager
    def put_out(self, tensor: torch.Tensor, layer: str) -> Iterator[None]:
        """Take note of what a layer put out; what a hook does with it within the block does not count."""
        with self.unseen():
            yield
        key = key_of(tensor)
        if self._is_on and key is not None and layer not in self.found:
            self._waiting.setdefault(key, (set(), tensor.ndim))[0].add(layer)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (self._looks and self._waiting):
            return func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        taken = {key_of(each) for each in given} & self._waiting.keys()
        result = func(*args, **kwargs)
        layers = {layer for key in taken for layer in self._waiting.pop(key)[0]}
        name = operation(func)
        made = next((each for each in tree_leaves(result) if isinstance(each, torch.Tensor)), None)
        key = None if made is None else key_of(made)
        if made is not None and key is not None and layers and name in _PASSES:
            self._waiting.setdefault(key, (set(), made.ndim))[0].update(layers)
        else:
            self.found.update(dict.fromkeys(layers, _KINDS.get(name, "")))
        return result


def dead_channels(stats: ChannelStats, follower: Follower, eps: float = 0.0) -> torch.Tensor:
    """Tell of each channel of a layer whether it is dead, (C,) bool.

    It is where it never exceeds `eps`; where what follows takes negative values for as good as positive ones,
    only where it is never farther from zero than that, or always the same. A channel with NaN or Inf, or
    without any value, is not dead.

    Args:
        stats: The statistics of its channels.
        follower: What comes after the layer.
        eps: What a channel that is alive exceeds.
    """
    is_off = stats.max <= eps
    if not follower:
        return is_off
    is_constant = (stats.max == stats.min) & (stats.count - stats.nonfinite > 1)
    return (is_off & (stats.min >= -eps)) | is_constant
