"""Make a compressed module: validate a plan, copy the model, apply step by step, recover."""

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trimpoint.build import Build, type_names
from trimpoint.context import Progress, _Context
from trimpoint.errors import DataError, InvalidParameterError, ModelError, PlanError, UnknownNameError, suggest
from trimpoint.graph import Edit
from trimpoint.method import ALL_FACTS, Context, Fact, Stage
from trimpoint.plan import Plan, Step
from trimpoint.task import ROLES, Task
from trimpoint.values import Change, Format

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, eq=False)
class Compressed:
    """What a plan made of a model.

    Args:
        module: a plain module in evaluation mode. Weights that are held at zero or on a grid of integers are computed
            with a mask or from the grid, which lasts through training; `trimpoint.bake` makes plain weights of them, to
            save or hand on.
        plan: that made it.
        changes: what each step did to each module in its scope, or why it did nothing.
        edits: of the structure, in a closed vocabulary, for rebuilding it.
        formats: module path → tensor (`"weight"`, `"input"`, `"output"`) → number format, for a runtime to realise.
        origins: module path → its path in the unmodified model.
        facts: origin → what still holds.
        effort: at which the last recovery step ran.
    """

    module: nn.Module
    plan: Plan
    changes: tuple[Change, ...] = ()
    edits: tuple[Edit, ...] = ()
    formats: Mapping[str, Mapping[str, Format]] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    effort: float = 1.0


def compress(
    model: nn.Module,
    plan: Plan,
    task: Task | None = None,
    *,
    effort: float = 1.0,
    start: Compressed | None = None,
    progress: Progress | None = None,
    state_dir: Path | None = None,
    cache: MutableMapping[str, Tensor] | None = None,
) -> Compressed:
    """Apply a plan to a copy of a model; the model and the data stay as they are.

    Args:
        model: trained, any `nn.Module`.
        plan: what to do.
        task: data and loss, as far as the plan's methods need them.
        effort: share of its full length that the *last* recovery step runs, in (0, 1].
        start: what a prefix of this plan made of the same model, to go on from.
        progress: called with the position of the step, a text and the finished share of the step.
        state_dir: where the last recovery keeps its state before the cool-down, so that a run with more effort goes on
            from there.
        cache: what teachers said, shared between calls: hash of model and inputs → output.

    Raises:
        InvalidParameterError: if `effort` is out of range.
        PlanError: if the steps cannot follow each other, or `start` does not fit.
        UnknownNameError: if a step's `where` matches no module.
        DataError: if the task lacks what the methods need, everything lacking at once.
        ModelError: if a parameter is not finite, or has no values that can be changed.
        TrainingError: if a recovery breaks down.
    """
    _check(model, plan, task, effort, start)
    done = len(start.plan.steps) if start is not None else 0
    last = _last_recovery(plan)
    build = _begin(model, task, start, cache)
    for position, step in enumerate(plan.steps[done:], done):
        state = state_dir / f"{plan.prefix(position + 1).hash}.safetensors" if state_dir and position == last else None
        share = effort if position == last else 1.0
        context = _Context(build, step, position, plan.seed, effort=share, state=state, progress=progress)
        context.report("started", 0.0)
        step.method.apply(context)
        context.close()
        context.report("done", 1.0)
    origins = {path: build.origin(path) for path, _ in build.module.named_modules(remove_duplicate=False)}
    return Compressed(
        module=build.module,
        plan=plan,
        changes=tuple(build.changes),
        edits=tuple(build.edits),
        formats=build.formats,
        origins=origins,
        facts=build.facts,
        effort=effort if last is not None else 1.0,
    )


def examine(model: nn.Module, task: Task | None, step: Step, look: Callable[[Context], Found]) -> Found:
    """Return what a function finds in a copy of a model, seen as the step of a plan sees it.

    Args:
        model: trained.
        task: its data.
        step: whose scope and requirements decide what is seen.
        look: given the step's context.

    Raises:
        UnknownNameError: if the step's `where` matches no module.
        DataError: if the task lacks what the step's method needs.
        ModelError: if a parameter is not finite.
    """
    _check(model, Plan((step,)), task, 1.0, None)
    return look(_Context(_begin(model, task, None, None), step, 0, 0))


def _begin(
    model: nn.Module, task: Task | None, start: Compressed | None, cache: MutableMapping[str, Tensor] | None
) -> Build:
    try:
        module = copy.deepcopy(model if start is None else start.module).eval()
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"The model cannot be copied: {error}",
            "`torch.nn.utils.weight_norm` is a usual cause; take `torch.nn.utils.parametrizations.weight_norm`",
        ) from error
    build = Build(module=module, given=model, task=task, memory=cache)
    if start is None:
        build.facts = {path: _facts_of(m) for path, m in model.named_modules(remove_duplicate=False)}
        return build
    build.changes, build.edits = list(start.changes), list(start.edits)
    build.formats = {path: dict(formats) for path, formats in start.formats.items()}
    build.origins, build.facts = dict(start.origins), dict(start.facts)
    return build


