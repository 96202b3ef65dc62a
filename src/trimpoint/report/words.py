"""Numbers, limits and certificates in words that a reader understands without knowing the field."""

import math
from typing import TYPE_CHECKING

from trimpoint.values import Certificate, Measurement, Quality, Trial

if TYPE_CHECKING:
    from trimpoint.search.record import StudyRecord

METRIC_NAMES = {
    "latency_ms": "median latency",
    "latency_p95_ms": "95th-percentile latency",
    "throughput_per_s": "throughput",
    "file_bytes": "file size",
    "coded_bytes": "coded size",
    "peak_rss_bytes": "peak memory",
    "params": "parameters",
    "macs": "multiply–accumulates",
}
"""Metric name → what a reader calls it, in the order of a table."""

SHARES = frozenset({"accuracy"})
"""Scores that are a share of samples, shown in percent, their drops in points."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


def file_size(count: float) -> str:
    """Return a number of bytes with a decimal unit.

    Example:
        >>> file_size(1_089_520)
        '1.09 MB'
    """
    power = 0 if count < 1000 else min(int(math.log10(count) // 3), len(_UNITS) - 1)
    return f"{significant(count / 1000**power)} {_UNITS[power]}"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent for ordinary sizes.

    Example:
        >>> significant(0.012345), significant(1234.5), significant(2.0)
        ('0.0123', '1,234', '2.00')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "–∞" if value < 0 else "not a number"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(places, 0)}f}" if places < 9 else f"{value:.{digits - 1}e}"


def ratio(value: float | None) -> str:
    """Return a ratio such as `3.05×`; nothing where there is none."""
    return "" if value is None else f"{significant(value)}×"


def compared(value: float, better: str, worse: str) -> str:
    """Return a ratio with the word that fits it; a ratio of one is "the same".

    Example:
        >>> compared(2.0, "faster", "slower"), compared(0.5, "faster", "slower"), compared(1.001, "less", "more")
        ('2.00× faster', '2.00× slower', 'the same')
    """
    if abs(value - 1) < 0.005 or value <= 0:
        return "the same" if value > 0 else ""
    return f"{ratio(value)} {better}" if value > 1 else f"{ratio(1 / value)} {worse}"


def metric_text(name: str, value: float) -> str:
    """Return the value of a metric with its unit; what stands in brackets after its name does not matter.

    Example:
        >>> metric_text("latency_ms", 0.4123), metric_text("params", 272474)
        ('0.412 ms', '272,474')
    """
    name = name.partition("[")[0]
    if name in SHARES:
        return score_text(name, value)
    if name.endswith("_bytes"):
        return file_size(value)
    if name.endswith("_ms"):
        return f"{significant(value)} ms"
    if name.endswith("_per_s"):
        return f"{significant(value)} /s"
    if name == "macs" and value >= 1e6:
        return f"{significant(value / 1e6)} M"
    if name.endswith("_ratio"):
        return ratio(value)
    return f"{value:,.0f}" if float(value).is_integer() else significant(value, 4)


def spread_text(name: str, measurement: Measurement) -> str:
    """Return the 95 % interval of a measurement, `low – high`; nothing where none was taken."""
    if measurement.low is None or measurement.high is None:
        return ""
    return f"{metric_text(name, measurement.low)} – {metric_text(name, measurement.high)}"


def score_text(name: str, value: float) -> str:
    """Return a score: a share in percent, anything else as it is.

    Example:
        >>> score_text("accuracy", 0.93051), score_text("perplexity", 24.3111)
        ('93.05 %', '24.31')
    """
    return f"{100 * value:.2f} %" if name in SHARES else significant(value, 4)


def drop_text(name: str, drop: float) -> str:
    """Return a drop of a score in its unit; a gain has a minus.

    Example:
        >>> drop_text("accuracy", 0.0025)
        '0.25 points'
    """
    if not math.isfinite(drop):
        return significant(drop)
    return f"{100 * drop:.2f} points" if name in SHARES else significant(drop)


def quality_text(quality: Quality | None) -> str:
    """Return a score on its split; nothing where there is none."""
    return "" if quality is None else score_text(quality.name, quality.value)


def seconds_text(seconds: float) -> str:
    """Return a duration in its two largest units.

    Example:
        >>> seconds_text(75), seconds_text(3720), seconds_text(8.25)
        ('1 min 15 s', '1 h 2 min', '8.2 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def limit_text(metric: str, limit: float | str) -> str:
    """Return a limit in words.

    Example:
        >>> limit_text("latency_ms", "0.5x")
        "median latency at most 0.5× the original's"
    """
    side = "at least" if metric.endswith("_per_s") else "at most"
    amount = f"{limit.removesuffix('x')}× the original's" if isinstance(limit, str) else metric_text(metric, limit)
    return f"{METRIC_NAMES.get(metric, metric)} {side} {amount}"


def goal_text(record: "StudyRecord") -> str:
    """Return what the study was to reach, in one sentence."""
    goal = record.goal
    names = " and ".join(METRIC_NAMES.get(name, name) for name in goal.minimize)
    drop = goal.max_drop if isinstance(goal.max_drop, str) else drop_text(record.score, goal.max_drop)
    limits = "".join(f"; {limit_text(name, limit)}" for name, limit in goal.limits.items())
    return f"Improve {names} while {record.score} drops by at most {drop}{limits}."


def certificate_text(certificate: Certificate) -> str:
    """Return what a certificate says, in plain sentences."""
    name = certificate.score
    sentences = [
        f"On {certificate.n:,} samples that took no part in calibration, training or selection, {name} is "
        f"{score_text(name, certificate.value)} against {score_text(name, certificate.baseline)} of "
        f"{certificate.reference}: a drop of {drop_text(name, certificate.drop)}."
    ]
    if certificate.lost is not None and certificate.gained is not None:
        sentences.append(
            f"The compressed model lost {certificate.lost:,} samples that the original got right and gained "
            f"{certificate.gained:,} that it got wrong."
        )
    bound = f"at {100 * certificate.level:.4g} % confidence the drop is at most {drop_text(name, certificate.upper)}"
    margin = drop_text(name, certificate.margin)
    if certificate.status == "passed":
        sentences.append(f"So {bound}, within the allowed {margin}: passed.")
    elif certificate.status == "failed":
        sentences.append(f"The allowed drop is {margin}, and {bound}: failed.")
    else:
        sentences.append(f"That is too few samples to tell: {bound}, and {margin} is allowed. Unproven.")
        if certificate.needed is not None:
            sentences.append(f"About {certificate.needed:,} samples would be needed to pass.")
    if certificate.looks > 1:
        sentences.append(
            f"This data had been used to certify {certificate.looks - 1} "
            f"{'time' if certificate.looks == 2 else 'times'} before; the confidence level is corrected for it."
        )
    return " ".join(sentences)


def verdict_text(record: "StudyRecord") -> str:
    """Return the verdict of a study; for one that has none yet, how far it has come."""
    if record.verdict:
        return record.verdict
    if record.baseline is None:
        return "Nothing has been measured yet."
    candidates = sum(trial.role == "candidate" and trial.state == "complete" for trial in record.trials)
    counted = f"{candidates} {'candidate' if candidates == 1 else 'candidates'} measured so far"
    if record.chosen is not None:
        return f"{counted}; the best meets the goal: {trial_text(record.chosen)}."
    return f"{counted}; none meets the goal yet."


def advice_text(record: "StudyRecord") -> str:
    """Return advice against int8 on the target, where every artifact that differs in number formats alone shows it.

    Nothing where one of them pays, or where none was measured.
    """
    from trimpoint.advice import measured_advice, only_numbers

    timed = [
        trial
        for trial in record.trials
        if "latency_ratio" in trial.profile
        and (trial.role == "one_line_int8" or (trial.role == "candidate" and only_numbers(trial.plan)))
    ]
    if not timed:
        return ""
    return measured_advice(max(timed, key=lambda trial: trial.profile["latency_ratio"].value).profile)


def trial_text(trial: Trial) -> str:
    """Return a trial in a few words: its label, ratio, size and score."""
    parts = [trial.label or f"trial {trial.number}"]
    if speed := trial.profile.get("latency_ratio"):
        parts.append(compared(speed.value, "faster", "slower").replace("the same", "as fast"))
    if size := trial.profile.get("file_bytes"):
        parts.append(file_size(size.value))
    if trial.quality is not None:
        parts.append(f"{trial.quality.name} {quality_text(trial.quality)}")
    return ", ".join(parts)
