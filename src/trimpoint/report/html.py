"""The report of a study: one HTML file that opens offline, without any resource from elsewhere and without scripts."""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpoint.errors import StorageError, TrimpointError
from trimpoint.report import words
from trimpoint.report.data import metric, trial_of
from trimpoint.report.picture import Picture, frontier_picture
from trimpoint.values import Change, Trial

if TYPE_CHECKING:
    from trimpoint.search.record import StudyRecord

PATHS_SHOWN = 100
"""Modules named in one group of changes; a longer list ends with how many more there are."""
TRIALS_SHOWN = 300
"""Trials in the picture and in the table; the frontier is always among them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric before and after: cells of `(value, spread, ratio)` for each system."""

    name: str
    cells: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class StepView:
    """One step of a plan: what it does in words, the parameters that differ from their defaults, the others."""

    method: str
    summary: str
    where: str
    given: tuple[tuple[str, str], ...]
    defaults: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ChangeGroup:
    """Modules to which the same thing happened for the same reason."""

    method: str
    kind: str
    reason: str
    entries: tuple[str, ...]
    count: int


def write_report(record: "StudyRecord", path: str | os.PathLike[str]) -> Path:
    """Write the report of a study.

    Args:
        record: of the study, finished or not.
        path: of the file; its directory must exist.

    Returns:
        The path.

    Raises:
        StorageError: if it cannot be written; a report that was there before stays as it was.
    """
    path = Path(path)
    text = render(record)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StorageError(
            f"The report could not be written to {path}: {error.strerror or error}.", "name another file with --out"
        ) from error
    return path


def render(record: "StudyRecord") -> str:
    """Return the report of a study as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"words": words, "metric": metric}
    return environment.get_template("report.html.j2").render(view(record))


def view(record: "StudyRecord") -> dict[str, Any]:
    """Return everything that the template shows."""
    recovery = recovery_methods()
    shown = record.chosen or trial_of(record, record.nearest)
    trials = _trials_shown(record)
    return {
        "record": record,
        "verdict": words.verdict_text(record),
        "advice": words.advice_text(record),
        "goal": words.goal_text(record),
        "pictures": _pictures(dataclasses.replace(record, trials=tuple(trials)), recovery),
        "shown": shown,
        "certificate": None if shown is None else shown.certificate,
        "steps": [] if shown is None else plan_steps(shown),
        "columns": [title for title, _ in _systems(record, shown)],
        "rows": comparison(record, shown),
        "changed": [] if shown is None else group_changes(c for c in shown.changes if c.kind != "skipped"),
        "skipped": [] if shown is None else group_changes(c for c in shown.changes if c.kind == "skipped"),
        "missing": {} if shown is None else shown.profile.missing,
        "notes": () if shown is None else shown.profile.notes,
        "trials": trials,
        "hidden": len(record.trials) - len(trials),
    }


def _pictures(record: "StudyRecord", recovery: frozenset[str]) -> list[tuple[str, Picture]]:
    sizes = {"wide": (860, 430), "narrow": (340, 380)}
    drawn = {
        name: frontier_picture(record, width=width, height=height, recovery=recovery)
        for name, (width, height) in sizes.items()
    }
    return [(name, picture) for name, picture in drawn.items() if picture is not None]


def _trials_shown(record: "StudyRecord") -> list[Trial]:
    always = {*record.frontier, record.best, record.nearest}
    first = set(range(TRIALS_SHOWN))
    return [trial for index, trial in enumerate(record.trials) if index in first or trial.number in always]


def _systems(record: "StudyRecord", shown: Trial | None) -> list[tuple[str, Trial]]:
    titles = ("original", "one-line int8", "chosen" if record.chosen is not None else "nearest")
    trials = (record.baseline, record.one_line_int8, shown)
    return [
        (title, trial)
        for title, trial in zip(titles, trials, strict=True)
        if trial is not None and trial.state == "complete" and (title != titles[2] or trial.role == "candidate")
    ]


def comparison(record: "StudyRecord", shown: Trial | None) -> list[Row]:
    """Return the rows of the table before and after: scores first, then every metric that at least one system has."""
    systems = [trial for _, trial in _systems(record, shown)]
    rows = []
    if any(trial.quality is not None for trial in systems):
        split = next(trial.quality.split for trial in systems if trial.quality is not None)
        rows.append(Row(name=f"{record.score} on {split}", cells=tuple(map(_quality_cell, systems))))
    for name, title in words.METRIC_NAMES.items():
        if any(name in trial.profile for trial in systems):
            rows.append(Row(name=title, cells=tuple(_metric_cell(name, trial, record.baseline) for trial in systems)))
    return rows


def _quality_cell(trial: Trial) -> tuple[str, str, str]:
    quality = trial.quality
    if quality is None:
        return ("–", "", "")
    spread = ""
    if quality.low is not None and quality.high is not None:
        low, high = (words.score_text(quality.name, value) for value in (quality.low, quality.high))
        spread = f"{low} – {high}"
    drop = ""
    if quality.drop is not None:
        drop = f"drop {words.drop_text(quality.name, quality.drop)}"
        if quality.drop_upper is not None:
            drop += f", at most {words.drop_text(quality.name, quality.drop_upper)}"
    return (words.quality_text(quality), spread, drop)


def _metric_cell(name: str, trial: Trial, baseline: Trial | None) -> tuple[str, str, str]:
    if name not in trial.profile:
        return ("–", trial.profile.missing.get(name, ""), "")
    measured = trial.profile[name]
    text, spread = words.metric_text(name, measured.value), words.spread_text(name, measured)
    if baseline is None or trial.number == baseline.number or name not in baseline.profile or not measured.value:
        return (text, spread, "")
    before = baseline.profile[name].value
    if name == "latency_ms" and "latency_ratio" in trial.profile:
        paired = trial.profile["latency_ratio"]
        interval = words.spread_text("latency_ratio", paired)
        faster = words.compared(paired.value, "faster", "slower")
        return (text, spread, f"{faster} ({interval})" if interval else faster)
    factor = measured.value / before if measured.better == "higher" and before else before / measured.value
    return (
        text,
        spread,
        words.compared(factor, *(("more", "less") if measured.better == "higher" else ("less", "more"))),
    )


def plan_steps(trial: Trial) -> list[StepView]:
    """Return the steps of a trial's plan; a method that is not installed here is shown without its summary."""
    return [_step(dict(step)) for step in trial.plan.get("steps", [])]


