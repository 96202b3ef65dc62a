"""Tables as data, written with colour to a terminal and as plain aligned text everywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under headings.

    Args:
        title: above the table; none if empty.
        columns: the headings; one that begins with `>` is aligned to the right.
        rows: as many cells in each as there are columns.
        marked: indices of the rows to stand out.
        notes: lines below the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    marked: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def plain(self) -> str:
        """Return the table as aligned text without colour, lines never broken."""
        heads = [column.removeprefix(">") for column in self.columns]
        cells = [heads, *[[cell.replace("\n", " ") for cell in row] for row in self.rows]]
        widths = [max(len(row[index]) for row in cells) for index in range(len(heads))]
        lines = [self._line(row, widths) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*([self.title, ""] if self.title else []), *lines, *self.notes]) + "\n"

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        pairs = zip(self.columns, row, widths, strict=True)
        return "  ".join(cell.rjust(w) if head.startswith(">") else cell.ljust(w) for head, cell, w in pairs).rstrip()

    def write(self, stream: TextIO) -> None:
        """Write the table, with rich where `stream` is a terminal and rich is installed."""
        if not stream.isatty():
            stream.write(self.plain())
            return
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table as RichTable
        except ImportError:
            stream.write(self.plain())
            return
        table = RichTable(title=escape(self.title) or None, title_justify="left", header_style="bold")
        for column in self.columns:
            table.add_column(
                escape(column.removeprefix(">")),
                justify="right" if column.startswith(">") else "left",
                overflow="fold",
            )
        for index, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="bold green" if index in self.marked else None)
        console = Console(file=stream)
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)


def pairs(items: Sequence[tuple[str, str]], title: str = "") -> Table:
    """Return a table of names and values."""
    return Table(title=title, columns=("name", "value"), rows=tuple(items))
