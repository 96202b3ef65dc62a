"""Everything that can be measured of one model on one target, by one call."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimpoint.coding import code_model
from trimpoint.errors import DataError
from trimpoint.graph import baked
from trimpoint.measure.environment import cpu_name
from trimpoint.measure.inputs import CoreInputs, core_inputs
from trimpoint.measure.latency import LatencyResult, measure_latency
from trimpoint.measure.memory import MemoryResult, measure_memory
from trimpoint.measure.process import ArtifactFiles
from trimpoint.measure.quality import evaluate, generalisation_gap, quality
from trimpoint.measure.static import MacCount, count_macs, count_params
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import OperatorTime, Session
from trimpoint.runtimes.export import export
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.values import Measurement, Profile, Quality

NO_ENERGY = "not measurable here: no hardware energy counter is read"


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """What `measure_model` found.

    Args:
        profile: params, macs, file_bytes, coded_bytes, latency_ms, latency_p95_ms, throughput_per_s, peak_rss_bytes,
            the score as `accuracy[select]`, and `generalisation_gap`; further shapes as `latency_ms[length=128]`.
        operators: time of each operator of the exported model at the median shape, slowest first.
        macs: by module and by operator, with what was not counted.
        qualities: the score on each role that was used, with its interval.
    """

    profile: Profile
    operators: tuple[OperatorTime, ...]
    macs: MacCount
    qualities: tuple[Quality, ...] = ()


def measure_model(
    model: nn.Module,
    task: Task,
    target: Target | None = None,
    *,
    limit: int | None = None,
    rounds: int = 15,
    on_step: Callable[[str], None] = lambda _: None,
) -> MeasuredModel:
    """Export a model as it is and measure it in the target's runtime: size, speed, memory, quality.

    The `certify` data is left alone. Without any data but an `example`, everything but quality is measured.

    Args:
        model: to be measured; it is not changed.
        task: data and score, or only an `example`.
        target: runtime, threads, batch and lengths; ONNX Runtime with one thread and batch 1 by default.
        limit: the number of samples to score, at most.
        rounds: of the latency measurement.
        on_step: told what is being measured, in a few words.

    Raises:
        ExportError: if the model cannot be exported.
        MissingDependencyError: if the runtime is not installed.
        MeasurementError: if a measuring process fails.
        DataError: if the task has neither data nor an example.
    """
    target = target or Target()
    runtime = get_runtime(target.runtime)
    where = f"{target.runtime} {runtime.version()} on {cpu_name()}"
    on_step("counting")
    inputs = core_inputs(model, task, target)
    static, macs = static_profile(task.core_of(model), inputs)
    with tempfile.TemporaryDirectory(prefix="trimpoint-") as name:
        on_step("exporting")
        exported = export(task.core_of(model), inputs.example, inputs.dims, sources=(runtime.source,))
        files = ArtifactFiles(directory=Path(name), lowered=runtime.lower(exported, Path(name)))
        on_step("timing")
        timed = measure_latency({"model": files}, target, inputs.shapes, baseline="model", rounds=rounds)["model"]
        memory = measure_memory(files, target, inputs.shapes)
        measured = artifact_profile(files, timed, memory, middle=inputs.middle, where=where)
        operators = runtime.operators(
            files.directory, files.lowered, inputs.shapes[inputs.middle], threads=target.threads
        )
        on_step("coding")
        coded = coded_profile(files)
        on_step("scoring")
        session = runtime.open(files.directory, files.lowered, threads=target.threads)
        scored, qualities = quality_profile(session, task, limit=limit, where=where)
    notes = Profile(notes=(*exported.notes, *files.lowered.unmapped))
    return MeasuredModel(
        profile=static | measured | coded | scored | notes, operators=tuple(operators), macs=macs, qualities=qualities
    )


def static_profile(core: nn.Module, inputs: CoreInputs) -> tuple[Profile, MacCount]:
    """Return `params` and `macs` (of one sample at the median shape) of a module, and the MACs in detail."""
    core = baked(core)
    macs = count_macs(core, inputs.shapes[inputs.middle])
    metrics = {
        "params": Measurement(value=count_params(core).total, unit="1", how="tied and shared parameters once"),
        "macs": Measurement(value=macs.total, unit="1", how="of the module as ATen executes it, one sample"),
    }
    skipped = ", ".join(f"{name} ×{calls}" for name, calls in macs.not_counted.items())
    return Profile(metrics, notes=(f"not counted in macs: {skipped}",) if skipped else ()), macs


def artifact_profile(
    files: ArtifactFiles,
    latency: Mapping[str, LatencyResult],
    memory: MemoryResult | None = None,
    *,
    middle: str = "",
    where: str = "",
) -> Profile:
    """Return what was measured of an artifact as a profile.

    Args:
        files: give `file_bytes`.
        latency: shape → result; that of `middle` becomes `latency_ms`, another one `latency_ms[length=128]`.
        memory: gives `peak_rss_bytes`.
        middle: name of the median shape.
        where: machine and runtime.
    """
    metrics: dict[str, Measurement] = {
        "file_bytes": Measurement(value=files.bytes, unit="bytes", how="the files that the runtime loads", where=where)
    }
    for shape, result in latency.items():
        suffix = "" if shape == middle else f"[{shape}]"
        metrics |= {name + suffix: value for name, value in _latency_metrics(result, where).items()}
    if memory:
        metrics["peak_rss_bytes"] = Measurement(value=memory.peak_rss_bytes, unit="bytes", how=memory.how, where=where)
    notes = [f"latency_ms is for {middle}"] if middle else []
    notes += [note for result in latency.values() for note in result.notes] + list(files.lowered.notes)
    return Profile(metrics, missing={"energy_j": NO_ENERGY}, notes=tuple(dict.fromkeys(notes)))


def coded_profile(files: ArtifactFiles) -> Profile:
    """Return `coded_bytes`: the size of one self-sufficient coded file, which is written and read back.

    Args:
        files: what the runtime loads.
    """
    with tempfile.TemporaryDirectory(prefix="trimpoint-") as name:
        coded = Path(name) / "model.tpz"
        code_model(coded, files.directory, files.lowered)
        size = coded.stat().st_size
    how = "one file, graph and signature included, that restores what the runtime loads bit for bit"
    return Profile({"coded_bytes": Measurement(value=size, unit="bytes", how=how)})


def quality_profile(
    session: Session | nn.Module, task: Task, *, limit: int | None = None, where: str = ""
) -> tuple[Profile, tuple[Quality, ...]]:
    """Return the score on `select` with its interval, and the generalisation gap where there is training data.

    Args:
        session: or module, to be scored.
        task: gives data and score.
        limit: the number of samples, at most.
        where: machine and runtime.
    """
    name = task.score.name
    if not task.has("select"):
        return Profile(missing={f"{name}[select]": "the task has no `select` data"}), ()
    evaluation = evaluate(session, task, "select", limit=limit)
    result = quality(evaluation)
    interval = "Wilson" if task.score.proportion else "bootstrap (BCa)"
    metrics = {
        f"{name}[select]": Measurement(
            value=result.value,
            unit="1",
            better=result.better,
            n=result.n,
            low=result.low,
            high=result.high,
            how=f"interval: {interval}",
            where=where,
        )
    }
    if not task.has("train"):
        return Profile(metrics, missing={"generalisation_gap": "the task has no `train` data"}), (result,)
    try:
        metrics["generalisation_gap"] = generalisation_gap(session, task, evaluation)
    except DataError as error:
        return Profile(metrics, missing={"generalisation_gap": error.message}), (result,)
    return Profile(metrics), (result,)


def _latency_metrics(result: LatencyResult, where: str) -> dict[str, Measurement]:
    def measurement(value: float, unit: str, **more: Any) -> Measurement:
        return Measurement(value=value, unit=unit, n=result.calls, how=result.how, where=where, **more)

    return {
        "latency_ms": measurement(result.median_ms, "ms", low=result.low_ms, high=result.high_ms),
        "latency_p95_ms": measurement(result.p95_ms, "ms"),
        "throughput_per_s": measurement(result.throughput_per_s, "1/s", better="higher"),
    }


def ratio_profile(results: Mapping[str, LatencyResult], middle: str, where: str) -> Profile:
    """Return the interleaved ratio to the baseline (above 1 is faster) at each shape."""
    return Profile(
        {
            "latency_ratio" + ("" if shape == middle else f"[{shape}]"): Measurement(
                value=result.ratio,
                unit="1",
                better="higher",
                n=result.rounds,
                low=result.ratio_low,
                high=result.ratio_high,
                how="baseline ÷ this, " + result.how,
                where=where,
            )
            for shape, result in results.items()
        }
    )
