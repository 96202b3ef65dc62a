"""What a study is about, as one hash: it refuses a resume that would mix things."""

import hashlib
import json
from typing import Any

from torch import nn

from trimpoint.data import as_numpy
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


def parts(model: nn.Module, task: Task, target: Target, plan_data: Any) -> dict[str, str]:
    """Return name → hash of everything that a study's results depend on.

    The certification data is not read: only certifying opens it.

    Args:
        model: unmodified.
        task: its data, score and version.
        target: where it must run.
        plan_data: what else was asked for (seed, scope, recovery), as JSON data.
    """
    data = {f"`{role}` data": task.fingerprint(role) for role in ROLES if role != "certify" and task.has(role)}
    return {
        "format": str(FORMAT),
        "model": model_digest(model),
        **data,
        "score": repr(task.score),
        "task version": task.version,
        "target": json.dumps(to_data(target), sort_keys=True),
        "search settings": json.dumps(to_data(plan_data), sort_keys=True),
    }


def combined(named: dict[str, str]) -> str:
    """Return one hash of all parts."""
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
