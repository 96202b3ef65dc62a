import pytest

from tests.search.trials import BASELINE, INT8, trial
from trimpoint.errors import InvalidParameterError, StudyError
from trimpoint.search.frontier import Frontier
from trimpoint.search.log import TrialLog
from trimpoint.search.study import Best, Study, alone, discard, goal_from, open_study, pick
from trimpoint.target import Goal, Target
from trimpoint.values import Trial, from_data, to_data

SETTINGS = {
    "model": "m:m",
    "task": "m:t",
    "score": "accuracy",
    "target": Target(),
    "goal": Goal(),
    "budget": "3 trials",
    "command": "",
    "environment": {},
    "warnings": [],
}


@pytest.fixture
def log(tmp_path):
    return TrialLog.begin(tmp_path, {**SETTINGS, "goal": to_data(Goal())})


def finish(log: TrialLog, made: Trial) -> None:
    number = log.start()
    log.finish(from_data(Trial, {**to_data(made), "number": number}))


def test_the_log_is_there_with_its_settings_or_not_at_all(tmp_path, monkeypatch):
    def breaks(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrialLog, "note", breaks)
        with pytest.raises(KeyboardInterrupt):
            TrialLog.begin(tmp_path, SETTINGS)
    with pytest.raises(StudyError, match="There is no study"):
        open_study(tmp_path)
    TrialLog.begin(tmp_path, SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["study.db"]
    assert open_study(tmp_path).record.model == "m:m"


def test_a_study_without_trials_can_be_read(log, tmp_path):
    study = Study(tmp_path)
    assert study.record.trials == ()
    assert study.record.best is None
    assert study.best is None
    assert len(study.frontier) == 0
    assert repr(study) == f"Study({tmp_path.as_posix()!r}, 0 trials, not finished: nothing is measured yet)"


def test_the_record_follows_the_trials(log, tmp_path):
    for made in (BASELINE, INT8, trial(2, latency=1.0, size=500.0, ratio=4.0, drop=0.004, upper=0.009)):
        finish(log, made)
    record = Study(tmp_path).record
    assert record.best == 2
    assert record.nearest is None
    assert record.baseline.number == 0
    assert record.one_line_int8.number == 1
    assert record.chosen.number == 2
    assert set(record.frontier) <= {0, 1, 2}
    assert "Trial 2" in record.verdict
    assert not record.finished
    log.note("picked", 1)
    assert Study(tmp_path).record.best == 1


def test_without_a_feasible_trial_the_nearest_and_the_limit_are_named(tmp_path):
    goal = Goal(limits={"latency_ms": "0.01x"})
    log = TrialLog.begin(tmp_path, {**SETTINGS, "goal": to_data(goal)})
    for made in (BASELINE, INT8):
        finish(log, made)
    record = Study(tmp_path).record
    assert record.best is None
    assert record.nearest == 1
    assert record.binding.startswith("latency_ms ≤")


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        (7, StudyError, "There is no complete trial 7"),
        (2, StudyError, "There is no complete trial 2"),
        ("elbow", InvalidParameterError, "must be a trial's number, 'knee' or limits"),
        ({"latency_ms": 0.001}, InvalidParameterError, "No trial is within"),
    ],
)
def test_rules_that_choose_nothing(log, tmp_path, rule, kind, message):
    for made in (BASELINE, INT8, trial(2, state="failed", error="it broke")):
        finish(log, made)
    with pytest.raises(kind, match=message):
        pick(tmp_path, rule)
    assert "picked" not in log.settings()


def test_one_at_a_time(tmp_path):
    with alone(tmp_path), pytest.raises(StudyError, match="Another process"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_discard_takes_only_what_a_search_made(log, tmp_path):
    (tmp_path / "store" / "entry").mkdir(parents=True)
    log.close()
    discard(tmp_path)
    assert not tmp_path.exists()
    tmp_path.mkdir()
    (tmp_path / "mine.txt").touch()
    discard(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_best_is_saved_elsewhere_once(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.onnx").write_text("x")
    best = Best(tmp_path / "best", BASELINE)
    assert (best.save(tmp_path / "copy") / "model.onnx").read_text() == "x"
    with pytest.raises(StudyError, match="is not empty"):
        best.save(tmp_path / "copy")


def test_what_a_user_types_prints_in_a_line_each(tmp_path):
    made = trial(2, latency=1.0, size=500.0, ratio=4.0, score=0.9, drop=0.0, upper=0.009)
    assert repr(made).startswith("Trial(2, ")
    assert "complete, latency_ratio 4" in repr(made)
    assert "accuracy 0.9" in repr(made)
    for value in (made, Best(tmp_path, made)):
        assert len(repr(value)) < 300
        assert "\n" not in repr(value)
    frontier = Frontier.of([BASELINE, INT8, made], ("latency_ms", "file_bytes"))
    assert len(repr(frontier).splitlines()) == len(frontier) + 1
    assert from_data(Trial, to_data(made)) == made


def test_goals_come_back():
    goal = Goal(minimize=("file_bytes",), limits={"latency_ms": "0.5x"}, max_drop="1%")
    assert goal_from(to_data(goal)) == goal
