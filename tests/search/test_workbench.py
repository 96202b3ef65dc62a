import pytest

from tests.end_to_end import tiny
from trimpoint.errors import StudyError
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.search.workbench import Workbench
from trimpoint.target import Target
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
