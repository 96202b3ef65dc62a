"""Which extra brings a package that is not installed: the line between the light half and the full one.

`pip install trimpoint` brings what opens and verifies artifacts. What makes them imports more, in the function that
needs it; where that is missing, the error says what to install.
"""

from trimpoint.errors import MissingDependencyError

EXTRAS = {
    "openvino": "openvino",
    "nncf": "openvino",
    "executorch": "executorch",
    "torchao": "executorch",
} | dict.fromkeys(
    ("filelock", "jinja2", "onnx", "onnxscript", "optuna", "psutil", "rich", "scipy", "sqlalchemy", "tomli_w", "torch"),
    "full",
)
"""Top-level module → extra."""


def missing_dependency(error: ModuleNotFoundError, what: str) -> MissingDependencyError | None:
    """Return the error that says what to install, or `None` where the missing module belongs to no extra.

    Args:
        error: as it was raised by an import.
        what: needs the module, in the message.

    Example:
        >>> missing_dependency(ModuleNotFoundError(name="torch.nn"), "trimpoint.search").hint
        'pip install "trimpoint[full]"'
    """
    module = (error.name or "").split(".")[0]
    if module not in EXTRAS:
        return None
    return MissingDependencyError(
        f"{what} needs the package {module!r}, which is not installed.", f'pip install "trimpoint[{EXTRAS[module]}]"'
    )
