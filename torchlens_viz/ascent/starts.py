"""How a climb begins: its random streams, its first image, and the empty state of its slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch

from torchlens_viz.ascent.plan import Plan, Request, stream
from torchlens_viz.ascent.slots import Rows, Run


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
            drawn = [plan.transforms.numbers(plan.steps, self._generator(run, "place")) for run in runs]
            numbers = torch.stack(drawn).to(self._device)
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

    def _image(self, run: Run) -> torch.Tensor:
        """Return the parameters of the first image; the last start of all is the best reference image."""
        plan, image = self._plan, self._plan.start
        number = plan.start_of(run.attempt)  # without the transforms from the same starts
        if number > 0:
            image = None
            if plan.references is not None and plan.reference_means is not None and number > plan.restarts:
                means = plan.reference_means[:, run.request.channel % plan.reference_means.shape[1]]
                image = plan.references[int(means.argmax())]
        generator = self._generator(run, "start")
        return plan.parametrization.start(plan.image_channels, plan.size, generator, image, number)

    def _generator(self, run: Run, purpose: str) -> torch.Generator:
        generator = torch.Generator("cpu")  # so that every device gets the same numbers
        if self._plan.is_classic:  # every channel begins from the same image
            return generator.manual_seed(self._plan.seed)
        number = self._plan.start_of(run.attempt)
        return generator.manual_seed(stream(self._plan.seed, run.request, number, purpose))
