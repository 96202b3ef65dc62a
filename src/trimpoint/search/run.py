"""Start a search and go on with one: check what is given, record it, run it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from trimpoint.budget import parse_duration
from trimpoint.errors import InvalidParameterError, StorageError, StudyError, TrimpointError
from trimpoint.filters import EVERYTHING, Filter, parse
from trimpoint.measure.environment import environment
from trimpoint.methods.distill import Distill
from trimpoint.methods.finetune import Finetune
from trimpoint.plan import Step
from trimpoint.progress import SILENT, Progress
from trimpoint.recover.recipe import Recovery
from trimpoint.reference import load_reference
from trimpoint.runtimes import get_runtime
from trimpoint.search.delivery import certify_trial, deliver
from trimpoint.search.engine import Engine
from trimpoint.search.fingerprint import combined, parts
from trimpoint.search.heartbeat import Heartbeat
from trimpoint.search.log import FILE, TrialLog
from trimpoint.search.preflight import preflight
from trimpoint.search.settings import Settings
from trimpoint.search.store import NOT_WRITABLE, cannot_write
from trimpoint.search.study import Study, alone, discard, goal_from
from trimpoint.search.workbench import Workbench
from trimpoint.target import Goal, Target
from trimpoint.task import Task
from trimpoint.values import from_data

FULL_EPOCHS = 30.0
"""Length of the default recovery at full effort; how much of it a candidate gets is the search's choice."""


def search(
    model: nn.Module | str,
    task: Task | str,
    *,
    target: Target | None = None,
    goal: Goal | None = None,
    max_drop: float | str | None = None,
    limits: Mapping[str, float | str] | None = None,
    budget: str | float | None = None,
    trials: int | None = None,
    out: str | Path = "runs/search",
    seed: int = 0,
    scope: Filter | str | None = None,
    freeze: Filter | str | None = None,
    recovery: Recovery | None = None,
    progress: Progress | None = None,
) -> Study:
    """Find how small and fast a model can get, and hand over the best artifact.

    The unmodified model and the runtime's one-line int8 are measured first; whenever the search is stopped, what it
    found so far is kept, and `resume` goes on.

    Args:
        model: trained; the module itself, or `package.module:attribute` (then a study can be resumed by itself).
        task: its data, loss and score; the object, or its reference.
        target: where it must run; ONNX Runtime on one thread by default.
        goal: what it must reach.
        max_drop: of the goal, where no `goal` is given; by default one point, or one percent of an unbounded score.
        limits: of the goal, where no `goal` is given.
        budget: time for all of it, such as `"30m"`, or seconds; half an hour where neither time nor trials are given.
        trials: how many candidates to try at most.
        out: directory of the study, made by this call.
        seed: of everything random.
        scope: which modules may be changed.
        freeze: which modules must not be changed.
        recovery: the step that brings quality back; distillation from the unmodified model by default.
        progress: where to tell how far it is.

    Raises:
        StudyError: if `out` holds another study.
        DataError: if the task has no `select` data, or its data cannot be used.
        ModelError: if the model cannot be used.
        ExportError: if the model cannot be exported.
        StorageError: if nothing can be written.
    """
    if goal is not None and (max_drop is not None or limits is not None):
        raise InvalidParameterError("Give either `goal` or `max_drop` and `limits`. Got both.")
    seconds = parse_duration(budget) if budget is not None else 1800.0 if trials is None else None
    if trials is not None and (not isinstance(trials, int) or isinstance(trials, bool) or trials < 1):
        raise InvalidParameterError(f"The 'trials' parameter of search must be a whole number ≥ 1. Got {trials!r}.")
    module, purpose = _objects(model, task)
    if goal is None:
        default = 0.01 if purpose.score.bounded else "1%"
        goal = Goal(limits=limits or {}, max_drop=default if max_drop is None else max_drop)
    if not purpose.score.bounded and not isinstance(goal.max_drop, str):
        raise InvalidParameterError(
            f"The score {purpose.score.name!r} has no bound, so 'max_drop' must be a share of the baseline's. Got "
            f"{goal.max_drop!r}.",
            'write one percent as "1%"',
        )
    where = _where(scope, freeze)
    if recovery is None and purpose.has("train"):
        recovery = Distill(epochs=FULL_EPOCHS)
    settings = Settings(
        target=target or Target(),
        goal=goal,
        seconds=seconds,
        trials=trials,
        seed=seed,
        where=where,
        recovery=recovery,
        control=_control(recovery, purpose),
    )
    directory = Path(out)
    get_runtime(settings.target.runtime).version()
    _check_free(directory)
    warnings = preflight(module, purpose)
    known = {
        "model": model if isinstance(model, str) else type(model).__name__,
        "task": task if isinstance(task, str) else f"{purpose.score.name} task",
        "score": purpose.score.name,
        "target": settings.target,
        "goal": settings.goal,
        "budget": str(budget) if budget is not None else f"{trials} trials" if trials is not None else "30m",
        "seconds": seconds,
        "trials": trials,
        "seed": seed,
        "where": str(where),
        "recovery": None if recovery is None else Step(recovery).to_data(),
        "references": isinstance(model, str) and isinstance(task, str),
        "command": _command(),
        "environment": environment(),
        "warnings": warnings,
        "fingerprint": _fingerprint(module, purpose, settings),
    }
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with alone(directory):
            _check_free(directory)
            log = TrialLog.begin(directory, known)
            try:
                return _run(directory, log, module, purpose, settings, progress or SILENT)
            except StorageError:
                raise
            except TrimpointError:
                if not any(trial.state == "complete" for trial in log.trials()):
                    log.close()
                    discard(directory)
                raise


