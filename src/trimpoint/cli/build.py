"""One plan, applied, lowered, measured beside the unmodified model, and written as an artifact."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from trimpoint.artifact import VerifyReport, verify_artifact, write_artifact
from trimpoint.errors import StorageError
from trimpoint.manifest import is_artifact
from trimpoint.measure.inputs import synthetic_like
from trimpoint.plan import Plan
from trimpoint.progress import Progress
from trimpoint.search.delivery import files_of, rebuild_of
from trimpoint.search.workbench import Workbench
from trimpoint.target import Target
from trimpoint.values import Trial

if TYPE_CHECKING:
    from trimpoint.task import Task


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `build_artifact` made.

    Args:
        baseline: the unmodified model on the target.
        trial: the plan on the target.
        verified: the check of the artifact in a clean process.
    """

    baseline: Trial
    trial: Trial
    verified: VerifyReport


def build_artifact(
    model: nn.Module, task: "Task", plan: Plan, target: Target, directory: str | Path, progress: Progress
) -> Built:
    """Apply a plan, lower, measure beside the unmodified model, write the artifact and verify it.

    Args:
        model: unmodified; it stays so.
        task: data for the plan's methods; both are scored on `select`, where there is such data.
        plan: what to do.
        target: where it must run.
        directory: of the artifact; new or empty.
        progress: where to tell what is being done.

    Raises:
        StorageError: if the directory is in use.
        ArtifactError: if the artifact does not give its recorded answers in a clean process.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "holds an artifact" if is_artifact(directory) else "is not empty"
        raise StorageError(f"{directory} {what} already.", "give another directory with --out")
    with tempfile.TemporaryDirectory(prefix="trimpoint-") as name:
        bench = Workbench(model, task, target, Path(name), "one plan", progress, coded=True)
        progress.phase("measuring the unmodified model")
        baseline = bench.baseline(_trial(Plan(), number=0, role="baseline"))
        bench.use_baseline(baseline)
        progress.phase(f"applying {plan}")
        trial = bench.candidate(_trial(plan, number=1, role="candidate"), plan, 1.0)
        files = files_of(Path(name), trial)
        session = bench.open(files)
        inputs = [synthetic_like(batch, seed) for seed, batch in enumerate(bench.inputs.shapes.values())]
        progress.phase("comparing with other runtimes")
        trial = replace(trial, profile=trial.profile | bench.elsewhere(trial, plan))
        progress.phase("writing and verifying the artifact")
        digest = write_artifact(
            directory,
            source_dir=files.directory,
            lowered=files.lowered,
            parity=[(batch, session(batch)) for batch in inputs],
            plan=plan.to_data(),
            profile=trial.profile,
            baseline=baseline.profile,
            rebuild=rebuild_of(Path(name), files),
        )
    return Built(baseline=baseline, trial=trial, verified=verify_artifact(directory, digest))


def _trial(plan: Plan, *, number: int, role: Literal["baseline", "candidate"]) -> Trial:
    return Trial(
        number=number,
        plan=plan.to_data(),
        plan_hash=plan.hash,
        rung=0,
        state="complete",
        role=role,
        label=str(plan),
    )
