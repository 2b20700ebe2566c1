"""Where the channels of each tensor are: followed from operation to operation while a network runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias, final

import torch
from torch.utils._pytree import tree_leaves

from torchlens_viz.arguments import has_values
from torchlens_viz.dimensions.factors import channel_dim, input_dim, laid_out
from torchlens_viz.dimensions.operations import SOURCES, Called, Known, Seen, followed
from torchlens_viz.dimensions.parts import Part, takes_memory, view_of, whole, whole_after
from torchlens_viz.models.watching import Following

# How a tensor is known again: not as an object, of which autograd makes new ones, but by its place in memory.
_Key: TypeAlias = tuple[int | tuple[int, int], tuple[int, ...], tuple[int, ...]]


@final
class ChannelAxes(Following):  # type: ignore[no-untyped-call]
    """Within it, knows of every tensor which dimension counts channels.

    Convolutions, normalisations and dense layers say it; every other operation passes on where its input has
    them: moved by `permute`, split and joined by `reshape`, kept by the sum of two maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[_Key, Seen | None] = {}
        self._parts: dict[_Key, Part] = {}
        self._clock = 0

    def stop(self) -> None:
        """Follow no longer, and forget."""
        self._is_on = False
        self._found.clear()
        self._parts.clear()

    def of(self, tensor: torch.Tensor) -> int | None:
        """Return the dimension of a tensor that counts channels, from 0; None where that is not known."""
        seen = self._seen(tensor)
        return None if seen is None else channel_dim(seen.dims)

    def inputs_of(self, tensor: torch.Tensor) -> int | None:
        """Return the dimension of a tensor that counts inputs; None where that is not known any more."""
        seen = self._seen(tensor) if self._is_on else None
        return None if seen is None else input_dim(seen.dims)

    def is_untouched(self, tensor: torch.Tensor) -> bool:
        """Tell whether nothing that may have channels led to a tensor, as to what a network takes."""
        key = key_of(tensor)
        return key is None or not (key in self._found or key in self._parts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_on:
            return func(*args, **kwargs)
        name = operation(func)
        if name not in SOURCES and _is_made_of_others(func):  # in inference mode; otherwise autograd does it
            with self:
                return func.decompose(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        # Before it runs: it may change the shape of what it is given.
        known = [Known(each, seen) for each in given if (seen := self._seen(each)) is not None]
        keys = [key_of(each) for each in given]
        result = func(*args, **kwargs)
        self._clock += 1
        for made in tree_leaves(result):
            key = key_of(made) if isinstance(made, torch.Tensor) else None
            if key is None:
                continue
            called = Called(func, args, kwargs, tuple(made.shape))
            self._found.pop(key, None)  # what was there before is gone
            if given and not name.startswith("new_"):
                self._found[key] = followed(name, called, known, self._clock)
            if takes_memory(name):
                self._parts[key] = whole(key, called.made)
            elif getattr(func, "is_view", False) and keys and keys[0] in self._parts:
                self._parts[key] = view_of(self._parts[keys[0]], name, called, given[0])
            elif key not in keys:
                self._parts.pop(key, None)
            elif key in self._parts:
                self._write(self._parts[key], self._found[key], name, called, known)
        return result

    def _write(
        self, part: Part, seen: Seen | None, name: str, called: Called, known: Sequence[Known]
    ) -> None:
        """Pass on to the whole what was written to a part of it, where nothing was known of it.

        Args:
            part: What was written to.
            seen: What is known of it now.
            name: The operation.
            called: The same, with what it was given.
            known: What it was given of which something is known.
        """
        before = self._found.get(part.key)
        is_known = before is not None and not before.is_assumed and channel_dim(before.dims) is not None
        if seen is not None and (not is_known or before is seen):
            dims = whole_after(part, name, called, known, seen.dims)
            self._found[part.key] = seen._replace(dims=dims)

    def _seen(self, tensor: torch.Tensor) -> Seen | None:
        key = key_of(tensor)
        if key is None:
            return None
        if key in self._found:
            return self._found[key]
        if key in self._parts or isinstance(tensor, torch.nn.Parameter) or tensor.ndim < 3:
            return None
        return Seen(laid_out(tensor.shape, 1), self._clock, is_assumed=True)


def operation(func: Any) -> str:
    """Return the name of what is dispatched, without a sign that it is done in place."""
    schema = getattr(func, "_schema", None)  # what takes functions, such as `cond`, has none
    return str(func) if schema is None else str(schema.name).removeprefix("aten::").rstrip("_")


def key_of(tensor: torch.Tensor) -> _Key | None:
    """Return what tells the values of a tensor from those of others, while they are there."""
    try:
        # What has no values has no address, and still what would be its memory.
        place = tensor.data_ptr() if has_values(tensor) else _place_of(tensor)
        return place, tuple(tensor.shape), tensor.stride()
    except Exception:  # sparse, without memory, or what stands for a tensor
        return None


def _place_of(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


@lru_cache(1024)
def _is_made_of_others(func: Any) -> bool:
    """Tell whether an operation is nothing but a few others, on every device."""
    # What a tensor says of itself, such as its device, is told as well, and has no kernels.
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
        return False
    name, has_kernel = str(func._schema.name), torch._C._dispatch_has_kernel_for_dispatch_key
    name += f".{func._schema.overload_name}" if func._schema.overload_name else ""
    return has_kernel(name, "CompositeImplicitAutograd") and not any(
        has_kernel(name, device) for device in ("CPU", "CUDA", "MPS", "Meta")
    )
