import io

import pytest

from trimpoint.progress import SILENT, Progress
from trimpoint.report.progress import LineProgress, LiveProgress, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(progress: Progress) -> None:
    progress.phase("baseline")
    for share in (0.0, 0.5, 1.0):
        progress.update(text="trial [3]", fraction=share, best="2.1× faster", seconds_left=75.0)
    progress.phase("search")
    progress.update(text="trial 4", fraction=None, seconds_left=None)
    progress.message("one-line int8: [bold]2.2×[/bold] faster")


def test_a_log_gets_one_line_per_phase_and_message() -> None:
    stream = io.StringIO()
    with show_progress(stream) as progress:
        assert isinstance(progress, LineProgress)
        work(progress)
    assert stream.getvalue() == "baseline …\nsearch …\none-line int8: [bold]2.2×[/bold] faster\n"


def test_a_terminal_gets_the_best_so_far_and_the_time_left(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with show_progress(stream) as progress:
        assert isinstance(progress, LiveProgress)
        progress.phase("baseline")
        progress.update(text="trial [3]", fraction=0.5, best="2.1× faster", seconds_left=75.0)
        progress._bar.refresh()
        shown = stream.getvalue()
        work(progress)
    for part in ("baseline", "trial [3]", "best: 2.1× faster", "1 min 15 s left"):
        assert part in shown
    assert "[bold]2.2×[/bold]" in stream.getvalue()


def test_quiet_is_silent() -> None:
    stream = Terminal()
    with show_progress(stream, quiet=True) as progress:
        work(progress)
    assert stream.getvalue() == ""
    assert progress is SILENT


@pytest.mark.parametrize("kind", [LineProgress, LiveProgress, type(SILENT)])
def test_every_kind_has_the_whole_protocol(kind: type) -> None:
    assert issubclass(kind, Progress)
