"""The slots of a batch: what the device knows of each image under way, and what the host knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

import torch

from torchlens_viz.climbs import Request


@final
@dataclass(slots=True)
class Run:
    """What the host knows of a slot without asking the device."""

    request: Request
    attempt: int
    noise: torch.Generator
    step: int = 0
    redirected_until: int = 0
    ending: Literal["", "dead"] = ""
    frames: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_redirected(self) -> bool:
        """Whether its ReLUs pass on what would wake them."""
        return self.step < self.redirected_until

    @property
    def is_at_a_crossroads(self) -> bool:
        """Whether it is time to look if there is a gradient: at the start, and around a redirection."""
        return self.step in ((0, 1, self.redirected_until) if self.redirected_until else (0,))


@final
@dataclass(slots=True)
class Rows:
    """The state of all slots; row i of every tensor belongs to slot i."""

    channels: torch.Tensor
    parameters: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    step: torch.Tensor
    active: torch.Tensor
    over: torch.Tensor
    redirected: torch.Tensor
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
