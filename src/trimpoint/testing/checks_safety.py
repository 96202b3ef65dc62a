"""Checks of what a method must leave alone: the user's model and data, interfaces, ties, names, global state."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.compress import compress
from trimpoint.errors import TrimpointError
from trimpoint.method import Method
from trimpoint.plan import Plan, Step
from trimpoint.signature import flatten, structure_of, unflatten
from trimpoint.task import Task
from trimpoint.testing.applied import (
    EFFORT,
    answers,
    applied,
    apply_to,
    count_hooks,
    differences,
    named_tensors,
    snapshot,
    tensor_bytes,
)
from trimpoint.testing.failure import ConformanceFailure, expect, few
from trimpoint.testing.zoo import Drawn, ZooEntry


def check_model_untouched(method: Method, entry: ZooEntry) -> None:
    """The model that is handed over keeps its values, flags, hooks, attributes and modules."""
    result = applied(method, entry)
    changed = differences(result.model_before, result.model_after)
    expect(not changed, f"the model that was handed over has changed: {few(changed)}.")
    theirs = {id(tensor) for tensor in named_tensors(result.model).values()}
    shared = [name for name, tensor in named_tensors(result.compressed.module).items() if id(tensor) in theirs]
    expect(not shared, f"the result shares tensors with the model that was handed over: {few(shared)}.")
    ours = {tensor.untyped_storage().data_ptr() for tensor in named_tensors(result.model).values() if tensor.numel()}
    memory = [
        name
        for name, tensor in named_tensors(result.compressed.module).items()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in ours
    ]
    expect(not memory, f"the result shares memory with the model that was handed over: {few(memory)}.")


def check_task_untouched(method: Method, entry: ZooEntry) -> None:
    """The data of the task stays as it is."""
    result = applied(method, entry)
    changed = differences(result.task_before, result.task_after)
    expect(not changed, f"the data of the task has changed in the roles {few(changed)}.")


def check_global_state_untouched(method: Method, entry: ZooEntry) -> None:
    """Random generators, gradient mode and the like are afterwards what they were before."""
    result = applied(method, entry)
    changed = differences(result.world_before, result.world_after)
    expect(not changed, f"global state has changed: {few(changed)}. Use `ctx.rng` and `ctx.seed`.")


def check_same_interface(method: Method, entry: ZooEntry) -> None:
    """The result takes the same inputs and returns the same structure, shapes and types, all finite."""
    result = applied(method, entry)
    before, after = answers(result.model, result.task), answers(result.compressed.module, result.task)
    expect_alike(before, after)


def check_nothing_left_behind(method: Method, entry: ZooEntry) -> None:
    """The result is in evaluation mode, without hooks or gradients, and `requires_grad` is what it was."""
    result = applied(method, entry)
    model, module = result.model, result.compressed.module
    before, after = dict(model.named_modules()), dict(module.named_modules())
    both = [path for path in before if path in after]
    hooked = [path for path in both if count_hooks(after[path]) > count_hooks(before[path])]
    hooked += [path for path in after if path not in before and count_hooks(after[path])]
    expect(not hooked, f"hooks are left on {few(hooked)}; remove them when done.")
    training = [path for path, part in module.named_modules() if part.training]
    expect(not training, f"the result must be in evaluation mode; these are in training mode: {few(training)}.")
    tensors = dict(module.named_parameters())
    graded = [name for name, tensor in tensors.items() if tensor.grad is not None]
    expect(not graded, f"gradients are left on {few(graded)}.")
    originals = dict(model.named_parameters())
    flipped = [
        name
        for name, tensor in tensors.items()
        if name in originals and tensor.requires_grad != originals[name].requires_grad
    ]
    expect(not flipped, f"`requires_grad` differs from the original's at {few(flipped)}.")


def check_ties_kept(method: Method, entry: ZooEntry) -> None:
    """Parameters that were tied are still one, modules that were shared are still one."""
    result = applied(method, entry)
    model, module = result.model, result.compressed.module
    before: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    after: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    _expect_still_one(before, after, "tied parameters")
    _expect_still_one(
        dict(model.named_modules(remove_duplicate=False)), dict(module.named_modules(remove_duplicate=False)), "modules"
    )


def check_names_kept(method: Method, entry: ZooEntry) -> None:
    """No module is renamed or lost, except inside of what was bypassed or replaced; nothing is wrapped around it."""
    result = applied(method, entry)
    before = dict(result.model.named_modules(remove_duplicate=False))
    after = dict(result.compressed.module.named_modules(remove_duplicate=False))
    replaced = [before.get(c.origin) for c in result.compressed.changes if c.kind in ("bypassed", "replaced")]
    gone = {path for path, module in before.items() if any(module is other for other in replaced)}
    lost = [path for path in before if path not in after and not any(within(path, root) for root in gone)]
    expect(not lost, f"modules of the original are missing in the result: {few(lost)}. Removal must not rename.")
    added = [path for path in after if path not in before and not any(within(path, root) for root in gone)]
    added = [path for path in added if "parametrizations" not in path.split(".")]
    expect(not added, f"the result has modules that the original has not: {few(added)}.")


def check_same_seed_same_bytes(method: Method, entry: ZooEntry) -> None:
    """The same model, task and seed give the same bytes, whatever the global random state."""
    first = applied(method, entry).compressed
    model, task = entry.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        second = apply_to(method, model, task)
    changed = _value_differences(first.module, second.module)
    expect(not changed, f"two runs with the same seed differ at {few(changed)}. Draw from `ctx.rng` or `ctx.seed`.")
    expect(first.changes == second.changes, "two runs with the same seed record different changes.")
    expect(first.formats == second.formats, "two runs with the same seed assign different formats.")


def check_bfloat16(method: Method, entry: ZooEntry) -> None:
    """A bfloat16 model stays one, and gives finite answers."""
    model, task = entry.make()
    model = model.bfloat16()
    task = task.with_(**{role: _in_bfloat16(task, role) for role in ("train", "calibrate", "select")})
    compressed = apply_to(method, model, task)
    expect_alike(answers(model, task), answers(compressed.module, task))
    before = {name: tensor.dtype for name, tensor in named_tensors(model).items()}
    wrong = [
        name
        for name, tensor in named_tensors(compressed.module).items()
        if tensor.dtype != before.get(name, tensor.dtype)
    ]
    expect(not wrong, f"the type of {few(wrong)} has changed.")


def check_missing_data(method: Method, entry: ZooEntry) -> None:
    """Without what it needs the method is refused with a clear error and a hint; without the rest it works."""
    model, task = entry.make()
    lacking: dict[str, dict[str, Any]] = {
        "train": {"train": None},
        "calibrate": {"calibrate": None},
        "loss": {"loss": None, "step": None},
    }
    example = flatten(task.example_batch())
    structure = structure_of(task.example_batch())
    task = task.with_(example=unflatten(structure, [leaf[0] for leaf in example]))
    for need in sorted(method.traits.needs):
        message = _refusal(method, model, task.with_(**lacking[need]))
        expect(message is not None, f"it needs `{need}`, but runs without it.")
        expect(need in (message or ""), f"the error for missing `{need}` does not name it: {message!r}.")
    spare = {
        key: value for need, gone in lacking.items() if need not in method.traits.needs for key, value in gone.items()
    }
    if spare:
        message = _refusal(method, model, task.with_(**spare))
        expect(message is None, f"it does not declare that it needs {few(set(spare))}, but is refused: {message}")


def within(path: str, root: str) -> bool:
    """Return whether `path` is `root` or lies below it.

    Example:
        >>> within("a.b", "a"), within("ab", "a"), within("a", "")
        (True, False, True)
    """
    return root == "" or path == root or path.startswith(f"{root}.")


def expect_alike(before: Any, after: Any) -> None:
    """Raise unless two outputs have the same structure, shapes and types, and are finite where they were.

    Raises:
        ConformanceFailure: naming the first difference.
    """
    expect(type(before) is type(after), f"outputs are {type(after).__name__}, they were {type(before).__name__}.")
    expect(
        structure_of(before) == structure_of(after),
        f"the structure of the outputs is {structure_of(after)}, it was {structure_of(before)}.",
    )
    for index, (old, new) in enumerate(zip(flatten(before), flatten(after), strict=True)):
        expect(old.shape == new.shape, f"output {index} has the shape {list(new.shape)}, it had {list(old.shape)}.")
        expect(old.dtype == new.dtype, f"output {index} is {new.dtype}, it was {old.dtype}.")
        lost = bool(torch.isfinite(old).all()) and not bool(torch.isfinite(new).all())
        expect(not lost, f"output {index} is no longer finite.")


def _expect_still_one(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    names: dict[int, list[str]] = {}
    for name, value in before.items():
        names.setdefault(id(value), []).append(name)
    for group in names.values():
        left = [name for name in group if name in after]
        expect(len({id(after[name]) for name in left}) <= 1, f"the {what} {few(left)} were one and are no longer.")
        whole = len(left) in (0, len(group)) or what == "modules"
        expect(whole, f"of the {what} {few(group)}, which were one, only {few(left)} is left.")


def _value_differences(first: nn.Module, second: nn.Module) -> list[str]:
    one, other = named_tensors(first), named_tensors(second)
    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or tensor_bytes(one[name]) != tensor_bytes(other[name])
    ]


def _in_bfloat16(task: Task, role: Any) -> Drawn:
    data = copy.deepcopy(task.data(role))

    def cast(sample: Any) -> Any:
        leaves = [
            leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in flatten(sample)
        ]
        return unflatten(structure_of(sample), leaves)

    return Drawn(len(data), lambda index, _: cast(data[index]), 0)


def _refusal(method: Method, model: nn.Module, task: Task) -> str | None:
    before = snapshot(model)
    message: str | None = None
    try:
        compress(model, Plan((Step(method),)), task, effort=EFFORT)
    except TrimpointError as error:
        expect(bool(error.hint), f"{type(error).__name__} has no hint: {error}")
        message = str(error)
    except Exception as error:
        raise ConformanceFailure(f"it breaks with {type(error).__name__}: {error}") from error
    expect(not differences(before, snapshot(model)), "the model that was handed over has changed.")
    return message
