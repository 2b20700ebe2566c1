"""A `Monitor` as a callback of Lightning. Importing this module needs the `lightning` extra."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, final

from torch import nn

from torchlens_viz.errors import InvalidArgumentError, MissingDependencyError, calling
from torchlens_viz.monitor.health import Trouble, warn
from torchlens_viz.monitor.monitor import Monitor
from torchlens_viz.trackers.recognise import is_run

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingDependencyError(
        "the callback is one of Lightning, which cannot be imported; run "
        '`python -m pip install "torchlens_viz[lightning]"`'
    ) from error


@final
class MonitorCallback(Callback):  # type: ignore[misc]
    """Logs kernels, maps and health while a `Trainer` trains.

    With a `probe`, that is what is logged, after the training step; without, the training batch itself. Steps
    are counted by `trainer.global_step`, as it is when a batch begins.

    Args:
        writer: A folder or a writer, as in `Monitor`; None takes that of the trainer's logger, of TensorBoard
            or Weights & Biases.
        stop: End the training, by `trainer.should_stop`, when there is an alarm.
        module: Which part of the LightningModule to look at; None is all of it.
        alarm: As in `Monitor`; called before the training is ended.
        options: The other options of `Monitor`.

    Raises:
        MissingDependencyError: Lightning is not installed (on import of this module).

    Example:
        >>> from torch import nn
        >>> callback = MonitorCallback("runs/first", layers=nn.Conv2d, every=50, stop=True)
    """

    def __init__(
        self,
        writer: str | os.PathLike[str] | Any | None = None,
        *,
        stop: bool = False,
        module: Callable[[Any], nn.Module] | None = None,
        alarm: Callable[[Trouble], object] | None = warn,
        **options: Any,
    ) -> None:
        super().__init__()
        self._writer = writer
        self._stop = stop
        self._module = module
        self._alarm = alarm
        self._options = options
        self._watching: AbstractContextManager[None] | None = None
        self._step = 0
        self._should_stop = False
        self.monitor: Monitor | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor, when the model is where it will train."""

        def alarm(trouble: Trouble) -> None:
            self._should_stop = self._stop
            if self._alarm is not None:
                self._alarm(trouble)

        is_quiet = self._alarm is None and not self._stop
        writer = self._writer if self._writer is not None else _writer_of(trainer)
        with calling("module(pl_module)", "return the network to watch"):
            model = pl_module if self._module is None else self._module(pl_module)
        self.monitor = Monitor(model, writer, alarm=None if is_quiet else alarm, **self._options)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to watch, where the training batch is what is logged."""
        self._drop()
        self._step = trainer.global_step
        if self.monitor is not None and self._options.get("probe") is None:
            self._watching = self.monitor.watch(self._step)
            self._watching.__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step."""
        if self._options.get("probe") is None:
            self._end()
        elif self.monitor is not None:
            self.monitor.step(self._step)
        # Only rank 0 hears the alarm, and all must leave the loop together.
        if self._stop and trainer.strategy.reduce_boolean_decision(self._should_stop, all=False):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off where the last batch of the epoch was skipped."""
        self._drop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off and write to disk what there is."""
        self._end(type(exception), exception, exception.__traceback__)
        self._close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write to disk what there is."""
        self._drop()
        self._close()

    def _end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        watching, self._watching = self._watching, None
        if watching is None:
            return
        try:
            watching.__exit__(kind, error, trace)
        except BaseException as raised:
            if raised is not error:
                raise

    def _drop(self) -> None:
        """Leave a step that was begun and not ended, without logging it."""
        self._end(GeneratorExit, GeneratorExit(), None)

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def _writer_of(trainer: Any) -> Any:
    for logger in trainer.loggers:
        writer = getattr(logger, "experiment", None)
        if is_run(writer) or all(
            callable(getattr(writer, name, None)) for name in ("add_image", "add_scalar", "add_histogram")
        ):
            return writer
    raise InvalidArgumentError(
        "`writer` must be given where the Trainer has no TensorBoardLogger or WandbLogger: pass a folder, or "
        '`Trainer(logger=TensorBoardLogger("runs"))`'
    )
