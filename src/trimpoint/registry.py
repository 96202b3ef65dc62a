"""Every known method by its name: the files of `trimpoint.methods`, and those of other packages."""

import dataclasses
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from trimpoint.errors import PlanError, UnknownNameError, suggest
from trimpoint.method import Method


@cache
def all_methods() -> dict[str, type[Method]]:
    """Return every known method by name: the files of `trimpoint.methods` and the entry points of that group.

    Raises:
        PlanError: if two methods have one name.
    """
    package = importlib.import_module("trimpoint.methods")
    modules = [
        importlib.import_module(f"trimpoint.methods.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    found = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    ]
    found += [entry.load() for entry in importlib.metadata.entry_points(group="trimpoint.methods")]
    methods: dict[str, type[Method]] = {}
    for kind in found:
        if methods.setdefault(kind.method_name(), kind) is not kind:
            raise PlanError(f"Two methods are named {kind.method_name()!r}: {methods[kind.method_name()]} and {kind}.")
    return dict(sorted(methods.items()))


def make_method(name: str, params: Mapping[str, Any]) -> Method:
    """Return the method `name` with `params`; lists become tuples.

    Raises:
        UnknownNameError: if there is no such method or parameter.
        InvalidParameterError: if a value is not allowed.
    """
    methods = all_methods()
    if name not in methods:
        raise UnknownNameError(f"There is no method {name!r}.", suggest(name, list(methods)))
    known = [field.name for field in dataclasses.fields(methods[name])]
    for key in params:
        if key not in known:
            raise UnknownNameError(f"The method {name!r} has no parameter {key!r}.", suggest(key, known))
    return methods[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in params.items()})
