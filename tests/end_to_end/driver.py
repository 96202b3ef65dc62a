"""Runs one search whole, and one that is killed again and again: `python -m tests.end_to_end.driver DIRECTORY`.

A process of its own, since it forks: every search runs in a child that ends by SIGKILL at a chosen moment, with nothing
cleaned up. What was on disk after each kill is written to `killed.json`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trimpoint.artifact
from tests.end_to_end import tiny
from trimpoint.search import open_study, resume, search
from trimpoint.search.log import TrialLog
from trimpoint.values import to_data

TRIALS = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse:
    """A `Progress` that kills the process at its `at`-th call that says something with `word` in it."""

    def __init__(self, at: int = -1, word: str = "") -> None:
        self.at, self.word, self.calls = at, word, 0

    def update(self, text: str = "", *_: object, **__: object) -> None:
        self.calls += self.word in text
        if self.calls == self.at:
            die()

    phase = message = update


def before(owner: Any, name: str, at: int = 1) -> None:
    """Kill the process when `owner.name` is called for the `at`-th time, before it does anything."""
    _wrap(owner, name, at, lambda _: die())


def after(owner: Any, name: str, at: int = 1) -> None:
    """Kill the process when the `at`-th call of `owner.name` has ended."""
    _wrap(owner, name, at, lambda call: (call(), die()))


def _wrap(owner: Any, name: str, at: int, last: Callable[[Callable[[], Any]], Any]) -> None:
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            return last(lambda: original(*args, **more))
        return original(*args, **more)

    setattr(owner, name, wrapped)


def between_record_and_state() -> None:
    """Kill the process when the record of a candidate is written but its state is not."""
    original = TrialLog.finish

    def finish(self: TrialLog, trial: Any) -> None:
        if trial.role == "candidate":
            self._study.tell = lambda *_, **__: die()
        original(self, trial)

    TrialLog.finish = finish


MOMENTS: dict[str, Callable[[], Fuse | None]] = {
    "the very beginning": lambda: Fuse(1),
    "before the settings are there": lambda: before(TrialLog, "note"),
    "the baseline being exported": lambda: Fuse(2),
    "a trial begun": lambda: after(TrialLog, "start"),
    "a trial measured, not recorded": lambda: before(TrialLog, "finish", 2),
    "a decision not recorded": lambda: before(TrialLog, "note", 6),
    "a stage half written": lambda: after(sys.modules["trimpoint.search.workbench"], "save_stage", 2),
    "in the middle of training": lambda: Fuse(3, "distill"),
    "a trial recorded, not ended": between_record_and_state,
    "just before the certificate": lambda: before(sys.modules["trimpoint.search.run"], "certify_trial"),
    "the certificate not recorded": lambda: before(TrialLog, "certify"),
    "the artifact not in place": lambda: before(trimpoint.artifact, "put_in_place", 2),
}


def run(directory: Path, fuse: Fuse) -> None:
    with tiny.replayed():
        if (directory / "study.db").exists():
            resume(directory, model=tiny.model(), task=tiny.task(), progress=fuse)
        else:
            search(tiny.model(), tiny.task(), trials=TRIALS, out=directory, recovery=tiny.recovery(), progress=fuse)


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked process and return how that ended: 0, or the negative number of the signal."""
    if (child := os.fork()) == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001 - a forked child must never return into the caller
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_disk(directory: Path) -> dict[str, Any]:
    """Return the recorded trials, and (inode, time of change) of every stored file that is written once."""
    trials = to_data(TrialLog.in_directory(directory).trials()) if (directory / "study.db").exists() else []
    files = {
        path.relative_to(directory).as_posix(): [path.stat().st_ino, path.stat().st_mtime_ns]
        for path in sorted(directory.glob("store/[!.]*/**/*"))
        if path.is_file() and path.name != "records.npy"
    }
    return {"trials": trials, "files": files}


def main(where: str) -> None:
    root = Path(where)
    whole, killed = root / "whole", root / "killed"
    run(whole, Fuse())
    kills = []
    for moment, prepare in MOMENTS.items():
        code = in_child(lambda prepare=prepare: run(killed, prepare() or Fuse()))
        kills.append({"moment": moment, "code": code, **on_disk(killed)})
    code = in_child(lambda: run(killed, Fuse()))
    kills.append({"moment": "none", "code": code, **on_disk(killed)})
    result = {"kills": kills, "whole": on_disk(whole), "records": {}}
    for directory in (whole, killed):
        result["records"][directory.name] = to_data(open_study(directory).record)
    (root / "killed.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
