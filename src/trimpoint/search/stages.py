"""Intermediate results on disk: what a plan's prefix made of the model, written once and read back exactly."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trimpoint.compress import Compressed
from trimpoint.errors import StudyError
from trimpoint.graph import rebuild, save_structure
from trimpoint.graph.surgery import edits_from_data, edits_to_data
from trimpoint.method import Fact
from trimpoint.plan import Plan
from trimpoint.values import Change, Format, from_data, to_data

FILE = "stage.json"


def save_stage(made: Compressed, directory: Path, seconds: float) -> None:
    """Write a compressed model: weights and edits, formats, changes, and how long it took to make."""
    save_structure(directory / "rebuild", made.module, made.edits)
    data = {
        "plan": made.plan.to_data(),
        "effort": made.effort,
        "seconds": seconds,
        "changes": made.changes,
        "edits": edits_to_data(made.edits),
        "formats": made.formats,
        "origins": made.origins,
        "facts": {path: fact.value for path, fact in made.facts.items()},
    }
    (directory / FILE).write_text(json.dumps(to_data(data)), encoding="utf-8")


def load_stage(directory: Path, model: nn.Module, plan: Plan) -> Compressed:
    """Read a compressed model back.

    Args:
        directory: written by `save_stage`.
        model: the unmodified model, from whose copy it is rebuilt.
        plan: that it must come from.

    Raises:
        StudyError: if it comes from another plan.
    """
    data = stage_data(directory)
    if data["plan"] != to_data(plan.to_data()):
        raise StudyError(f"The stage in {directory} comes from another plan.", "remove it, it will be made again")
    return Compressed(
        module=rebuild(directory / "rebuild", lambda: copy.deepcopy(model)).eval(),
        plan=plan,
        changes=tuple(from_data(Change, change) for change in data["changes"]),
        edits=tuple(edits_from_data(data["edits"])),
        formats={
            path: {name: from_data(Format, f) for name, f in kinds.items()} for path, kinds in data["formats"].items()
        },
        origins=data["origins"],
        facts={path: Fact(value) for path, value in data["facts"].items()},
        effort=data["effort"],
    )


def stage_data(directory: Path) -> Mapping[str, Any]:
    """Return what is noted beside the weights of a stage."""
    data = json.loads((directory / FILE).read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}
