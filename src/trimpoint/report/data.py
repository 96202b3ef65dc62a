"""The stable JSON of a study: computed first, rendered elsewhere.

`study_data` is what `trimpoint show RUN --format json` prints. Keys are only ever added.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpoint.report.words import advice_text
from trimpoint.values import Certificate, Quality, Trial, to_data

if TYPE_CHECKING:
    from trimpoint.search.record import StudyRecord

COUNTED = ("complete", "infeasible", "stopped", "failed")
"""States that a trial can end in."""


def study_data(record: "StudyRecord") -> dict[str, Any]:
    """Return a study as JSON data.

    Returns:
        `baseline`, `one_line_int8`, `best` and `nearest` (each as `point` gives it, or `None`), `frontier` (a list of
        points, fastest first), `trials` (state → count), `target`, `goal`, `seconds`, and `verdict`, `binding`,
        `finished`, `warnings`, `advice`.
    """
    return {
        "baseline": _measured(record, record.baseline),
        "one_line_int8": _measured(record, record.one_line_int8),
        "best": _handed_over(record),
        "nearest": _measured(record, trial_of(record, record.nearest)),
        "frontier": [point(record, trial) for trial in frontier_trials(record)],
        "trials": {state: sum(trial.state == state for trial in record.trials) for state in COUNTED},
        "target": to_data(record.target),
        "goal": to_data(record.goal),
        "seconds": record.seconds,
        "verdict": record.verdict,
        "binding": record.binding,
        "finished": record.finished,
        "warnings": list(record.warnings),
        "advice": advice_text(record) or None,
    }


def point(record: "StudyRecord", trial: Trial) -> dict[str, Any]:
    """Return one trial as JSON data; what was not measured is `None`.

    `latency_ratio` is the baseline's latency divided by this one's, above 1 is faster; `latency_ratio_ci` its 95 %
    interval `[low, high]`. `artifact` is a path that can be opened from where the study was opened.
    """
    ratio = trial.profile.get("latency_ratio")
    return {
        "trial": trial.number,
        "label": trial.label,
        "plan": trial.plan,
        "artifact": None if trial.artifact is None else (Path(record.directory) / trial.artifact).as_posix(),
        "latency_ms": metric(trial, "latency_ms"),
        "latency_ratio": metric(trial, "latency_ratio"),
        "latency_ratio_ci": None
        if ratio is None or ratio.low is None or ratio.high is None
        else [_finite(ratio.low), _finite(ratio.high)],
        "file_bytes": _whole(metric(trial, "file_bytes")),
        "peak_rss_bytes": _whole(metric(trial, "peak_rss_bytes")),
        "params": _whole(metric(trial, "params")),
        "macs": _whole(metric(trial, "macs")),
        "score": score_data(trial.quality),
        "certificate": certificate_data(trial.certificate),
    }


def score_data(quality: Quality | None) -> dict[str, Any] | None:
    """Return name, value, number of samples and split of a score."""
    if quality is None:
        return None
    return {"name": quality.name, "value": _finite(quality.value), "n": quality.n, "split": quality.split}


def certificate_data(certificate: Certificate | None) -> dict[str, Any] | None:
    """Return a certificate; `upper95` is the one-sided bound at `level`, corrected for `looks`."""
    if certificate is None:
        return None
    return {
        "status": certificate.status,
        "margin": _finite(certificate.margin),
        "drop": _finite(certificate.drop),
        "upper95": _finite(certificate.upper),
        "n": certificate.n,
        "level": _finite(certificate.level),
        "looks": certificate.looks,
    }


def trial_of(record: "StudyRecord", number: int | None) -> Trial | None:
    """Return the trial with a number, or `None`."""
    return next((trial for trial in record.trials if trial.number == number), None)


def frontier_trials(record: "StudyRecord") -> list[Trial]:
    """Return the trials of the frontier, in its order."""
    return [trial for number in record.frontier if (trial := trial_of(record, number)) is not None]


def metric(trial: Trial | None, name: str) -> float | None:
    """Return the value of a metric of a trial, `None` where it was not measured or is not finite."""
    measurement = None if trial is None else trial.profile.get(name)
    return None if measurement is None else _finite(measurement.value)


def _measured(record: "StudyRecord", trial: Trial | None) -> dict[str, Any] | None:
    return None if trial is None or trial.state != "complete" else point(record, trial)


def _handed_over(record: "StudyRecord") -> dict[str, Any] | None:
    """Return the chosen trial; its artifact is the one that was handed over, once that is there."""
    found = _measured(record, record.chosen)
    delivered = Path(record.directory) / "best"
    return found if found is None or not delivered.is_dir() else found | {"artifact": delivered.as_posix()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value