def _step(data: dict[str, Any]) -> StepView:
    name, where = str(data.pop("method", "?")), str(data.pop("where", ""))
    kind = known_methods().get(name)
    defaults: dict[str, Any] = {}
    summary = ""
    if kind is not None:
        summary = (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        defaults = {field.name: _plain(field.default) for field in dataclasses.fields(kind)}
    return StepView(
        method=name,
        summary=summary,
        where=where,
        given=tuple((k, _value(v)) for k, v in data.items() if k not in defaults or defaults[k] != v),
        defaults=tuple((k, _value(v)) for k, v in data.items() if k in defaults and defaults[k] == v),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def known_methods() -> dict[str, type]:
    """Return the methods that are installed here, or none where the full installation is missing."""
    from trimpoint.registry import all_methods

    try:
        return dict(all_methods())
    except (ImportError, TrimpointError):
        return {}


def recovery_methods() -> frozenset[str]:
    """Return the names of the methods that only recover quality."""
    from trimpoint.method import Stage

    return frozenset(name for name, kind in known_methods().items() if kind.traits.stage is Stage.RECOVER)  # type: ignore[attr-defined]


def group_changes(changes: Iterable[Change]) -> list[ChangeGroup]:
    """Return changes grouped by method, kind and reason, the largest groups first."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        arrow = f": {change.before} → {change.after}" if change.before and change.after else ""
        groups.setdefault((change.method, change.kind, change.reason), []).append(
            f"{change.origin or '(model)'}{arrow}"
        )
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        ChangeGroup(method=key[0], kind=key[1], reason=key[2], entries=tuple(paths[:PATHS_SHOWN]), count=len(paths))
        for key, paths in ordered
    ]
