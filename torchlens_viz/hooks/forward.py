"""Ending a forward pass early, without the model's consent and without harm to it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, final

from torch import nn


@final
class StopForwardError(BaseException):
    """Unwinds a forward pass; not an `Exception`, because models may catch those."""


@final
class StopPoint:
    """Turns a `StopForwardError` raised below `model(...)` into a return value of None.

    It stands in for the instance's compiled call, the one place where the whole call of a module can be
    intercepted: the model's own hooks do not see the missing output, and neither `copy.deepcopy` nor pickle
    takes it along.

    Args:
        model: The module whose call ends early.
        error: The very error to swallow; any other passes.
    """

    def __init__(self, model: nn.Module, error: StopForwardError) -> None:
        self._model = model
        self._error = error
        self._previous: Any = None
        self._thread = 0
        self._depth = 0
        self._active = False

    def __enter__(self) -> StopPoint:
        self._thread = threading.get_ident()
        self._previous = self._model.__dict__.get("_compiled_call_impl")
        self._model.__dict__["_compiled_call_impl"] = self
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        top = self._model.__dict__.get("_compiled_call_impl")
        # One that was left earlier may still stand below this one, where blocks overlap without nesting.
        while isinstance(top, StopPoint) and not top._active:
            top = top._previous
        if top is None:
            self._model.__dict__.pop("_compiled_call_impl", None)
        else:
            self._model.__dict__["_compiled_call_impl"] = top

    def __deepcopy__(self, memo: object) -> None:
        """Vanish in a copy of the model, where a model copies its whole `__dict__`."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; return None where the pass was ended early."""
        call = self._previous or self._model._call_impl
        if not self._active or threading.get_ident() != self._thread:
            return call(*args, **kwargs)
        self._depth += 1
        try:
            return call(*args, **kwargs)
        except StopForwardError as stop:
            if stop is not self._error or self._depth > 1:  # a model that calls itself ends as a whole
                raise
            return None
        finally:
            self._depth -= 1
