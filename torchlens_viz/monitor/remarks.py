"""What a monitor says once, and how failures of logging are excused."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

from torch import nn

from torchlens_viz.errors import in_one_line, kind_of, message_of
from torchlens_viz.hooks.forward import is_compiled
from torchlens_viz.monitor.health import MonitorWarning
from torchlens_viz.monitor.observe import Observation


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
            if not self.excuses(step, error):
                raise

    def excuses(self, step: int | None, error: Exception) -> bool:
        """Say that a step could not be logged; False with `strict`, where the error is to be raised."""
        if self._strict:
            return False
        if not self._has_failed:
            self._has_failed = True
            told = f"{kind_of(error)}: {in_one_line(message_of(error))}"
            _say(
                f"step {step} could not be logged, or not in full ({told}). The "
                "training goes on, and nothing more is said of this; `strict=True` raises instead"
            )
        return True

    def eager(self, model: nn.Module) -> None:
        """Say that a compiled model runs eagerly while it is hooked."""
        if not self._has_said_eager and any(map(is_compiled, model.modules())):
            self._has_said_eager = True
            _say(
                "the model is compiled, and hooks do not fire in compiled code: the steps that are logged "
                "run eagerly, the others compiled. With a `probe` and `step`, all training steps run compiled"
            )

    def shares_tags(self, example: str) -> None:
        """Say that another monitor has the tags that this one would have had."""
        _say(
            "another monitor of another model writes to the same writer under the same tags; this one "
            f"writes under `{example}` and so on. Pass `name=` to choose what stands there"
        )

    def never_stepped(self) -> None:
        """Say that a monitor ended that was never told of a step."""
        _say(
            "it ends without a step, so that nothing was logged: call `monitor.step(step)` after the "
            "optimiser's step, or put the training step in `with monitor.watch(step):`"
        )

    def weights_alone(self) -> None:
        """Say that maps and health are missing where there is nothing to look at."""
        if not self._has_said_missing:
            self._has_said_missing = True
            _say(
                "there is no `probe`, so that `step` logs kernels alone, without maps, health and alarms; "
                "pass `probe=`, a batch to look at, or put the training step in `with monitor.watch(step):`"
            )

    def missing(self, step: int, layers: Iterable[str], observation: Observation, advice: str) -> None:
        """Say which of the layers were not seen in a step, if there are any that no failure explains."""
        unseen = [name for name in layers if name not in observation.layers]
        if unseen and not self._has_said_missing and not self._has_failed:
            self._has_said_missing = True
            idle = [name for name in unseen if name not in observation.ran]
            what = "did not run" if idle else "put out no tensor"
            _say(
                f"step {step}: {_listed(idle or unseen)} {what}, so that maps and health are missing; "
                f"{advice if idle else '`layers` can leave them out'}. Nothing more is said of this"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"`{name}`" for name in names[:4]) + more


def _say(message: str) -> None:
    warnings.warn(f"Monitor: {message}", MonitorWarning, stacklevel=2)
