"""Every exception that trimpoint raises on purpose.

Each says what is wrong, what was expected and what was received; a `hint` says what to do about it.
"""


class TrimpointError(Exception):
    """Base of all errors of this package.

    Args:
        message: what is wrong, what was expected, what was received.
        hint: what to do about it, shown on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class InvalidParameterError(TrimpointError, ValueError):
    """A parameter is outside of what its declaration allows."""


class UnknownNameError(TrimpointError, LookupError):
    """A name (method, key, metric, module path, runtime) that nothing here has."""


class PlanError(TrimpointError, ValueError):
    """A plan whose steps cannot follow each other, or a recipe that is not one."""


class DataError(TrimpointError, ValueError):
    """Data that cannot be used: empty, overlapping, of the wrong shape, not finite, changed since it was hashed."""


class ModelError(TrimpointError, ValueError):
    """A model that cannot be used as it is: weights that are not finite, outputs that do not fit the task."""


class MissingDependencyError(TrimpointError, ImportError):
    """A package that this operation needs is not installed."""


class ExportError(TrimpointError, RuntimeError):
    """A model, or one of its operators, cannot be exported."""


class TraceError(TrimpointError, RuntimeError):
    """A model whose structure could not be traced."""


class SurgeryError(TrimpointError, RuntimeError):
    """A structural edit that would leave a model that does not run."""


class LoweringError(TrimpointError, RuntimeError):
    """A runtime could not realise an exported model."""


class ParityError(TrimpointError, RuntimeError):
    """A lowered model does not give the answers of the module that it came from."""


class MeasurementError(TrimpointError, RuntimeError):
    """A measurement that did not come to an end or cannot be trusted."""


class TrainingError(TrimpointError, RuntimeError):
    """Training that went wrong, such as a loss that is not finite."""


class ArtifactError(TrimpointError, ValueError):
    """A directory that is not a sound artifact."""


class StudyError(TrimpointError, RuntimeError):
    """A study that cannot be opened, resumed or continued."""


class StorageError(TrimpointError, OSError):
    """Something could not be written: a full disk, missing permission. Nothing half-written is left."""


def not_finite_at(path: str) -> DataError:
    """Return the error of calibration data that leads to NaN or infinity where a layer reads."""
    return DataError(
        f"The calibration data leads to values that are not finite at the input of `{path}`.",
        "check it for outliers and NaNs",
    )


def suggest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return a hint that names the entries of `known` nearest to `name`, or all of them when none is near.

    Example:
        >>> suggest("ratoi", ["ratio", "where"])
        'did you mean `ratio`?'
    """
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else "known are: " + ", ".join(f"`{entry}`" for entry in sorted(known))
