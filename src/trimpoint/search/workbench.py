"""Runs one plan: apply, recover, lower, verify, measure. Every stage is kept by content and never computed twice."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from trimpoint.build import Build
from trimpoint.compress import Compressed, compress
from trimpoint.data import as_numpy
from trimpoint.errors import StudyError
from trimpoint.graph import edits_to_data, grids_of, input_ranges
from trimpoint.measure.agreement import other_runtimes_profile, sample_inputs, simulation_profile
from trimpoint.measure.environment import cpu_name
from trimpoint.measure.inputs import capture, core_inputs
from trimpoint.measure.latency import LatencyResult, measure_latency
from trimpoint.measure.memory import measure_memory
from trimpoint.measure.process import ArtifactFiles
from trimpoint.measure.profile import artifact_profile, coded_profile, ratio_profile, static_profile
from trimpoint.measure.quality import Evaluation, evaluate, forecast_upper, quality
from trimpoint.method import Stage
from trimpoint.parts import Block, Group
from trimpoint.plan import Plan, Step
from trimpoint.progress import SILENT, Progress
from trimpoint.recover.recipe import Recovery, steps_in_epoch
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Exported, Lowered, OperatorTime, Session
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import require_parity
from trimpoint.search.delivery import LOWERED, STAGE, files_of, read_lowered, save_synthetic
from trimpoint.search.fingerprint import model_digest
from trimpoint.search.space import parameter_leaves
from trimpoint.search.stages import load_stage, save_stage
from trimpoint.search.store import Store
from trimpoint.signature import Signature
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.trust.bounds import resampled_upper
from trimpoint.values import Format, Profile, Quality, Trial, from_data, to_data

CALIBRATION_SAMPLES = 512
RECORDS = "records.npy"
SPEED_STEPS = 20
QUIET = 1.08
"""By what factor the baseline may be slower than it has been, for the machine to count as quiet."""
TIMINGS = 3
"""How often a candidate is timed at most, where the machine is not quiet."""


class Workbench:
    """Makes, lowers and measures what plans describe.

    Args:
        model: unmodified, in evaluation mode; never changed.
        task: data, loss and score.
        target: where it must run.
        study: directory of the study; stages and lowered files are kept in its `store/`.
        fingerprint: of model, data and target; part of every key.
        progress: where to tell what is being done.
        coded: measure `coded_bytes`, which takes seconds a megabyte.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        target: Target,
        study: Path,
        fingerprint: str,
        progress: Progress = SILENT,
        *,
        coded: bool = False,
    ) -> None:
        self.model, self.task, self.target, self.study = model, task, target, study
        self.store = Store(study / "store")
        self.fingerprint, self.progress, self.coded = fingerprint, progress, coded
        self.runtime = get_runtime(target.runtime)
        self.inputs = core_inputs(model, task, target)
        self.leaves = parameter_leaves(model)
        self._unmodified = Build(module=model, given=model, task=task)
        self.overhead_seconds = 8.0
        self._calibration: list[Any] | None = None
        self._traced: tuple[str, Exported] | None = None
        self._baseline: tuple[ArtifactFiles, Evaluation | None] | None = None
        self._fastest_ms = math.inf
        self._teachers: MutableMapping[str, Tensor] = {}

    # The parts of the model

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the unmodified model that can be bypassed."""
        return self._unmodified.blocks()

    def groups(self) -> tuple[Group, ...]:
        """Return the coupled groups of the unmodified model that can be cut."""
        return tuple(group for group in self._unmodified.groups() if not group.reason)

    # Trials

    def baseline(self, trial: Trial) -> Trial:
        """Export, verify and measure the unmodified model."""
        save_synthetic(self.study, self.inputs.shapes)
        made = compress(self.model, Plan(), self.task)
        files = self._lowered(made)
        return self._measured(trial, made, files)

    def one_line_int8(self, trial: Trial) -> Trial:
        """Quantise the unmodified model with the runtime's own one-line int8 and measure it."""
        made = compress(self.model, Plan(), self.task)
        files = self._keep(
            self._key("one-line-int8", self.runtime.version()),
            None,
            lambda directory: self.runtime.lower_one_line_int8(self._exported(made), directory, self.calibration()),
        )
        return self._measured(trial, made, files)

    def candidate(self, trial: Trial, plan: Plan, effort: float) -> Trial:
        """Make what a plan describes, with its last recovery at `effort`, and measure it."""
        started = time.monotonic()
        made = self.stage(plan, effort)
        trained = time.monotonic() - started
        files = self._lowered(made)
        result = self._measured(trial, made, files)
        self.overhead_seconds = time.monotonic() - started - trained
        return result

    def use_baseline(self, trial: Trial) -> None:
        """Compare everything from now on with the baseline of `trial`."""
        files = files_of(self.study, trial)
        evaluation = None
        if self.task.has("select"):
            records = np.load(files.directory / RECORDS, allow_pickle=False)
            evaluation = Evaluation(
                score=self.task.score, role="select", records=records, value=self.task.score.aggregate(records)
            )
        self._baseline = (files, evaluation)
        if "latency_ms" in trial.profile:
            self._fastest_ms = min(self._fastest_ms, trial.profile["latency_ms"].value)

    # Shapes, before anything is trained

    def use_unmodified(self) -> None:
        """Compare shapes with the unmodified model, which need not be measured for that."""
        self._baseline = self._lowered(compress(self.model, Plan(), self.task)), None

    def shape(self, plan: Plan) -> dict[str, float]:
        """Return the `latency_ms` and `file_bytes` of a plan without recovery, over the baseline's."""
        files = self._lowered(self.stage(plan, 1.0))
        base, _ = self._reference()
        middle = self.inputs.middle
        found, _ = self._timed({"baseline": base, "shape": files}, {middle: self.inputs.shapes[middle]}, rounds=5)
        timed = found["shape"][middle]
        return {"latency_ms": 1 / timed.ratio, "file_bytes": files.bytes / base.bytes}

    def operators(self, plan: Plan) -> list[OperatorTime]:
        """Return the operator times of a plan without recovery, with paths of the unmodified model's modules."""
        files = self._lowered(self.stage(plan, 1.0))
        inputs = self.inputs.shapes[self.inputs.middle]
        found = self.runtime.operators(files.directory, files.lowered, inputs, threads=self.target.threads)
        core = "" if self.task.core is None else f"{self.task.core}."
        return [replace(operator, module=(core + operator.module).rstrip(".")) for operator in found]

    # Stages

    def stage(self, plan: Plan, effort: float) -> Compressed:
        """Return what a plan makes of the model: read from the store, or made from the longest stored prefix."""
        if not plan.steps:
            return compress(self.model, plan, self.task)
        key = self._stage_key(plan, effort)
        if (directory := self.store.get(key)) is not None:
            return load_stage(directory, self.model, plan)
        recovers = plan.steps[-1].method.traits.stage is Stage.RECOVER
        # Effort is that of the *last* recovery: whatever stands before it ran at full length.
        before = self.stage(plan.prefix(len(plan.steps) - 1), 1.0 if recovers else effort)
        self.progress.update(text=f"{plan.steps[-1]}")
        started = time.monotonic()
        made = compress(
            self.model,
            plan,
            self.task,
            effort=effort,
            start=before,
            state_dir=self._training_directory() if recovers else None,
            cache=self._teachers,
            progress=lambda _, text, share: self.progress.update(text=f"{plan.steps[-1]}: {text} {share:.0%}"),
        )
        seconds = time.monotonic() - started
        self.store.put(key, lambda directory: save_stage(made, directory, seconds))
        return made

    def training_speed(self, recovery: Recovery) -> float:
        """Return the seconds that a recovery of full length would take on the unmodified model, from a few steps.

        They are taken at a rate at which nothing can break down: what the real rate does shows in the trials.
        """
        steps = steps_in_epoch(self.task)
        seconds = []
        for count in (4, SPEED_STEPS):
            short = replace(recovery, epochs=count / steps, warmup=0.0, lr=1e-6)
            started = time.monotonic()
            compress(self.model, Plan((Step(short),)), self.task)
            seconds.append(time.monotonic() - started)
        return max(seconds[1] - seconds[0], 1e-3) / (SPEED_STEPS - 4) * steps * recovery.epochs

    def _stage_key(self, plan: Plan, effort: float) -> str:
        recovers = any(step.method.traits.stage is Stage.RECOVER for step in plan.steps)
        return self._key("stage", plan.hash, f"{effort if recovers else 1.0:.6f}")

    def _training_directory(self) -> Path:
        path = self.study / "training"
        path.mkdir(exist_ok=True)
        return path

    def trim(self, trials: Iterable[Trial]) -> None:
        """Cut the store down to its limit; what was lowered for one of `trials`, and its weights, stay."""
        keep = set[str]()
        for trial in trials:
            if trial.artifact:
                keep.add(Path(trial.artifact).name)
                noted = self.study / trial.artifact / STAGE
                if noted.is_file():
                    keep.add(str(json.loads(noted.read_text(encoding="utf-8"))["stage"]))
        self.store.trim(frozenset(keep))

    # Lowering

    def calibration(self) -> list[Any]:
        """Return the calibration batches of the core's inputs; empty without calibration data."""
        if self._calibration is None:
            size = min(32, self.task.batch_size)
            batches = (
                self.task.batches("calibrate", size=size, limit=CALIBRATION_SAMPLES) if self.task.calibrate else ()
            )
            self._calibration = [as_numpy(capture(self.model, self.task, inputs)) for inputs, _ in batches]
        return self._calibration

    def _exported(self, made: Compressed) -> Exported:
        """Return the export, shared by plans that differ in number formats only: the module is the same then.

        ONNX graphs are kept in the store. A traced program is not, only the last one is, in memory: it takes less time
        to make than it takes to lower, and to read one from a file is to run what the file says.
        """
        core = self.task.core_of(made.module)
        key = self._key("export", model_digest(core), json.dumps(edits_to_data(made.edits)))
        if self.runtime.source == "program":
            if self._traced is None or self._traced[0] != key:
                self._traced = key, export(core, self.inputs.example, self.inputs.dims, sources=("program",))
            return self._traced[1]

        def write(directory: Path) -> None:
            exported = export(self.task.core_of(made.module), self.inputs.example, self.inputs.dims)
            (directory / "model.onnx").write_bytes(exported.onnx)
            rest = {"signature": exported.signature, "scopes": exported.scopes, "notes": exported.notes}
            (directory / "export.json").write_text(json.dumps(to_data(rest)), encoding="utf-8")

        directory = self.store.put(key, write)
        rest = json.loads((directory / "export.json").read_text(encoding="utf-8"))
        return Exported(
            onnx=(directory / "model.onnx").read_bytes(),
            signature=from_data(Signature, rest["signature"]),
            scopes=rest["scopes"],
            notes=tuple(rest["notes"]),
            grids=grids_of(core),
            ranges=input_ranges(core),
        )

    def _formats(self, made: Compressed) -> dict[str, dict[str, Format]]:
        core = f"{self.task.core}." if self.task.core else ""
        return {path.removeprefix(core): dict(f) for path, f in made.formats.items() if path.startswith(core)}

    def _lowered(self, made: Compressed) -> ArtifactFiles:
        formats = self._formats(made)
        key = self._key("lowered", self.runtime.name, self.runtime.version(), made.plan.hash, f"{made.effort:.6f}")
        files = self._keep(
            key,
            self._stage_key(made.plan, made.effort),
            lambda directory: self.runtime.lower(
                self._exported(made),
                directory,
                formats=formats or None,
                calibration=self.calibration() if formats else (),
            ),
        )
        if not formats:
            require_parity(
                self.task.core_of(made.module),
                self.open(files),
                [self.inputs.shapes[name] for name in self.inputs.shapes],
            )
        return files

    def _keep(self, key: str, stage: str | None, lower: Callable[[Path], Lowered]) -> ArtifactFiles:
        def write(directory: Path) -> None:
            lowered = lower(directory)
            if stage is not None:
                (directory / STAGE).write_text(json.dumps({"stage": stage}), encoding="utf-8")
            (directory / LOWERED).write_text(json.dumps(to_data(lowered)), encoding="utf-8")

        directory = self.store.put(key, write)
        return ArtifactFiles(directory=directory, lowered=read_lowered(directory))

    def open(self, files: ArtifactFiles) -> Session:
        """Open lowered files in the target's runtime."""
        return self.runtime.open(files.directory, files.lowered, threads=self.target.threads)

    # Measuring

    def elsewhere(self, trial: Trial, plan: Plan) -> Profile:
        """Return how far the same plan's files for other installed runtimes are from those of its trial."""
        made, session = self.stage(plan, 1.0), self.open(files_of(self.study, trial))
        formats = self._formats(made)
        data = self.calibration() if formats else ()
        samples = self._samples(session)
        return other_runtimes_profile(self.runtime, session, self._exported(made), formats, data, **samples)

    def _samples(self, session: Session) -> dict[str, Any]:
        inputs = sample_inputs(self.model, self.task, self.inputs, session)
        return {"inputs": inputs, "choices": self.task.score.proportion}

    def _reference(self) -> tuple[ArtifactFiles, Evaluation | None]:
        if self._baseline is None:
            raise StudyError("Nothing can be compared before the baseline is measured.", "run the baseline first")
        return self._baseline

    def _measured(self, trial: Trial, made: Compressed, files: ArtifactFiles) -> Trial:
        base = self._baseline[0] if self._baseline else files
        together = {"baseline": base, "this": files} if self._baseline else {"baseline": files}
        self.progress.update(text="timing")
        timed, disturbed = self._timed(together, self.inputs.shapes)
        memory = measure_memory(files, self.target, self.inputs.shapes)
        mine = timed["this" if self._baseline else "baseline"]
        where = f"{self.runtime.name} {self.runtime.version()} on {cpu_name()}"
        static, _ = static_profile(self.task.core_of(made.module), self.inputs)
        measured = artifact_profile(files, mine, memory, middle=self.inputs.middle, where=where)
        if self.coded:
            self.progress.update(text="coding")
            measured |= coded_profile(files)
        profile = static | measured | ratio_profile(mine, self.inputs.middle, where) | Profile(notes=disturbed)
        session, found = self.open(files), None
        profile |= simulation_profile(self.task.core_of(made.module), session, **self._samples(session))
        if self.task.has("select"):
            self.progress.update(text="scoring on `select`")
            evaluation = evaluate(session, self.task, "select")
            found = quality(evaluation, self._baseline[1] if self._baseline else None)
            if self.task.has("certify"):
                found = replace(found, drop_forecast=self._forecast(found, evaluation))
            np.save(files.directory / RECORDS, evaluation.records)
        else:
            profile |= Profile(missing={f"{self.task.score.name}[select]": "the task has no `select` data"})
        return replace(
            trial,
            profile=profile,
            quality=found,
            changes=made.changes,
            artifact=files.directory.relative_to(self.study).as_posix(),
        )

    def _forecast(self, found: Quality, evaluation: Evaluation) -> float | None:
        """Return the bound that a certificate will likely state, its allowance included where the score has one."""
        n, reference = len(self.task.data("certify")), self._baseline[1] if self._baseline else None
        upper = forecast_upper(found, n)
        if upper is None or reference is None or evaluation.score.proportion:
            return upper
        unseen = resampled_upper(evaluation.score, reference.records, evaluation.records)[2]
        return upper + unseen * evaluation.n / n

    def _timed(
        self, candidates: Mapping[str, ArtifactFiles], shapes: Mapping[str, Any], rounds: int = 15
    ) -> tuple[dict[str, dict[str, LatencyResult]], tuple[str, ...]]:
        """Time candidates; again where the baseline is slower than it has been, since then something else runs.

        What else runs does not slow all artifacts alike: beside a busy neighbour on the same physical core, int8 loses
        twice as much as float32, and an interleaved ratio loses with it.
        """
        middle, found = self.inputs.middle, []
        for _ in range(TIMINGS):
            timed = measure_latency(candidates, self.target, shapes, baseline="baseline", rounds=rounds)
            found.append(timed)
            if timed["baseline"][middle].median_ms <= QUIET * self._fastest_ms:
                break
        best = min(found, key=lambda timed: timed["baseline"][middle].median_ms)
        reached = best["baseline"][middle].median_ms
        slower, self._fastest_ms = reached / self._fastest_ms, min(self._fastest_ms, reached)
        if slower <= QUIET:
            return best, ()
        return best, (
            f"timed on a busy machine: the unmodified model took {slower:.2f} times what it had taken before",
        )

    def _key(self, *parts: str) -> str:
        return hashlib.sha256("\n".join((self.fingerprint, *parts)).encode()).hexdigest()[:32]
