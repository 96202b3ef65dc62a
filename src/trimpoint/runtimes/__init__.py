"""The inference runtimes that models are lowered to, measured in and shipped for. One runtime is one file."""

from importlib import import_module
from typing import TYPE_CHECKING, cast

from trimpoint.errors import UnknownNameError, suggest

if TYPE_CHECKING:
    from trimpoint.runtimes.base import Runtime

_CLASSES = {"onnxruntime": "OnnxRuntime", "openvino": "OpenVino", "executorch": "Executorch"}


def runtime_names() -> tuple[str, ...]:
    """Return the names of all runtimes, the reference first.

    Example:
        >>> runtime_names()
        ('onnxruntime', 'openvino', 'executorch')
    """
    return tuple(_CLASSES)


def get_runtime(name: str) -> "Runtime":
    """Return the runtime called `name`. Whether it is installed shows when it is used.

    Raises:
        UnknownNameError: if there is no such runtime.

    Example:
        >>> get_runtime("onnxruntime").name
        'onnxruntime'
    """
    if name not in _CLASSES:
        raise UnknownNameError(f"There is no runtime {name!r}.", suggest(name, runtime_names()))
    return cast("Runtime", getattr(import_module(f"trimpoint.runtimes.{name}"), _CLASSES[name])())