def _facts_of(module: nn.Module) -> Fact:
    floating = all(p.is_floating_point() for p in module.parameters(recurse=False))
    return ALL_FACTS if floating else ALL_FACTS & ~Fact.FLOAT_WEIGHT


def _last_recovery(plan: Plan) -> int | None:
    positions = [i for i, step in enumerate(plan.steps) if step.method.traits.stage is Stage.RECOVER]
    return positions[-1] if positions else None


# What can be known before anything is done


def _check(model: nn.Module, plan: Plan, task: Task | None, effort: float, start: Compressed | None) -> None:
    if isinstance(effort, bool) or not isinstance(effort, (int, float)) or not 0 < effort <= 1:
        raise InvalidParameterError(f"The 'effort' parameter of compress must be in the range (0, 1]. Got {effort!r}.")
    plan.check_order()
    if start is not None:
        _check_start(plan, effort, start)
    _check_where(model, plan)
    _check_needs(plan, task)
    check_finite(model)


def _check_start(plan: Plan, effort: float, start: Compressed) -> None:
    length = len(start.plan.steps)
    if plan.prefix(length) != start.plan:
        raise PlanError(
            f"`start` must come from a prefix of the plan. Got {start.plan} for {plan}.",
            "compress the unmodified model instead",
        )
    recovered = _last_recovery(start.plan)
    needed = effort if recovered == _last_recovery(plan) else 1.0
    if recovered is not None and start.effort != needed:
        raise PlanError(
            f"The last recovery in `start` must have run at effort {needed:g}. Got {start.effort:g}.",
            "go on from a prefix before that recovery",
        )


def _check_where(model: nn.Module, plan: Plan) -> None:
    modules = [(path, type_names(module)) for path, module in model.named_modules(remove_duplicate=False)]
    problems = [
        f"`where` of step {number} ({step.method.name}) matches no module of the model. Got {str(step.where)!r}."
        for number, step in enumerate(plan.steps, 1)
        if not any(step.where.matches(path, types) for path, types in modules)
    ]
    if problems:
        first = next(s for s in plan.steps if not any(s.where.matches(path, types) for path, types in modules))
        names = [path for path, _ in modules if path]
        names += [f"type:{name}" for name in dict.fromkeys(types[0] for _, types in modules)]
        hint = suggest(str(first.where), names) if len(names) < 30 else _nearest(str(first.where), names)
        raise UnknownNameError(_numbered(problems), hint)


def _nearest(text: str, names: list[str]) -> str:
    hint = suggest(text, names)
    return hint if hint.startswith("did you mean") else "`trimpoint measure` lists the model's modules"


def _check_needs(plan: Plan, task: Task | None) -> None:
    problems = []
    for number, step in enumerate(plan.steps, 1):
        head = f"Step {number} ({step.method.name}) needs"
        for need in sorted(step.method.traits.needs):
            if task is None or not task.has(need):
                problems.append(f"{head} {'a loss' if need == 'loss' else f'`{need}` data'}. The task has none.")
            elif need in ROLES and len(getattr(task, need)) == 0:
                problems.append(f"{head} `{need}` data. That of the task is empty.")
        if step.method.traits.acts_on in ("groups", "blocks") and not (task is not None and task.has_example):
            problems.append(f"{head} example inputs. The task has neither data nor an `example`.")
    if problems:
        hint = "give a `task`" if task is None else "give `Task(train=..., calibrate=..., loss=..., example=...)`"
        raise DataError(_numbered(problems), hint)


def check_finite(model: nn.Module) -> None:
    """Check that every parameter of a model is there and finite, and that no buffer holds NaN.

    Raises:
        ModelError: naming those that are not.
    """
    _check_there(model)
    bad = [
        f"The parameter `{name}` has {int((~torch.isfinite(p)).sum()):,} values of {p.numel():,} that are not finite."
        for name, p in model.named_parameters()
        if p.is_floating_point() and not bool(torch.isfinite(p).all())
    ] + [
        f"The buffer `{name}` holds NaN."
        for name, b in model.named_buffers()
        if b.is_floating_point() and bool(torch.isnan(b).any())
    ]
    if bad:
        raise ModelError(_numbered(bad), "start from weights that were saved before training broke down")


def _check_there(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(f"`{name}` has no shape yet: its layer is a lazy one.", "run the model on one batch first")
        if tensor.is_meta:
            raise ModelError(f"`{name}` has no values: it is on the device `meta`.", "load the model's weights first")
        if tensor.is_inference():
            raise ModelError(
                f"`{name}` was made under `torch.inference_mode()` and cannot be changed.",
                "make or load the model outside of it, or put `clone()`s of its parameters and buffers in their place",
            )


def _numbered(problems: list[Any]) -> str:
    return problems[0] if len(problems) == 1 else "\n".join(f"{i}. {p}" for i, p in enumerate(problems, 1))
