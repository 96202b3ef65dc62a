"""What a study is about, as one hash: it refuses a resume that would mix things."""

import ast
import dataclasses
import hashlib
import inspect
import json
import textwrap
from collections.abc import Sequence
from typing import Any

from torch import nn

from trimpoint.data import as_numpy
from trimpoint.method import Method
from trimpoint.reference import load_reference
from trimpoint.registry import all_methods
from trimpoint.target import Target
from trimpoint.task import ROLES, Task
from trimpoint.values import to_data

FORMAT = 1
"""Of studies on disk; a study of another format cannot be resumed."""


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's structure and of every parameter and buffer."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        array = as_numpy(tensor)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(array.tobytes()))
    return digest.hexdigest()


def code_digest(model: nn.Module, task: Task) -> str:
    """Return the SHA-256 of the user's own code: the model's classes, the task's functions and the score's class.

    Taken from the syntax tree, so that comments and layout do not count; what has no source counts by its name.
    """
    kinds = {type(part) for part in model.modules() if not type(part).__module__.startswith("torch.")}
    given = [task.loss, task.step, task.predict, task.collate, task.augment]
    scores = {type(task.score)} if _is_own(type(task.score)) else set()
    objects = sorted((item for item in (*kinds, *given, *scores) if item is not None), key=_name)
    return _digest(objects)


def method_code(given: Sequence[Method]) -> dict[str, str]:
    """Return name → SHA-256 of the code of others that a search runs: methods, and what parameters refer to.

    Args:
        given: methods that the search was given; those it finds by itself count where they are from other packages.
    """
    found = [kind for kind in all_methods().values() if _is_own(kind) and kind.traits.status == "stable"]
    kinds = {kind.method_name(): kind for kind in (*found, *(type(method) for method in given)) if _is_own(kind)}
    digests = {f"code of `{name}`": _digest([kind]) for name, kind in sorted(kinds.items())}
    for method in (*given, *(kind() for kind in found)):
        for field in dataclasses.fields(method):
            value = getattr(method, field.name)
            if field.metadata.get("reference") and isinstance(value, str) and ":" in value:
                named = load_reference(value, object, field.name)
                has_source = inspect.isroutine(named) or inspect.isclass(named)
                digests[f"code of `{value}`"] = _digest([named if has_source else type(named)])
    return digests


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] != "trimpoint"


def _digest(objects: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(f"{_name(item)} {_tree(item)}" for item in objects).encode()).hexdigest()


def _name(item: Any) -> str:
    return f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', type(item).__qualname__)}"


def _tree(item: Any) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(item))
    except (OSError, TypeError):
        return ""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:  # A lambda in the middle of a statement.
        return source


def parts(
    model: nn.Module, task: Task, target: Target, plan_data: Any, methods: Sequence[Method] = ()
) -> dict[str, str]:
    """Return name → hash of everything that a study's results depend on.

    The certification data is not read: only certifying opens it.

    Args:
        model: unmodified.
        task: its data, score and version.
        target: where it must run.
        plan_data: what else was asked for (seed, scope, recovery), as JSON data.
        methods: that were asked for.
    """
    data = {f"`{role}` data": task.fingerprint(role) for role in ROLES if role != "certify" and task.has(role)}
    return {
        "format": str(FORMAT),
        "model": model_digest(model),
        **data,
        "code": code_digest(model, task),
        **method_code(methods),
        "score": repr(task.score),
        "task version": task.version,
        "target": json.dumps(to_data(target), sort_keys=True),
        "search settings": json.dumps(to_data(plan_data), sort_keys=True),
    }


def combined(named: dict[str, str]) -> str:
    """Return one hash of all parts."""
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
