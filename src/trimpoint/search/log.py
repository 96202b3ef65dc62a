"""The one truth about a study: Optuna's relational storage (SQLite here, PostgreSQL where it is shared).

A trial is written as running when it starts and told when it ends; settings and decisions are attributes of the study.
Whatever was committed survives a kill at any moment. The file opens in optuna-dashboard.
"""

import json
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimpoint.errors import StorageError, StudyError
from trimpoint.search.frontier import SCORE, costs
from trimpoint.values import Certificate, Trial, from_data, to_data

NAME = "trimpoint"
FILE = "study.db"
_CERTIFICATE = "certificate/"
OBJECTIVES = ("latency_ms", "file_bytes", SCORE)


class TrialLog:
    """The trials and settings of one study, on disk.

    Args:
        url: of the storage, such as `sqlite:///runs/mine/study.db`.
    """

    def __init__(self, url: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._storage = self._guard(lambda: optuna.storages.RDBStorage(url, skip_compatibility_check=False))
            self._study = self._guard(
                lambda: optuna.create_study(
                    storage=self._storage,
                    study_name=NAME,
                    directions=["minimize"] * len(OBJECTIVES),
                    sampler=optuna.samplers.RandomSampler(seed=0),
                    load_if_exists=True,
                )
            )
        self._open: dict[int, Any] = {}

    @classmethod
    def in_directory(cls, directory: Path, *, create: bool = False) -> "TrialLog":
        """Open the log of a study directory.

        Raises:
            StudyError: if there is none and `create` is false.
        """
        path = directory / FILE
        if not create and not path.is_file():
            raise StudyError(
                f"There is no study in {directory}.", "give the directory that `trimpoint search --out` named"
            )
        return cls(f"sqlite:///{path.resolve().as_posix()}")

    @classmethod
    def begin(cls, directory: Path, settings: Mapping[str, Any]) -> "TrialLog":
        """Make the log of a new study; it lies in the directory as soon as its settings are in it, never before.

        Raises:
            StorageError: if it cannot be written; nothing of it is left.
        """
        fresh = directory / f".{FILE}.new"
        try:
            fresh.unlink(missing_ok=True)
            log = cls(f"sqlite:///{fresh.resolve().as_posix()}")
            log.note("settings", settings)
            log.close()
            fresh.replace(directory / FILE)
        except StorageError:
            for leftover in directory.glob(f"{fresh.name}*"):
                leftover.unlink(missing_ok=True)
            raise
        return cls.in_directory(directory)

    def close(self) -> None:
        """Let go of the file."""
        self._storage.engine.dispose()

    def _guard(self, action: Any) -> Any:
        from sqlalchemy.exc import DatabaseError

        try:
            with _interrupts_held():
                return action()
        except (self._optuna.exceptions.StorageInternalError, DatabaseError) as error:
            reason = getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error
            raise StorageError(
                f"The study cannot be read or written: {reason}.",
                "is the disk full, or the file damaged? What was committed before is kept; `trimpoint resume` goes on",
            ) from error

    # Settings

    def settings(self) -> dict[str, Any]:
        """Return what was noted with `note`."""
        return {key: json.loads(value) for key, value in self._guard(lambda: self._study.user_attrs).items()}

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`, replacing what was there."""
        self._guard(lambda: self._study.set_user_attr(key, json.dumps(to_data(value))))

    # Trials

    def start(self) -> int:
        """Write a running trial; return its number."""
        trial = self._guard(self._study.ask)
        self._open[trial.number] = trial
        return int(trial.number)

    def finish(self, trial: Trial) -> None:
        """Write how a started trial ended: its record and its state, the state last."""
        handle = self._open.pop(trial.number)
        self._guard(lambda: handle.set_user_attr("record", json.dumps(to_data(trial))))
        states = self._optuna.trial.TrialState
        values = [float(cost) for cost in costs([trial], OBJECTIVES)[0]]
        complete = trial.state == "complete" and all(value == value and abs(value) < 1e300 for value in values)
        self._guard(
            lambda: self._study.tell(
                handle, values if complete else None, state=states.COMPLETE if complete else states.FAIL
            )
        )

    def certify(self, number: int, certificate: Certificate) -> None:
        """Keep the certificate of a finished trial (Optuna does not let a finished trial be changed)."""
        self.note(f"{_CERTIFICATE}{number}", certificate)

    def close_interrupted(self) -> list[int]:
        """Mark the trials that a process left running as failed; return their numbers."""
        running = [t for t in self._trials() if t.state == self._optuna.trial.TrialState.RUNNING]
        for trial in running:
            self._guard(lambda trial=trial: self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL))
        return [trial.number for trial in running]

    def trials(self) -> tuple[Trial, ...]:
        """Return all trials that ended with a record, by number, with their certificates."""
        records = (trial.user_attrs.get("record") for trial in self._trials())
        trials = (from_data(Trial, json.loads(record)) for record in records if record is not None)
        settings = self.settings()
        return tuple(
            replace(trial, certificate=from_data(Certificate, settings[key]))
            if (key := f"{_CERTIFICATE}{trial.number}") in settings
            else trial
            for trial in trials
        )

    def _trials(self) -> list[Any]:
        return self._guard(lambda: self._study.get_trials(deepcopy=False))  # type: ignore[no-any-return]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended; a second one does not wait, as the storage may hang.

    SQLAlchemy closes a connection under a statement that is cut short, and says so at length.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return

    held = False

    def hold(number: int, frame: Any) -> None:
        nonlocal held
        if held and callable(usual):
            usual(number, frame)
        held = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            signal.raise_signal(signal.SIGINT)
