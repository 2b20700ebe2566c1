"""Units without a gradient: when to redirect ReLUs for them, when to begin anew, and when they are dead."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from torchlens_viz.ascent.plan import Plan
from torchlens_viz.ascent.slots import Run

_REDIRECTED_STEPS: Final = 16
_REDIRECTIONS: Final = 4  # on end, from one start
_WAKINGS: Final = 3  # from one start: what falls asleep again and again should begin elsewhere
_PATIENCE: Final = 4  # steps without a gradient, where images are moved at random
LOOK_EVERY: Final = 8  # steps between two looks at what climbs: a GPU must come to a halt for each


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
    if plan.is_classic or run.ending:
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
    if plan.is_classic:
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
