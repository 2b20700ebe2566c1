"""Who writes under which tags: two monitors on one writer do not write over one another."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, final

from torch import nn

from torchlens_viz.arguments import shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, one_line
from torchlens_viz.files.paths import as_path
from torchlens_viz.models.layers import unwrap

_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


@final
class Claim:
    """The tags of one monitor, from its beginning to its end, or until it is dropped.

    Args:
        writer: Where it writes; a folder is told by its path.
        model: What it watches. Several monitors of one model share their tags, as where a run goes on.
        layers: The names of the layers.
        name: What the caller calls the model in tags, or None.

    Raises:
        InvalidTypeError: `name` is no text, or empty.

    Attributes:
        name: What it is called in tags; "" where its layers stand for themselves.
        is_chosen: Whether that was neither the caller's choice nor nothing, because of another monitor.
    """

    def __init__(self, writer: Any, model: nn.Module, layers: Sequence[str], name: str | None) -> None:
        if name is not None and not (isinstance(name, str) and name):
            raise InvalidTypeError(
                f"`name` must be a text that stands in tags, got {shown(name)}; or leave it out"
            )
        is_folder = isinstance(writer, str | os.PathLike)
        self._writer = _real_path(writer) if is_folder else writer
        self._model = weakref.ref(unwrap(model))
        self._layers = frozenset(layers)
        self.name = name or ""
        taken = {other.name for other in list(_claims) if self._clashes(other)}
        self.is_chosen = name is None and "" in taken
        number = 2
        while self.is_chosen and (self.name or "") in taken:
            self.name = f"model{number}"
            number += 1
        _claims.add(self)

    def release(self) -> None:
        """Leave the tags to others."""
        _claims.discard(self)

    def _clashes(self, other: Claim) -> bool:
        is_same = other._writer is self._writer or (
            isinstance(self._writer, str) and isinstance(other._writer, str) and other._writer == self._writer
        )
        return is_same and other._model() is not self._model() and bool(other._layers & self._layers)


def _real_path(folder: str | os.PathLike[str]) -> str:
    try:
        return os.path.realpath(as_path(folder, "writer"))
    except ValueError as error:  # a zero byte
        raise InvalidArgumentError(
            f"`writer` must be a folder that can be written, got {shown(folder)} ({one_line(error)})"
        ) from error
