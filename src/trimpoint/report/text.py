"""Tables of a study and of a profile for the terminal."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trimpoint.report.data import frontier_trials, trial_of
from trimpoint.report.table import Table
from trimpoint.report.words import (
    METRIC_NAMES,
    advice_text,
    certificate_text,
    drop_text,
    goal_text,
    metric_text,
    quality_text,
    ratio,
    score_text,
    seconds_text,
    spread_text,
    verdict_text,
)
from trimpoint.values import Profile, Quality, Trial

if TYPE_CHECKING:
    from trimpoint.runtimes.base import OperatorTime
    from trimpoint.search.record import StudyRecord

COLUMNS = (">trial", "plan", ">latency", ">faster", ">size", ">score", ">drop", ">drop at most", "certificate")


def study_table(record: "StudyRecord") -> Table:
    """Return the baseline, the one-line int8, the frontier and the chosen trial, with the verdict below."""
    trials = [trial for trial in (record.baseline, record.one_line_int8) if trial is not None]
    trials += [trial for trial in frontier_trials(record) if trial not in trials]
    trials += [
        trial
        for trial in (record.chosen, trial_of(record, record.nearest))
        if trial is not None and trial not in trials
    ]
    marked = frozenset(index for index, trial in enumerate(trials) if trial.number == record.best)
    return Table(columns=COLUMNS, rows=tuple(map(_row, trials)), marked=marked, notes=tuple(_notes(record)))


def _row(trial: Trial) -> tuple[str, ...]:
    names = {"baseline": "unmodified", "one_line_int8": "one-line int8"}
    label = names.get(trial.role) or trial.label or f"trial {trial.number}"
    speed, quality = trial.profile.get("latency_ratio"), trial.quality
    failed = f" ({trial.state}: {trial.error})" if trial.state != "complete" else ""
    return (
        str(trial.number),
        label + failed,
        _cell(trial.profile, "latency_ms"),
        ratio(speed.value) if speed else "",
        _cell(trial.profile, "file_bytes"),
        quality_text(quality),
        _drop(quality, "drop"),
        _drop(quality, "drop_upper"),
        "" if trial.certificate is None else trial.certificate.status,
    )


def _cell(profile: Profile, name: str) -> str:
    return metric_text(name, profile[name].value) if name in profile else ""


def _drop(quality: Quality | None, field: str) -> str:
    value = None if quality is None else getattr(quality, field)
    return "" if quality is None or value is None else drop_text(quality.name, value)


def _notes(record: "StudyRecord") -> Iterable[str]:
    yield ""
    yield verdict_text(record)
    if record.best is None and record.binding and record.binding not in verdict_text(record):
        yield f"Nothing met the goal: {record.binding}"
    if advice := advice_text(record):
        yield f"Advice: {advice}."
    yield f"Goal: {goal_text(record)}"
    if record.chosen is not None and record.chosen.certificate is not None:
        yield f"Certificate: {certificate_text(record.chosen.certificate)}"
    ended = "" if record.finished else ", not finished"
    yield f"{len(record.trials)} trials in {seconds_text(record.seconds)}{ended}."
    for warning in record.warnings:
        yield f"warning: {warning}"


def profile_table(profile: Profile, *, title: str = "", ratios_to: Profile | None = None) -> Table:
    """Return what was measured of one artifact, with its 95 % intervals and what could not be measured.

    Args:
        profile: to show.
        title: above the table.
        ratios_to: a profile whose values are divided by these; the column is left out without it.
    """
    rows = []
    for name in [*(n for n in METRIC_NAMES if n in profile), *(n for n in profile if n not in METRIC_NAMES)]:
        entry = profile[name]
        row = [name, metric_text(name, entry.value), spread_text(name, entry), str(entry.n), entry.how]
        if ratios_to is not None:
            base = ratios_to.get(name)
            row.insert(3, ratio(base.value / entry.value) if base is not None and entry.value else "")
        rows.append(tuple(row))
    rows += [
        (name, "not measured", "", *(("",) if ratios_to is not None else ()), "", why)
        for name, why in profile.missing.items()
    ]
    columns = ("metric", ">value", "95 % interval", *((">original ÷ this",) if ratios_to else ()), ">n", "how")
    return Table(title=title, columns=columns, rows=tuple(rows), notes=tuple(f"note: {n}" for n in profile.notes))


def operator_table(operators: Sequence["OperatorTime"], *, shown: int = 10) -> Table:
    """Return the slowest operators with their share of the time of all."""
    total = sum(entry.ms for entry in operators) or 1.0
    rows = [
        (entry.kind, entry.module or entry.name, metric_text("operator_ms", entry.ms), f"{entry.ms / total:.0%}")
        for entry in operators[:shown]
    ]
    rest = len(operators) - len(rows)
    notes = (f"{rest} faster ones take {sum(e.ms for e in operators[shown:]) / total:.0%}.",) if rest > 0 else ()
    title = "slowest operators" if rows else "The runtime tells no times of single operators."
    return Table(title=title, columns=("operator", "module", ">time", ">share"), rows=tuple(rows), notes=notes)


def quality_line(quality: Quality) -> str:
    """Return a score with its interval, samples and split in one line."""
    spread = ""
    if quality.low is not None and quality.high is not None:
        low, high = (score_text(quality.name, value) for value in (quality.low, quality.high))
        spread = f" (95 % interval {low} – {high})"
    return f"{quality.name} on {quality.split}: {quality_text(quality)}{spread}, n = {quality.n:,}"
