"""What a search was asked for."""

from dataclasses import dataclass

from trimpoint.filters import EVERYTHING, Filter
from trimpoint.recover.recipe import Recovery
from trimpoint.target import Goal, Target


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a search was asked for.

    Args:
        target: where the model must run.
        goal: what it must reach.
        seconds: budget in time, or `None`.
        trials: budget in trials of candidates, or `None`.
        seed: of everything random.
        where: what may be changed.
        recovery: the step that brings quality back; `None` where the task cannot train.
        control: how the original is trained further, to see if training alone helps; `None` leaves it out.
    """

    target: Target
    goal: Goal
    seconds: float | None = None
    trials: int | None = None
    seed: int = 0
    where: Filter = EVERYTHING
    recovery: Recovery | None = None
    control: Recovery | None = None
