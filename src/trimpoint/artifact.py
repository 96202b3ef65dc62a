"""The artifact: a directory with what ships, its proof and its provenance. Written whole, opened light, verified.

Nothing here imports torch, and nothing named in a file is imported: NumPy, safetensors and the runtime are enough.
"""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimpoint.coding import Contents
from trimpoint.errors import ArtifactError, MeasurementError, StorageError, TrimpointError
from trimpoint.manifest import (
    MANIFEST,
    check_files,
    check_names,
    digest_of,
    is_artifact,
    model_of,
    own_version,
    read_manifest,
    write_manifest,
)
from trimpoint.measure.environment import environment as present_environment
from trimpoint.measure.environment import instruction_set
from trimpoint.measure.process import ArtifactFiles, run_child
from trimpoint.model_card import model_card
from trimpoint.packed import unpacked
from trimpoint.parity import PARITY, Tolerance, compare, parity_bytes, read_parity
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Lowered, Session
from trimpoint.runtimes.stream import Stream
from trimpoint.signature import Signature
from trimpoint.storage import put_in_place, scratch_beside, sync
from trimpoint.values import Certificate, Profile, dumps, from_data, to_data

_RECORDS = ("plan", "profile", "certificate", "environment")
RESERVED = (PARITY, MANIFEST, "README.md", *(f"{name}.json" for name in _RECORDS))


class ArtifactWarning(UserWarning):
    """Something that a certificate says may not hold here."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify_artifact` checked.

    Args:
        directory: of the artifact.
        digest: SHA-256 of the manifest.
        files: how many files have the size and hash that the manifest says.
        bytes: of all of them.
        runtime: name and version with which parity was checked.
        cases: how many recorded inputs were run.
        largest_error: largest distance of an output from the recorded one.
        notes: where the certificate is for another instruction set or runtime version.
    """

    directory: str
    digest: str
    files: int
    bytes: int
    runtime: str
    cases: int
    largest_error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """An opened artifact: call it as the module that it came from, with NumPy arrays.

    Args:
        session: runs it.
        manifest: as stored.
        profile: what was measured of it.
        certificate: of its quality, if it has one.
        plan: what was done to make it.
        environment: where it was made.
        baseline: what was measured of the unmodified model.
    """

    session: Session
    manifest: dict[str, Any]
    profile: Profile
    certificate: Certificate | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    baseline: Profile | None = None

    @property
    def signature(self) -> Signature:
        """Names, types and shapes of the inputs and outputs."""
        return self.session.signature

    def __call__(self, inputs: Any) -> Any:
        """Run one batch: a tensor, tuple or mapping of arrays, as the module takes them.

        Raises:
            DataError: if the inputs do not fit the signature.
        """
        return self.session(_arrays(inputs))

    def stream(self, *, batch: int = 1) -> Stream:
        """Return the model as one that carries its state from call to call, see `Stream`."""
        return Stream(self, self.signature, batch=batch)