def resume(
    directory: str | Path,
    *,
    model: nn.Module | str | None = None,
    task: Task | str | None = None,
    budget: str | float | None = None,
    trials: int | None = None,
    progress: Progress | None = None,
) -> Study:
    """Go on with a search where it was cut off; nothing that was completed is done again.

    Args:
        directory: of the study.
        model: needed where the study was not started with references.
        task: needed where the study was not started with references.
        budget: a new total of time, the time already used included.
        trials: a new total of trials.
        progress: where to tell how far it is.

    Raises:
        StudyError: if there is no study, another process works on it, or model, data or settings are not the same.
    """
    directory = Path(directory)
    log = TrialLog.in_directory(directory)
    known = log.settings().get("settings")
    if known is None:
        raise StudyError(f"The study in {directory} was cut off before it began.", "remove it and start it again")
    if (model is None or task is None) and not known["references"]:
        raise StudyError(
            "This study was started with objects, not with references, so it cannot make model and task again.",
            "give them: `resume(directory, model=model, task=task)`",
        )
    module, purpose = _objects(model or known["model"], task or known["task"])
    settings = Settings(
        target=from_data(Target, known["target"]),
        goal=goal_from(known["goal"]),
        seconds=parse_duration(budget) if budget is not None else known["seconds"],
        trials=trials if trials is not None else known["trials"],
        seed=known["seed"],
        where=parse(known["where"]),
        recovery=(recovery := _recovery(known["recovery"])),
        control=_control(recovery, purpose),
    )
    found = _fingerprint(module, purpose, settings)
    differing = [
        name for name in {**known["fingerprint"], **found} if known["fingerprint"].get(name) != found.get(name)
    ]
    if differing:
        raise StudyError(
            f"The study in {directory} was made with another {', another '.join(differing)}.",
            "what it found stays readable (`trimpoint show`); start a new study with another `out`",
        )
    with _writing(directory), alone(directory):
        if budget is not None or trials is not None:
            total = str(budget) if budget is not None else f"{trials} trials"
            more = {"budget": total, "seconds": settings.seconds, "trials": settings.trials}
            log.note("settings", {**known, **more})
        before = len(log.trials())
        study = _run(directory, log, module, purpose, settings, progress or SILENT)
        if progress is not None and len(log.trials()) == before:
            progress.message("nothing was left to try within this budget; give a larger one to go on")
        return study


