"""What a study found: text and HTML for people, JSON for machines. Data is computed first, rendered second."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimpoint.search import Study

__all__ = ["report"]


def report(study: "Study | str | os.PathLike[str]", path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a study as one HTML file that opens offline.

    Args:
        study: a study, or its directory.
        path: of the file; `report.html` in the study's directory by default.

    Returns:
        The path.

    Raises:
        StudyError: if the directory holds no study.
        StorageError: if the file cannot be written.
    """
    from trimpoint.report.html import write_report

    if isinstance(study, (str, os.PathLike)):
        from trimpoint.search import open_study

        study = open_study(Path(study))
    record = study.record
    return write_report(record, Path(record.directory) / "report.html" if path is None else path)
