"""Which steps of a training are logged: one in so many, whatever numbers they have."""

from __future__ import annotations

import operator
from typing import final

from torchlens_viz.errors import InvalidTypeError


@final
class Schedule:
    """Hears the numbers of steps, and tells which of them are to be logged.

    Args:
        every: Log those whose number it divides, and the next one where that was skipped.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._stride = 1
        self.heard: int | None = None
        self.logged: int | None = None

    def is_due(self, step: int) -> bool:
        """Take note of a step, and tell whether to log it; of several with one number, the first is."""
        heard, self.heard = self.heard, step
        if heard is not None and step != heard:
            self._stride = max(1, step - heard)
        if step == self.logged:
            return False
        is_due = self._passes(step - 1 if heard is None else min(heard, step - 1), step)
        if is_due:
            self.logged = step
        return is_due

    def next_due(self) -> int | None:
        """Return the next step, if it is to be logged and its number is one stride further than the last."""
        if self.heard is None:
            return None
        following = self.heard + self._stride
        return following if self._passes(self.heard, following) else None

    def try_again(self) -> None:
        """Log a step that was broken off when it is heard of again."""
        self.logged = None

    def _passes(self, before: int, step: int) -> bool:
        return step // self._every > before // self._every


def number(global_step: int) -> int:
    """Return the number of a step as an int.

    Raises:
        InvalidTypeError: It is none.
    """
    try:
        return operator.index(global_step)
    except TypeError:
        raise InvalidTypeError(f"`global_step` must be an int, got {global_step!r}") from None
