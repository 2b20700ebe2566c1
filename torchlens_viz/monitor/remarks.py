"""What a monitor has to say beside its alarm: each thing once, and never so that the training stops."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

from torch import nn

from torchlens_viz.monitor.health import MonitorWarning


@final
class Remarks:
    """Warns once of failures, of compiled models, and of layers that do not run.

    Args:
        strict: Raise what fails.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._has_failed = self._has_said_eager = self._has_said_missing = False

    @contextmanager
    def attempt(self, step: int | None) -> Iterator[None]:
        """Do what the block says, or else excuse the failure."""
        try:
            yield
        except Exception as error:
            self.excuse(step, error)

    def excuse(self, step: int | None, error: Exception) -> None:
        """Say that a step could not be logged, or with `strict` raise the error."""
        if self._strict:
            raise error
        if not self._has_failed:
            self._has_failed = True
            _say(
                f"step {step} could not be logged, or not in full ({type(error).__name__}: {error}). The "
                "training goes on, and nothing more is said of this; `strict=True` raises instead"
            )

    def eager(self, model: nn.Module) -> None:
        """Say that a compiled model runs eagerly while it is hooked."""
        is_compiled = any(
            "_orig_mod" in module._modules or module._compiled_call_impl is not None
            for module in model.modules()
        )
        if is_compiled and not self._has_said_eager:
            self._has_said_eager = True
            _say(
                "the model is compiled, and hooks do not fire in compiled code: the steps that are logged "
                "run eagerly, the others compiled. With a `probe` and `step`, all training steps run compiled"
            )

    def missing(self, step: int, layers: Sequence[str], advice: str) -> None:
        """Say which layers did not run in a step, unless none is given or a failure explains it."""
        if layers and not self._has_said_missing and not self._has_failed:
            self._has_said_missing = True
            names = ", ".join(f"`{name}`" for name in layers[:4])
            names += f" and {len(layers) - 4} more" if len(layers) > 4 else ""
            _say(
                f"step {step}: {names} did not run, so that maps and health are missing; {advice}. Nothing "
                "more is said of this"
            )


def _say(message: str) -> None:
    warnings.warn(f"Monitor: {message}", MonitorWarning, stacklevel=2)
