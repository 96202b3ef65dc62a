"""Which trial is handed over: feasible, then likely to be certified, then the best of what was to be minimised."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimpoint.target import METRICS, Goal
from trimpoint.values import Trial


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a trial stands against the goal.

    Args:
        merit: geometric mean, over the metrics to minimise, of the ratio to the baseline: below 1 is better.
        excess: by how much the worst limit is exceeded, relative; 0 within all limits.
        limit: the limit that is exceeded most, in words; empty when feasible.
        keeps_limits: whether all limits hold, whatever the drop is.
    """

    merit: float
    excess: float
    limit: str = ""
    keeps_limits: bool = True

    @property
    def feasible(self) -> bool:
        """Whether all limits hold."""
        return self.excess <= 0


def ratio(trial: Trial, baseline: Trial, metric: str) -> float:
    """Return trial ÷ baseline where lower is better, baseline ÷ trial where higher is; infinite where not measured.

    For the latency it is the measured, interleaved ratio, since the two absolute figures come from different moments.
    """
    if metric == "latency_ms" and "latency_ratio" in trial.profile:
        return 1 / trial.profile["latency_ratio"].value
    if metric not in trial.profile or metric not in baseline.profile:
        return float("inf")
    value, base = trial.profile[metric].value, baseline.profile[metric].value
    if METRICS[metric] == "higher":
        value, base = base, value
    return value / base if base else float("inf")


def standing(trial: Trial, baseline: Trial, goal: Goal) -> Standing:
    """Return how `trial` stands against `goal`; limits apply to the worse end of each interval."""
    merit = float(np.exp(np.mean([np.log(max(ratio(trial, baseline, m), 1e-9)) for m in goal.minimize])))
    excesses: dict[str, float] = {}
    for metric in goal.limits:
        limit = goal.limit(metric, baseline.profile[metric].value if metric in baseline.profile else float("nan"))
        measured = trial.profile.get(metric)
        if not limit > 0:
            excesses[f"{metric} cannot be judged: the unmodified model's was not measured, or is 0"] = float("inf")
        elif measured is None:
            excesses[f"{metric} could not be measured"] = float("inf")
        elif METRICS[metric] == "lower":
            worst = measured.value if measured.high is None else measured.high
            if metric == "latency_ms" and isinstance(goal.limits[metric], str) and "latency_ratio" in trial.profile:
                relative = trial.profile["latency_ratio"]  # Interleaved, while the two times are of different moments.
                worst = baseline.profile[metric].value / (relative.low or relative.value)
            excesses[f"{metric} ≤ {limit:.4g} (it is {worst:.4g})"] = worst / limit - 1
        else:
            worst = measured.value if measured.low is None else measured.low
            excesses[f"{metric} ≥ {limit:.4g} (it is {worst:.4g})"] = limit / max(worst, 1e-12) - 1
    keeps_limits = all(excess <= 0 for excess in excesses.values())
    if trial.quality is not None and trial.role != "baseline":
        allowed = goal.allowed_drop(baseline.quality.value if baseline.quality else 0.0)
        upper = trial.quality.drop_upper
        if upper is None:
            excesses["the drop is not known"] = float("inf")
        else:
            text = f"drop of {trial.quality.name} ≤ {allowed:.4g} (its upper bound is {upper:.4g})"
            excesses[text] = (upper - allowed) / max(allowed, 1e-6)
    worst_name = max(excesses, key=lambda name: excesses[name], default="")
    excess = max(0.0, excesses[worst_name]) if worst_name else 0.0
    return Standing(merit=merit, excess=excess, limit=worst_name if excess > 0 else "", keeps_limits=keeps_limits)


def choose(trials: Sequence[Trial], baseline: Trial, goal: Goal) -> Trial | None:
    """Return the feasible, complete trial of the best merit; between equals the first metric, then the score.

    Trials whose certificate is likely to pass go before the others; among the others, the likeliest is taken.
    """
    fitting = [t for t in trials if t.state == "complete" and standing(t, baseline, goal).feasible]
    allowed = goal.allowed_drop(baseline.quality.value if baseline.quality else 0.0)

    def doubt(trial: Trial) -> float:
        forecast = trial.quality.drop_forecast if trial.quality else None
        return max(0.0, forecast - allowed) if forecast is not None else 0.0

    # The original needs no certificate: it is handed over only where nothing feasible improves on it.
    better = [t for t in fitting if t.role != "baseline" and standing(t, baseline, goal).merit < 0.9999]
    return min(
        better or fitting,
        key=lambda t: (
            doubt(t),
            round(standing(t, baseline, goal).merit, 4),
            ratio(t, baseline, goal.minimize[0]),
            t.quality.drop or 0.0 if t.quality else 0.0,
            t.number,
        ),
        default=None,
    )


