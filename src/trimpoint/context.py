"""What a method sees and may do while `compress` applies it: the one implementation of `Context`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trimpoint.build import Build, describe, observed, own_shapes, tied_parameters, type_names
from trimpoint.errors import DataError, SurgeryError, UnknownNameError, suggest
from trimpoint.filters import EVERYTHING
from trimpoint.graph import GridEdit, MaskEdit, OnGrid, bypass_, mask_, masks_of, put_on_grid_, remove_units_, replace_
from trimpoint.graph.codebooks import share_
from trimpoint.graph.edits import CodebookEdit
from trimpoint.graph.grids import grid_to_data
from trimpoint.graph.masks import MASKED, owner_of, schedule_to_data
from trimpoint.method import ALL_FACTS, Context, Site
from trimpoint.parts import Block, Group, MaskSchedule
from trimpoint.plan import Step
from trimpoint.recover.batches import epoch_batches, mix
from trimpoint.recover.distill import Distillation, DistillationLoss, Teacher
from trimpoint.recover.penalty import Penalty
from trimpoint.recover.recipe import Recovery, check_batches
from trimpoint.recover.trainer import train
from trimpoint.task import Task
from trimpoint.values import Change, ChangeKind, Format

Progress = Callable[[int, str, float], None]
Lesson = tuple[Callable[[nn.Module, Any], Tensor], Callable[[int], int]]


class _Context(Context):
    """The context of one step.

    Args:
        build: the model in the making.
        step: to be applied.
        position: of the step in its plan.
        seed: of the plan.
        effort: see `Context`.
        state: file for the state of a recovery, see `trimpoint.recover.train`.
        progress: called with the step's position, a text and the finished share of the step.
    """

    def __init__(
        self,
        build: Build,
        step: Step,
        position: int,
        seed: int,
        *,
        effort: float = 1.0,
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._build, self._step, self._position, self._plan_seed = build, step, position, seed
        self._state, self._progress = state, progress
        self._traits, self._name = step.method.traits, step.method.name
        self._changes: dict[tuple[str, str], Change] = {}  # by origin, and the part of what stands there now
        self._facts = dict(build.facts)  # when the step began: what it does to one part must not keep it from another
        self._implied: set[tuple[str, str]] = set()  # parts that are skipped for the reason of another part
        self._blocks: tuple[Block, ...] | None = None
        self._originals = dict(build.original.named_modules(remove_duplicate=False))
        self.task, self.effort = build.task, effort
        self.seed = mix(seed, position)
        self.rng = np.random.default_rng(self.seed)

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The model as it is now."""
        return self._build.module

    @property
    def original(self) -> nn.Module:  # type: ignore[override]
        """The unmodified model in evaluation mode."""
        return self._build.original

    # What there is

    def modules(self) -> Iterator[Site]:
        """Yield the modules in scope that still have the required facts."""
        shared = tied_parameters(self.module)
        for path, module in list(self.module.named_modules()):
            if not self._in_scope(path, module) or not set(self._traits.targets) & set(type_names(module)):
                continue
            if missing := self._missing(path):
                self.skip(path, missing)
            else:
                tied = any(id(p) in shared for p in module.parameters(recurse=False))
                yield Site(path=path, origin=self._build.origin(path), module=module, tied=tied)

    def groups(self) -> tuple[Group, ...]:
        """Return the removable groups all of whose producing modules are in scope, and those of all alike groups."""
        admitted = {group.name: self._admits(group) for group in self._build.groups()}
        torn = {group.alike for group in self._build.groups() if group.alike and not admitted[group.name]}
        return tuple(group for group in self._build.groups() if admitted[group.name] and group.alike not in torn)

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks in scope that could be bypassed when the step began."""
        if self._blocks is None:
            self._blocks = tuple(b for b in self._build.blocks() if self._in_scope(b.path, self.get(b.path)))
        return self._blocks

    def covers(self, path: str) -> bool:
        """Return whether the module at `path` is in scope of the step's `where`."""
        return self._in_scope(path, self.get(path))

    def get(self, path: str) -> nn.Module:
        """Return the module at `path` as it is now."""
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            names = [name for name, _ in self.module.named_modules() if name]
            raise UnknownNameError(f"The model has no module {path!r}.", suggest(path, names)) from error

    # What can be done

    def resize(self, removals: Mapping[str, Sequence[int]]) -> None:
        """Remove units from groups, all at once."""
        every = self._build.groups()
        groups = [group for group in every if removals.get(group.name)]
        before = {path: (describe(module), own_shapes(module)) for path, module in self.module.named_modules()}
        edits, rejected = remove_units_(self.module, every, dict(removals), self._build.inputs())
        self._build.edited(edits)
        for group in groups:
            reason = rejected.get(group.name)
            removed = f"{len(removals[group.name])} of {group.size} units of `{group.name}`"
            for path in dict.fromkeys(member.path for member in group.members):
                if reason is None:
                    self._change("resized", path, before[path][0], describe(self.get(path)), removed)
                else:
                    self.skip(path, reason)
        members = {member.path for group in groups for member in group.members}
        for path, module in self.module.named_modules():
            if path not in members and own_shapes(module) != before[path][1]:
                self._change("resized", path, before[path][0], describe(module), "its parameters are tied with these")

    def bypass(self, path: str, reason: str = "") -> None:
        """Replace the block at `path` by one that hands its first input on, or skip it where that does not run."""
        before, below = (
            describe(self.get(path)),
            [f"{path}.{name}" for name, _ in self.get(path).named_modules() if name],
        )
        try:
            edits = bypass_(self.module, path, self._build.inputs())
        except SurgeryError as error:
            self.skip(path, error.message)
            return
        self._build.edited(edits)
        for inner in below:
            self._lose(inner)
        self._change("bypassed", path, before, "Bypass", reason)

    def replace(self, path: str, module: nn.Module, reason: str = "") -> None:
        """Put `module` wherever the module at `path` was used, or skip it where the model does not run with it."""
        old = self.get(path)
        aliases = self._aliases(old)
        try:
            self._build.module, edits = replace_(self.module, path, module, self._build.example())
        except SurgeryError as error:
            self.skip(path, error.message)
            return
        for alias in aliases:
            inner = (f"{alias}.{inner}".strip(".") for inner, _ in module.named_modules())
            self._build.origins.update(dict.fromkeys(inner, self._build.origin(alias)))
        self._build.edited(edits)
        self._change("replaced", path, describe(old), describe(module), reason)

    def mask(
        self,
        path: str,
        keep: Tensor | None = None,
        *,
        parameter: str = "weight",
        values: Tensor | None = None,
        schedule: MaskSchedule | None = None,
        reason: str = "",
    ) -> None:
        """Hold weights of the module at `path` at zero, through training and in the exported file."""
        module = self.get(path)
        before = describe(module)
        mask_(module, parameter, keep, schedule, values)
        self._inherit(module)
        self._build.edited([MaskEdit(path, parameter, schedule_to_data(schedule))])
        held = masks_of(module)[parameter]
        count = held.keep.numel()
        self._change("masked", path, before, f"{100 * held.removed / count:.4g} % of {count:,} weights zero", reason)

    def put_on_grid(
        self, path: str, scale: Tensor, bits: int, *, axis: int = 0, values: Tensor | None = None, reason: str = ""
    ) -> None:
        """Hold the weight of the module at `path` on a grid of integers, through training and in the exported file."""
        module, grid = self.get(path), OnGrid(scale.detach().float().clone(), bits, axis)
        before = describe(module)
        put_on_grid_(module, "weight", grid, values)
        self._inherit(module)
        self._build.edited([GridEdit(path, "weight", grid_to_data(grid))])
        self._change("assigned", path, before, f"weight on {2 * grid.top + 1} levels", reason)

    def share(self, path: str, codes: Tensor, values: Tensor, *, reason: str = "") -> None:
        """Let the weights of the module at `path` share values, through training and in the exported file."""
        module = self.get(path)
        before, book = describe(module), share_(module, "weight", codes, values)
        self._inherit(module)
        self._build.edited([CodebookEdit(path, "weight", book)])
        self._change("assigned", path, before, f"weight of {book['values']} values and zero", reason)

    def assign(self, path: str, tensor: Literal["weight", "input", "output"], format: Format) -> None:
        """Decide the number format of a tensor, under every path that the module has."""
        for alias in self._aliases(self.get(path)):
            self._build.formats.setdefault(alias, {})[tensor] = format
        old = self._changes.get(self._key(path))
        text = f"{tensor} {format.dtype} per {format.granularity}"
        added = old is not None and old.kind == "assigned"
        after, reason = (f"{old.after}, {text}", old.reason) if old is not None and added else (text, "")
        self._change("assigned", path, describe(self.get(path)), after, reason)

    def skip(self, path: str, reason: str) -> None:
        """Record why a module stays as it is; the first reason counts."""
        origin, part = self._key(path)
        told = {other: change for (at, other), change in self._changes.items() if at == origin}
        if told.keys() & {"", part} or (told and not part) or (origin, part) in self._implied:
            return
        if any(change.reason == reason for change in told.values()):
            self._implied.add((origin, part))
        else:
            self._changes[origin, part] = Change(method=self._name, origin=origin, kind="skipped", reason=reason)

    @torch.no_grad()
    def calibrate(self, observe: Callable[[str, nn.Module, tuple[Any, ...], Any], None], paths: Sequence[str]) -> int:
        """Run all calibration data through the model in evaluation mode and observe the modules at `paths`."""
        return observed(self.module.eval(), self._need_task(), observe, paths)

    def train(self, recipe: Recovery, distillation: Distillation | None = None, penalty: Penalty | None = None) -> None:
        """Train the parameters in scope."""
        if recipe.epochs == 0:
            return self.skip("", "its length is 0 epochs")
        task, model = self._need_task(), self.module
        frozen = [] if self._step.where == EVERYTHING else self._out_of_scope_parameters()
        if not any(p.requires_grad for p in model.parameters() if not any(p is other for other in frozen)):
            return self.skip("", "nothing in scope can be trained: no parameter requires a gradient")
        check_batches(model, task)
        settings = recipe.settings(model, task, effort=self.effort, seed=self.seed)
        loss, seeds = self._lesson(task, recipe, distillation)
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            with nullcontext() if penalty is None else penalty.around(model):
                done = train(
                    model,
                    loss,
                    lambda epoch: (batch for _, batch in epoch_batches(task, seeds(epoch))),
                    settings,
                    state=self._state,
                    penalty=penalty,
                    progress=None if self._progress is None else lambda share, text: self.report(text, share),
                )
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            model.eval()
        after = f"{done.steps:,} steps of {settings.optimizer}, loss {done.first_loss:.4g} → {done.last_loss:.4g}"
        where = "" if self._step.where == EVERYTHING else f"at {self._step.where}"
        self._change("trained", "", "", after, f"went on from step {done.resumed:,}" if done.resumed else where)

    def report(self, text: str, share: float) -> None:
        """Tell how far the step is."""
        if self._progress is not None:
            self._progress(self._position, f"{self._name}: {text}", share)

    def close(self) -> None:
        """Give what was in scope and not mentioned a reason, and hand the step's changes over."""
        for path, reason in self._unmentioned():
            self.skip(path, reason)
        self._build.changes += self._changes.values()

    # Inside

    def _change(self, kind: ChangeKind, path: str, before: str, after: str, reason: str) -> None:
        origin, part = self._key(path)
        old = self._changes.get((origin, ""))
        if kind == "resized" and old is not None and old.kind == "replaced":  # a part of what this step put there
            parts = [other for other, _ in self.module.named_modules() if self._build.origin(other) == origin]
            after = describe(self.get(min(parts, key=len)))
            kind, before, reason = (
                "replaced",
                old.before,
                old.reason if reason in old.reason else f"{old.reason}; {reason}",
            )
            part = ""
        elif part:
            before = f"its `{part}`, {before}"
            if old is not None and old.kind == "skipped":
                del self._changes[origin, ""]
        self._changes[origin, part] = Change(
            method=self._name, origin=origin, kind=kind, before=before, after=after, reason=reason
        )
        self._lose(path)

    def _key(self, path: str) -> tuple[str, str]:
        """Return the origin of a module, and its path below what stands in the place of that now."""
        path = owner_of(path)
        origin, names = self._build.origin(path), path.split(".") if path else []
        heads = (".".join(names[:count]) for count in range(len(names) + 1))
        whole = next(head for head in heads if self._build.origin(head) == origin)
        return origin, path[len(whole) :].lstrip(".")

    def _lose(self, path: str) -> None:
        origin = self._build.origin(path)
        self._build.facts[origin] = self._build.facts.get(origin, ALL_FACTS) & ~self._traits.removes

    def _missing(self, path: str) -> str:
        """Return why the required facts do not hold, empty where they do."""
        missing = self._traits.requires & ~self._facts.get(self._build.origin(path), ALL_FACTS)
        names = ", ".join(fact.name.lower() for fact in missing if fact.name)
        return f"{self._name} needs what no longer holds here: {names}" if missing else ""

    def _in_scope(self, path: str, module: nn.Module) -> bool:
        """Return whether `where` matches a module as it is, or what stood in its place in the unmodified model."""
        owner = owner_of(path)
        origin = self._build.origin(owner)
        names = type_names(module if owner == path else self.get(owner))
        before = self._originals.get(origin)
        return self._step.where.matches(origin, names if before is None else (*names, *type_names(before)))

    def _admits(self, group: Group) -> bool:
        """Return whether a group may be changed; record why not for its producing modules in scope.

        What acts on the whole model leaves none alone: it is asked for groups to know them.
        """
        outs = list(dict.fromkeys(m.path for m in group.members if m.role == "out")) or [group.members[0].path]
        inside = [path for path in outs if self._in_scope(path, self.get(path))]
        if not inside:
            return False
        outside = next((path for path in outs if path not in inside), None)
        lacking = next((why for m in group.members if (why := self._missing(m.path))), "")
        coupled = f"its channels are coupled with `{outside}`, which is out of scope" if outside else ""
        reason = group.reason or coupled or lacking
        for path in inside if reason and self._traits.acts_on != "model" else ():
            self.skip(path, reason)
        return not reason

    def _unmentioned(self) -> Iterator[tuple[str, str]]:
        """Yield what is in scope of the step and has no entry yet, with a reason."""
        acts_on = self._traits.acts_on
        if acts_on == "blocks":
            yield from ((block.path, "kept") for block in self.blocks())
        for path, module in self.module.named_modules():
            if not self._in_scope(path, module):
                continue
            if acts_on == "modules" and set(self._traits.targets) & set(type_names(module)):
                yield path, f"left as it is by {self._name}"
            owner = owner_of(path)
            if acts_on == "groups" and owner != path and masks_of(self.get(owner)):
                yield owner, MASKED.format(owner)
            elif acts_on == "groups" and any(p.ndim > 1 for p in module.parameters(recurse=False)):
                yield path, "no removable group begins here"
        if not self._changes:
            yield "", f"nothing in scope that {self._name} acts on"

    def _aliases(self, module: nn.Module) -> list[str]:
        return [path for path, other in self.module.named_modules(remove_duplicate=False) if other is module]

    def _inherit(self, module: nn.Module) -> None:
        """Give the parts of a module the origin that it has."""
        for alias in self._aliases(module):
            inner = (f"{alias}.{name}".strip(".") for name, _ in module.named_modules())
            self._build.origins.update(dict.fromkeys(inner, self._build.origin(alias)))

    def _out_of_scope_parameters(self) -> list[nn.Parameter]:
        covered = [module for path, module in self.module.named_modules() if self._in_scope(path, module)]
        inside = {id(parameter) for module in covered for parameter in module.parameters(recurse=False)}
        return [p for p in self.module.parameters() if p.requires_grad and id(p) not in inside]

    def _need_task(self) -> Task:
        if self.task is None:
            raise DataError(f"{self._name} needs a task.", "give one to `compress(model, plan, task)`")
        return self.task

    def _lesson(self, task: Task, recipe: Recovery, distillation: Distillation | None) -> Lesson:
        """Return the loss to train with, and the seed of each epoch.

        With a teacher, epochs are seeded by the plan's seed only, so that all plans see the same views and share what
        the teacher said about them.
        """
        if distillation is None:
            return task.loss_of, lambda epoch: mix(self.seed, epoch)
        if distillation.hints > 0:
            distillation = replace(distillation, places=tuple(b.path for b in self._build.original_blocks()))
        views, memory = 0 if distillation.inner else distillation.views, self._build.memory
        if memory is None and 0 < views < recipe.epochs * self.effort:
            memory = {}
        teacher = Teacher(self.original, memory if views else None, task.core)
        return DistillationLoss(task, teacher, distillation), lambda epoch: mix(
            self._plan_seed, epoch % views if views else epoch
        )
