"""An artifact once more, on this machine: its speed and size beside a baseline, its quality on data at hand."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trimpoint.artifact import artifact_files, read_certificate
from trimpoint.errors import ArtifactError, InvalidParameterError
from trimpoint.manifest import is_artifact
from trimpoint.measure.environment import cpu_name, instruction_set
from trimpoint.measure.process import ArtifactFiles
from trimpoint.parity import read_parity
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Lowered
from trimpoint.signature import unflatten
from trimpoint.target import Target
from trimpoint.values import Certificate, Measurement, Profile

if TYPE_CHECKING:
    from trimpoint.task import Task
    from trimpoint.trust.ledger import Ledger


def baseline_files(path: Path | str, artifact: ArtifactFiles) -> ArtifactFiles:
    """Return the files of what an artifact is compared with.

    Args:
        path: an artifact, or an ONNX file with the same inputs.
        artifact: that is compared with it.

    Raises:
        ArtifactError: if it is neither, or not for the same runtime and inputs.
    """
    path, runtime = Path(path), artifact.lowered.runtime
    if path.is_file() and path.suffix == ".onnx":
        if runtime != "onnxruntime":
            raise ArtifactError(
                f"The baseline of an artifact for {runtime} must be in the same runtime. Got the file {path.name!r}.",
                "give the directory of an artifact, such as the `baseline/` of a study",
            )
        lowered = Lowered(runtime=runtime, files={"main": (path.name,)}, signature=artifact.lowered.signature)
        return ArtifactFiles(directory=path.parent, lowered=lowered)
    if not is_artifact(path):
        raise ArtifactError(
            f"The baseline must be an ONNX file or the directory of an artifact. Got {str(path)!r}.",
            "a search writes one beside `best/`: `--baseline RUN/baseline`",
        )
    files = artifact_files(path)
    if files.lowered.runtime != runtime:
        raise ArtifactError(
            f"The baseline must be in the runtime of the artifact, {runtime}. Got {files.lowered.runtime}.",
            "other runtimes cannot be compared fairly",
        )
    if files.lowered.signature.inputs != artifact.lowered.signature.inputs:
        raise ArtifactError("The baseline must take the inputs of the artifact. Got others.", "is it the same model?")
    return files


def remeasure(directory: Path | str, baseline: Path | str, *, threads: int = 1) -> Profile:
    """Measure an artifact beside a baseline on this machine, interleaved, on the artifact's recorded inputs.

    Args:
        directory: of the artifact.
        baseline: an artifact, or an ONNX file with the same inputs.
        threads: for one call.

    Returns:
        `latency_ms`, `latency_ratio` (baseline ÷ this) and `size_ratio`; behind the first shape, the others.

    Raises:
        ArtifactError: if one of them is not sound, or they do not fit together.
        MeasurementError: if the measuring process crashes.
    """
    from trimpoint.measure.latency import measure_latency

    files = artifact_files(directory)
    base = baseline_files(baseline, files)
    structure = files.lowered.signature.input_structure
    cases, _ = read_parity(files.directory, files.lowered.signature)
    inputs = {f"case {name}": unflatten(structure, leaves) for name, (leaves, _) in cases.items()}
    runtime = get_runtime(files.lowered.runtime)
    where = f"{runtime.name} {runtime.version()} on {cpu_name()}"
    found = measure_latency({"baseline": base, "this": files}, Target(threads=threads), inputs, baseline="baseline")
    metrics: dict[str, Measurement] = {}
    for position, (case, timed) in enumerate(found["this"].items()):
        suffix = f"[{case}]" if position else ""
        metrics["latency_ms" + suffix] = Measurement(
            value=timed.median_ms,
            unit="ms",
            n=timed.calls,
            low=timed.low_ms,
            high=timed.high_ms,
            how=timed.how,
            where=where,
        )
        metrics["latency_ratio" + suffix] = Measurement(
            value=timed.ratio,
            unit="1",
            better="higher",
            n=timed.rounds,
            low=timed.ratio_low,
            high=timed.ratio_high,
            how="baseline ÷ this, " + timed.how,
            where=where,
        )
    size = Measurement(value=base.bytes / files.bytes, unit="1", better="higher", how="bytes of baseline ÷ this")
    notes = tuple(note for timed in found["this"].values() for note in timed.notes)
    return Profile(metrics | {"size_ratio": size}, notes=tuple(dict.fromkeys(notes)))


def recertify(
    directory: Path | str,
    baseline: Path | str,
    task: "Task",
    *,
    margin: float | None = None,
    threads: int = 1,
    ledger: "Ledger | None" = None,
) -> Certificate:
    """Compare an artifact with a baseline on a task's `certify` data, on this machine and in its runtime.

    The look is recorded in the ledger like every other; the same artifact on the same data is not a further one.

    Args:
        directory: of the artifact.
        baseline: an artifact, or an ONNX file with the same inputs.
        task: with `certify` data.
        margin: the drop that is allowed, in the score's own unit; by default that of the artifact's certificate.
        threads: for one call.
        ledger: of the looks; the user's own by default.

    Raises:
        ArtifactError: if one of them is not sound, or they do not fit together.
        DataError: if the task has no `certify` data, or it does not fit.
        InvalidParameterError: if the artifact has no certificate and no `margin` is given.
        StorageError: if the look cannot be recorded.
    """
    from trimpoint.trust.certify import certify_runs
    from trimpoint.trust.ledger import Ledger

    files = artifact_files(directory)
    base = baseline_files(baseline, files)
    recorded = read_certificate(directory)
    if margin is None and recorded is None:
        raise InvalidParameterError(
            "The artifact has no certificate to take the allowed drop from.", "give it, such as `--margin 0.01`"
        )
    runtime = get_runtime(files.lowered.runtime)
    certificate = certify_runs(
        runtime.open(base.directory, base.lowered, threads=threads),
        runtime.open(files.directory, files.lowered, threads=threads),
        task,
        recorded.margin if margin is None and recorded is not None else float(margin or 0.0),
        ledger=ledger or Ledger(),
        artifact_digest=files.digest,
        batch=base.digest,
        runtime=f"{runtime.name} {runtime.version()}",
        instruction_set=instruction_set(),
    )
    return replace(certificate, reference=f"the baseline {Path(baseline).name!r} in the same runtime")
