"""The batches that a model is exported, timed and checked with: what its core receives, at the task's own shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trimpoint.data import as_numpy, as_tensors
from trimpoint.errors import DataError, ModelError
from trimpoint.measure.static import evaluating
from trimpoint.signature import BATCH, flatten, leaf_names, structure_of, unflatten
from trimpoint.target import Target
from trimpoint.task import Task, call


@dataclass(frozen=True, kw_only=True)
class CoreInputs:
    """What the exported part of a model takes.

    Args:
        example: one batch of tensors, in the core's own structure.
        dims: input name → {dimension: name}, for the exporter.
        shapes: name of the shape (`""` where there is only one, else `"length=32"`) → one batch of NumPy arrays with
            the target's batch size.
    """

    example: Any
    dims: dict[str, dict[int, str]]
    shapes: dict[str, Any]

    @property
    def middle(self) -> str:
        """Name of the median shape."""
        return list(self.shapes)[len(self.shapes) // 2]


def core_inputs(model: nn.Module, task: Task, target: Target) -> CoreInputs:
    """Return what a model's core takes, at every shape to measure.

    Dimensions that vary in the data are brought to each length by repeating or cutting the example along them, so
    that no padding distorts a comparison. Where `task.predict` surrounds the core, its first call of the core shows
    what that takes.

    Args:
        model: the whole model.
        task: gives data or an example.
        target: gives batch size and, where set, the lengths.

    Raises:
        DataError: if there is neither data nor an example, or the target names a dimension that does not exist.
    """
    example = capture(model, task, task.example_batch(2))
    dims = core_dims(task, example)
    lengths = {**_lengths(task, dims), **target.lengths}
    known = {name for entry in dims.values() for name in entry.values()} - {BATCH}
    if unknown := sorted(set(target.lengths) - known):
        raise DataError(
            f"The target gives lengths for the dimension {unknown[0]!r}, but what varies in the model's inputs is: "
            f"{', '.join(sorted(known)) or 'nothing'}.",
            "name it with `Task(dims={input: {dimension: name}})`",
        )
    batch = as_numpy(capture(model, task, task.example_batch(target.batch)))
    count = max((len(sizes) for sizes in lengths.values()), default=1)
    shapes: dict[str, Any] = {}
    for index in range(count):
        sizes = {name: values[min(index, len(values) - 1)] for name, values in lengths.items()}
        shapes[",".join(f"{name}={size}" for name, size in sizes.items())] = resized(batch, dims, sizes)
    return CoreInputs(example=example, dims=dims, shapes=shapes)


def core_dims(task: Task, example: Any) -> dict[str, dict[int, str]]:
    """Return the named dynamic dimensions of the core's inputs; behind a `predict`, only what the task names."""
    if task.predict is None and task.core is None:
        return task.dynamic_dims()
    given = task.dims or {}
    return {name: {0: BATCH} | dict(given.get(name, {})) for name in leaf_names(example, "input")}


def capture(model: nn.Module, task: Task, inputs: Any) -> Any:
    """Return the inputs that the core receives when the task runs on `inputs`: themselves, or what `predict` passes on.

    Raises:
        ModelError: if `predict` never calls the core.
    """
    if task.predict is None:
        return inputs
    core, seen = task.core_of(model), []

    def run(value: Any) -> Any:
        seen.append(value)
        return call(core, value)

    with evaluating(model), torch.inference_mode():
        task.predict(run, inputs)
    if not seen:
        raise ModelError("`Task.predict` never called the core of the model.", "it must call `run(inputs)`")
    return as_tensors(as_numpy(seen[0]))


def resized(batch: Any, dims: Mapping[str, Mapping[int, str]], sizes: Mapping[str, int]) -> Any:
    """Return arrays with their named dimensions brought to `sizes`, by repeating or cutting."""
    leaves = []
    for name, leaf in zip(leaf_names(batch, "input"), flatten(batch), strict=True):
        array = np.asarray(leaf)
        for dim, label in dims.get(name, {}).items():
            if label in sizes:
                array = np.take(array, np.arange(sizes[label]) % array.shape[dim], axis=dim)
        leaves.append(np.ascontiguousarray(array))
    return unflatten(structure_of(batch), leaves)


def synthetic_like(batch: Any, seed: int = 0) -> Any:
    """Return random arrays that a model takes in place of `batch`, without any of its content.

    Floating-point values are normal with the mean and deviation of the tensor; integers are uniform between its
    smallest and largest value, so that indices stay valid and masks of ones stay ones.

    Args:
        batch: NumPy arrays in the module's structure.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    leaves = []
    for leaf in flatten(batch):
        array = np.asarray(leaf)
        if array.dtype.kind == "f":
            drawn = rng.normal(array.mean() if array.size else 0, array.std() if array.size else 1, array.shape)
            leaves.append(drawn.astype(array.dtype))
        elif array.dtype.kind in "iu" and array.size:
            leaves.append(rng.integers(array.min(), array.max(), array.shape, array.dtype, endpoint=True))
        else:
            leaves.append(np.full_like(array, bool(array.all()) if array.size else True))
    return unflatten(structure_of(batch), leaves)


def _lengths(task: Task, dims: Mapping[str, Mapping[int, str]]) -> dict[str, tuple[int, ...]]:
    if task.predict is not None and not set(task.dims or {}) <= set(leaf_names(task.example_batch(), "input")):
        return {}  # the dimensions are those of what `predict` hands on, of which the data says nothing
    known = {name for entry in dims.values() for name in entry.values()}
    return {name: sizes for name, sizes in task.lengths().items() if name in known}
