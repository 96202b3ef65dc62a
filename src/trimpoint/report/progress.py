"""Progress on stderr: a live line on a terminal, at most one line per phase elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from trimpoint.progress import Progress
from trimpoint.report.words import seconds_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class LineProgress:
    """A `Progress` for logs: one line per phase and per message.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def phase(self, name: str) -> None:
        """Write the name of the phase."""
        self.message(f"{name} …")

    def update(
        self, text: str = "", fraction: float | None = None, best: str = "", seconds_left: float | None = None
    ) -> None:
        """Write nothing."""

    def message(self, text: str) -> None:
        """Write one line."""
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveProgress:
    """A `Progress` for a terminal: the phase, a bar, the best so far and the time left, on one line.

    Args:
        bar: of rich, already started.
    """

    def __init__(self, bar: "Bar") -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, detail="", best="", left="")

    def phase(self, name: str) -> None:
        """Show a new phase, its bar empty; the best so far stays."""
        self._bar.reset(self._task, total=None, description=name)
        self._bar.update(self._task, detail="", left="")

    def update(
        self, text: str = "", fraction: float | None = None, best: str = "", seconds_left: float | None = None
    ) -> None:
        """Show where the phase stands."""
        shown: dict[str, Any] = {"detail": text}
        if best:
            shown["best"] = f"best: {best}"
        shown["left"] = "" if seconds_left is None else f"{seconds_text(max(seconds_left, 0.0))} left"
        self._bar.update(
            self._task,
            total=None if fraction is None else 1.0,
            completed=0.0 if fraction is None else min(max(fraction, 0.0), 1.0),
            **shown,
        )

    def message(self, text: str) -> None:
        """Write one line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)


@contextmanager
def show_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Iterator[Progress]:
    """Give a `Progress` that fits `stream`, and clear its line at the end.

    Args:
        stream: standard error by default.
        quiet: show nothing at all.
    """
    from trimpoint.progress import SILENT

    stream = sys.stderr if stream is None else stream
    if quiet:
        yield SILENT
        return
    if not stream.isatty():
        yield LineProgress(stream)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield LineProgress(stream)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}", markup=False),
        TextColumn("{task.fields[best]}", style="green", markup=False),
        TextColumn("{task.fields[left]}", style="dim", markup=False),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        yield LiveProgress(bar)
