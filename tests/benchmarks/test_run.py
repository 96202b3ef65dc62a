"""The benchmark runner: discovery, resuming, the result file, the verdict."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trimpoint.errors import DataError, UnknownNameError

ROOT = Path(__file__).parents[2]
GOAL = {"name": "speed", "value": 4.0, "must": 3.0, "aim": 5.0, "better": "higher", "unit": "×"}
SCENARIO = """
QUESTION = "does it count?"

def run(resume_dir):
    done = resume_dir / "done"
    done.write_text(done.read_text() + "x" if done.exists() else "x")
    if len(done.read_text()) < 2:
        raise KeyboardInterrupt
    return {"rows": [{"system": "it", "count": len(done.read_text())}], "goals": [GOAL]}
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.run")


@pytest.fixture
def planted(runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A scratch `benchmarks/scenarios` with one scenario, `counting`, that is cut off the first time."""
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "counting.py").write_text(SCENARIO.replace("GOAL", repr(GOAL)))
    (tmp_path / "scenarios" / "_shared.py").write_text("")
    monkeypatch.setattr(runner, "HERE", tmp_path)
    scenarios = ModuleType("benchmarks.scenarios")
    scenarios.__path__ = [str(tmp_path / "scenarios")]
    monkeypatch.setitem(sys.modules, "benchmarks.scenarios", scenarios)
    yield tmp_path
    sys.modules.pop("benchmarks.scenarios.counting", None)


def test_a_scenario_that_was_cut_off_goes_on(
    runner: ModuleType, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["counting", "--state", str(planted / "state"), "--results", str(planted / "results")]
    with pytest.raises(KeyboardInterrupt):
        runner.main(command)
    assert not (planted / "results").exists()
    assert runner.main(command) == 0
    result = json.loads((planted / "results" / "counting.json").read_text())
    assert list(result) == ["scenario", "question", "seconds", "environment", "rows", "goals"]
    assert result["rows"] == [{"system": "it", "count": 2}]
    assert result["environment"]["versions"]["onnxruntime"]
    assert {"cpu", "cores", "threads", "commit", "load"} <= set(result["environment"])
    assert list((planted / "results").iterdir()) == [planted / "results" / "counting.json"]
    assert "must    speed: 4 × (must 3.0, aim 5.0)" in capsys.readouterr().out


def test_without_a_name_all_are_run(runner: ModuleType, planted: Path) -> None:
    assert runner.scenario_names() == ["counting"]
    with pytest.raises(UnknownNameError, match="no scenario 'couting'") as caught:
        runner.main(["couting"])
    assert caught.value.hint == "did you mean `counting`?"


@pytest.mark.parametrize(
    ("better", "value", "expected"),
    [
        ("higher", 5.0, "aim"),
        ("higher", 3.0, "must"),
        ("higher", 2.9, "missed"),
        ("higher", None, "missed"),
        ("higher", float("nan"), "missed"),
        ("lower", 3.0, "aim"),
        ("lower", 5.1, "missed"),
    ],
)
def test_verdict(runner: ModuleType, better: str, value: float | None, expected: str) -> None:
    must, aim = (3.0, 5.0) if better == "higher" else (5.0, 3.0)
    assert runner.verdict(GOAL | {"better": better, "value": value, "must": must, "aim": aim}) == expected


@pytest.mark.parametrize(
    ("value", "aim", "expected"), [(5.0, 5.0, "aim"), (4.9, 5.0, "short"), (4.9, None, "–"), (None, 5.0, "missed")]
)
def test_a_goal_without_a_must(runner: ModuleType, value: float | None, aim: float | None, expected: str) -> None:
    assert runner.verdict(GOAL | {"value": value, "must": None, "aim": aim}) == expected


def test_what_is_short_of_its_aim_alone_is_shown_and_is_no_failure(
    runner: ModuleType, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = GOAL | {"must": None}
    (planted / "scenarios" / "counting.py").write_text(
        'QUESTION = "does it count?"\n\n'
        f'def run(resume_dir):\n    return {{"rows": [{{"system": "it"}}], "goals": [{short!r}]}}\n'
    )
    assert runner.main(["counting", "--state", str(planted / "state"), "--results", str(planted / "results")]) == 0
    shown = capsys.readouterr()
    assert "short   speed: 4 × (must –, aim 5.0)" in shown.out
    assert "0 goals missed" in shown.err


def test_a_result_that_is_none_names_every_problem(runner: ModuleType) -> None:
    with pytest.raises(DataError) as caught:
        runner.check_result("x", {"rows": [{"latency_ms": 1}], "goals": [{"name": "a"}, GOAL | {"better": "more"}]})
    for part in ("row 0 names no `system`", "goal 'a' lacks aim, better, must, unit, value", "Got 'more'"):
        assert part in str(caught.value)


def test_a_scenario_can_make_a_page(runner: ModuleType, planted: Path) -> None:
    paged = SCENARIO.replace("GOAL", repr(GOAL)).replace("    if len(done", "    if False and len(done")
    paged += (
        "\nPAGE = 'paged.md'\n\ndef page(result):\n    return f'{result[\"scenario\"]}: {len(result[\"rows\"])} row'\n"
    )
    (planted / "scenarios" / "paged.py").write_text(paged)
    places = [f"--{name}={planted / name}" for name in ("state", "results", "pages")]
    assert runner.main(["paged", *places]) == 0
    assert (planted / "pages" / "paged.md").read_text() == "paged: 1 row"
    assert (planted / "results" / "paged.json").exists()


def test_pages_are_those_of_the_committed_results(runner: ModuleType) -> None:
    for name in runner.scenario_names():
        scenario, result = runner.load(name), ROOT / "benchmarks" / "results" / f"{name}.json"
        if hasattr(scenario, "PAGE") and result.exists():
            page = scenario.page(json.loads(result.read_text()))
            assert (ROOT / "docs" / "reference" / scenario.PAGE).read_text() == page


def test_the_scenarios_here_have_a_question_and_a_run(runner: ModuleType) -> None:
    for name in runner.scenario_names():
        scenario = runner.load(name)
        assert scenario.QUESTION.endswith("?")
        assert callable(scenario.run)


def test_committed_results_answer_the_questions_that_are_asked_now(runner: ModuleType) -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        if file.stem in runner.scenario_names():
            assert json.loads(file.read_text())["question"] == runner.load(file.stem).QUESTION


def test_the_page_of_criteria_ranks_them_against_chance(runner: ModuleType) -> None:
    scenario = runner.load("importance")
    rows = [{"system": "unmodified", "select": 0.9491}]
    for ratio in scenario.RATIOS:
        for name, values in (("taylor", [0.94, 0.93, 0.95]), ("random", [0.92, 0.91, 0.9]), ("l1", [0.91, 0.92, 0.93])):
            by_seed = {"pruned_by_seed": [0.5], "settled_by_seed": [0.8], "recovered_by_seed": values}
            means = {"pruned": 0.5, "settled": 0.8, "recovered": sum(values) / 3}
            rows.append({"system": name, "importance": name, "ratio": ratio, **means, **by_seed})
    page = scenario.page({"rows": rows})
    assert "94.91" in page
    assert page.count("| taylor | 50.00 | 80.00 | 94.00 (93.00–95.00) | +3.00 |") == len(scenario.RATIOS)
    assert "| random | 50.00 | 80.00 | 91.00 (90.00–92.00) | +0.00 |" in page
    assert "At 25 % every seed of taylor beats every random draw after recovery." in page
