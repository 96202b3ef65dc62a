"""The process that measures: reads a job file, runs the files it names, writes the result beside it.

Started as `python -m trimpoint.measure.child JOB`; see `trimpoint.measure.process`. Only files come in, and neither
torch nor anything else that makes models can be imported here, so that nothing but the runtime is measured. A runtime
that cannot do without one of them says so (`Runtime.imports`).
"""

import gc
import importlib.abc
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimpoint.errors import TrimpointError
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Lowered, Session
from trimpoint.signature import unflatten
from trimpoint.values import from_data

FORBIDDEN = ("torch", "optuna", "onnx", "onnxscript", "scipy")
_WARM_UP = 3


class Forbid(importlib.abc.MetaPathFinder):
    """Makes packages impossible to import, as if they were not installed."""

    def __init__(self, names: Sequence[str] = FORBIDDEN) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG002
        """Refuse the forbidden packages, leave all others to the next finder.

        Raises:
            ModuleNotFoundError: for a forbidden package.
        """
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{fullname} is not available in a measuring process", name=fullname)


def main(path: str) -> int:
    """Run the job in the file `path`; return the exit code."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.meta_path.insert(0, Forbid(_forbidden(job)))
    directory = Path(path).parent
    try:
        result, arrays = _JOBS[job["kind"]](job, directory)
    except TrimpointError as error:
        result, arrays = {"error": error.message, "hint": error.hint}, {}
    np.savez(directory / "arrays.npz", **arrays)
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def _forbidden(job: Mapping[str, Any]) -> list[str]:
    runtimes = {get_runtime(entry["lowered"]["runtime"]) for entry in job["artifacts"].values()}
    needed = {name for runtime in runtimes for name in runtime.imports}
    return [name for name in FORBIDDEN if name not in needed]


def _open(artifact: Mapping[str, Any], threads: int) -> Session:
    lowered = from_data(Lowered, artifact["lowered"])
    return get_runtime(lowered.runtime).open(Path(artifact["directory"]), lowered, threads=threads)


def _inputs(job: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    with np.load(directory / "inputs.npz", allow_pickle=False) as file:
        return {
            name: unflatten(entry["structure"], [file[f"{entry['key']}_{i}"] for i in range(entry["count"])])
            for name, entry in job["inputs"].items()
        }


def run_outputs(job: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run an artifact once on each of its inputs and return the outputs."""
    session = _open(job["artifacts"]["main"], job["threads"])
    arrays: dict[str, Any] = {}
    for name, inputs in _inputs(job, directory).items():
        outputs = session.run_flat(session.flat_inputs(inputs))
        arrays |= {f"{name}_{index}": np.asarray(output) for index, output in enumerate(outputs)}
    return {"modules": sorted(name for name in _forbidden(job) if name in sys.modules)}, arrays


def run_memory(job: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open an artifact, run it, and return the peak resident set size before and after, in bytes."""
    inputs = _inputs(job, directory)
    artifact = job["artifacts"]["main"]
    get_runtime(artifact["lowered"]["runtime"]).version()
    empty = peak_rss_bytes()
    session = _open(artifact, job["threads"])
    for value in inputs.values():
        arrays = session.flat_inputs(value)
        for _ in range(job["runs"]):
            session.run_flat(arrays)
    return {"empty": empty, "peak": peak_rss_bytes()}, {}


def peak_rss_bytes() -> int:
    """Return the largest resident set size that this process had so far, in bytes.

    Linux: the high-water mark of the present memory map, since `ru_maxrss` also remembers the process that started
    this one. macOS: `ru_maxrss`. Windows: the peak working set, by psutil.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if platform.system() == "Darwin" else peak * 1024)


def run_latency(job: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time artifacts in turns: every round gives each of them, in random order, one turn at each shape.

    Rounds are added, up to `max_rounds`, until `rounds` of them agree on the baseline.
    """
    sessions = {name: _open(entry, job["threads"]) for name, entry in job["artifacts"].items()}
    inputs = _inputs(job, directory)
    rng = np.random.default_rng(job["seed"])
    times: dict[str, Any] = {}
    used: dict[str, list[int]] = {}
    for shape, value in inputs.items():
        arrays = {name: session.flat_inputs(value) for name, session in sessions.items()}
        calls = {name: _calls(sessions[name], arrays[name], job["turn_ms"]) for name in sessions}
        medians: list[float] = []
        while len(medians) < job["max_rounds"] and len(_agreeing(medians, job["tolerance"])) < job["rounds"]:
            for index in rng.permutation(len(sessions)):
                name = list(sessions)[index]
                turn = _turn(sessions[name], arrays[name], calls[name])
                times[_key(job, shape, name, len(medians))] = turn
                if name == job["baseline"]:
                    baseline = float(np.median(turn))
            medians.append(baseline)
        used[shape] = _agreeing(medians, job["tolerance"])
        if len(used[shape]) < job["rounds"]:
            used[shape] = list(range(len(medians)))
    return {"used": used}, times


def _key(job: Mapping[str, Any], shape: str, name: str, turn: int) -> str:
    return f"{list(job['inputs']).index(shape)}_{list(job['artifacts']).index(name)}_{turn}"


def _agreeing(medians: Sequence[float], tolerance: float) -> list[int]:
    """Return the rounds in which the baseline took no longer than its fastest round by more than `tolerance`."""
    return [index for index, median in enumerate(medians) if median <= min(medians) * (1 + tolerance)]


def _calls(session: Session, arrays: Sequence[Any], turn_ms: float) -> int:
    """Warm up and return how many calls fill a turn: at least 3, at most 5,000."""
    for _ in range(_WARM_UP):
        session.run_flat(arrays)
    typical = float(np.median(_turn(session, arrays, _WARM_UP)))
    if typical < turn_ms * 1e5:
        typical = float(np.median(_turn(session, arrays, 20)))
    return int(np.clip(turn_ms * 1e6 / max(typical, 1.0), 3, 5_000))


def _turn(session: Session, arrays: Sequence[Any], calls: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the time of each call in nanoseconds, after one that brings the model back into the caches."""
    session.run_flat(arrays)
    taken = np.empty(calls, np.int64)
    gc.collect()
    gc.disable()
    try:
        for index in range(calls):
            start = time.perf_counter_ns()
            session.run_flat(arrays)
            taken[index] = time.perf_counter_ns() - start
    finally:
        gc.enable()
    return taken


_JOBS: dict[str, Callable[[Mapping[str, Any], Path], tuple[dict[str, Any], dict[str, Any]]]] = {
    "latency": run_latency,
    "memory": run_memory,
    "outputs": run_outputs,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
