"""trimpoint finds how small and fast a trained network can get before it is no longer good enough, by measurement.

    import trimpoint as tpt

    study = tpt.search(model, tpt.Task.classification(train, val), max_drop=0.01, budget="30m", out="runs/mine")
    study.best.save("small/")

The names listed in `__all__` are the stable interface. They are imported when they are first used, so that
`import trimpoint` costs nothing and `open` and `verify` work where only NumPy and a runtime are installed.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimpoint.artifact import open_artifact as open
    from trimpoint.artifact import verify_artifact as verify
    from trimpoint.compress import compress as compress
    from trimpoint.errors import TrimpointError as TrimpointError
    from trimpoint.graph.held import baked as bake
    from trimpoint.graph.streaming import streaming as streaming
    from trimpoint.measure.profile import measure_model as measure
    from trimpoint.method import Method as Method
    from trimpoint.plan import Plan as Plan
    from trimpoint.plan import Step as Step
    from trimpoint.report import report as report
    from trimpoint.score import Score as Score
    from trimpoint.search import Frontier as Frontier
    from trimpoint.search import Study as Study
    from trimpoint.search import open_study as open_study
    from trimpoint.search import pick as pick
    from trimpoint.search import resume as resume
    from trimpoint.search import search as search
    from trimpoint.target import Goal as Goal
    from trimpoint.target import Target as Target
    from trimpoint.task import Task as Task
    from trimpoint.trust.certify import certify as certify
    from trimpoint.values import Certificate as Certificate
    from trimpoint.values import Profile as Profile

_HOMES = {
    "Certificate": "values",
    "Frontier": "search",
    "Goal": "target",
    "Method": "method",
    "Plan": "plan",
    "Profile": "values",
    "Score": "score",
    "Step": "plan",
    "Study": "search",
    "Target": "target",
    "Task": "task",
    "TrimpointError": "errors",
    "bake": "graph.held:baked",
    "certify": "trust.certify",
    "compress": "compress",
    "measure": "measure.profile:measure_model",
    "open": "artifact:open_artifact",
    "open_study": "search",
    "pick": "search",
    "report": "report",
    "resume": "search",
    "search": "search",
    "streaming": "graph.streaming",
    "verify": "artifact:verify_artifact",
}
"""Public name → the module that has it, with its name there where that is another."""

__all__ = [
    "Certificate",
    "Frontier",
    "Goal",
    "Method",
    "Plan",
    "Profile",
    "Score",
    "Step",
    "Study",
    "Target",
    "Task",
    "TrimpointError",
    "__version__",
    "bake",
    "certify",
    "compress",
    "measure",
    "open",
    "open_study",
    "pick",
    "report",
    "resume",
    "search",
    "streaming",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("trimpoint")
    if name not in _HOMES:
        raise AttributeError(f"module 'trimpoint' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    try:
        home = import_module(f"trimpoint.{module}")
    except ModuleNotFoundError as error:
        from trimpoint.extras import missing_dependency

        missing = missing_dependency(error, f"trimpoint.{name}")
        if missing is None:
            raise
        raise missing from error
    return getattr(home, attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """A module in which a verb stays a verb.

    `trimpoint.search` is a function of the public interface and also the name of the package that holds it. Importing a
    submodule sets it as an attribute of its parent, which would hide the function; here that is left out. The modules
    are imported as ever: `from trimpoint.search import record`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