def _run(directory: Path, log: TrialLog, model: nn.Module, task: Task, settings: Settings, progress: Progress) -> Study:
    log.note("finished", False)
    key = combined(log.settings()["settings"]["fingerprint"])
    coded = "coded_bytes" in {*settings.goal.minimize, *settings.goal.limits}
    bench = Workbench(model, task, settings.target, directory, key, progress, coded=coded)
    engine = Engine(model=model, task=task, settings=settings, log=log, bench=bench, progress=progress)
    bench.progress = Heartbeat(progress, engine.note_time)
    engine.run()
    study = Study(directory)
    best = study.record.chosen
    if best is not None:
        progress.phase("certify")
        if task.has("certify") and best.role != "baseline" and best.certificate is None:
            baseline = engine.reference()
            margin = settings.goal.allowed_drop(baseline.quality.value if baseline.quality else 0.0)
            certificate = certify_trial(directory, task, baseline, best, margin, threads=settings.target.threads)
            log.certify(best.number, certificate)
        record = study.record
        deliver(directory, record.chosen or best, record)
    log.note("finished", True)
    engine.note_time()
    return study


def _check_free(directory: Path) -> None:
    if (directory / FILE).exists():
        raise StudyError(
            f"{directory} already holds a study.",
            f"go on with it: `trimpoint resume {directory}`, or give another `out`",
        )
    if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise StudyError(f"{directory} is not empty.", "give another `out`")


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Say clearly that a directory cannot be written, wherever that shows."""
    try:
        yield
    except TrimpointError:
        raise
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise cannot_write(directory, error) from error


def _objects(model: nn.Module | str, task: Task | str) -> tuple[nn.Module, Task]:
    module = load_reference(model, nn.Module, "model") if isinstance(model, str) else model
    purpose = load_reference(task, Task, "task") if isinstance(task, str) else task
    if not isinstance(module, nn.Module):
        raise InvalidParameterError(f"The model must be a torch.nn.Module. Got {type(module).__name__}.")
    if not isinstance(purpose, Task):
        raise InvalidParameterError(f"The task must be a trimpoint.Task. Got {type(purpose).__name__}.")
    return module, purpose


def _where(scope: Filter | str | None, freeze: Filter | str | None) -> Filter:
    inside = parse(scope) if isinstance(scope, str) else scope or EVERYTHING
    if freeze is None:
        return inside
    outside = ~(parse(freeze) if isinstance(freeze, str) else freeze)
    return outside if inside == EVERYTHING else inside & outside


def _fingerprint(model: nn.Module, task: Task, settings: Settings) -> dict[str, str]:
    asked = {
        "seed": settings.seed,
        "where": str(settings.where),
        "recovery": None if settings.recovery is None else Step(settings.recovery).to_data(),
    }
    methods = () if settings.recovery is None else (settings.recovery,)
    return parts(model, task, settings.target, asked, methods)


def _recovery(data: Mapping[str, Any] | None) -> Recovery | None:
    method = None if data is None else Step.from_data(data).method
    if method is not None and not isinstance(method, Recovery):
        raise StudyError(f"The recovery of the study must be one that trains. Got {method.name!r}.")
    return method


def _control(recovery: Recovery | None, task: Task) -> Recovery | None:
    """Return plain training of the length of `recovery`; `None` where the task cannot train."""
    return Finetune(epochs=recovery.epochs) if recovery is not None and task.has("loss") else None


def _command() -> str:
    arguments = " ".join(sys.argv[1:])
    return f"trimpoint {arguments}" if Path(sys.argv[0]).stem in ("trimpoint", "__main__") else ""