def write_artifact(
    directory: Path | str,
    *,
    source_dir: Path | str,
    lowered: Lowered,
    parity: Sequence[tuple[Any, Any]],
    plan: Mapping[str, Any],
    profile: Profile,
    certificate: Certificate | None = None,
    environment: Mapping[str, str] | None = None,
    baseline: Profile | None = None,
    tolerance: Tolerance | None = None,
    extra: Mapping[str, Path | str] | None = None,
    rebuild: Path | str | None = None,
    readme: str | None = None,
) -> str:
    """Write an artifact beside its destination and move it into place; an older artifact there is replaced.

    Args:
        directory: where it is to lie: new, empty, or an artifact.
        source_dir: holds the runtime's files.
        lowered: names them.
        parity: pairs of synthetic inputs and the outputs that the runtime gives for them, NumPy arrays in the module's
            structure. Never a user's data.
        plan: what was done, in its JSON form.
        profile: what was measured.
        certificate: of its quality.
        environment: where it was made; this machine by default.
        baseline: profile of the unmodified model, for the table of the model card.
        tolerance: for parity.
        extra: name → file that goes along (tokenizer, labels).
        rebuild: directory with what rebuilds the module.
        readme: text of the model card; made from the rest by default.

    Returns:
        The digest: SHA-256 of the manifest.

    Raises:
        ArtifactError: if the destination holds something else, or a name is taken or unsafe.
        StorageError: if it cannot be written; nothing half-written is left and an older artifact stays.
    """
    directory, source = Path(directory).absolute(), Path(source_dir)
    environment = dict(environment) if environment is not None else present_environment()
    texts = {
        "plan.json": dumps(dict(plan)),
        "profile.json": dumps({"profile": to_data(profile), "baseline": to_data(baseline)}),
        "certificate.json": dumps(certificate),
        "environment.json": dumps(environment),
        "README.md": readme
        or model_card(directory.name, plan, lowered, profile, baseline, certificate, environment, extra or {}),
    }
    shipped = sorted({name for names in lowered.files.values() for name in names})
    copies = {name: source / name for name in shipped}
    copies |= {f"extra/{name}": Path(path) for name, path in (extra or {}).items()}
    copies |= {f"rebuild/{name}": path for name, path in _files_below(rebuild).items()}
    if taken := sorted(set(shipped) & set(RESERVED)):
        raise ArtifactError(f"A runtime's file may not be called {taken[0]!r}: the artifact has its own.")
    check_names([*copies, *texts, PARITY])
    recorded = parity_bytes(lowered.signature, parity, tolerance or Tolerance())
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(directory) as scratch:
            work = scratch / directory.name
            work.mkdir()
            for name, path in copies.items():
                _copy(path, work / name)
            for name, text in texts.items():
                _write(work / name, text.encode())
            _write(work / PARITY, recorded)
            about = {"trimpoint": own_version(), "model": to_data(lowered)}
            digest = write_manifest(work, about, _write)
            put_in_place(work, directory, replaceable=is_artifact)
    except OSError as error:
        if isinstance(error, TrimpointError):
            raise
        raise StorageError(
            f"The artifact {directory.name!r} could not be written: {error.strerror or error}. Nothing half-written is "
            "left.",
            "free some space, or choose a directory that you may write to",
        ) from error
    return digest


def open_artifact(directory: Path | str, *, threads: int = 1) -> Model:
    """Open an artifact, a directory or a coded file, and check that its files are those that were written.

    Warns with `ArtifactWarning` where the certificate was made for another instruction set or runtime version.

    Args:
        directory: of the artifact, or a coded file. Of a model packed alone there are no records.
        threads: that the runtime may use for one call.

    Raises:
        ArtifactError: if the directory is no sound artifact.
        MissingDependencyError: if its runtime is not installed.
    """
    with unpacked(directory) as found:
        if found.model is None:
            manifest = read_manifest(found.directory)
            check_files(found.directory, manifest)
            lowered, records = model_of(manifest), _records(found.directory)
        else:
            manifest, lowered, records = {}, found.model, {"profile": Profile()}
        session = get_runtime(lowered.runtime).open(found.directory, lowered, threads=threads)
    model = Model(session=session, manifest=manifest, **records)
    for note in certificate_notes(model.certificate, lowered.runtime):
        warnings.warn(note, ArtifactWarning, stacklevel=2)
    return model


def verify_artifact(
    directory: Path | str, digest: str | None = None, *, clean_process: bool = True, timeout: float = 300
) -> VerifyReport:
    """Check every file of an artifact, a directory or a coded file, and run its recorded inputs again.

    Args:
        directory: of the artifact, or a coded file.
        digest: that the manifest must have (of a model packed alone: its files), where it is known from elsewhere.
        clean_process: run in a new process in which nothing but the runtime can be imported.
        timeout: seconds that it may take.

    Raises:
        ArtifactError: naming the file that is missing, too much, changed or unsafe, or the output that differs.
        MissingDependencyError: if its runtime is not installed.
    """
    with unpacked(directory) as found:
        if found.contents is not None and found.model is not None:
            return _verified_model(Path(directory), digest, found.model, found.contents, found.directory)
        return _verified(found.directory, Path(directory), digest, clean_process=clean_process, timeout=timeout)


def _verified(directory: Path, named: Path, digest: str | None, *, clean_process: bool, timeout: float) -> VerifyReport:
    manifest = read_manifest(directory)
    found = manifest_digest(directory)
    if digest is not None and found != digest.lower():
        raise ArtifactError(
            f"{MANIFEST} must have the digest {digest}. Got {found}.", "it is not the artifact you expect"
        )
    check_files(directory, manifest)
    lowered = model_of(manifest)
    runtime = f"{lowered.runtime} {get_runtime(lowered.runtime).version()}"
    cases, tolerance = read_parity(directory, lowered.signature)
    inputs = {name: case[0] for name, case in cases.items()}
    if clean_process:
        outputs = _outputs_in_child(directory, lowered, inputs, timeout)
    else:
        session = get_runtime(lowered.runtime).open(directory, lowered)
        outputs = {name: session.run_flat(session.flat_inputs(value)) for name, value in inputs.items()}
    largest = max(
        (compare(lowered.signature, name, outputs[name], expected, tolerance) for name, (_, expected) in cases.items()),
        default=0.0,
    )
    sizes = [entry["size"] for entry in manifest["files"].values()]
    return VerifyReport(
        directory=str(named),
        digest=found,
        files=len(sizes) + 1,
        bytes=sum(sizes) + (directory / MANIFEST).stat().st_size,
        runtime=runtime,
        cases=len(cases),
        largest_error=largest,
        notes=certificate_notes(_records(directory)["certificate"], lowered.runtime),
    )