def nearest(trials: Sequence[Trial], baseline: Trial, goal: Goal) -> Trial | None:
    """Return the complete trial that exceeds the limits least."""
    done = [t for t in trials if t.state == "complete"]
    return min(done, key=lambda t: (standing(t, baseline, goal).excess, t.number), default=None)


def verdict(best: Trial | None, near: Trial | None, baseline: Trial, one_liner: Trial | None, goal: Goal) -> str:
    """Return one sentence: what came out, and what the search added over the runtime's one-line int8."""
    if best is None:
        if near is None:
            return "No trial is complete yet."
        return (
            f"Nothing met the goal. Nearest is trial {near.number} ({_steps(near)}): it misses "
            f"{standing(near, baseline, goal).limit}."
        )
    if best.role == "baseline":
        return (
            "The unmodified model is the best that meets the goal: nothing that was tried was better and good enough."
        )
    text = f"Trial {best.number} ({_steps(best)}) is {_times(best, baseline)} than the unmodified model"
    if best.quality is not None and best.quality.drop is not None:
        text += f", {_loss(best)} on `{best.quality.split}`"
    if one_liner is not None and one_liner.number == best.number:
        return text + "; it is the runtime's one-line int8, and the search found nothing better."
    if one_liner is not None and one_liner.state == "complete":
        text += f"; against the one-line int8 it is {_times(best, one_liner)}"
        if not standing(one_liner, baseline, goal).feasible:
            text += ", which does not meet the goal itself"
    return text + "."


def speed(trial: Trial, other: Trial) -> float:
    """Return how many times faster `trial` is than `other`, from the ratios of both to the same baseline."""
    if "latency_ratio" in trial.profile:
        base = other.profile["latency_ratio"].value if "latency_ratio" in other.profile else 1.0
        return trial.profile["latency_ratio"].value / base
    if "latency_ms" in trial.profile and "latency_ms" in other.profile:
        return other.profile["latency_ms"].value / trial.profile["latency_ms"].value
    return float("nan")


def _times(trial: Trial, other: Trial) -> str:
    faster = speed(trial, other)
    smaller = 1 / ratio(trial, other, "file_bytes")
    parts = [_factor(faster, "faster", "slower"), _factor(smaller, "smaller", "larger")]
    return " and ".join(part for part in parts if part)


def _factor(value: float, better: str, worse: str) -> str:
    if not np.isfinite(value) or value <= 0:
        return ""
    return f"{value:.2f}× {better}" if value >= 1 else f"{1 / value:.2f}× {worse}"


def _loss(trial: Trial) -> str:
    quality = trial.quality
    if quality is None or quality.drop is None:
        return ""
    scale, unit = (100, "points") if quality.name == "accuracy" else (1, "")
    lost = f"{abs(quality.drop) * scale:.2f} {unit}".rstrip() + f" of {quality.name}"
    upper = quality.drop_upper
    if quality.drop >= 0:
        return f"loses {lost}" + ("" if upper is None else f" (at most {upper * scale:.2f} with 95 % confidence)")
    if upper is None:
        return f"gains {lost}"
    return f"gains {lost} (with 95 % confidence it loses " + (
        f"at most {upper * scale:.2f})" if upper > 0 else "nothing)"
    )


def _steps(trial: Trial) -> str:
    return " → ".join(step["method"] for step in trial.plan.get("steps", [])) or trial.label


def line(trial: Trial, baseline: Trial, goal: Goal) -> str:
    """Return a trial in one line, for people who watch a search."""
    metrics = "  ".join(f"{name} {ratio(trial, baseline, name):.3g}x" for name in goal.minimize)
    quality = trial.quality
    score = "" if quality is None else f"  {quality.name} {quality.value:.4g}"
    drop = "" if quality is None or quality.drop_upper is None else f" (drop ≤ {quality.drop_upper:.3g})"
    held = "" if standing(trial, baseline, goal).feasible else "  does not meet the goal"
    return f"trial {trial.number} rung {trial.rung}: {trial.label}: {metrics}{score}{drop}{held}"
