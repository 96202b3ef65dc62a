"""From a chosen trial to what is handed over: the certificate, and the artifact in `best/`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trimpoint.artifact import write_artifact
from trimpoint.errors import StudyError
from trimpoint.manifest import is_artifact
from trimpoint.measure.environment import instruction_set
from trimpoint.measure.inputs import synthetic_like
from trimpoint.measure.process import ArtifactFiles
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Lowered, Session
from trimpoint.search.record import StudyRecord
from trimpoint.signature import flatten, unflatten
from trimpoint.task import Task
from trimpoint.trust.certify import certify_runs
from trimpoint.trust.ledger import Ledger
from trimpoint.values import Certificate, Trial, from_data

BEST, BASELINE = "best", "baseline"
LOWERED = "lowered.json"
SYNTHETIC = "synthetic.npz"
STAGE = "stage.json"


def read_lowered(directory: Path) -> Lowered:
    """Read what lowered files in a directory are."""
    return from_data(Lowered, json.loads((directory / LOWERED).read_text(encoding="utf-8")))


def files_of(study: Path, trial: Trial) -> ArtifactFiles:
    """Return a trial's lowered files.

    Args:
        study: directory of the study.
        trial: with an artifact.

    Raises:
        StudyError: if it has none, or they are gone.
    """
    path = study / trial.artifact if trial.artifact else None
    if path is None or not (path / LOWERED).is_file():
        raise StudyError(
            f"The files of trial {trial.number} are gone from {study}.", "start the search again elsewhere"
        )
    return ArtifactFiles(directory=path, lowered=read_lowered(path))


def save_synthetic(study: Path, shapes: dict[str, Any]) -> None:
    """Keep random inputs of every shape, for the parity cases of artifacts; nothing of the user's data is in them."""
    arrays = {
        f"{at}_{leaf:03d}": array
        for at, batch in enumerate(shapes.values())
        for leaf, array in enumerate(flatten(synthetic_like(batch, seed=at)))
    }
    np.savez(study / SYNTHETIC, **arrays)


def _parity_cases(study: Path, session: Session) -> list[tuple[Any, Any]]:
    with np.load(study / SYNTHETIC, allow_pickle=False) as stored:
        cases: dict[str, list[Any]] = {}
        for name in sorted(stored.files):
            cases.setdefault(name.split("_")[0], []).append(stored[name])
    batches = [unflatten(session.signature.input_structure, leaves) for leaves in cases.values()]
    return [(batch, session(batch)) for batch in batches]


def certify_trial(
    study: Path,
    task: Task,
    reference: Trial,
    trial: Trial,
    margin: float,
    *,
    threads: int,
    ledger: Ledger | None = None,
) -> Certificate:
    """Compare a trial's artifact with the reference's on the `certify` data.

    Args:
        study: directory of the study.
        task: with `certify` data.
        reference: what the drop is measured against.
        trial: the finalist.
        margin: the drop that is allowed.
        threads: for both sessions.
        ledger: of the looks at the data; the user's own by default.
    """
    files, base = files_of(study, trial), files_of(study, reference)
    runtime = get_runtime(files.lowered.runtime)
    certificate = certify_runs(
        runtime.open(base.directory, base.lowered, threads=threads),
        runtime.open(files.directory, files.lowered, threads=threads),
        task,
        margin,
        ledger=ledger or Ledger(),
        artifact_digest=files.digest,
        batch=base.digest,
        runtime=f"{runtime.name} {runtime.version()}",
        instruction_set=instruction_set(),
    )
    compared = (
        "the unmodified model" if reference.role == "baseline" else f"trial {reference.number} ({reference.label})"
    )
    return replace(certificate, reference=f"{compared} in the same runtime")


def rebuild_of(study: Path, files: ArtifactFiles) -> Path | None:
    """Return the directory that rebuilds the module which lowered files come from; `None` where it was not changed."""
    noted = files.directory / STAGE
    if not noted.is_file():
        return None
    path = study / "store" / str(json.loads(noted.read_text(encoding="utf-8"))["stage"]) / "rebuild"
    return path if path.is_dir() else None


def deliver(study: Path, trial: Trial, record: StudyRecord) -> Path:
    """Write the artifact of a trial to `best/`, in place of what was there, and the unmodified model's to `baseline/`.

    Args:
        study: directory of the study.
        trial: to hand over.
        record: of the study.
    """
    if record.baseline is not None and not is_artifact(study / BASELINE):
        _write(study, BASELINE, record.baseline, record)
    return _write(study, BEST, trial, record)


def _write(study: Path, name: str, trial: Trial, record: StudyRecord) -> Path:
    files = files_of(study, trial)
    session = get_runtime(files.lowered.runtime).open(files.directory, files.lowered, threads=record.target.threads)
    for leftover in study.glob(f".{name}-*"):  # Of a process that was killed here; the study's lock is held.
        shutil.rmtree(leftover, ignore_errors=True)
    write_artifact(
        study / name,
        source_dir=files.directory,
        lowered=files.lowered,
        parity=_parity_cases(study, session),
        plan=trial.plan or {"one_line_int8": record.target.runtime},
        profile=trial.profile,
        certificate=trial.certificate,
        environment=record.environment,
        baseline=record.baseline.profile if record.baseline else None,
        rebuild=rebuild_of(study, files),
    )
    return study / name
