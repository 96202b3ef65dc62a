"""Checks of what a method must tell: changes, skips with reasons, facts, scope."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimpoint.compress import compress
from trimpoint.errors import TrimpointError
from trimpoint.filters import Filter, Glob
from trimpoint.graph import Bypass, Codebook, OnSigns, find_blocks, grids_of
from trimpoint.method import ALL_FACTS, Fact, Method
from trimpoint.plan import Plan, Step
from trimpoint.signature import flatten
from trimpoint.testing.applied import (
    EFFORT,
    Applied,
    answers,
    applied,
    apply_to,
    core_inputs,
    differences,
    inputs_of,
    named_tensors,
    own_tensors,
    snapshot,
    tensor_bytes,
)
from trimpoint.testing.checks_safety import within
from trimpoint.testing.failure import ConformanceFailure, expect, few
from trimpoint.testing.select import acts_on, class_names
from trimpoint.testing.zoo import ZooEntry, zoo

NOWHERE = "no.such.module"


def check_every_module_accounted(method: Method, entry: ZooEntry) -> None:
    """Every module in scope is changed, or skipped with a reason; every record names a module of the original."""
    result = applied(method, entry)
    paths = dict(result.model.named_modules(remove_duplicate=False))
    unknown = [change.origin for change in result.compressed.changes if change.origin not in paths]
    expect(not unknown, f"changes are recorded at {few(unknown)}, which the original has not.")
    silent = [origin for origin, reason in result.skipped.items() if not reason.strip()]
    expect(not silent, f"skipped without a reason: {few(silent)}.")
    wrong = [change.method for change in result.compressed.changes if change.method != method.name]
    expect(not wrong, f"changes are recorded under the name {few(wrong)}.")
    told = result.changed | set(result.skipped)
    whole = {origin for origin in told if origin in result.skipped or _kind(result, origin) == "bypassed"}
    names = _aliases(result.model)
    missing = [
        path
        for path in _units(method, result)
        if not any(alias in told or any(within(alias, root) for root in whole) for alias in names[path])
    ]
    expect(not missing, f"neither changed nor skipped: {few(missing)}.")
    expect(bool(told) or not acts_on(method, entry), "nothing is recorded at all.")


def check_every_change_recorded(method: Method, entry: ZooEntry) -> None:
    """What differs from the original is recorded as changed, and what is recorded as changed does differ."""
    result = applied(method, entry)
    changed = changed_modules(result.model, result.compressed.module)
    names = _aliases(result.model)
    covered = {alias for origin in result.changed for alias in names.get(origin, {origin})}
    roots = {
        alias
        for change in result.compressed.changes
        if change.kind in ("bypassed", "replaced", "trained")
        for alias in names.get(change.origin, {change.origin})
    }
    secret = [path for path in changed if path not in covered and not any(within(path, root) for root in roots)]
    expect(not secret, f"changed, but not recorded: {few(secret)}. Edit through the context only.")
    formats = result.compressed.formats
    empty = [
        origin
        for origin in result.changed
        if not formats.get(origin) and not any(within(path, alias) for path in changed for alias in names[origin])
    ]
    expect(not empty, f"recorded as changed, but the same as before: {few(empty)}.")


def check_facts(method: Method, entry: ZooEntry) -> None:
    """The facts that the method declares to remove are those that what it changed has lost, no more and no fewer."""
    result = applied(method, entry)
    lost = Fact.NONE
    before = dict(result.model.named_modules())
    for origin in sorted(result.changed):
        if origin in before:
            own = _lost_facts(result, before[origin], origin)
            more = own & ~method.traits.removes
            expect(not more, f"`{origin}` has lost {_names(more)}, which the method does not declare to remove.")
            kept_on_record = own & result.compressed.facts.get(origin, Fact.NONE)
            expect(not kept_on_record, f"`{origin}` has lost {_names(kept_on_record)}; the result still lists it.")
            lost |= own
    kept = method.traits.removes & ~lost
    touched = bool(result.changed) and acts_on(method, entry)
    expect(not touched or not kept, f"it declares to remove {_names(kept)}, but everything it changed still has that.")


def check_where_respected(method: Method, entry: ZooEntry) -> None:
    """Nothing outside of `where` is changed, whether `where` names one module or all but one."""
    result = applied(method, entry)
    origins = sorted(path for path in _scope_candidates(method, result) if path)
    if not origins:
        return
    target = Glob(origins[len(origins) // 2])
    for where in (target, ~target):
        model, task = entry.make()
        compressed = apply_to(method, model, task, where=where)
        changed = _changed_on_purpose(method, model, compressed.module)
        outside = [path for path in changed if not _meant(where, model, path)]
        expect(not outside, f"with where={str(where)!r}, {few(outside)} outside of it changed.")
        told = [
            c.origin
            for c in compressed.changes
            if c.kind in ("replaced", "bypassed", "masked", "assigned") and not _meant(where, model, c.origin)
        ]
        expect(not told, f"with where={str(where)!r}, changes outside of it are recorded: {few(told)}.")


def check_where_matching_nothing(method: Method, entry: ZooEntry) -> None:
    """A `where` that no module matches is an error that names it and has a hint."""
    model, task = entry.make()
    before = snapshot(model)
    try:
        compress(model, Plan((Step(method, Glob(NOWHERE)),)), task, effort=EFFORT)
    except TrimpointError as error:
        expect(bool(error.hint), f"the error has no hint: {error}")
        expect(NOWHERE in str(error), f"the error does not name the filter {NOWHERE!r}: {error}")
    except Exception as error:
        raise ConformanceFailure(f"it breaks with {type(error).__name__}: {error}") from error
    else:
        raise ConformanceFailure(f"where={NOWHERE!r} matches nothing, and is accepted in silence.")
    expect(not differences(before, snapshot(model)), "the model that was handed over has changed.")


def check_noop_exact(method: Method, entry: ZooEntry) -> None:
    """At the value declared as `noop` the result is the original, bit by bit, and nothing is recorded as changed."""
    for field in dataclasses.fields(method):
        if "noop" not in field.metadata:
            continue
        value = field.metadata["noop"]
        model, task = entry.make()
        compressed = apply_to(dataclasses.replace(method, **{field.name: value}), model, task)
        head = f"at {field.name}={value!r}, which is declared to change nothing,"
        changed = changed_modules(model, compressed.module)
        expect(not changed, f"{head} {few(changed)} changed.")
        told = [change.origin for change in compressed.changes if change.kind != "skipped"]
        expect(not told, f"{head} changes are recorded at {few(told)}.")
        expect(not any(compressed.formats.values()), f"{head} formats are assigned to {few(list(compressed.formats))}.")
        same = same_answers(answers(model, task), answers(compressed.module, task))
        expect(same, f"{head} the outputs differ.")


def check_not_vacuous(method: Method, _: ZooEntry) -> None:
    """With the parameters that are given, the method does change at least one model of the zoo."""
    for entry in sorted(zoo().values(), key=lambda each: not acts_on(method, each)):
        result = applied(method, entry)
        if changed_modules(result.model, result.compressed.module) or any(result.compressed.formats.values()):
            return
    raise ConformanceFailure("it changes nothing in any model of the zoo.")


def changed_modules(before: nn.Module, after: nn.Module) -> list[str]:
    """Return the paths of modules whose class or own tensors differ, or that are gone; an alias counts once."""
    later = dict(after.named_modules(remove_duplicate=False))
    return [path for path, module in before.named_modules() if path not in later or _differs(module, later[path])]


def _differs(before: nn.Module, after: nn.Module) -> bool:
    if type(before) is not type(after):
        return True
    one, other = own_tensors(before), own_tensors(after)
    return set(one) != set(other) or any(tensor_bytes(one[name]) != tensor_bytes(other[name]) for name in one)


def _units(method: Method, result: Applied) -> list[str]:
    """Return the paths that the method has to account for."""
    traits, model, task = method.traits, result.model, result.task
    if traits.acts_on == "blocks":
        prefix = "" if task.core is None else f"{task.core}."
        inputs = core_inputs(model, task, inputs_of(task))
        return [prefix + block.path for block in find_blocks(task.core_of(model), inputs)]
    if traits.acts_on == "modules":
        return [path for path, module in model.named_modules() if set(traits.targets) & set(class_names(type(module)))]
    if traits.acts_on == "groups":
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return []


def _aliases(model: nn.Module) -> dict[str, set[str]]:
    """Return for each path all paths of the same module."""
    groups: dict[int, set[str]] = {}
    paths = dict(model.named_modules(remove_duplicate=False))
    for path, module in paths.items():
        groups.setdefault(id(module), set()).add(path)
    return {path: groups[id(module)] for path, module in paths.items()}


def _kind(result: Applied, origin: str) -> str:
    return next((c.kind for c in result.compressed.changes if c.origin == origin and c.kind != "skipped"), "skipped")


def _lost_facts(result: Applied, before: nn.Module, origin: str) -> Fact:
    after = dict(result.compressed.module.named_modules(remove_duplicate=False)).get(origin)
    if after is None or isinstance(after, Bypass):
        return Fact.PRESENT
    formats = result.compressed.formats.get(origin, {})
    probes: Mapping[Fact, Callable[[], bool]] = {
        Fact.FLOAT_WEIGHT: lambda: "weight" in formats or not _float_weights(after) or _few(after),
        Fact.ORIGINAL_SHAPE: lambda: _shapes(before) != _shapes(after),
        # What is rounded to zero on a grid is not held there.
        Fact.DENSE: lambda: _zeros(after) > _zeros(before) and not grids_of(after) and not _few(after),
    }
    return Fact(sum(fact.value for fact, probe in probes.items() if probe()))


def _float_weights(module: nn.Module) -> bool:
    weight = own_tensors(module).get("weight")
    return weight is None or weight.is_floating_point()


def _few(module: nn.Module) -> bool:
    """Return whether weights have a few values that are no integers."""
    return any(isinstance(part, (Codebook, OnSigns)) for part in module.modules())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _effective(module).items()}


def _zeros(module: nn.Module) -> float:
    """Return the largest share of exact zeros in a weight of two or more dimensions."""
    weights = [tensor for tensor in _effective(module).values() if tensor.dim() >= 2 and tensor.numel()]
    return max((float((tensor == 0).float().mean()) for tensor in weights), default=0.0)


def _effective(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under their names below `module`, parametrised ones as they are computed."""
    tensors = {name: tensor for name, tensor in named_tensors(module).items() if "parametrizations" not in name}
    with torch.no_grad():
        for path, part in module.named_modules():
            if parametrize.is_parametrized(part):
                for name in part.parametrizations:
                    tensors[f"{path}.{name}".lstrip(".")] = getattr(part, str(name))
    return tensors


