"""The verbs that show studies, on a study that was made up: what they print where, and how they end."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimpoint.cli import main
from trimpoint.report.data import study_data
from trimpoint.search.record import StudyRecord


@pytest.fixture
def study(record: StudyRecord, tmp_path: Path, monkeypatch):
    """Stand in for the search: `give(record)` is what it will have found; the calls it got are kept."""
    calls: list[tuple[str, tuple, dict]] = []
    found = SimpleNamespace(record=dataclasses.replace(record, directory=str(tmp_path)))

    def stand_in(name: str):
        def called(*args, **keywords):
            calls.append((name, args, keywords))
            return found

        return called

    importlib.import_module("trimpoint.search")
    for name in ("search", "resume", "open_study", "pick"):
        monkeypatch.setattr(sys.modules["trimpoint.search"], name, stand_in(name), raising=False)

    def give(**changes) -> StudyRecord:
        found.record = dataclasses.replace(found.record, **changes)
        return found.record

    return SimpleNamespace(calls=calls, give=give, record=found.record, directory=tmp_path)


SEARCH = ("search", "mymodule:model", "mymodule:task", "--out", "runs/mine")


def test_search_gets_what_was_asked_for(study, capsys) -> None:
    code = main(
        [
            *SEARCH,
            *("--max-drop", "1%", "--limit", "latency_ms=0.5x", "--limit", "file_bytes=100000"),
            *("--minimize", "file_bytes", "--budget", "10m", "--trials", "7", "--threads", "2", "--batch", "4"),
            *("--runtime", "openvino", "--seed", "3"),
        ]
    )
    assert code == 0
    name, args, keywords = study.calls[0]
    assert (name, args) == ("search", ("mymodule:model", "mymodule:task"))
    assert keywords["goal"].minimize == ("file_bytes",)
    assert dict(keywords["goal"].limits) == {"latency_ms": "0.5x", "file_bytes": 100_000.0}
    assert keywords["goal"].max_drop == "1%"
    assert (keywords["target"].runtime, keywords["target"].threads, keywords["target"].batch) == ("openvino", 2, 4)
    assert [keywords[k] for k in ("budget", "trials", "out", "seed")] == ["10m", 7, "runs/mine", 3]


def test_search_prints_data_on_stdout_and_the_rest_on_stderr(study, capsys) -> None:
    assert main([*SEARCH, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == study_data(study.record)
    assert f"report: {study.directory / 'report.html'}" in err
    assert f"artifact: {study.directory / 'best'}" in err
    assert (study.directory / "report.html").is_file()


@pytest.mark.parametrize(
    ("status", "required", "code"),
    [
        ("passed", True, 0),
        ("unproven", False, 0),
        ("unproven", True, 4),
        ("failed", False, 4),
        (None, False, 0),
        (None, True, 4),
    ],
)
def test_the_certificate_decides_the_exit_code(study, status, required: bool, code: int, capsys) -> None:
    chosen = study.record.trials[7]
    certificate = None if status is None else dataclasses.replace(chosen.certificate, status=status)
    trials = tuple(dataclasses.replace(t, certificate=certificate) if t.number == 7 else t for t in study.record.trials)
    study.give(trials=trials)
    assert main([*SEARCH, *(["--require-certificate"] if required else [])]) == code
    out, err = capsys.readouterr()
    assert "drop-blocks(0.44)" in out
    assert ("certificate" in err.replace(str(study.directory), "")) == (code == 4)


def test_a_goal_that_nothing_met_ends_with_code_3_and_the_nearest(study, capsys) -> None:
    study.give(best=None, nearest=8, binding="file size")
    assert main([*SEARCH, "--format", "json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["nearest"]["trial"] == 8
    assert "artifact:" not in err


def test_demo_searches_the_demo(study, capsys) -> None:
    assert main(["demo", "--trials", "2"]) == 0
    name, args, keywords = study.calls[0]
    assert (name, args) == ("search", ("trimpoint.demo:model", "trimpoint.demo:task"))
    assert [keywords[k] for k in ("budget", "trials", "out")] == ["10m", 2, "runs/demo"]
    assert keywords["target"].threads == 1


def test_resume_and_show(study, capsys) -> None:
    assert main(["resume", "runs/mine", "--budget", "5m"]) == 0
    assert study.calls[0][:2] == ("resume", ("runs/mine",))
    assert study.calls[0][2]["budget"] == "5m"
    capsys.readouterr()
    assert main(["show", "runs/mine", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == study_data(study.record)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (["--trial", "5"], 5),
        (["--knee"], "knee"),
        (["--limit", "file_bytes=0.1x"], {"file_bytes": pytest.approx(110_500)}),
    ],
)
def test_pick_hands_the_rule_over(study, rule: list[str], expected, capsys) -> None:
    assert main(["pick", "runs/mine", *rule]) == 0
    assert study.calls[-1][0] == "pick"
    assert study.calls[-1][1] == ("runs/mine", expected)


def test_report_prints_the_path_of_the_file(study, capsys) -> None:
    path = study.directory / "page.html"
    assert main(["report", "runs/mine", "--out", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", "runs/mine", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": (study.directory / "report.html").as_posix()}
