"""Results on standard output, as a table or as JSON."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimpoint.report.table import Table


def write_json(data: Any) -> None:
    """Write JSON data with a final newline."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(*tables: "Table") -> None:
    """Write tables with a blank line between them."""
    for index, table in enumerate(tables):
        if index:
            sys.stdout.write("\n")
        table.write(sys.stdout)


def note(text: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(text + "\n")
