"""The slots of a batch: what the device knows of each image under way, and what the host knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Literal, final

import torch

from torchlens_viz.ascent.plan import Plan, Request, stream

_REDIRECTED_STEPS: Final = 16
_REDIRECTIONS: Final = 4  # on end, from one start
_WAKINGS: Final = 3  # from one start: what falls asleep again and again should begin elsewhere
_PATIENCE: Final = 4  # steps without a gradient, where images are moved at random
LOOK_EVERY: Final = 8  # steps between two looks at what climbs: a GPU must come to a halt for each


@final
@dataclass(slots=True)
class Run:
    """What the host knows of a slot without asking the device.

    Attributes:
        request: What it is for.
        attempt: How often it began anew.
        noise: The stream of the noise that is added to its image.
        step: How many steps it has made. Those until there is a gradient do not count.
        redirected_until: The first step without redirected ReLUs; 0 where they were not needed.
        flat: How many of the latest steps had no gradient.
        redirections: How often on end ReLUs were redirected.
        wakings: How often it had to be woken.
        has_climbed: Whether there ever was a gradient without redirected ReLUs, from this start or another.
        ending: What the host has found.
        frames: Its image on the way.
    """

    request: Request
    attempt: int
    noise: torch.Generator
    step: int = 0
    redirected_until: int = 0
    flat: int = 0
    redirections: int = 0
    wakings: int = 0
    has_climbed: bool = False
    ending: Literal["", "dead", "asleep"] = ""
    frames: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_waking(self) -> bool:
        """Whether it has yet to be seen that there is a gradient without redirected ReLUs."""
        return self.redirected_until > 0

    @property
    def is_redirected(self) -> bool:
        """Whether its ReLUs pass on what would wake them."""
        return self.step < self.redirected_until


@final
@dataclass(slots=True)
class Rows:
    """The state of all slots; row i of every tensor belongs to slot i.

    `age` is of all steps, for the optimiser; `step` of those that count, for history and random numbers.
    """

    channels: torch.Tensor
    parameters: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    age: torch.Tensor
    step: torch.Tensor
    active: torch.Tensor
    over: torch.Tensor
    redirected: torch.Tensor
    still: torch.Tensor
    narrow: torch.Tensor
    history: torch.Tensor
    numbers: torch.Tensor
    offset: torch.Tensor
    slope: torch.Tensor

    def put_(self, places: list[int], other: Rows) -> None:
        """Overwrite rows with those of `other`."""
        index = torch.tensor(places, device=self.channels.device)
        for name in self.__slots__:
            getattr(self, name).index_copy_(0, index, getattr(other, name))

    def joined(self, other: Rows) -> Rows:
        """Return these rows and, after them, those of `other`."""
        names = self.__slots__
        return Rows(**{name: torch.cat((getattr(self, name), getattr(other, name))) for name in names})

    def taken(self, places: list[int]) -> Rows:
        """Return these rows alone."""
        index = torch.tensor(places, dtype=torch.int64, device=self.channels.device)
        return Rows(**{name: getattr(self, name)[index] for name in self.__slots__})


@final
class Starts:
    """Begins climbs as the plan says.

    Args:
        plan: The plan.
        device: Where they climb.
        sensitivity: (images, channels) -> (offset, slope) of an objective that is affine; None for others.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        sensitivity: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None,
    ) -> None:
        self._plan = plan
        self._device = device
        self._sensitivity = sensitivity

    def run(self, request: Request, *, attempt: int) -> Run:
        """Return what the host knows of a climb at its beginning."""
        noise = torch.Generator(self._device)
        noise.manual_seed(stream(self._plan.seed, request, attempt, "noise"))
        return Run(request, attempt, noise)

    def rows(self, runs: Sequence[Run]) -> Rows:
        """Return what the device knows of climbs at their beginning."""
        plan, count = self._plan, len(runs)
        channels = torch.tensor([run.request.channel for run in runs], device=self._device)
        parameters = torch.stack([self._image(run) for run in runs]).to(self._device)
        none = torch.zeros(count, 0, device=self._device)
        offset, slope = none, none
        if self._sensitivity is not None:
            offset, slope = self._sensitivity(plan.parametrization.decode(parameters, plan.size), channels)
        numbers = none
        if plan.transforms.moves:
            numbers = torch.stack([self._numbers(run) for run in runs]).to(self._device)
        return Rows(
            channels=channels,
            parameters=parameters,
            mean=torch.zeros_like(parameters),
            square=torch.zeros_like(parameters),
            age=torch.zeros_like(channels),
            step=torch.zeros_like(channels),
            active=torch.ones_like(channels, dtype=torch.bool),
            over=torch.zeros_like(channels, dtype=torch.bool),
            redirected=torch.zeros_like(channels, dtype=torch.bool),
            still=torch.tensor([plan.is_still(run.attempt) for run in runs], device=self._device),
            narrow=torch.tensor([plan.is_narrow(run.attempt) for run in runs], device=self._device),
            history=torch.full((count, plan.steps), torch.nan, device=self._device),
            numbers=numbers,
            offset=offset,
            slope=slope,
        )

    def _numbers(self, run: Run) -> torch.Tensor:
        """Return what places its image at every step."""
        generator = self._generator(run, "place")
        return self._plan.transforms.numbers(self._plan.steps, generator, len(self._plan.size))

    def _image(self, run: Run) -> torch.Tensor:
        """Return the parameters of the first image; the last start of all is the best reference image."""
        plan, image = self._plan, self._plan.begun.get(run.request.place, self._plan.start)
        number = plan.start_of(run.attempt)  # without the transforms from the same starts
        if number > 0:
            image = None
            real, means = plan.references, plan.reference_means
            if real is not None and means is not None and number >= plan.method.starts:
                image = real[int(means[:, run.request.channel % means.shape[1]].argmax())]
        generator = self._generator(run, "start")
        return plan.parametrization.start(plan.image_channels, plan.size, generator, image, number)

    def _generator(self, run: Run, purpose: str) -> torch.Generator:
        generator = torch.Generator("cpu")  # so that every device gets the same numbers
        if self._plan.method.shares_start:
            return generator.manual_seed(self._plan.seed)
        number = self._plan.start_of(run.attempt)
        return generator.manual_seed(stream(self._plan.seed, run.request, number, purpose))


