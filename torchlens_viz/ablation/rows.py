"""Copies of a batch from one layer on: what was made before it is repeated where it meets them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from torchlens_viz.hooks.axes import key_of, operation
from torchlens_viz.models.watching import Following

# How a tensor depends on the inputs: a row for each, a row for each in each copy, or otherwise.
_Rows: TypeAlias = Literal["once", "copies", "mixed"]

# Operations on each row by itself, with the place of what has the rows; the rest are weights.
_CONVOLUTIONS: Final = ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
_NORMS: Final = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
_WEIGHTED: Final = {
    **dict.fromkeys((*_CONVOLUTIONS, *_NORMS, "_native_batch_norm_legit_no_training"), 0),
    **dict.fromkeys(("linear", "mm", "native_group_norm", "_prelu_kernel"), 0),
    "addmm": 1,
}
_TRAINING: Final = 5  # where batch normalisation is told whether to mix the rows
_POINTWISE: Final = frozenset(
    {
        *(
            "add",
            "sub",
            "rsub",
            "mul",
            "div",
            "neg",
            "abs",
            "exp",
            "log",
            "sqrt",
            "pow",
            "clamp",
            "clamp_min",
        ),
        *("relu", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh", "elu", "mish"),
        *("leaky_relu", "softplus", "maximum", "minimum", "clone", "detach", "alias", "_to_copy"),
    }
)
_WINDOWS: Final = frozenset(
    {
        *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "constant_pad_nd"),
        *("upsample_nearest2d", "upsample_bilinear2d", "reflection_pad2d", "pixel_shuffle"),
    }
)
_SHAPES: Final = frozenset({"view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze"})
_ALONG: Final = frozenset({"mean", "sum", "amax", "cat", "_softmax", "_log_softmax"})  # along dimensions
# Where other operations are told the dimension that they work along; without it, it is the first.
_DIMENSION: Final = {"slice": 1, "select": 1, "split": 2, "split_with_sizes": 2}


class CannotRepeatError(Exception):
    """The network does something of which it is not known that it treats every row by itself."""


@final
class Repeating(Following):  # type: ignore[no-untyped-call]
    """From `begin` to `end`, lets a network go on with copies of a batch from where `repeat` is called.

    What meets the copies afterwards, and was made of the batch before, is repeated as well. Only operations
    that treat each row by itself are let through; another one raises `CannotRepeatError`.

    Args:
        inputs: How many rows the batch has.
        copies: How many there are to be.
    """

    def __init__(self, inputs: int, copies: int) -> None:
        super().__init__()
        self._inputs, self._copies = inputs, copies
        self._known: dict[Any, _Rows] = {}
        self._looks = True

    def start(self, taken: Any) -> None:
        """Take note of what the network takes."""
        for tensor in tree_leaves(taken):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, "once" if tensor.ndim and len(tensor) == self._inputs else "mixed")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let everything through within the block."""
        looked, self._looks = self._looks, False
        try:
            yield
        finally:
            self._looks = looked

    def repeat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copies of a tensor that has a row per input; of what is copied already, itself."""
        rows = self._known.get(key_of(tensor))
        if rows == "copies":
            return tensor
        if rows != "once":
            raise CannotRepeatError
        with self.paused():
            copies = tensor.repeat(self._copies, *(1,) * (tensor.ndim - 1))
        self.note_copies(copies)
        return copies

    def note_copies(self, tensor: torch.Tensor) -> None:
        """Take note of a tensor with a row for each input in each copy."""
        self._note(tensor, "copies")

    def has_copies(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor has a row for each input in each copy, or one for each input.

        Raises:
            CannotRepeatError: It has neither.
        """
        rows = self._known.get(key_of(tensor))
        if rows == "mixed":
            raise CannotRepeatError
        return rows == "copies"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._looks:
            return func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        rows = {self._known.get(key_of(each)) for each in given}
        if "copies" not in rows:
            result = func(*args, **kwargs)
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    has_rows = made.ndim > 0 and len(made) == self._inputs
                    is_once = has_rows and "once" in rows and "mixed" not in rows
                    self._note(made, None if rows <= {None} else "once" if is_once else "mixed")
            return result
        if "mixed" in rows or not self._is_by_row(operation(func), args):
            raise CannotRepeatError
        if func._schema.is_mutable and self._known.get(key_of(args[0])) != "copies":
            raise CannotRepeatError
        if "once" in rows:
            rank = max(each.ndim for each in given if self._known.get(key_of(each)) == "copies")
            if any(each.ndim != rank for each in given if self._known.get(key_of(each)) == "once"):
                raise CannotRepeatError
            args = tree_map_only(torch.Tensor, self._with_copies, args)
        result = func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        if not made or made[0].ndim == 0 or len(made[0]) != self._inputs * self._copies:
            raise CannotRepeatError
        for each in made:
            is_copied = each.ndim > 0 and len(each) == self._inputs * self._copies
            self._note(each, "copies" if is_copied else "mixed")
        return result

    def _is_by_row(self, name: str, args: tuple[Any, ...]) -> bool:
        """Tell whether an operation treats the rows of the copies one by one."""
        if name in _WEIGHTED:
            known = [self._known.get(key_of(each)) for each in args if isinstance(each, torch.Tensor)]
            mixes = name in _NORMS and args[_TRAINING] is True
            return known.pop(_WEIGHTED[name]) == "copies" and not any(known) and not mixes
        if name in _ALONG:
            dims = args[1] if len(args) > 1 else None
            rank = (args[0][0] if name == "cat" else args[0]).ndim
            given = dims if isinstance(dims, list | tuple) else [dims]
            return bool(given) and all(dim is not None and dim % rank != 0 for dim in given)
        if name == "permute":
            return bool(args[1][0] == 0)
        if name == "transpose":
            return 0 not in {dim % args[0].ndim for dim in args[1:3]}
        if name in _DIMENSION:
            place = _DIMENSION[name]
            return len(args) > place and bool(args[place] % args[0].ndim)
        return name in _POINTWISE or name in _WINDOWS or name in _SHAPES

    def _with_copies(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.repeat(tensor) if self._known.get(key_of(tensor)) == "once" else tensor

    def _note(self, tensor: torch.Tensor, rows: _Rows | None) -> None:
        # Memory is used again, so that what is not noted must be forgotten.
        key = key_of(tensor)
        if rows is None:
            self._known.pop(key, None)
        else:
            self._known[key] = rows
