"""Systems side by side: each made and lowered once, scored on `select`, timed together, the finalists certified.

What a system came to is kept in a directory of its own, so that a scenario that was cut off goes on with the next one.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.run import commit
from torch import Tensor, nn

from trimpoint.compress import Compressed, compress
from trimpoint.data import as_numpy
from trimpoint.errors import StudyError
from trimpoint.measure.environment import instruction_set
from trimpoint.measure.inputs import CoreInputs, capture, core_inputs
from trimpoint.measure.latency import LatencyResult, measure_latency
from trimpoint.measure.process import ArtifactFiles
from trimpoint.measure.profile import static_profile
from trimpoint.measure.quality import Evaluation, evaluate, quality
from trimpoint.methods.distill import Distill
from trimpoint.plan import Plan
from trimpoint.recover import train
from trimpoint.recover.batches import epoch_batches, mix
from trimpoint.recover.distill import Distillation, DistillationLoss, Teacher
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Exported, Lowered
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import require_parity
from trimpoint.search.delivery import LOWERED, read_lowered
from trimpoint.search.fingerprint import model_digest
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.trust.certify import certify_runs
from trimpoint.trust.ledger import Ledger
from trimpoint.values import Certificate, from_data, to_data

UNMODIFIED = "unmodified"
OTHER_SEEDS = (1, 2)
FACTS, RECORDS, CLAIM = "facts.json", "records.npy", "compared.json"
Make = Callable[[], nn.Module | Compressed]
Lower = Callable[[Exported, Path, Sequence[Any]], Lowered]


@dataclass(frozen=True)
class _Made:
    files: ArtifactFiles
    facts: Mapping[str, Any]
    evaluation: Evaluation


class Comparison:
    """Systems that are to be compared with one unmodified model.

    Args:
        out: where everything is kept.
        model: unmodified, in evaluation mode.
        task: its data; `select` is scored for every system, `certify` for the finalists alone.
        target: where they run.

    Attributes:
        reference: the system that drops are against: the unmodified model, until `refer_to` finds a better one.
        answers: of teachers, shared by all that see the same views.

    Raises:
        StudyError: if `out` holds systems of another model or other data.
    """

    def __init__(self, out: Path, model: nn.Module, task: Task, target: Target | None = None) -> None:
        self.out, self.model, self.task, self.target = out, model, task, target or Target()
        self.reference = UNMODIFIED
        self.answers: dict[str, Tensor] = {}
        _claim(out, {"model": model_digest(model), "select": task.fingerprint("select"), "target": str(self.target)})
        self.runtime = get_runtime(self.target.runtime)
        self.inputs: CoreInputs = core_inputs(model, task, self.target)
        self.systems: dict[str, _Made] = {}
        self.add(UNMODIFIED, lambda: model)

    def add(self, name: str, make: Plan | Make, recipe: str = "", **facts: Any) -> Mapping[str, Any]:
        """Make, lower and score a system, unless that was done before.

        Args:
            name: of the system.
            make: a plan for the unmodified model, or what returns a module, or what a plan made of one.
            recipe: all that `make` depends on besides model and task; a plan says it itself.
            facts: to be put into its row.

        Returns:
            its figures so far: `params`, `macs`, `file_bytes`, `accuracy` and `drop` on `select`, and `facts`.

        Raises:
            StudyError: if a system of that name was made by another recipe.
        """
        directory = self._directory(name)
        recipe = make.hash if isinstance(make, Plan) else recipe
        if not (directory / FACTS).exists():
            directory.mkdir(parents=True, exist_ok=True)
            made = compress(self.model, make, self.task, cache=self.answers) if isinstance(make, Plan) else make()
            module = made.module if isinstance(made, Compressed) else made
            lowered = self.runtime.lower(
                self._exported(module.eval()),
                directory,
                **self._numbers(made),
            )
            if not (isinstance(made, Compressed) and made.formats):
                session = self.runtime.open(directory, lowered, threads=self.target.threads)
                require_parity(self.task.core_of(module), session, list(self.inputs.shapes.values()))
            static, _ = static_profile(self.task.core_of(module), self.inputs)
            plan = {"plan": str(make)} if isinstance(make, Plan) else {}
            facts = plan | facts | {metric: static[metric].value for metric in ("params", "macs")}
            self._keep(directory, lowered, facts | {"recipe": recipe, "commit": commit()})
        self._read(name, directory, recipe)
        return self._figures(name)

    def refer_to(self, *names: str) -> str:
        """Measure drops from now on against the best on `select` of the unmodified model and these systems.

        An undertrained start makes every drop look free; the original, given the same extra training, does not.
        """
        sign = 1 if self.task.score.better == "higher" else -1
        self.reference = max((UNMODIFIED, *names), key=lambda name: sign * self.systems[name].evaluation.value)
        return self.reference

    def expected_bound(self, name: str) -> float:
        """Return the upper bound of a system's drop if the `certify` samples show the same as those of `select` do."""
        row, sizes = self._figures(name), [len(self.task.data(role)) for role in ("select", "certify")]
        drop, upper = row["drop_select"] or 0.0, row["drop_select_upper95"] or 0.0
        return float(drop + (upper - drop) * math.sqrt(sizes[0] / sizes[1]))

    def _keep(self, directory: Path, lowered: Lowered, facts: Mapping[str, Any]) -> None:
        (directory / LOWERED).write_text(json.dumps(to_data(lowered)), encoding="utf-8")
        session = self.runtime.open(directory, lowered, threads=self.target.threads)
        np.save(directory / RECORDS, evaluate(session, self.task, "select").records)
        size = ArtifactFiles(directory=directory, lowered=lowered).bytes
        (directory / FACTS).write_text(json.dumps({**facts, "file_bytes": size}), encoding="utf-8")

    def _read(self, name: str, directory: Path, recipe: str = "") -> None:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        if facts.pop("recipe", "") != recipe:
            raise StudyError(f"{name!r} in {directory} was made by another recipe.", "remove the directory")
        records = np.load(directory / RECORDS, allow_pickle=False)
        self.systems[name] = _Made(
            files=ArtifactFiles(directory=directory, lowered=read_lowered(directory)),
            facts=facts,
            evaluation=Evaluation(
                score=self.task.score, role="select", records=records, value=self.task.score.aggregate(records)
            ),
        )

    def add_one_line_int8(self) -> None:
        """Add the runtime's own one-line int8 of the unmodified model."""
        self.add_lowered("one-line int8", self.runtime.lower_one_line_int8)

    def add_lowered(self, name: str, lower: Lower, recipe: str = "") -> None:
        """Add what somebody else makes of the exported, unmodified model.

        Args:
            name: of the system.
            lower: called with the export, an empty directory and the calibration batches.
            recipe: all that `lower` depends on besides these.
        """
        directory = self._directory(name)
        if not (directory / FACTS).exists():
            directory.mkdir(parents=True, exist_ok=True)
            exported = self._exported(self.model)
            facts = {"recipe": recipe, "commit": commit()}
            self._keep(directory, lower(exported, directory, self.calibration()), facts)
        self._read(name, directory, recipe)

    def _exported(self, module: nn.Module) -> Exported:
        core = self.task.core_of(module)
        return export(core, self.inputs.example, self.inputs.dims, sources=(self.runtime.source,))

    def _directory(self, name: str) -> Path:
        return self.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def _numbers(self, made: nn.Module | Compressed) -> dict[str, Any]:
        if not isinstance(made, Compressed) or not made.formats:
            return {}
        return {"formats": made.formats, "calibration": self.calibration()}

    def calibration(self) -> list[Any]:
        """Return the calibration batches, as runtimes take them."""
        batches = self.task.batches("calibrate", size=32, limit=512)
        return [as_numpy(capture(self.model, self.task, inputs)) for inputs, _ in batches]

    def _figures(self, name: str) -> dict[str, Any]:
        made, base = self.systems[name], self.systems[self.reference].evaluation
        found = quality(made.evaluation, None if name == self.reference else base)
        return {
            "system": name,
            **made.facts,
            "select": found.value,
            "drop_select": found.drop,
            "drop_select_upper95": found.drop_upper,
        }

    def timed(self, names: Sequence[str] = (), rounds: int = 15) -> dict[str, LatencyResult]:
        """Time systems at the median shape, all of them interleaved in one process.

        Args:
            names: which ones; all of them by default. The unmodified model is always among them.
            rounds: of turns.
        """
        chosen = {UNMODIFIED: self.systems[UNMODIFIED].files}
        chosen |= {name: self.systems[name].files for name in names or self.systems}
        middle = self.inputs.middle
        found = measure_latency(
            chosen, self.target, {middle: self.inputs.shapes[middle]}, baseline=UNMODIFIED, rounds=rounds
        )
        return {name: shapes[middle] for name, shapes in found.items()}

    def certify(self, finalists: Sequence[str], margin: float, key: str) -> dict[str, Certificate]:
        """Compare finalists with the reference on the `certify` data.

        What was certified before is read back; finalists that were named first under this key stay, whoever is given.

        Args:
            finalists: at most three systems, fixed before any of them is looked at.
            margin: the drop that is allowed.
            key: names this set of finalists.

        Raises:
            StudyError: if they were named with another margin or reference.
        """
        chosen, terms = self.out / f"finalists-{key}.json", {"margin": margin, "reference": self.reference}
        if not chosen.exists():
            chosen.write_text(json.dumps({**terms, "finalists": list(finalists)}), encoding="utf-8")
        named = json.loads(chosen.read_text(encoding="utf-8"))
        finalists = named.pop("finalists")
        if named != terms:
            raise StudyError(f"The finalists in {chosen} were named for {named}. Now it is {terms}.")
        digests = "".join(self.systems[name].files.digest for name in finalists)
        batch = f"{key} {hashlib.sha256(digests.encode()).hexdigest()[:12]}"
        certificates = {}
        for name in finalists:
            made, base = self.systems[name].files, self.systems[self.reference].files
            file = made.directory / f"certificate-{key}.json"
            if file.exists():
                certificates[name] = from_data(Certificate, json.loads(file.read_text(encoding="utf-8")))
                continue
            certificates[name] = certify_runs(
                self.runtime.open(base.directory, base.lowered, threads=self.target.threads),
                self.runtime.open(made.directory, made.lowered, threads=self.target.threads),
                self.task,
                margin,
                ledger=Ledger(),
                artifact_digest=made.digest,
                finalists=len(finalists),
                batch=batch,
                runtime=f"{self.runtime.name} {self.runtime.version()}",
                instruction_set=instruction_set(),
            )
            file.write_text(json.dumps(to_data(certificates[name])), encoding="utf-8")
        return certificates

    def examine(
        self,
        plans: Mapping[str, Plan],
        timed: Mapping[str, LatencyResult],
        margin: float,
        key: str,
        finalists: int = 2,
    ) -> tuple[dict[str, Certificate], str | None]:
        """Certify the fastest systems that are likely to pass, and repeat the fastest that does with other seeds.

        All finalists are named before any of them is looked at, by what they show on `select` alone.

        Args:
            plans: name → how a system was made, with seed 0.
            timed: what `timed` returned.
            margin: the drop that is allowed.
            key: names this set of finalists.
            finalists: how many at most.

        Returns:
            the certificates, and the fastest system that passed and whose drop on `select`, in the mean of all seeds,
            is within the margin too.
        """
        fitting = sorted((n for n in plans if self.expected_bound(n) <= margin), key=lambda n: -timed[n].ratio)
        certificates = self.certify(fitting[:finalists], margin, key) if fitting else {}
        for name in sorted(certificates, key=lambda name: -timed[name].ratio):
            if certificates[name].status != "passed":
                continue
            others = [self.add(f"{name}, seed {seed}", replace(plans[name], seed=seed)) for seed in OTHER_SEEDS]
            drops = [figures["drop_select"] or 0.0 for figures in (self._figures(name), *others)]
            if float(np.mean(drops)) <= margin:
                return certificates, name
        return certificates, None

    def rows(
        self, timed: Mapping[str, LatencyResult], certificates: Mapping[str, Certificate] | None = None
    ) -> list[dict[str, Any]]:
        """Return a row for each system: what it is, how fast, how good."""
        rows = []
        for name in self.systems:
            row = self._figures(name)
            if (found := timed.get(name)) is not None:
                row |= {
                    "latency_ms": found.median_ms,
                    "latency_ratio": found.ratio,
                    "latency_ratio_ci": [found.ratio_low, found.ratio_high],
                }
            if (certificate := (certificates or {}).get(name)) is not None:
                row |= {
                    "certificate": certificate.status,
                    "certified": certificate.value,
                    "drop_certified": certificate.drop,
                    "drop_certified_upper": certificate.upper,
                    "n_certified": certificate.n,
                    "level_certified": certificate.level,
                    "looks_certified": certificate.looks,
                }
            rows.append(row)
        return rows


