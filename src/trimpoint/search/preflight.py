"""What can be known before a search writes anything: whether the data of every role fits the model."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trimpoint.compress import check_finite
from trimpoint.errors import DataError, TrimpointError
from trimpoint.measure.quality import evaluate
from trimpoint.signature import flatten
from trimpoint.task import Batch, Role, Task, call

SAMPLES = 64
"""How many samples of a role are run at most."""
_WRONG = (RuntimeError, ValueError, TypeError, LookupError)


def preflight(model: nn.Module, task: Task) -> list[str]:
    """Check a model and its task, and run one batch of every role but `certify`, which only certifying runs.

    The model stays as it is, and so does the state of PyTorch's random numbers.

    Returns:
        Warnings: what a reader of the results must know.

    Raises:
        ModelError: if a weight is not finite, or an output is not a number.
        DataError: if a role is missing, empty or overlapping, or its samples do not fit the model, loss or score.
    """
    check_finite(model)
    if not task.has("select"):
        raise DataError(
            "A search needs `select` data to compare candidates on. The task has none.", "give `Task(select=...)`"
        )
    warnings = task.check()
    probe = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for role in ("select", "calibrate"):
            if task.has(role):
                _try(role, task, "the model", lambda batch: _run(probe.eval(), task, batch[0]))
        evaluate(probe, task, "select", limit=SAMPLES)
        if task.has("train") and task.has("loss"):
            _try("train", task, "the model and the loss", lambda batch: task.loss_of(probe.train(), batch))
    if not task.has("train"):
        warnings.append(
            "The task has no `train` data: nothing can be trained after a change, so little can be removed."
        )
    if not task.has("certify"):
        warnings.append("The task has no `certify` data: the chosen artifact will have no certificate.")
    return warnings


def _run(model: nn.Module, task: Task, inputs: Any) -> Any:
    if task.predict is None:
        return call(model, inputs)
    core = task.core_of(model)
    return task.predict(lambda value: call(core, value), inputs)


def _try(role: Role, task: Task, what: str, action: Callable[[Batch], Any]) -> None:
    batch = next(task.batches(role, size=min(task.batch_size, SAMPLES)))
    try:
        action(batch)
    except _WRONG as error:
        shapes = [_shapes(part) for part in batch]
        reason, hint = f"{type(error).__name__}: {error}", None
        if isinstance(error, TrimpointError):
            reason, hint = error.message.rstrip("."), error.hint
        raise DataError(
            f"The `{role}` data does not fit {what}: {reason}. It gives inputs of shape {shapes[0]} and targets of "
            f"shape {shapes[1]}.",
            hint or "check shapes, types and labels of its samples; every role must be prepared alike",
        ) from error


def _shapes(value: Any) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in flatten(value) if hasattr(leaf, "shape")) or "none"
