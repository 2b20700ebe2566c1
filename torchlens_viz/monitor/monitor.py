"""`Monitor`: kernels, maps and the health of layers in TensorBoard while a network trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any, Final, final

from torch import nn

from torchlens_viz.arguments import flag, function, integer
from torchlens_viz.distributed import world
from torchlens_viz.errors import CaptureError, InvalidArgumentError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.followers import Follower, Followers
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.models.inputs import InputOf
from torchlens_viz.models.kernels import has_kernels
from torchlens_viz.models.layers import Layer, Selector, unwrap
from torchlens_viz.monitor.alarm import Watchman
from torchlens_viz.monitor.claims import Claim
from torchlens_viz.monitor.evidence import Intake
from torchlens_viz.monitor.health import Trouble, warn
from torchlens_viz.monitor.log import Log
from torchlens_viz.monitor.observe import Norms, Observation, Schedule, Update, number, watched
from torchlens_viz.monitor.probe import Probe, ProbeBatch
from torchlens_viz.monitor.remarks import Remarks

_PATIENCE: Final = 5  # seconds that leaving waits for the disk after Ctrl-C
_IDLE: Final[AbstractContextManager[None]] = nullcontext()


@final
class Monitor:
    """Logs what layers look like and how they are, every so many steps, and changes nothing in the training.

    Two sources: a `probe` batch, which the network looks at in eval mode when `step` is called; or the
    training batch itself, as it passes within `with monitor.watch(global_step):`. On the steps between,
    either costs a comparison of numbers, and no hook is registered.

    Under every logged step stand `kernels/<layer>` and `maps/<layer>` (pictures), `health/<layer>/mean`,
    `std`, `zero_fraction`, `dead`, `dead_fraction`, `nonfinite` (numbers) and `health/<layer>/values` (a
    histogram); with `norms=True` also `weight_norm`, `update_norm` and `update_ratio`. Each picture keeps one
    scale for the whole training, which its legend states.

    Under DistributedDataParallel rank 0 logs. Where logging fails, one warning says so and the training goes
    on. A compiled model runs eagerly on the steps that `watch` logs.

    Args:
        model: The network; compiled or within DistributedDataParallel too.
        writer: A folder for TensorBoard; a `FolderWriter`; a run of Weights & Biases, MLflow, trackio or Aim;
            or anything with `add_image`, `add_scalar` and `add_histogram`, such as a `SummaryWriter`.
        layers: Which layers, as in `capture`; those that are no convolutions have no kernels. Where this is
            left out and there is no `nn.Conv2d`, other convolutions, dense layers and attention are watched.
        probe: What `step` shows the network: a batch (N, C, H, W), of which a copy is kept; a mapping of
            keyword arguments; or a DataLoader, of whose dataset 16 items are kept. None: `step` logs the
            weights alone, and `watch` is there for the rest.
        input_of: Which part of a DataLoader's batch is the input, as in `survey`.
        every: Log a step in so many: those whose number it divides, and the next one where that was skipped.
        alarm: Called with a `Trouble` when values are not finite, when a figure is out of the bounds below,
            or when weights are far too small or large: once, and again after it was gone. It names the cause,
            and is written too, under `alarms`. What it raises ends the training. It warns by default; None
            turns it off.
        max_dead: The share of dead channels above which there is an alarm, 0 to 1.
        std_range: (low, high); a std outside it raises the alarm.
        max_growth: How many times its first value a std may be.
        max_update: The share of a layer's parameters, by their norm, that a logged step may change.
        norms: Log the norm of each layer's parameters and of what the last step added to them.
        channel_dim: The dimension that counts channels in what all of the layers put out: 1 in (N, C, H, W),
            -1 in tokens (N, L, C). None finds it for each layer by itself, as in `torchlens_viz.capture`.
        histograms: Log a histogram of at most 8,009 values per call, spread evenly.
        scales: The scale (low, high) by tag or glob of tags, as in `{"maps/features.*": (0, 4)}`. For other
            pictures it is taken from the first one.
        headroom: How many times as far as the values of the first picture, outliers aside, its scale reaches.
        max_tiles: The most filters in a picture.
        map_images: Of how many inputs to draw maps, a row each.
        map_channels: How many maps to draw of each, the first ones.
        name: What the model is called in tags, as in `health/<name>/<layer>/std`. By default that is left
            out; where a monitor of another model has the same tags it is `model2` and so on, with a warning.
        strict: Raise where logging fails.

    Raises:
        LayerNotFoundError: A selector matches nothing.
        MissingDependencyError: `writer` is a folder, and TensorBoard is not installed.
        InvalidArgumentError: An option is out of range or has no effect.
        InvalidTypeError: An argument has another type.
        CaptureError: The model is TorchScript or fully sharded.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        >>> optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with Monitor(net, tempfile.mkdtemp(), probe=torch.randn(16, 3, 8, 8), every=10) as monitor:
        ...     for step in range(20):
        ...         optimiser.zero_grad()
        ...         net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        ...         optimiser.step()
        ...         monitor.step(step)
        >>> list(monitor.scales)
        ['kernels/0', 'maps/0']
    """

    def __init__(
        self,
        model: nn.Module,
        writer: str | os.PathLike[str] | Any,
        *,
        layers: Selector = nn.Conv2d,
        probe: Probe | None = None,
        input_of: InputOf = None,
        every: int = 100,
        alarm: Callable[[Trouble], object] | None = warn,
        max_dead: float = 0.9,
        std_range: tuple[float, float] = (1e-6, 1e4),
        max_growth: float = 100.0,
        max_update: float = 0.25,
        norms: bool = False,
        channel_dim: int | None = None,
        histograms: bool = True,
        scales: Mapping[str, Sequence[float]] | None = None,
        headroom: float = 2.0,
        max_tiles: int = 64,
        map_images: int = 4,
        map_channels: int = 16,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        self._schedule = Schedule(integer(every, "every", least=1))
        self._map_images = integer(map_images, "map_images", least=1)
        map_channels = integer(map_channels, "map_channels", least=1)
        self._kept: dict[str, Any] = {
            "images": self._map_images,
            "maps": map_channels,
            "histograms": flag(histograms, "histograms"),
        }
        function(alarm, "alarm")
        refuse_torchscript(model)
        self._model = model
        self._selected = watched(model, layers)
        self._layout = Layout(self._selected, channel_dim)
        self._check()  # in every process, and before rank 0 could wait for the others
        first: dict[nn.Module, str] = {}
        for layer, module in self._selected:  # one that is reached by two names is shown under the first
            first.setdefault(module, layer)
        self._modules = {layer: module for module, layer in first.items()}
        self._with_kernels = {layer: module for layer, module in self._modules.items() if has_kernels(module)}
        self._watchman = Watchman(
            max_dead=max_dead, std_range=std_range, max_growth=max_growth, max_update=max_update
        )
        self._alarm = alarm
        norms = flag(norms, "norms")
        self._remarks = Remarks(strict=flag(strict, "strict"))
        self._probe = None if probe is None else ProbeBatch(probe, input_of, unwrap(model))
        self._norms, self._logs_norms = Norms(self._modules), norms
        self._claim = Claim(writer, model, tuple(self._modules), name)
        self._log = Log(
            writer,
            self._claim.name,
            self._modules,
            self._remarks,
            scales=scales,
            headroom=headroom,
            max_tiles=integer(max_tiles, "max_tiles", least=1),
            norms=norms,
        )
        self._has_shown_inputs = False
        self._followers: dict[str, Follower] = {}
        if self._claim.is_chosen:
            self._remarks.shares_tags(self._log.tag("health", next(iter(self._modules))))

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """The scale (low, high) of every picture so far, to pass as `scales` to a run that goes on."""
        return self._log.scales.ranges

    def step(self, global_step: int) -> None:
        """Log this step if it is one to log; call it once a step, after the optimiser's.

        Args:
            global_step: The number of the step.

        Raises:
            Exception: What the alarm raises; with `strict`, what went wrong.
        """
        step = number(global_step)
        is_due = self._schedule.is_due(step)
        if world()[0] != 0 or (is_due and not self._may_look(step)):
            return
        if is_due:
            self._look_and_log(step)
        self._log_updates(step)
        following = self._schedule.next_due()
        if self._measures_updates and following is not None:
            self._norms.before(following)

    def watch(self, global_step: int) -> AbstractContextManager[None]:
        """Return a context manager for a training step: what passes through the layers is logged at its end.

        Args:
            global_step: The number of the step. Several passes within one block count as one step; of
                several blocks with one number, the first is logged.

        Raises:
            InvalidArgumentError: There is a probe, whose place under the same tags this would take.
        """
        if self._probe is not None:
            raise InvalidArgumentError(
                "`watch` shows the training batch under the tags of the `probe`: call `step` instead, or "
                "leave the probe out"
            )
        step = number(global_step)
        is_due = self._schedule.is_due(step)
        if world()[0] != 0:
            return _IDLE
        if is_due:
            return self._watched(step) if self._may_look(step) else _IDLE
        is_again = self._measures_updates and step == self._schedule.logged
        return self._watched_for_updates(step) if is_again else _IDLE

    def close(self) -> None:
        """Write everything to disk. A writer that was passed in stays open."""
        self._claim.release()
        if self._schedule.heard is None:
            self._remarks.never_stepped()
        with self._remarks.attempt(self._schedule.heard):
            self._log.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self.close()
            return
        # After Ctrl-C nobody waits for a disk: TensorBoard may take two minutes to flush.
        closing = Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(_PATIENCE)

    def _check(self) -> None:
        # On rank 0 alone the wrapper must not run, but its layers may be looked at.
        refuse_unhookable(self._model, self._selected, stop=False, compiled="eager")

    def _may_look(self, step: int) -> bool:
        """Tell whether the model may be looked at; to read sharded weights would wait for all ranks."""
        try:
            self._check()
        except CaptureError as error:
            if not self._remarks.excuses(step, error):
                raise
            return False
        return True

    def _look_and_log(self, step: int) -> None:
        observation, intake = self._observers(step)
        if self._probe is not None:
            with self._remarks.attempt(step), self._hooked(observation, intake):
                self._probe.show(unwrap(self._model))
            self._remarks.missing(step, self._modules, observation, "`layers` can leave them out")
        elif self._alarm is not None and not self._logs_norms:
            self._remarks.weights_alone()
        self._log_step(step, observation, intake)

    @contextmanager
    def _watched(self, step: int) -> Iterator[None]:
        observation, intake = self._observers(step)
        if self._measures_updates:
            with self._remarks.attempt(step):
                self._norms.before(step)
        try:
            with ExitStack() as hooks:
                with self._remarks.attempt(step):
                    hooks.enter_context(self._hooked(observation, intake))
                    self._remarks.eager(self._model)
                yield
        except BaseException:
            self._schedule.try_again()
            raise
        advice = "is the forward pass within `watch`? `layers` can leave them out"
        self._remarks.missing(step, self._modules, observation, advice)
        self._log_step(step, observation, intake)

    @contextmanager
    def _watched_for_updates(self, step: int) -> Iterator[None]:
        """While gradients accumulate, the optimiser steps in a later block of a number than the first."""
        yield
        self._log_updates(step)

    @property
    def _measures_updates(self) -> bool:
        return self._logs_norms or self._alarm is not None

    def _log_updates(self, step: int) -> dict[str, float]:
        """Return by layer which share of its parameters the step changed, once that is known."""
        updates: dict[str, Update] = {}
        with self._remarks.attempt(step):
            updates = self._norms.updates(step)
            if self._logs_norms:
                self._log.updates(updates, step)
        return {layer: update.ratio for layer, update in updates.items() if update.ratio is not None}

    def _observers(self, step: int) -> tuple[Observation, Intake]:
        excuses, followers = partial(self._remarks.excuses, step), Followers(self._followers)
        observation = Observation(
            **self._kept, excuses_error=excuses, layout=self._layout, followers=followers
        )
        return observation, Intake(unwrap(self._model), self._modules, excuses)

    @contextmanager
    def _hooked(self, observation: Observation, intake: Intake) -> Iterator[None]:
        root, selected, check = unwrap(self._model), self._selected, self._check
        with ExitStack() as hooks:
            if self._alarm is not None:
                layers = [Layer("", root), *selected]
                hooks.enter_context(Capture(root, layers, check, intake, io="input"))
            hooks.enter_context(Capture(root, selected, check, observation, layout=self._layout))
            if self._modules.keys() - self._followers.keys():
                observation.followers.begin()
            hooks.callback(observation.followers.end)
            yield

    def _log_step(self, step: int, observation: Observation, intake: Intake) -> None:
        if self._probe is not None and not self._has_shown_inputs:
            self._has_shown_inputs = True
            with self._remarks.attempt(step):
                batch = self._probe.picture()
                if batch is not None:
                    self._log.inputs(batch[: self._map_images], step)
        self._log.kernels(self._with_kernels, step)
        health = self._log.health(observation.layers, self._followers, step)
        if self._logs_norms:
            with self._remarks.attempt(step):
                self._log.weights(self._norms.weights(), step)
        updates = self._log_updates(step)
        if self._alarm is None:
            return
        found: list[Trouble] = []
        with self._remarks.attempt(step):
            found = self._watchman.look(health, step, intake.evidence(updates))
        self._log.troubles(found, step)
        self._watchman.tell(self._alarm, found)