def recovered(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    recipe: Distill,
    seed: int = 0,
    cache: MutableMapping[str, Tensor] | None = None,
) -> nn.Module:
    """Train a network of any origin, in place, on what the teacher answers.

    The same data, views, schedule and number of steps as by a plan, without the hints, which need blocks in common.
    With a `cache`, the teacher is asked once for what several networks are taught.
    """
    settings = Distillation(temperature=recipe.temperature, alpha=recipe.alpha, views=recipe.views)
    answers = ({} if cache is None else cache) if recipe.views else None
    train(
        student,
        DistillationLoss(task, Teacher(teacher, answers, task.core), settings),
        lambda epoch: (
            batch for _, batch in epoch_batches(task, mix(seed, epoch % recipe.views if recipe.views else epoch))
        ),
        recipe.settings(student, task, seed=seed),
    )
    return student.eval()


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that were kept in a file, or make them and keep them."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    made = make()
    part = path.with_suffix(".part")
    part.write_text(json.dumps(made), encoding="utf-8")
    part.replace(path)
    return made


def goal(
    name: str, value: float | None, must: float | None, aim: float | None, *, better: str = "higher", unit: str = "×"
) -> dict[str, Any]:
    """Return a goal of a scenario with what was reached."""
    return {"name": name, "value": value, "must": must, "aim": aim, "better": better, "unit": unit}


def best_ratio(rows: Sequence[Mapping[str, Any]], drop: float) -> float:
    """Return the highest latency ratio among rows whose upper bound of the drop on `select` is at most `drop`.

    It is at least 1: whoever finds nothing faster keeps the unmodified model.
    """
    fitting = (row["latency_ratio"] for row in rows if (row.get("drop_select_upper95") or 0.0) <= drop)
    return max((1.0, *fitting))


def _claim(out: Path, what: Mapping[str, str]) -> None:
    """Write down what the systems in a directory are compared with, or check that it is the same."""
    file = out / CLAIM
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(what), encoding="utf-8")
    known = json.loads(file.read_text(encoding="utf-8"))
    if differing := [name for name, value in what.items() if known.get(name) != value]:
        raise StudyError(
            f"The systems in {out} were made with another {', another '.join(differing)}.",
            "remove the directory, or give another `--state`",
        )
