from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.end_to_end import tiny
from trimpoint.build import Build
from trimpoint.errors import StudyError
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.search.workbench import Workbench
from trimpoint.target import Target
from trimpoint.task import Task, cross_entropy
from trimpoint.values import Trial


def blank(number: int, plan: Plan, role: str) -> Trial:
    return Trial(number=number, plan=plan.to_data(), plan_hash=plan.hash, rung=0, state="running", role=role)


def test_a_task_without_select_data_is_measured_without_quality(tmp_path):
    task, plan = tiny.task().with_(select=None), Plan((Step(QuantizeStatic()),))
    bench = Workbench(tiny.untrained(), task, Target(), tmp_path, "test")
    with pytest.raises(StudyError, match="before the baseline"), tiny.replayed():
        bench.shape(plan)
    with tiny.replayed():
        baseline = bench.baseline(blank(0, Plan(), "baseline"))
        bench.use_baseline(baseline)
        made = bench.candidate(blank(1, plan, "candidate"), plan, 1.0)
        kept = {path: path.stat().st_mtime_ns for path in bench.store.root.rglob("*") if path.is_file()}
        again = bench.candidate(blank(1, plan, "candidate"), plan, 1.0)
    for trial in (baseline, made):
        assert trial.quality is None
        assert trial.profile.missing["accuracy[select]"] == "the task has no `select` data"
    assert made.profile["file_bytes"].value < baseline.profile["file_bytes"].value
    assert again == made
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


@pytest.mark.parametrize(
    ("baselines", "timings", "noted"), [([1.0], 1, False), ([1.3, 1.05], 2, False), ([1.4, 1.2, 1.3], 3, True)]
)
def test_a_candidate_is_timed_again_while_the_machine_is_busy(tmp_path, monkeypatch, baselines, timings, noted):
    from trimpoint.search import workbench

    task, plan = tiny.task().with_(select=None), Plan((Step(QuantizeStatic()),))
    bench = Workbench(tiny.untrained(), task, Target(), tmp_path, "test")
    with tiny.replayed():
        baseline = bench.baseline(blank(0, Plan(), "baseline"))
        bench.use_baseline(baseline)
        replayed, quiet, calls = workbench.measure_latency, baseline.profile["latency_ms"].value, []

        def busy(*args, **options):
            factor = baselines[len(calls)]
            calls.append(factor)
            timed = replayed(*args, **options)
            return {
                name: {shape: replace(r, median_ms=quiet * factor, ratio=1 / factor) for shape, r in shapes.items()}
                for name, shapes in timed.items()
            }

        monkeypatch.setattr(workbench, "measure_latency", busy)
        made = bench.candidate(blank(1, plan, "candidate"), plan, 1.0)
    assert len(calls) == timings
    assert made.profile["latency_ratio"].value == pytest.approx(1 / min(baselines))
    assert any("busy machine" in note for note in made.profile.notes) is noted


def test_the_store_keeps_to_its_limit_but_never_loses_what_a_trial_needs(tmp_path):
    task, plan = tiny.task().with_(select=None), Plan((Step(QuantizeStatic()),))
    bench = Workbench(tiny.untrained(), task, Target(), tmp_path, "test")
    with tiny.replayed():
        baseline = bench.baseline(blank(0, Plan(), "baseline"))
        bench.use_baseline(baseline)
        made = bench.candidate(blank(1, plan, "candidate"), plan, 1.0)
        whole = {path.name for path in bench.store.root.iterdir()}
        bench.trim([baseline, made])
        assert {path.name for path in bench.store.root.iterdir()} == whole
        bench.store.limit_bytes = 0
        bench.trim([baseline, made])
        left = {path.name for path in bench.store.root.iterdir()}
        assert left < whole
        assert {Path(baseline.artifact).name, Path(made.artifact).name} < left
        assert bench.candidate(blank(1, plan, "candidate"), plan, 1.0) == made
        assert {path.name for path in bench.store.root.iterdir()} == left


def test_the_forecast_of_a_score_without_a_proportion_has_the_certificates_allowance(tmp_path):
    from trimpoint.measure.quality import forecast_upper
    from trimpoint.score import F1
    from trimpoint.trust.bounds import resampled_upper

    task = tiny.task().with_(score=F1())
    bench = Workbench(tiny.untrained(), task, Target(), tmp_path, "test")
    plan = Plan((Step(QuantizeStatic()),))
    with tiny.replayed():
        baseline = bench.baseline(blank(0, Plan(), "baseline"))
        bench.use_baseline(baseline)
        made = bench.candidate(blank(1, plan, "candidate"), plan, 1.0)
    reference = bench._baseline[1]
    records = np.load(tmp_path / made.artifact / "records.npy", allow_pickle=False)
    n, m = len(task.data("certify")), len(task.data("select"))
    unseen = resampled_upper(task.score, reference.records, records)[2]
    assert unseen > 0
    assert made.quality.drop_forecast == pytest.approx(forecast_upper(made.quality, n) + unseen * m / n)


class Branching(nn.Module):
    """Look at its data before it runs its core, which is all that is exported."""

    def __init__(self):
        super().__init__()
        self.core = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return self.core(x if x.sum().item() > 0 else -x)


def test_the_parts_of_a_core_are_told_with_the_paths_of_the_whole_model(tmp_path):
    data = [(torch.ones(8), 0)] * 8
    predict = lambda run, inputs: run(inputs)  # noqa: E731
    task = Task(calibrate=data, select=data, loss=cross_entropy, core="core", predict=predict)
    bench = Workbench(Branching().eval(), task, Target(), tmp_path, "test")
    assert [group.name for group in bench.groups()] == ["core.0"]
    with tiny.replayed():
        bench.use_baseline(bench.baseline(blank(0, Plan(), "baseline")))
        modules = {operator.module for operator in bench.operators(Plan())}
    assert {"core.0", "core.2"} <= modules


def test_a_core_that_is_one_layer_has_groups():
    model = nn.ModuleDict({"core": nn.LSTM(4, 8, batch_first=True)}).eval()
    task = Task(example=torch.zeros(3, 4), core="core", predict=lambda run, inputs: run(inputs))
    build = Build(module=model, given=model, task=task)
    build.core = lambda: (model["core"], torch.zeros(2, 3, 4), "core.")
    assert {member.path for group in build.groups() for member in group.members} == {"core"}
