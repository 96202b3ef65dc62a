"""A lowered model as one coded file: what its runtime loads, and what is needed to call it."""

import json
from dataclasses import replace
from pathlib import Path

from trimpoint.coding.container import Contents, Step
from trimpoint.coding.entropy import DAMAGED
from trimpoint.coding.writing import write_coded
from trimpoint.errors import ArtifactError, TrimpointError
from trimpoint.runtimes.base import Lowered
from trimpoint.values import from_data, to_data


def code_model(
    destination: Path, directory: Path, lowered: Lowered, on_step: Step = lambda _done, _total: None
) -> Contents:
    """Write the files that a runtime loads, and the signature, into one coded file.

    Args:
        destination: of the coded file.
        directory: holds the runtime's files.
        lowered: names them. What tells where they came from (`scopes`, `unmapped`) is left out.
        on_step: told of the progress.

    Raises:
        MissingDependencyError: if the entropy coder is not installed.
    """
    names = sorted({name for files in lowered.files.values() for name in files})
    data = to_data(replace(lowered, scopes={}, unmapped=()))
    shipped = {key: value for key, value in data.items() if value}
    about = json.dumps(shipped, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return write_coded(destination, about, {name: directory / name for name in names}, on_step)


def coded_model(contents: Contents) -> Lowered | None:
    """Return what a coded file says of its model, `None` where it is a whole artifact, whose manifest says it.

    Raises:
        ArtifactError: if it says something else.
    """
    if not contents.about:
        return None
    try:
        lowered = from_data(Lowered, json.loads(contents.about.decode("utf-8")))
    except (ValueError, TrimpointError, TypeError, KeyError) as error:
        raise ArtifactError(f"The coded file does not describe a model: {error}.", DAMAGED) from error
    if {name for files in lowered.files.values() for name in files} != set(contents.files):
        raise ArtifactError("The coded file must hold exactly the files of its model.", DAMAGED)
    return lowered
