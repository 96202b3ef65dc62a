"""Apply a method to a model of the zoo, once for all the checks that only look at the result."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimpoint.compress import Compressed, compress
from trimpoint.data import hash_samples
from trimpoint.filters import EVERYTHING, Filter
from trimpoint.measure.static import evaluating
from trimpoint.method import Method
from trimpoint.plan import Plan, Step
from trimpoint.signature import flatten
from trimpoint.task import ROLES, Task, call
from trimpoint.testing.zoo import ZooEntry

EFFORT = 0.1
BATCH = 8


@dataclass(frozen=True, eq=False)
class Applied:
    """A model of the zoo after a method, with what is needed to see what else has changed.

    Args:
        model: the model that was handed over.
        task: the task that was handed over.
        compressed: what came back.
        model_before: a snapshot of `model` from before.
        model_after: a snapshot of `model` from afterwards.
        task_before: hashes of the task's data from before.
        task_after: hashes of the task's data from afterwards.
        world_before: global state from before.
        world_after: global state from afterwards.
    """

    model: nn.Module
    task: Task
    compressed: Compressed
    model_before: Mapping[str, Any]
    model_after: Mapping[str, Any]
    task_before: Mapping[str, str]
    task_after: Mapping[str, str]
    world_before: Mapping[str, Any]
    world_after: Mapping[str, Any]

    @property
    def changed(self) -> frozenset[str]:
        """Origins that were changed, as far as the method says."""
        return frozenset(change.origin for change in self.compressed.changes if change.kind != "skipped")

    @property
    def skipped(self) -> Mapping[str, str]:
        """Origins that were skipped, with the reason."""
        return {change.origin: change.reason for change in self.compressed.changes if change.kind == "skipped"}


@lru_cache(maxsize=64)
def applied(method: Method, entry: ZooEntry) -> Applied:
    """Apply `method` everywhere in the model of `entry`, watching what happens to what was handed over.

    The result is shared between checks: it must not be changed.
    """
    model, task = entry.make()
    before, data_before, world_before = snapshot(model), data_hashes(task), world()
    compressed = apply_to(method, model, task)
    return Applied(
        model, task, compressed, before, snapshot(model), data_before, data_hashes(task), world_before, world()
    )


def apply_to(
    method: Method | Plan, model: nn.Module, task: Task, *, where: Filter = EVERYTHING, seed: int = 0
) -> Compressed:
    """Apply a method, or a plan, to a model."""
    plan = method if isinstance(method, Plan) else Plan((Step(method, where),), seed)
    return compress(model, plan, task, effort=EFFORT)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a method might change: values, flags, hooks, attributes, identities."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path} class"] = type(module)
        seen[f"{path} training"] = module.training
        seen[f"{path} hooks"] = count_hooks(module)
        seen[f"{path} identity"] = id(module)
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple)) and name != "training":
                seen[f"{path} attribute {name}"] = value
    for name, tensor in named_tensors(model).items():
        seen[f"{name} value"] = tensor_bytes(tensor)
        seen[f"{name} requires_grad"] = tensor.requires_grad
        seen[f"{name} has a gradient"] = tensor.grad is not None if tensor.is_leaf else False
        seen[f"{name} identity"] = id(tensor)
    return seen


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the keys of two snapshots that differ."""
    return [key for key in {**before, **after} if before.get(key, _ABSENT) != after.get(key, _ABSENT)]


_ABSENT = object()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, tied and shared ones under each name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a module owns itself."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    return tensors | dict(module.named_buffers(recurse=False))


def tensor_bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Return type, shape and bytes of a tensor: equal only where it is bitwise the same."""
    plain = tensor.detach().cpu().contiguous()
    return str(plain.dtype), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def count_hooks(module: nn.Module) -> int:
    """Return how many hooks are registered on a module."""
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value)


def data_hashes(task: Task) -> dict[str, str]:
    """Return the hash of each role's samples."""
    return {role: hash_samples(task.data(role)) for role in ROLES if getattr(task, role) is not None}


def world() -> dict[str, Any]:
    """Return global state that a method must not disturb."""
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "NumPy's random state": repr(np.random.get_state()),
        "Python's random state": random.getstate(),
        "gradient mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def inputs_of(task: Task, size: int = BATCH) -> Any:
    """Return the inputs of one batch of the data that candidates are compared on."""
    inputs, _ = next(task.batches("select", size=size, limit=size))
    return inputs


def core_inputs(model: nn.Module, task: Task, inputs: Any) -> Any:
    """Return what the task hands to the part that is exported, for a batch of inputs."""
    if task.predict is None:
        return inputs
    core = task.core_of(model)
    seen: list[Any] = []

    def run(given: Any) -> Any:
        seen.append(given)
        return call(core, given)

    with torch.no_grad(), evaluating(core):
        task.predict(run, inputs)
    return seen[0]


def answers(model: nn.Module, task: Task) -> Any:
    """Return what a model returns for one batch, in evaluation mode."""
    with torch.no_grad(), evaluating(model):
        return call(model, inputs_of(task))


def core_answer(model: nn.Module, task: Task) -> Tensor:
    """Return the outputs of the part that is exported for one batch, as one float64 vector."""
    core = task.core_of(model)
    with torch.no_grad(), evaluating(core):
        return joined(call(core, core_inputs(model, task, inputs_of(task))))


def joined(outputs: Any) -> Tensor:
    """Return nested outputs as one float64 vector."""
    return torch.cat([torch.as_tensor(leaf).double().reshape(-1) for leaf in flatten(outputs)])


def relative_error(answer: Tensor, reference: Tensor) -> float:
    """Return the Euclidean distance of an answer from its reference, as a share of the reference's own length."""
    return float((answer - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))