def _verified_model(
    file: Path, digest: str | None, lowered: Lowered, contents: Contents, directory: Path
) -> VerifyReport:
    """Return what can be said of a model packed alone: it was restored to its SHA-256, and its runtime opens it."""
    if digest is not None and contents.digest != digest.lower():
        raise ArtifactError(
            f"The files must have the digest {digest}. Got {contents.digest}.", "it is not the model you expect"
        )
    runtime = get_runtime(lowered.runtime)
    runtime.open(directory, lowered)
    return VerifyReport(
        directory=str(file),
        digest=contents.digest,
        files=len(contents.files),
        bytes=contents.bytes,
        runtime=f"{lowered.runtime} {runtime.version()}",
        cases=0,
        largest_error=0.0,
        notes=("a model packed alone has no recorded answers: its bytes were checked, its outputs were not",),
    )


def manifest_digest(directory: Path | str) -> str:
    """Return the SHA-256 of an artifact's manifest, which pins every byte of it.

    Raises:
        ArtifactError: if there is no manifest.
    """
    return digest_of(Path(directory))


def artifact_files(directory: Path | str) -> ArtifactFiles:
    """Return the runtime's files of an artifact, every hash checked.

    Raises:
        ArtifactError: if the directory is no sound artifact.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    return ArtifactFiles(directory=directory, lowered=model_of(manifest))


def read_certificate(directory: Path | str) -> Certificate | None:
    """Return the certificate of an artifact, `None` where it has none.

    Raises:
        ArtifactError: if its records cannot be read.
    """
    certificate: Certificate | None = _records(Path(directory))["certificate"]
    return certificate


def certificate_notes(certificate: Certificate | None, runtime: str) -> tuple[str, ...]:
    """Return in what respects a certificate was made for something else than this machine and its runtime."""
    if certificate is None:
        return ()
    here = {
        "instruction set": (certificate.instruction_set, instruction_set()),
        "runtime": (certificate.runtime, f"{runtime} {get_runtime(runtime).version()}"),
    }
    return tuple(
        f"the certificate is for the {what} {certified!r}, this machine has {found!r}: quality may differ here"
        for what, (certified, found) in here.items()
        if certified and certified != found
    )


def _outputs_in_child(
    directory: Path, lowered: Lowered, inputs: Mapping[str, Any], timeout: float
) -> dict[str, list[Any]]:
    files = ArtifactFiles(directory=directory, lowered=lowered)
    try:
        _, arrays = run_child("outputs", {"main": files}, inputs, threads=1, timeout=timeout)
    except MeasurementError as error:
        raise ArtifactError(f"The artifact does not run in a clean process: {error.message}", error.hint) from error
    return {name: [arrays[f"{name}_{i}"] for i in range(len(lowered.signature.outputs))] for name in inputs}


def _records(directory: Path) -> dict[str, Any]:
    """Return the fields of `Model` that are read from files."""
    try:
        read = {name: json.loads((directory / f"{name}.json").read_text(encoding="utf-8")) for name in _RECORDS}
        profiles, certificate = read["profile"], read["certificate"]
        return {
            "profile": from_data(Profile, profiles["profile"]),
            "certificate": from_data(Certificate, certificate) if certificate else None,
            "plan": read["plan"],
            "environment": read["environment"],
            "baseline": from_data(Profile, profiles["baseline"]) if profiles["baseline"] else None,
        }
    except (OSError, ValueError, KeyError, TypeError, TrimpointError) as error:
        raise ArtifactError(f"A record of the artifact cannot be read: {error}.") from error


def _arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_arrays(item) for item in value)
    return value if value is None or isinstance(value, np.ndarray) else np.asarray(value)


def _files_below(directory: Path | str | None) -> dict[str, Path]:
    if directory is None:
        return {}
    root = Path(directory)
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    sync(destination)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
