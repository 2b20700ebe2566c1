"""Seeing every operation of a forward pass, and each of those that write to memory before it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a thread, from `begin` to `end`."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_on = True

    def begin(self) -> None:
        """Follow the operations of this thread."""
        self._is_on = True
        _push_mode(self)

    def end(self) -> None:
        """Follow them no longer, though what was found stays; may be called again.

        Other modes that were entered meanwhile, and not left, stay.
        """
        self._is_on = False
        if self not in _get_current_dispatch_mode_stack():  # another thread has it, in which it does nothing
            return
        others = []
        while (mode := _pop_mode()) is not self:
            others.append(mode)
        for mode in reversed(others):
            _push_mode(mode)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Follow within the block."""
        try:
            self.begin()
            yield
        finally:
            try:
                self.end()
            finally:
                self.end()  # once more: Ctrl-C may have come within the first


class Writes(Following, ABC):  # type: ignore[no-untyped-call]
    """Is told of the memory of chosen tensors before an operation writes to it.

    Weights are written to by name, through `weight.data`, through views, and by functions of torch, which all
    are the same here: an operation is given a tensor in their memory, and says that it writes to it.

    Args:
        tensors: Those whose memory counts; what has none, such as a sparse one, does not.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._held: dict[int, list[torch.Tensor]] = {}
        self._memory = []  # kept, so that nothing else comes to lie there
        for tensor in tensors:
            if address := address_of(tensor):
                self._held.setdefault(address, []).append(tensor)
                self._memory.append(tensor.untyped_storage())
        self._writes_to: dict[Any, list[tuple[int, str]]] = {}

    @abstractmethod
    def before(self, written: torch.Tensor, held: list[torch.Tensor]) -> None:
        """Learn that an operation is about to write to memory that counts.

        Args:
            written: What the operation is given.
            held: The chosen tensors that are there.
        """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        places = self._writes_to.get(func)
        if places is None:
            places = self._writes_to[func] = _written_arguments(func)
        if places and self._is_on:
            for number, name in places:
                given = args[number] if number < len(args) else kwargs.get(name)
                for each in tree_leaves(given):
                    held = self._held.get(address_of(each)) if isinstance(each, torch.Tensor) else None
                    if held is not None:
                        self.before(each, held)
        return func(*args, **kwargs)


@final
class Restoring(Writes):  # type: ignore[no-untyped-call]
    """Keeps the values of tensors before they are written over, and gives them back."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__(tensors)
        self._kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def before(self, written: torch.Tensor, held: list[torch.Tensor]) -> None:
        """Keep what is there."""
        memory = written.untyped_storage()
        if memory.data_ptr() not in self._kept:
            self._kept[memory.data_ptr()] = memory, _copy_of(memory)

    def restore(self) -> bool:
        """Give the tensors back what they held; return whether any was written to."""
        for memory, values in self._kept.values():
            memory.copy_(values)
        return bool(self._kept)


@final
class Parting(Writes):  # type: ignore[no-untyped-call]
    """Moves weights that a copy of a model shares with it to memory of their own, before they are written to.

    Args:
        copy: The copy.
    """

    def __init__(self, copy: nn.Module) -> None:
        super().__init__(copy.parameters())
        self._own: dict[int, torch.UntypedStorage] = {}

    @property
    def has_moved(self) -> bool:
        """Whether anything was written to."""
        return bool(self._own)

    def before(self, written: torch.Tensor, held: list[torch.Tensor]) -> None:
        """Move the weights that are there, and what is about to be written to."""
        address = address_of(written)
        if address not in self._own:
            self._own[address] = _copy_of(written.untyped_storage())
            for tensor in held:
                tensor.data = _within(self._own[address], tensor)
        if address_of(written) == address:  # a view, or what `data` gave, of before or after
            written.data = _within(self._own[address], written)


def _copy_of(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory).clone().untyped_storage()


def _within(memory: torch.UntypedStorage, tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor is, at the same place within other memory."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def address_of(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins; 0 where it has none, or none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()  # 0 on the meta device
    except Exception:  # as what is sparse, has no values yet, or stands for a tensor
        return 0


def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Return which arguments an operation writes to, by number and name."""
    schema = getattr(func, "_schema", None)  # what takes functions, such as `cond`, has none
    arguments = [] if schema is None else schema.arguments
    return [
        (number, str(argument.name))
        for number, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
