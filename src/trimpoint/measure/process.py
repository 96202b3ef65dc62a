"""Start the process that measures, and hold the one lock that makes measuring exclusive on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimpoint.errors import MeasurementError
from trimpoint.runtimes.base import Lowered
from trimpoint.signature import flatten, structure_of
from trimpoint.values import to_data

if TYPE_CHECKING:
    from filelock import BaseFileLock

Arrays = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


@dataclass(frozen=True, kw_only=True)
class ArtifactFiles:
    """Files that a runtime can open.

    Args:
        directory: that holds them.
        lowered: what they are.
    """

    directory: Path
    lowered: Lowered

    @property
    def bytes(self) -> int:
        """Size of all files that the runtime loads."""
        names = {name for files in self.lowered.files.values() for name in files}
        return sum((self.directory / name).stat().st_size for name in names)

    @property
    def digest(self) -> str:
        """SHA-256 over the files that the runtime loads, their names included."""
        digest = hashlib.sha256()
        for name in sorted({name for files in self.lowered.files.values() for name in files}):
            digest.update(name.encode() + (self.directory / name).read_bytes())
        return digest.hexdigest()


def run_child(
    kind: str,
    artifacts: Mapping[str, ArtifactFiles],
    inputs: Mapping[str, Any],
    *,
    threads: int,
    timeout: float,
    **settings: Any,
) -> tuple[dict[str, Any], Arrays]:
    """Run one job of `trimpoint.measure.child` in a new process and return its result and its arrays.

    Args:
        kind: of job: `"latency"`, `"memory"` or `"outputs"`.
        artifacts: name → files to open.
        inputs: name → one batch, NumPy arrays in the module's structure.
        threads: that the runtime may use.
        timeout: seconds after which the process is ended.
        settings: further entries of the job.

    Raises:
        MeasurementError: if the process takes too long, crashes, or reports an error.
    """
    with tempfile.TemporaryDirectory(prefix="trimpoint-measure-") as name:
        directory = Path(name)
        _write_job(directory, kind, artifacts, inputs, {"threads": threads} | settings)
        command = [sys.executable, "-m", "trimpoint.measure.child", str(directory / "job.json")]
        try:
            done = subprocess.run(
                command, env=_environment(threads), cwd=directory, timeout=timeout, capture_output=True, check=False
            )
        except subprocess.TimeoutExpired:
            raise MeasurementError(
                f"The measuring process ({kind}) must end within {timeout:g} s. It was stopped.",
                "give a longer `timeout`, or check that the machine is not overloaded",
            ) from None
        return _read_result(directory, kind, done)


def _write_job(
    directory: Path,
    kind: str,
    artifacts: Mapping[str, ArtifactFiles],
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    arrays: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for index, (name, value) in enumerate(inputs.items()):
        leaves = flatten(value)
        described[name] = {"structure": structure_of(value), "key": f"input_{index}", "count": len(leaves)}
        arrays |= {f"input_{index}_{leaf}": np.asarray(array) for leaf, array in enumerate(leaves)}
    files = {
        name: {"directory": str(entry.directory.resolve()), "lowered": to_data(entry.lowered)}
        for name, entry in artifacts.items()
    }
    np.savez(directory / "inputs.npz", **arrays)
    job = {"kind": kind, "artifacts": files, "inputs": described, **settings}
    (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(entry for entry in (root, os.environ.get("PYTHONPATH", "")) if entry)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": "1"}


def _read_result(
    directory: Path, kind: str, done: "subprocess.CompletedProcess[bytes]"
) -> tuple[dict[str, Any], Arrays]:
    path = directory / "result.json"
    if done.returncode != 0 or not path.exists():
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise MeasurementError(
            f"The measuring process ({kind}) ended with exit code {done.returncode}: {lines[-1] if lines else ''}",
            "a negative code is a signal: -9 is mostly a lack of memory, -11 a crash inside the runtime",
        )
    result = json.loads(path.read_text(encoding="utf-8"))
    if "error" in result:
        raise MeasurementError(f"The measuring process ({kind}) failed: {result['error']}", result["hint"])
    with np.load(directory / "arrays.npz", allow_pickle=False) as file:
        return result, {key: file[key] for key in file.files}


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


_LOCKS: "dict[Path, BaseFileLock]" = {}


@contextmanager
def measuring(on_wait: Callable[[str], None] = _say) -> Iterator[None]:
    """Hold the machine-wide lock: nobody else measures meanwhile. Re-entrant within a thread.

    Args:
        on_wait: called once with a message if another process holds the lock.

    Raises:
        MeasurementError: if the lock file cannot be used.
    """
    from filelock import FileLock, Timeout

    path = Path(tempfile.gettempdir()) / "trimpoint-measure.lock"
    lock = _LOCKS.setdefault(path, FileLock(path, mode=0o666))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait("waiting: another process is measuring on this machine")
            lock.acquire()
    except OSError as error:
        raise MeasurementError(
            f"The lock file {path} cannot be used: {error.strerror}", "set TMPDIR to a directory that you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()
