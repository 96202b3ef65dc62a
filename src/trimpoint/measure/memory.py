"""Peak memory of one artifact, in a process of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimpoint.measure.process import ArtifactFiles, run_child
from trimpoint.target import Target


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Peak resident set size of a process that opens and runs one artifact.

    Args:
        peak_rss_bytes: of the whole process, Python and the runtime's libraries included.
        increase_bytes: over the same process with the runtime imported and nothing opened: what the model adds.
        how: how it was taken.
    """

    peak_rss_bytes: int
    increase_bytes: int
    how: str


def measure_memory(
    artifact: ArtifactFiles, target: Target, inputs_by_shape: Mapping[str, Any], *, runs: int = 5, timeout: float = 300
) -> MemoryResult:
    """Open an artifact in a new process, run it a few times at each shape, and read the process's peak memory.

    Args:
        artifact: files to open.
        target: gives the threads.
        inputs_by_shape: name of the shape → one batch, NumPy arrays in the module's structure.
        runs: at each shape.
        timeout: seconds after which measuring is given up.

    Raises:
        MeasurementError: if the process crashes, for want of memory for example, or does not come to an end.
    """
    result, _ = run_child(
        "memory", {"main": artifact}, inputs_by_shape, threads=target.threads, timeout=timeout, runs=runs
    )
    increase = result["peak"] - result["empty"]
    return MemoryResult(
        peak_rss_bytes=result["peak"],
        increase_bytes=increase,
        how=f"peak resident set of a process of its own, {increase:,} bytes above the same without the model",
    )
