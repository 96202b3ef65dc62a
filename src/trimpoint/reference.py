"""Objects of the user's own code by their reference, `package.module:attribute`.

This is how models and tasks are named on the command line and in a study, so that other processes can make them again.
Nothing named in a *file* that came from elsewhere is ever resolved here: references come from the user.
"""

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any, TypeVar

from trimpoint.errors import ModelError, TrimpointError, UnknownNameError, suggest

T = TypeVar("T")


def load_reference(reference: str, kind: type[T], what: str) -> T:
    """Return the object that a reference names; a callable without arguments, or a class of `kind`, is called.

    The current directory can be imported from.

    Args:
        reference: such as `"mymodule:model"`.
        kind: what it must be.
        what: it is for, in messages (`"model"`, `"task"`).

    Raises:
        UnknownNameError: if there is no such module or attribute.
        ModelError: if the user's code raises, or gives something else.
    """
    module_name, separator, attribute = reference.partition(":")
    if not separator or not module_name or not attribute or module_name.endswith(".py") or "/" in module_name:
        raise UnknownNameError(
            f"The {what} must be given as `package.module:attribute`. Got {reference!r}.", _spelling(module_name, what)
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    value: Any = _import(module_name, reference, what)
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []
            raise UnknownNameError(
                f"{module_name!r} has no attribute {part!r} ({what} {reference!r}).", suggest(part, public)
            )
        value = getattr(value, part)
    if not isinstance(value, kind) and callable(value):
        value = _call(value, reference, what)
    if not isinstance(value, kind):
        raise ModelError(
            f"The {what} {reference!r} must be a {kind.__name__}, or a callable without arguments that returns one. "
            f"Got {type(value).__name__}.",
            f"point it at the object itself: `{module_name}:NAME`",
        )
    return value


def _spelling(module_name: str, what: str) -> str:
    if module_name.endswith(".py"):
        return f"write `{module_name.removesuffix('.py').replace('/', '.')}:{what}`, without the file's ending"
    return f"write it like `mymodule:{what}` for the name `{what}` in mymodule.py"


def _import(module_name: str, reference: str, what: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UnknownNameError(
                f"There is no module {error.name!r} ({what} {reference!r}).",
                f"run this where `{error.name.split('.')[0]}` can be imported; looked in {Path.cwd()} and the "
                "installed packages",
            ) from error
        raise _broken(error, f"Importing {module_name!r}") from error
    except TrimpointError:
        raise
    except Exception as error:
        raise _broken(error, f"Importing {module_name!r}") from error


def _call(function: Any, reference: str, what: str) -> Any:
    try:
        return function()
    except TrimpointError:
        raise
    except Exception as error:
        raise _broken(error, f"Calling the {what} {reference!r}") from error


def _broken(error: Exception, doing: str) -> ModelError:
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ModelError(
        f"{doing} failed with {type(error).__name__}: {error}{at}.", "run again with --debug for the whole traceback"
    )