def _names(facts: Fact) -> str:
    return ", ".join(str(fact.name) for fact in ALL_FACTS if fact in facts)


def _scope_candidates(method: Method, result: Applied) -> list[str]:
    """Return paths to restrict the method to: what it changed, or parts with parameters where it changes everything."""
    if method.traits.acts_on != "model":
        return [path for path in result.changed if path]
    return [path for path, module in result.model.named_modules() if path and own_tensors(module)]


def _changed_on_purpose(method: Method, before: nn.Module, after: nn.Module) -> list[str]:
    """Return the modules that changed; of those coupled to a resized one, only those that lost outputs themselves."""
    changed = changed_modules(before, after)
    if method.traits.acts_on != "groups":
        return changed
    old, new = dict(before.named_modules()), dict(after.named_modules(remove_duplicate=False))
    return [path for path in changed if _lost_outputs(old[path], new[path])]


def _lost_outputs(before: nn.Module, after: nn.Module) -> bool:
    """Return whether a producer has fewer outputs; norms and depthwise convolutions only pass channels through."""
    old, new = getattr(before, "weight", None), getattr(after, "weight", None)
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or old.dim() < 2:
        return False
    if getattr(before, "transposed", False):
        return old.shape[1] != new.shape[1]
    passes = getattr(before, "groups", 1) == old.shape[0]
    return not passes and old.shape[0] != new.shape[0]


def _meant(where: Filter, model: nn.Module, path: str) -> bool:
    return any(
        where.matches(alias, class_names(type(model.get_submodule(alias))))
        for alias in _aliases(model).get(path, {path})
    )


def same_answers(one: object, other: object) -> bool:
    """Return whether two outputs are bitwise the same."""
    return [tensor_bytes(leaf) for leaf in flatten(one)] == [tensor_bytes(leaf) for leaf in flatten(other)]
