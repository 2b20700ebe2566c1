"""A `Monitor` as a callback of the `Trainer` of transformers. Importing this module needs the `hf` extra."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

from torchlens_viz.errors import InvalidArgumentError, MissingDependencyError, calling
from torchlens_viz.monitor.health import Trouble, warn
from torchlens_viz.monitor.monitor import Monitor

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "the callback is one of transformers, which cannot be imported; run "
        '`python -m pip install "torchlens_viz[hf]"`'
    ) from error


@final
class MonitorCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Logs kernels, maps and health of a probe while a `Trainer` trains.

    Steps are counted by `state.global_step`, as it is when an optimiser step has ended. The training batch
    itself cannot be watched: a `Trainer` does not tell its callbacks of an exception, after which hooks would
    stay on the model.

    Args:
        writer: A folder, a run or a writer, as in `Monitor`.
        probe: What to show the network, as in `Monitor`, such as `{"pixel_values": images}`.
        stop: End the training, by `control.should_training_stop`, when there is an alarm.
        module: Which part of the model to look at; None is all of it.
        alarm: As in `Monitor`; called before the training is ended.
        options: The other options of `Monitor`.

    Raises:
        InvalidArgumentError: There is no probe.
        MissingDependencyError: transformers is not installed (on import of this module).

    Example:
        >>> import torch
        >>> images = torch.rand(16, 3, 32, 32)
        >>> callback = MonitorCallback("runs/first", probe={"pixel_values": images}, every=50, stop=True)
    """

    def __init__(
        self,
        writer: str | os.PathLike[str] | Any,
        *,
        probe: Any,
        stop: bool = False,
        module: Callable[[Any], nn.Module] | None = None,
        alarm: Callable[[Trouble], object] | None = warn,
        **options: Any,
    ) -> None:
        super().__init__()
        if probe is None:
            raise InvalidArgumentError(
                "`probe` must be a batch to show the network, got None: a Trainer's callback cannot watch "
                "the training batch; pass some images"
            )
        self._writer = writer
        self._stop = stop
        self._module = module
        self._alarm = alarm
        self._options = {"probe": probe, **options}
        self._should_stop = False
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make the monitor, when the model is where it will train."""

        def alarm(trouble: Trouble) -> None:
            self._should_stop = self._stop
            if self._alarm is not None:
                self._alarm(trouble)

        self._close()  # what an exception left of a training before
        self._should_stop = False
        with calling("module(model)", "return the network to watch"):
            model = given["model"] if self._module is None else self._module(given["model"])
        is_quiet = self._alarm is None and not self._stop
        self.monitor = Monitor(model, self._writer, alarm=None if is_quiet else alarm, **self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Log the step."""
        if self.monitor is not None:
            self.monitor.step(state.global_step)
        if self._stop and _anywhere(self._should_stop, args.device):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write to disk what there is."""
        self._close()

    def _close(self) -> None:
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor.close()


def _anywhere(flag: bool, device: torch.device) -> bool:
    """Tell whether a flag is set in any process: only rank 0 hears the alarm, and all must leave together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    shared = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return bool(shared.item())
