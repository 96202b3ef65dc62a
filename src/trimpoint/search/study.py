"""A study: a search, what it found, and what is handed over."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpoint.errors import InvalidParameterError, StudyError
from trimpoint.search.delivery import SYNTHETIC, deliver
from trimpoint.search.frontier import SCORE, Frontier
from trimpoint.search.log import FILE, TrialLog
from trimpoint.search.pick import choose, nearest, standing, verdict
from trimpoint.search.record import StudyRecord
from trimpoint.search.store import remove_tree
from trimpoint.target import Goal, Target
from trimpoint.values import Trial, from_data

LOCK = ".lock"


@dataclass(frozen=True, repr=False)
class Best:
    """The artifact that a study hands over.

    Args:
        directory: where it lies.
        trial: that it comes from.
    """

    directory: Path
    trial: Trial

    def __repr__(self) -> str:
        return f"Best({self.directory.as_posix()!r}, {self.trial})"

    def save(self, directory: str | Path) -> Path:
        """Copy the artifact to a new directory and return its path.

        Raises:
            StudyError: if there is something already.
        """
        destination = Path(directory)
        if destination.exists() and any(destination.iterdir()):
            raise StudyError(f"{destination} is not empty.", "give a new directory")
        shutil.copytree(self.directory, destination, dirs_exist_ok=True)
        return destination


class Study:
    """A search on disk, running or ended.

    Args:
        directory: of the study.

    Raises:
        StudyError: if there is no study.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.log = TrialLog.in_directory(self.directory)

    @property
    def record(self) -> StudyRecord:
        """Everything that is known, as one value."""
        known = self.log.settings()
        if "settings" not in known:
            raise StudyError(f"The study in {self.directory} was cut off before it began.", "start it again")
        settings = known["settings"]
        target, goal = from_data(Target, settings["target"]), goal_from(settings["goal"])
        trials = self.log.trials()
        baseline = next((t for t in trials if t.role == "baseline" and t.state == "complete"), None)
        one_liner = next((t for t in trials if t.role == "one_line_int8"), None)
        best = near = None
        text = binding = ""
        if baseline is not None:
            picked = known.get("picked")
            chosen = next((t for t in trials if t.number == picked), None)
            best = chosen or choose(trials, baseline, goal)
            near = None if best is not None else nearest(trials, baseline, goal)
            text = verdict(best, near, baseline, one_liner, goal)
            binding = standing(near, baseline, goal).limit if near is not None else ""
        return StudyRecord(
            directory=self.directory.as_posix(),
            model=settings["model"],
            task=settings["task"],
            score=settings["score"],
            target=target,
            goal=goal,
            trials=trials,
            frontier=tuple(t.number for t in Frontier.of(trials, (*goal.minimize, SCORE))),
            best=None if best is None else best.number,
            nearest=None if near is None else near.number,
            verdict=text,
            binding=binding,
            seconds=float(known.get("seconds", 0.0)),
            budget=settings["budget"],
            finished=bool(known.get("finished", False)),
            command=settings["command"],
            environment=settings["environment"],
            warnings=tuple(settings["warnings"]),
            space=known.get("space", {}),
        )

    @property
    def frontier(self) -> Frontier:
        """The trials that nothing beats in the goal's metrics and the score."""
        record = self.record
        return Frontier.of(record.trials, (*record.goal.minimize, SCORE))

    @property
    def best(self) -> Best | None:
        """The artifact that was handed over; `None` if nothing met the goal."""
        record = self.record
        directory = self.directory / "best"
        if record.chosen is None or not directory.is_dir():
            return None
        return Best(directory, record.chosen)

    def __repr__(self) -> str:
        record = self.record
        ended = f"{len(record.trials)} trials" + ("" if record.finished else ", not finished")
        return f"Study({self.directory.as_posix()!r}, {ended}: {record.verdict or 'nothing is measured yet'})"


def open_study(directory: str | Path) -> Study:
    """Open a study to read it.

    Raises:
        StudyError: if there is none.
    """
    return Study(directory)


def pick(directory: str | Path, rule: int | str | Mapping[str, float]) -> Study:
    """Hand over another trial of a study.

    Args:
        directory: of the study.
        rule: number of a trial, `"knee"`, or limits (metric → value) within which the best score is taken.

    Raises:
        StudyError: if there is no such complete trial.
        InvalidParameterError: if no trial is within the limits.
    """
    study = Study(directory)
    if isinstance(rule, str) and rule != "knee":
        raise InvalidParameterError(f"A rule must be a trial's number, 'knee' or limits. Got {rule!r}.")
    if isinstance(rule, int):
        found = next((t for t in study.record.trials if t.number == rule and t.state == "complete"), None)
        if found is None:
            numbers = ", ".join(str(t.number) for t in study.record.trials if t.state == "complete")
            raise StudyError(f"There is no complete trial {rule}.", f"complete are: {numbers or 'none'}")
    else:
        found = study.frontier.knee() if isinstance(rule, str) else study.frontier.pick(**rule)
    with alone(study.directory):
        study.log.note("picked", found.number)
        deliver(study.directory, found, study.record)
    return study


def goal_from(data: Mapping[str, Any]) -> Goal:
    """Read a goal back from its JSON form."""
    return Goal(minimize=tuple(data["minimize"]), limits=dict(data["limits"]), max_drop=data["max_drop"])


def discard(directory: Path) -> None:
    """Remove a study in which nothing was found: what it made itself, and the directory if nothing else is in it."""
    for name in (FILE, SYNTHETIC):
        (directory / name).unlink(missing_ok=True)
    for name in ("store", "training"):
        remove_tree(directory / name)
    with suppress(OSError):  # Where a lock that is held cannot be removed, or the directory holds something else.
        (directory / LOCK).unlink(missing_ok=True)
        directory.rmdir()


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the study's lock.

    Raises:
        StudyError: if another process works on the study.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(f"Another process is working on {directory}.", "wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()
