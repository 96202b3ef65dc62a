"""Successive halving: how many candidates train how long at each rung, and which of them rise. Pure functions.

References:
    K. Jamieson and A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimpoint.search.pick import standing
from trimpoint.search.space import Structure
from trimpoint.target import Goal
from trimpoint.values import Trial

LEARNING = 0.3
"""The drop is assumed to fall with training as effort to the power of minus this; used only to decide what to try."""


FIXED_COST = 0.35
"""Share of a training step's time that a faster structure does not save: the teacher, the data, the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One round of training.

    Args:
        number: 0 is the shortest.
        width: candidates that take part.
        effort: share of the recovery's full length that they have trained at its end.
    """

    number: int
    width: int
    effort: float


def widths(seconds: float | None, trials: int | None, overhead: float = 8.0) -> tuple[int, ...]:
    """Return how many candidates take part at each rung.

    Args:
        seconds: left for training, or `None` without a limit in time.
        trials: candidates' trials left, or `None` without a limit in number.
        overhead: seconds that a trial takes beside its training (exporting, measuring).
    """
    first = 5 if seconds is None else max(1, min(5, int(0.2 * seconds / (2 * overhead))))
    rounds = _rounds(first)
    while trials is not None and sum(rounds) > trials and first > 1:
        first -= 1
        rounds = _rounds(first)
    return rounds if trials is None or sum(rounds) <= trials else rounds[:trials]


def _rounds(first: int) -> tuple[int, ...]:
    return (first, first - 1, 1) if first > 1 else (1,)


def effort_for(
    seconds: float,
    width: int,
    *,
    full_seconds: float,
    before: float,
    overhead: float,
    kept: float = 1.0,
    least: float = 0.01,
    growth: float = 1.25,
) -> float:
    """Return the effort that `width` candidates can reach together in `seconds`.

    Args:
        seconds: for this rung.
        width: candidates.
        full_seconds: time of a recovery of full length, on average.
        before: effort that is already behind them.
        overhead: seconds of each trial beside its training.
        kept: share of it that a longer run does not repeat: what comes before the cool-down.
        least: effort at the least.
        growth: by what factor the effort grows at the least.
    """
    gain = (seconds / max(width, 1) - overhead) / max(full_seconds, 1e-9)
    return float(min(1.0, max(before * kept + gain, before * growth, least)))


def training_cost(structure: Structure) -> float:
    """Return the forecast time of a training step, over that of the unmodified model's."""
    return FIXED_COST + (1 - FIXED_COST) * structure.gains.get("latency_ms", 1.0)


def mean_cost(forecasts: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """Return the mean cost of what races; what was not measured yet costs its forecast, or as the dearest measured."""
    return float(np.mean([measured.get(key, max([cost, *measured.values()])) for key, cost in forecasts.items()]))


def outlook(trial: Trial, growth: float) -> float:
    """Return the bound of the drop to expect of a trial after more training.

    The drop falls with the training, and the room that its bound needs with the root of the drop.

    Args:
        trial: that ended.
        growth: effort to come over the effort so far.
    """
    quality = trial.quality
    if quality is None or quality.drop is None:
        return float("inf")
    bound = max((b for b in (quality.drop_upper, quality.drop_forecast) if b is not None), default=quality.drop)
    left = max(growth, 1.0) ** -LEARNING
    return float(max(quality.drop, 0.0) * left + (bound - quality.drop) * left**0.5)


def promote(trials: Sequence[Trial], baseline: Trial, goal: Goal, width: int, growth: float) -> list[Trial]:
    """Return the trials that rise to the next rung, best first.

    A candidate counts as promising when it keeps the limits, and the drop that it is expected to end with would be
    allowed; the promising are ranked by merit, the others by their drop. A place is kept for the mildest candidate that
    is already feasible, so that a bold choice never costs the safe one.

    Args:
        trials: of the rung that just ended.
        baseline: the unmodified model.
        goal: what is to be reached.
        width: how many may rise.
        growth: effort that the last rung is expected to reach, over the effort so far.
    """
    done = [t for t in trials if t.state == "complete" and t.quality is not None and t.quality.drop is not None]
    allowed = goal.allowed_drop(baseline.quality.value if baseline.quality else 0.0)

    standings = {t.number: standing(t, baseline, goal) for t in done}

    def promises(trial: Trial) -> bool:
        return standings[trial.number].keeps_limits and outlook(trial, growth) <= allowed

    promising = sorted(filter(promises, done), key=lambda t: standings[t.number].merit)
    others = sorted(
        (t for t in done if not promises(t)), key=lambda t: (not standings[t.number].keeps_limits, outlook(t, growth))
    )
    ranked = promising + others
    rising = ranked[:width]
    safe = next((t for t in promising if standings[t.number].feasible), None)
    if safe is not None and width > 1 and safe not in rising:
        rising[-1] = safe
    return rising
