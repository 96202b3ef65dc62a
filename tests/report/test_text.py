import dataclasses
import io

from trimpoint.report.data import study_data
from trimpoint.report.html import render
from trimpoint.report.table import Table
from trimpoint.report.text import profile_table, quality_line, study_table
from trimpoint.report.words import advice_text
from trimpoint.search.record import StudyRecord
from trimpoint.values import Measurement, Profile, Trial


def test_columns_line_up_and_nothing_is_coloured(record: StudyRecord) -> None:
    stream = io.StringIO()
    study_table(record).write(stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    rule = lines[1]
    edges = [index for index in range(len(rule)) if rule[index : index + 2] == "  "]
    table = lines[2 : lines.index("")]
    assert len(table) == 2 + len(record.frontier)
    for line in table:
        padded = line.ljust(len(rule))
        assert all(padded[edge : edge + 2] == "  " for edge in edges)


def test_a_study_shows_both_references_and_the_choice(variants: dict[str, StudyRecord]) -> None:
    text = study_table(variants["finished"]).plain()
    for part in ("unmodified", "one-line int8", "drop-blocks(0.44)", "4.12×", "192 kB", "92.89 %", "passed", "Goal:"):
        assert part in text
    assert study_table(variants["finished"]).marked == {6}
    unmet = study_table(variants["goal not met"]).plain()
    assert "Nothing met the goal: file size must be at most 100 kB" in unmet
    assert "failed: no supported operator" in study_table(variants["no int8"]).plain()
    assert "not finished" in study_table(variants["unfinished"]).plain()
    assert "Nothing has been measured yet." in study_table(variants["empty"]).plain()


def test_a_study_advises_against_int8_where_no_artifact_of_it_is_faster(record: StudyRecord) -> None:
    def at(trial: Trial, value: float) -> Trial:
        speed = Measurement(value=value, unit="1", low=value - 0.02, high=value + 0.02)
        return dataclasses.replace(trial, profile=trial.profile | Profile({"latency_ratio": speed}))

    assert advice_text(record) == ""
    quantised = next(trial for trial in record.trials if trial.role == "one_line_int8")
    slow = dataclasses.replace(record, trials=(record.trials[0], at(quantised, 0.97)))
    assert advice_text(slow).startswith("int8 does not pay here: 0.97× (0.95 – 0.99) of float32's speed")
    assert f"Advice: {advice_text(slow)}." in study_table(slow).plain()
    assert study_data(slow)["advice"] == advice_text(slow)
    assert advice_text(slow).replace("'", "&#39;") in render(slow)
    alone = {"seed": 0, "steps": [{"method": "quantize-static"}]}
    better = dataclasses.replace(at(quantised, 1.4), role="candidate", plan=alone, number=2)
    assert advice_text(dataclasses.replace(slow, trials=(*slow.trials, better))) == ""
    mixed = {"seed": 0, "steps": [{"method": "drop-blocks"}, {"method": "quantize-static"}]}
    smaller = dataclasses.replace(better, plan=mixed)
    assert advice_text(dataclasses.replace(slow, trials=(*slow.trials, smaller))) == advice_text(slow)


def test_a_profile_lists_what_could_not_be_measured(record: StudyRecord) -> None:
    text = profile_table(record.trials[7].profile, ratios_to=record.trials[0].profile).plain()
    assert "0.292 ms – 0.310 ms" in text
    assert "4.12×" in text
    assert "not measured" in text
    assert "no readable energy counter" in text
    assert quality_line(record.trials[0].quality).startswith("accuracy on select: 93.12 % (95 % interval 92.4")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_same_cells_and_markup_in_them_is_text(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    Table(title="[bold]t[/bold]", columns=("a", ">b"), rows=(("[red]x[/red]", "1"),), marked=frozenset({0})).write(
        stream
    )
    assert "[red]x[/red]" in stream.getvalue()
    assert "[bold]t[/bold]" in stream.getvalue()
