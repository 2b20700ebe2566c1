"""`Monitor`: kernels, maps and the health of layers in TensorBoard while a network trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Final, final

from torch import nn

from torchlens_viz.arguments import integer
from torchlens_viz.distributed import world
from torchlens_viz.errors import CaptureError, InvalidArgumentError, InvalidTypeError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.models.kernels import has_kernels
from torchlens_viz.models.layers import Selector, select, unwrap
from torchlens_viz.monitor import pictures as portraits
from torchlens_viz.monitor.health import Figures, Remarks, Trouble, Watchman, warn
from torchlens_viz.monitor.observe import Norms, Observation, Observed, Schedule, finite, number
from torchlens_viz.monitor.pictures import Scales
from torchlens_viz.monitor.probe import Probe, ProbeBatch
from torchlens_viz.monitor.writer import Board

_LAST: Final = (nn.Linear, nn.LayerNorm, nn.Embedding)  # what they put out has its channels last
_IDLE: Final[AbstractContextManager[None]] = nullcontext()


@final
class Monitor:
    """Logs what layers look like and how they are, every so many steps, and changes nothing in the training.

    Two sources: a `probe` batch, which the network looks at in eval mode when `step` is called; or the
    training batch itself, as it passes within `with monitor.watch(global_step):`. On the steps between,
    either costs a comparison of numbers, and no hook is registered.

    Under every logged step stand `kernels/<layer>` and `maps/<layer>` (pictures), `health/<layer>/mean`,
    `std`, `zero_fraction`, `dead`, `dead_fraction`, `nonfinite` (numbers) and `health/<layer>/values` (a
    histogram); with `norms=True` also `health/<layer>/weight_norm`, `update_norm` and `update_ratio`. A
    channel counts as dead where it exceeds zero nowhere. Each picture keeps one scale for the whole training,
    which its legend states.

    Under DistributedDataParallel rank 0 logs. Where logging fails, one warning says so and the training goes
    on. A compiled model runs eagerly on the steps that `watch` logs.

    Args:
        model: The network; compiled or within DistributedDataParallel too.
        writer: A folder, in which a `SummaryWriter` is made, or anything with `add_image`, `add_scalar` and
            `add_histogram`, such as torch's or tensorboardX's `SummaryWriter`.
        layers: Which layers, as in `capture`. Those that are no convolutions have no kernels.
        probe: What `step` shows the network: a batch (N, C, H, W), of which a copy is kept; a mapping of
            keyword arguments; or a DataLoader, of whose dataset 16 items are kept. None: `step` logs the
            weights alone, and `watch` is there for the rest.
        every: Log a step in so many: those whose number it divides, and the next one where that was skipped.
        alarm: Called with a `Trouble` when values are not finite, when too many channels are dead, or when
            the std is out of bounds: once, and again after it was gone. What it raises ends the training. It
            warns by default; None turns it off.
        max_dead: The share of dead channels above which there is an alarm, 0 to 1.
        std_range: (low, high); a std outside it raises the alarm.
        norms: Log the norm of each layer's parameters and of what the last step added to them.
        channel_dim: The dimension of the channels in what layers put out; -1 for the activations of a
            transformer (N, L, C). Of Linear, LayerNorm and Embedding it is always the last.
        histograms: Log a histogram of at most 8,009 values per call, spread evenly.
        scales: The scale (low, high) by tag or glob of tags, as in `{"maps/features.*": (0, 4)}`. For other
            pictures it is taken from the first one.
        headroom: How many times as far as the values of the first picture its scale reaches.
        max_tiles: The most filters in a picture.
        map_images: Of how many inputs to draw maps, a row each.
        map_channels: How many maps to draw of each, the first ones.
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
        every: int = 100,
        alarm: Callable[[Trouble], object] | None = warn,
        max_dead: float = 0.9,
        std_range: tuple[float, float] = (1e-6, 1e4),
        norms: bool = False,
        channel_dim: int = 1,
        histograms: bool = True,
        scales: Mapping[str, Sequence[float]] | None = None,
        headroom: float = 2.0,
        max_tiles: int = 64,
        map_images: int = 4,
        map_channels: int = 16,
        strict: bool = False,
    ) -> None:
        self._schedule = Schedule(integer(every, "every", least=1))
        self._max_tiles = integer(max_tiles, "max_tiles", least=1)
        self._map_images = integer(map_images, "map_images", least=1)
        self._map_channels = integer(map_channels, "map_channels", least=1)
        if alarm is not None and not callable(alarm):
            raise InvalidTypeError(f"`alarm` must be a function of one Trouble, or None, got {alarm!r}")
        refuse_torchscript(model)
        self._model = model
        self._selected = select(model, layers)
        self._channel_dim = channel_dim
        self._check()  # in every process, and before rank 0 could wait for the others
        inner = [name for name, module in unwrap(model).named_modules() if _is_distributed(module)]
        if probe is not None and inner:
            raise InvalidArgumentError(
                f"`probe` cannot be shown to a model with DistributedDataParallel inside it (`{inner[0]}`), "
                "which waits for the other processes; leave it out and use `watch`"
            )
        self._modules: dict[nn.Module, str] = {}
        for name, module in self._selected:  # one that is reached by two names is shown under the first
            self._modules.setdefault(module, name)
        self._with_kernels = [module for module in self._modules if has_kernels(module)]
        tags = [_tag(kind, name) for kind in ("kernels", "maps") for name in self._modules.values()]
        self._scales = Scales(scales, headroom=headroom, tags=tags)
        self._watchman = Watchman(max_dead=max_dead, std_range=std_range)
        self._alarm = alarm
        self._histograms = histograms
        self._remarks = Remarks(strict=strict)
        self._probe = None if probe is None else ProbeBatch(probe)
        self._norms = (
            Norms({_tag("health", name): module for module, name in self._modules.items()}) if norms else None
        )
        self._board = Board(writer)
        self._has_shown_inputs = False

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """The scale (low, high) of every picture so far, to pass as `scales` to a run that goes on."""
        return self._scales.ranges

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
        if self._norms is not None and following is not None:
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
        is_again = self._norms is not None and step == self._schedule.logged
        return self._watched_for_updates(step) if is_again else _IDLE

    def close(self) -> None:
        """Write everything to disk. A writer that was passed in stays open."""
        with self._remarks.attempt(self._schedule.heard):
            self._board.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        # On rank 0 alone the wrapper must not run, but its layers may be looked at.
        refuse_unhookable(self._model, self._selected, stop=False, compiled="eager")

    def _may_look(self, step: int) -> bool:
        """Tell whether the model may be looked at; to read sharded weights would wait for all ranks."""
        try:
            self._check()
        except CaptureError as error:
            self._remarks.excuse(step, error)
            return False
        return True

    def _look_and_log(self, step: int) -> None:
        observation = self._observation(step)
        if self._probe is not None:
            with self._remarks.attempt(step), self._capture(observation):
                self._probe.show(unwrap(self._model))
            self._remarks.missing(step, self._missing(observation), "`layers` can leave them out")
        self._log(step, observation.layers)

    @contextmanager
    def _watched(self, step: int) -> Iterator[None]:
        observation = self._observation(step)
        if self._norms is not None:
            with self._remarks.attempt(step):
                self._norms.before(step)
        try:
            with ExitStack() as hooks:
                with self._remarks.attempt(step):
                    hooks.enter_context(self._capture(observation))
                    self._remarks.eager(self._model)
                yield
        except BaseException:
            self._schedule.try_again()
            raise
        advice = "is the forward pass within `watch`? `layers` can leave them out"
        self._remarks.missing(step, self._missing(observation), advice)
        self._log(step, observation.layers)
        self._log_updates(step)

    @contextmanager
    def _watched_for_updates(self, step: int) -> Iterator[None]:
        """While gradients accumulate, the optimiser steps in a later block of a number than the first."""
        yield
        self._log_updates(step)

    def _log_updates(self, step: int) -> None:
        if self._norms is not None:
            with self._remarks.attempt(step):
                for tag, value in self._norms.updates(step).items():
                    self._board.number(tag, value, step)

    def _observation(self, step: int) -> Observation:
        return Observation(
            images=self._map_images,
            maps=self._map_channels,
            histograms=self._histograms,
            on_error=partial(self._remarks.excuse, step),
            channel_dims={
                name: -1 if isinstance(module, _LAST) else self._channel_dim
                for module, name in self._modules.items()
            },
        )

    def _missing(self, observation: Observation) -> list[str]:
        return [name for name in self._modules.values() if name not in observation.layers]

    def _capture(self, observation: Observation) -> Capture[None]:
        root, selected = unwrap(self._model), self._selected
        return Capture(root, selected, self._check, observation)

    def _log(self, step: int, seen: Mapping[str, Observed]) -> None:
        if self._probe is not None and not self._has_shown_inputs:
            self._has_shown_inputs = True
            with self._remarks.attempt(step):
                batch = self._probe.picture()
                if batch is not None:
                    self._board.picture("probe/inputs", portraits.inputs(batch[: self._map_images]), step)
        for module in self._with_kernels:
            with self._remarks.attempt(step):
                tag = _tag("kernels", self._modules[module])
                image = portraits.kernels(tag, module, self._scales, step, max_tiles=self._max_tiles)
                self._board.picture(tag, image, step)
        health: dict[str, Figures] = {}
        for name, observed in seen.items():
            with self._remarks.attempt(step):
                self._log_layer(name, observed, step, health)
        if self._norms is not None:
            with self._remarks.attempt(step):
                for tag, value in self._norms.weights().items():
                    self._board.number(tag, value, step)
        if self._alarm is not None:
            self._watchman.tell(self._alarm, self._watchman.look(health, step))

    def _log_layer(self, name: str, observed: Observed, step: int, health: dict[str, Figures]) -> None:
        figures = health[name] = Figures.of([stats.compute() for stats in observed.stats.values()])
        for what in ("mean", "std", "zero_fraction", "dead", "dead_fraction", "nonfinite"):
            self._board.number(f"{_tag('health', name)}/{what}", getattr(figures, what), step)
        with self._remarks.attempt(step):
            values = finite(observed.sample)
            if len(values):
                self._board.values(f"{_tag('health', name)}/values", values, step)
        if observed.maps is not None:
            tag = _tag("maps", name)
            self._board.picture(tag, portraits.maps(tag, observed.maps, self._scales, step), step)


def _tag(kind: str, layer: str) -> str:
    return f"{kind}/{layer or 'model'}"  # a model that is one layer has no name in itself


def _is_distributed(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)