class Action(Enum):
    """What to do about a run."""

    NONE = auto()
    REDIRECT = auto()
    RELEASE = auto()
    CLIMB = auto()
    RESTART = auto()


def is_watched(run: Run, plan: Plan) -> bool:
    """Tell whether `next_action` must know if there is a gradient at this step of a run.

    It depends on the run alone, so that an image ends up the same in every company.
    """
    if not plan.method.wakes or run.ending:
        return run.step == 0
    return run.is_waking or run.flat > 0 or run.step % LOOK_EVERY == 0


def next_action(run: Run, is_flat: bool | None, plan: Plan) -> Action:
    """Count a step of a run, and say what to do about it; where that is nothing any more, end it as dead.

    Args:
        run: The run.
        is_flat: Whether it had no gradient at this step; None where it stands still, or nobody looked.
        plan: The plan.
    """
    run.step += 1
    # Where the image is moved at random, a single step may miss what the unit sees.
    patience = _PATIENCE if plan.transforms.moves and not plan.is_still(run.attempt) else 1
    if is_flat:
        run.flat += 1
        if run.flat >= patience:
            return _help(run, plan)
    elif is_flat is not None:
        run.flat = 0
        if not run.is_waking:
            run.has_climbed = True
        elif run.step > run.redirected_until:
            run.step = run.redirected_until = run.redirections = 0
            run.has_climbed = True
            return Action.CLIMB
    if run.is_waking and run.step == run.redirected_until:
        run.flat = 0
        return Action.RELEASE
    return Action.NONE


def _help(run: Run, plan: Plan) -> Action:
    run.flat = 0
    if not plan.method.wakes:
        run.ending = "dead"
        return Action.NONE
    is_in_vain = run.is_redirected or run.redirections == _REDIRECTIONS
    if not is_in_vain and (run.is_waking or run.wakings < _WAKINGS):
        run.wakings += not run.is_waking
        run.redirections += 1
        run.redirected_until = run.step + _REDIRECTED_STEPS
        return Action.REDIRECT
    if run.attempt < plan.attempts - 1:
        return Action.RESTART
    if not run.has_climbed:
        run.ending = "dead"
    elif run.is_waking:
        run.ending = "asleep"
    return Action.NONE
