"""`Dependence`: a model is given extents in place of an image, and puts out extents."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode

from torchlens_viz.receptive.extents import Extents, UnknownOperationError
from torchlens_viz.receptive.rules import RULES


@final
class Dependence(TorchFunctionMode):
    """Inside the block, a model that is given `Extents` in place of an image puts out `Extents`.

    Args:
        most: How many numbers the extents of one tensor may take; None is any.

    Raises:
        UnknownOperationError: The model does something that has no rule here, or that takes more.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._most = most

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply the rule of an operation on extents; let all others do what they do."""
        if Extents not in types:
            return func(*args, **(kwargs or {}))
        rule = RULES.get(func.__name__)
        if rule is None:
            raise UnknownOperationError(f"`{func.__name__}` has no rule")
        # What is computed for extents is nobody else's business, such as that of who watches the model's.
        with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
            made = rule(func, args, kwargs or {})
        if self._most is not None and isinstance(made, Extents) and _numbers(made) > self._most:
            raise UnknownOperationError(f"`{func.__name__}` of extents that take too much memory")
        return made


def _numbers(extents: Extents) -> int:
    """Count what is held in memory: what is broadcast is there once, and so is what parts share."""
    held = {part.data_ptr(): part for part in extents.parts}.values()
    return sum(
        prod(size for size, step in zip(part.shape, part.stride(), strict=True) if step) for part in held
    )
