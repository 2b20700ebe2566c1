"""The climb itself: a batch of slots, in each an image that climbs alone and makes room for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Final, final

import torch

from torchlens_viz.ascent.parametrization import Size
from torchlens_viz.ascent.plan import Climb, Plan, Request, as_frame, verdict
from torchlens_viz.ascent.starts import LOOK_EVERY, Action, Rows, Run, Starts, is_watched, next_action
from torchlens_viz.backprop.relu import Redirection, gradient_within
from torchlens_viz.backprop.scorer import Scorer, Sensitivity
from torchlens_viz.errors import CaptureMemoryError, InvalidArgumentError, is_out_of_memory, reason_of

_HURRY: Final = 3.0


def climb(
    requests: Sequence[Request],
    plan: Plan,
    scorer: Scorer,
    *,
    batch_size: int,
    show: Callable[[float], None],
) -> Generator[Climb, None, None]:
    """Make images, and yield each when it is finished.

    Which images share a batch changes none of them, but for rounding. Where memory runs out, the batch is
    halved and what was on its way begins anew, to the same result.

    Args:
        requests: The images to make.
        plan: How.
        scorer: What they are to maximise.
        batch_size: How many to make at a time.
        show: Called after every step with how many images the work on those under way amounts to.
    """
    waiting = deque(requests)
    while waiting:
        slots: _Slots | None = None
        on_the_way: list[Request] = []
        try:
            while waiting or on_the_way:
                new = _next(waiting, batch_size - len(on_the_way), scorer, is_empty=not on_the_way)
                on_the_way += new  # before anything else: memory may run out at once
                if slots is None:
                    slots = _Slots(plan, scorer, new)
                else:
                    slots.fill(new)
                slots.step()
                for climb in slots.finished():
                    on_the_way.remove(climb.request)
                    yield climb
                show(slots.progress())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise CaptureMemoryError(
                    "one image at a time is more than there is memory for; choose a smaller `size`, an "
                    f"earlier layer, or a larger device ({reason_of(error)})"
                ) from error
            waiting.extendleft(reversed(on_the_way))
            batch_size = max(1, batch_size // 2)
        del slots
        if scorer.device.type == "cuda":
            torch.cuda.empty_cache()


def climb_in_phases(
    requests: Sequence[Request],
    plan: Plan,
    scorer: Scorer,
    small: Scorer,
    *,
    batch_size: int,
    show: Callable[[float], None],
) -> Generator[Climb, None, None]:
    """Make images as `climb` does, from copies of smaller ones that have climbed before.

    Args:
        requests: The images to make.
        plan: How, of both phases together.
        scorer: What they are to maximise.
        small: The same for images of the first phase.
        batch_size: How many whole images to make at a time.
        show: As for `climb`.
    """
    first, last = plan.phases()
    more = batch_size * plan.method.copies ** len(plan.size)
    share = first.steps / plan.steps
    at_once = len(requests) if scorer.objective.couples else more  # what is compared stays together
    for begin in range(0, len(requests), at_once):
        group = requests[begin : begin + at_once]
        made = {
            one.request.place: one
            for one in climb(group, first, small, batch_size=more, show=lambda part: show(share * part))
        }
        begun = {
            place: _side_by_side(one.image, plan.size)
            for place, one in made.items()
            if one.status not in ("dead", "nonfinite")
        }

        def tell(part: float, made: Mapping[int, Climb] = made) -> None:
            show(share * len(made) + (1 - share) * part)

        for one in climb(group, replace(last, begun=begun), scorer, batch_size=batch_size, show=tell):
            before = made.pop(one.request.place)
            frames = one.frames
            if frames is not None and before.frames is not None:
                early = [_side_by_side(frame, plan.size) for frame in before.frames[:-1]]
                frames = torch.stack([*early, *frames])
            yield one._replace(history=torch.cat((before.history, one.history)), frames=frames)


def _side_by_side(image: torch.Tensor, size: Size) -> torch.Tensor:
    """Return copies of (C, ...) side by side, cut to (C, *size)."""
    copies = [-(-whole // part) for whole, part in zip(size, image.shape[1:], strict=True)]
    return image.repeat(1, *copies)[(slice(None), *(slice(side) for side in size))].contiguous()


def _next(waiting: deque[Request], room: int, scorer: Scorer, *, is_empty: bool) -> list[Request]:
    """Take from the queue what there is room for; images that are compared must climb together."""
    if not scorer.objective.couples:
        return [waiting.popleft() for _ in range(min(room, len(waiting)))]
    chosen: list[Request] = []
    while is_empty and waiting:
        group = [request for request in waiting if request.channel == waiting[0].channel]
        if chosen and len(chosen) + len(group) > room:
            break
        chosen += group
        for request in group:
            waiting.remove(request)
    return chosen


@final
class _Slots:
    """The batch. Slots that are done stay until others take their place, so that it keeps its shape."""

    def __init__(self, plan: Plan, scorer: Scorer, requests: Sequence[Request]) -> None:
        self._plan = plan
        self._scorer = scorer
        self._starts = Starts(plan, scorer.device, scorer.sensitivity if scorer.is_affine else None)
        self.runs = [self._starts.run(request, attempt=0) for request in requests]
        self._rows = self._starts.rows(self.runs)
        self._done: list[int] = []
        self._optimizer = plan.method.optimizer(plan.rate)
        self._look_every = 1 if scorer.device.type == "cpu" else LOOK_EVERY
        self._count = 0

    def progress(self) -> float:
        """Return which part of their steps the images under way have made, summed."""
        steps = self._plan.steps
        return sum(min(run.step / steps, 1.0) for n, run in enumerate(self.runs) if n not in self._done)

    def fill(self, requests: Sequence[Request]) -> None:
        """Let these begin to climb, first in the places of those that are done."""
        runs = [self._starts.run(request, attempt=0) for request in requests]
        places, self._done = self._done, []
        if runs:
            old, new = runs[: len(places)], runs[len(places) :]
            if old:
                self._put(places[: len(old)], old)
            if new:
                self.runs += new
                self._rows = self._rows.joined(self._starts.rows(new))
        unused = set(places[len(runs) :])
        if unused:
            kept = [place for place in range(len(self.runs)) if place not in unused]
            self.runs = [self.runs[place] for place in kept]
            self._rows = self._rows.taken(kept)

    def step(self) -> None:
        """Move every image one step uphill."""
        rows, plan = self._rows, self._plan
        parameters = rows.parameters.requires_grad_()
        is_redirecting = any(run.is_redirected for run in self.runs)
        with Redirection(rows.redirected, rows.narrow) if is_redirecting else nullcontext():
            images = plan.parametrization.decode(parameters, plan.size)
            sensitivity = Sensitivity(rows.offset, rows.slope) if self._scorer.is_affine else None
            seen = self._transformed(images)
            scores = self._scorer.scores(images, seen, rows.channels, sensitivity, eagerly=is_redirecting)
            # Within, because checkpointing runs parts of the network again.
            gradient = _gradient(scores, parameters, self._scorer)
        rows.parameters = parameters.detach()
        with torch.no_grad():
            self._film(images)
            self._judge(*self._move(rows, scores.detach(), gradient))
            self._count += 1

    def finished(self) -> list[Climb]:
        """Take the images that have come to their end."""
        rows, steps = self._rows, self._plan.steps
        at_end = [bool(run.ending) or (run.step >= steps and not run.is_waking) for run in self.runs]
        if any(at_end) or self._count % self._look_every == 0:
            active = rows.active.tolist()
            at_end = [end or not active[place] for place, end in enumerate(at_end)]
        done = [place for place, end in enumerate(at_end) if end]
        self._done = done
        return self._climbs(done, rows.taken(done)) if done else []

    def _transformed(self, images: torch.Tensor) -> torch.Tensor:
        plan, rows, as_they_are = self._plan, self._rows, images
        if plan.transforms.moves:
            numbers = rows.numbers[torch.arange(len(images), device=images.device), rows.step]
            images = plan.transforms.place(images, numbers, plan.parametrization.middle)
        if plan.transforms.noise:
            noise = torch.empty_like(images, requires_grad=False)
            for row, run in zip(noise, self.runs, strict=True):
                row.normal_(generator=run.noise)
            images = images + plan.transforms.noise * plan.parametrization.width * noise
        if any(plan.is_still(run.attempt) for run in self.runs):
            images = torch.where(rows.still.view(-1, *[1] * (images.ndim - 1)), as_they_are, images)
        return images

    def _move(
        self, rows: Rows, scores: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change what still climbs; return which images have a gradient, and which climb, both (N,) bool."""
        plan = self._plan
        slope = plan.method.slope(gradient)
        is_fine = scores.isfinite() & slope.peak.isfinite()
        moving = rows.active & is_fine
        rows.history.scatter_(1, rows.step[:, None], scores.where(rows.active, torch.nan)[:, None])
        change = self._optimizer.change(slope.gradient, rows.age, rows.mean, rows.square)
        if plan.method.wakes:  # what has no gradient yet must go far
            change *= torch.where(rows.redirected, _HURRY, 1.0).view(-1, *[1] * (change.ndim - 1))
        rows.parameters += change.where(moving.view(-1, *[1] * (change.ndim - 1)), 0)
        if (smoothing := plan.parametrization.smoothing) is not None:
            smoothing.apply_(rows.parameters, rows.step, moving)
        plan.parametrization.confine_(rows.parameters)
        if plan.threshold is not None:
            rows.over |= moving & (scores > plan.threshold)
        rows.active &= is_fine & ~rows.over
        rows.age += 1
        rows.step.add_(1).clamp_(max=plan.steps - 1)  # waking may take longer than all steps
        return slope.peak > 0, moving

    def _judge(self, has_gradient: torch.Tensor, moving: torch.Tensor) -> None:
        """Redirect, restart or give up those that have no gradient where it is time to look."""
        rows, plan = self._rows, self._plan
        watched = [is_watched(run, plan) for run in self.runs]
        seen = torch.stack((has_gradient, moving)).tolist() if any(watched) else None
        for place, run in enumerate(self.runs):
            is_flat = not seen[0][place] if seen and watched[place] and seen[1][place] else None
            match next_action(run, is_flat, plan):
                case Action.REDIRECT:
                    rows.redirected[place] = True
                case Action.RELEASE:
                    rows.redirected[place] = False
                case Action.CLIMB:  # let it make all of its steps, from where it is
                    run.frames.clear()
                    rows.step[place] = 0
                    rows.history[place] = torch.nan
                case Action.RESTART:
                    anew = self._starts.run(run.request, attempt=run.attempt + 1)
                    anew.has_climbed = run.has_climbed
                    self._put([place], [anew])

    def _put(self, places: list[int], runs: list[Run]) -> None:
        self._rows.put_(places, self._starts.rows(runs))
        for place, run in zip(places, runs, strict=True):
            self.runs[place] = run

    def _film(self, images: torch.Tensor) -> None:
        every = self._plan.method.frames
        for place, run in enumerate(self.runs):
            if every is not None and run.step % every == 0:
                run.frames.append(as_frame(images[place], self._plan))

    def _climbs(self, places: list[int], rows: Rows) -> list[Climb]:
        plan = self._plan
        images = plan.parametrization.decode(rows.parameters, plan.size)
        scores, means = self._scorer.evaluate(images, rows.channels)
        scores, means, images, history, over, active = (
            part.cpu() for part in (scores, means, images, rows.history, rows.over, rows.active)
        )
        climbs = []
        for index, place in enumerate(places):
            run = self.runs[place]
            if plan.method.frames is not None:
                run.frames.append(as_frame(images[index], plan))
            own = history[index]
            status, evidence = verdict(
                plan,
                own,
                attempt=run.attempt,
                is_dead=run.ending == "dead",
                over=bool(over[index]),
                stopped=not active[index],
            )
            climbs.append(
                Climb(
                    request=run.request,
                    image=images[index].clone(),
                    score=scores[index].item(),
                    means=means[index].clone(),
                    history=own.clone(),
                    status=status,
                    evidence=evidence,
                    frames=torch.stack(run.frames) if run.frames else None,
                )
            )
        return climbs


def _gradient(scores: torch.Tensor, parameters: torch.Tensor, scorer: Scorer) -> torch.Tensor:
    if scores.requires_grad:
        (gradient,) = gradient_within(scores.sum(), parameters)
        if gradient is not None:
            return gradient
    raise InvalidArgumentError(
        f"the objective {scorer.objective!r} at `{scorer.layer}` has no gradient path to the image: "
        "something between them detaches, rounds or converts, or the layer runs in a part that is "
        "checkpointed with `use_reentrant=True`; look at `preprocess`, the objective and quantised layers"
    )
