import io

from trimpoint.report.table import Table
from trimpoint.report.text import profile_table, quality_line, study_table
from trimpoint.search.record import StudyRecord


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
