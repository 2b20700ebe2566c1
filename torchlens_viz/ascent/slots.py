"""The slots of a batch: what the device knows of each image under way, and what the host knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

import torch

from torchlens_viz.ascent.plan import Request


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
