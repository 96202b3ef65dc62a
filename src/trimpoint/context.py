"""What a method sees and may do while `compress` applies it: the one implementation of `Context`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trimpoint.build import Build, describe, observed, own_shapes, tied_parameters, type_names, why_no_format
from trimpoint.errors import DataError, SurgeryError, UnknownNameError, suggest
from trimpoint.filters import EVERYTHING
from trimpoint.graph import (
    CodebookEdit,
    GridEdit,
    InputGrid,
    InputGridEdit,
    MaskEdit,
    OnSigns,
    bypass_,
    mask_,
    masks_of,
    put_input_on_grid_,
    put_on_grid_,
    remove_units_,
    replace_,
    share_,
)
from trimpoint.graph.grids import OnGrid, OnGroups, grid_to_data
from trimpoint.graph.masks import MASKED, owner_of, schedule_to_data
from trimpoint.graph.scalings import rescale_
from trimpoint.graph.surgery import tensor_of
from trimpoint.method import ALL_FACTS, Context, Site, Stage
from trimpoint.parts import Block, Group, MaskSchedule, Scalings
from trimpoint.plan import Step
from trimpoint.record import Record
from trimpoint.recover.batches import epoch_batches, mix
from trimpoint.recover.distill import Distillation, Lesson, lesson
from trimpoint.recover.penalty import Penalty
from trimpoint.recover.recipe import Recovery, check_batches
from trimpoint.recover.trainer import train
from trimpoint.task import Task
from trimpoint.values import Format

Progress = Callable[[int, str, float], None]


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
        self._record = Record(build, self._name, self._traits.removes)
        self._facts = dict(build.facts)  # when the step began: what it does to one part must not keep it from another
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
        """Yield the modules in scope that have weights and still the required facts."""
        shared = tied_parameters(self.module)
        for path, module in list(self.module.named_modules()):
            if not self._in_scope(path, module) or not set(self._traits.targets) & set(type_names(module)):
                continue
            empty = "its weight is empty" if any(not p.numel() for p in module.parameters(recurse=False)) else ""
            if reason := self._missing(path) or empty:
                self.skip(path, reason)
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

    def scalings(self) -> Scalings:
        """Return where the model can be scaled."""
        return self._build.scalings()

    # What can be done

    def rescale(self, factors: Mapping[str, Tensor], reason: str = "") -> None:
        """Scale channels and what reads them, without a change of what the model computes."""
        groups = {group: factors[group.name] for group in self.scalings().groups if group.name in factors}
        paths = dict.fromkeys(m.path for group in groups for m in group.members if m.role != "through")
        try:
            changed = rescale_(self.module, groups, self._build.inputs())
        except SurgeryError as error:
            for path in paths:
                self.skip(path, error.message)
            return
        for path in paths:
            if path in changed:
                self._record.add("assigned", path, describe(self.get(path)), "channels scaled", reason)
            else:
                self.skip(path, "scaling changes none of its numbers")

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
                    self._record.add("resized", path, before[path][0], describe(self.get(path)), removed)
                else:
                    self.skip(path, reason)
        members = {member.path for group in groups for member in group.members}
        for path, module in self.module.named_modules():
            if path not in members and own_shapes(module) != before[path][1]:
                self._record.add(
                    "resized", path, before[path][0], describe(module), "its parameters are tied with these"
                )

    def bypass(self, path: str, reason: str = "") -> None:
        """Replace the block at `path` by one that hands its first input on, or skip it where that does not run."""
        block = self.get(path)
        before, below = describe(block), [f"{path}.{name}" for name, _ in block.named_modules() if name]
        try:
            edits = bypass_(self.module, path, self._build.inputs())
        except SurgeryError as error:
            self.skip(path, error.message)
            return
        self._build.edited(edits)
        for inner in below:
            self._record.lose(inner)
        self._record.add("bypassed", path, before, "Bypass", reason)

    def replace(self, path: str, module: nn.Module, reason: str = "") -> None:
        """Put `module` wherever the module at `path` was used, or skip it where the model does not run with it."""
        old = self.get(path)
        aliases = self._build.aliases(old)
        try:
            self._build.module, edits = replace_(self.module, path, module, self._build.example())
        except SurgeryError as error:
            self.skip(path, error.message)
            return
        for alias in aliases:
            inner = (f"{alias}.{inner}".strip(".") for inner, _ in module.named_modules())
            self._build.origins.update(dict.fromkeys(inner, self._build.origin(alias)))
        self._build.edited(edits)
        self._record.add("replaced", path, describe(old), describe(module), reason)

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
        self._build.inherit(module)
        self._build.edited([MaskEdit(path, parameter, schedule_to_data(schedule))])
        held = masks_of(module)[parameter]
        count = held.keep.numel()
        self._record.add(
            "masked", path, before, f"{100 * held.removed / count:.4g} % of {count:,} weights zero", reason
        )

    def put_on_grid(
        self,
        path: str,
        grid: OnGrid | OnGroups | OnSigns,
        *,
        parameter: str = "weight",
        values: Tensor | None = None,
        reason: str = "",
    ) -> None:
        """Hold a weight of the module at `path` on a grid, through training and in the exported file."""
        module = self.get(path)
        before = describe(module)
        put_on_grid_(module, parameter, grid, values)
        self._build.inherit(module)
        self._build.edited([GridEdit(path, parameter, grid_to_data(grid))])
        record = self._record.add if parameter == "weight" else self._record.add_to
        record("assigned", path, before, f"{parameter} on {grid.levels} levels", reason)

    def round_input(self, paths: Sequence[str], low: float, high: float) -> None:
        """Round what modules read, the same tensor, to 8 bits, between numbers that training learns."""
        modules = [self.get(path) for path in paths]
        grid = InputGrid(low, high).to(next(modules[0].parameters()).device)
        put_input_on_grid_(modules, grid)
        for module in modules:
            self._build.inherit(module)
        self._build.edited([InputGridEdit(paths[0], tuple(paths[1:]), grid.bits, low == 0)])
        for path in paths:
            self._record.add_to("assigned", path, describe(self.get(path)), "range of its input learned")

    def share(self, path: str, codes: Tensor, values: Tensor, *, reason: str = "") -> None:
        """Let the weights of the module at `path` share values, through training and in the exported file."""
        module = self.get(path)
        before, book = describe(module), share_(module, "weight", codes, values)
        self._build.inherit(module)
        self._build.edited([CodebookEdit(path, "weight", book)])
        self._record.add("assigned", path, before, f"weight of {book['values']} values and zero", reason)

    def assign(self, path: str, tensor: Literal["weight", "input", "output"], format: Format) -> None:
        """Decide the number format of a tensor, under every path that the module has."""
        for alias in self._build.aliases(self.get(path)):
            self._build.formats.setdefault(alias, {})[tensor] = format
        text = f"{tensor} {format.dtype} per {format.granularity}"
        self._record.add_to("assigned", path, describe(self.get(path)), text)

    def shift(self, path: str, parameter: str, by: Tensor, reason: str = "") -> None:
        """Add to a parameter or buffer of one dimension of the module at `path`."""
        tensor = tensor_of(self.module, path, parameter)
        tensor.data += by.to(tensor)
        self._record.add_to("assigned", path, describe(self.get(path)), f"{parameter} shifted", reason)

    def skip(self, path: str, reason: str) -> None:
        """Record why a module stays as it is; the first reason counts."""
        self._record.skip(path, reason)

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
        loss, seeds = self._lesson(task, recipe.epochs, distillation)
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
        self._record.add("trained", "", "", after, f"went on from step {done.resumed:,}" if done.resumed else where)

    def report(self, text: str, share: float) -> None:
        """Tell how far the step is."""
        if self._progress is not None:
            self._progress(self._position, f"{self._name}: {text}", share)

    def close(self) -> None:
        """Give what was in scope and not mentioned a reason, and hand the step's changes over."""
        for path, reason in self._unmentioned():
            self.skip(path, reason)
        self._build.changes += self._record.changes.values()

    # Inside

    def _missing(self, path: str) -> str:
        """Return why a module cannot be changed, empty where it can: all required facts hold."""
        missing = self._traits.requires & ~self._facts.get(self._build.origin(path), ALL_FACTS)
        names = ", ".join(fact.name.lower() for fact in missing if fact.name)
        if missing:
            return f"{self._name} needs what no longer holds here: {names}"
        return why_no_format(self.get(path)) if self._traits.stage is Stage.QUANTIZE else ""

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
        if not self._record.changes:
            yield "", f"nothing in scope that {self._name} acts on"

    def _out_of_scope_parameters(self) -> list[nn.Parameter]:
        covered = [module for path, module in self.module.named_modules() if self._in_scope(path, module)]
        inside = {id(parameter) for module in covered for parameter in module.parameters(recurse=False)}
        return [p for p in self.module.parameters() if p.requires_grad and id(p) not in inside]

    def _need_task(self) -> Task:
        if self.task is None:
            raise DataError(f"{self._name} needs a task.", "give one to `compress(model, plan, task)`")
        return self.task

    def _lesson(self, task: Task, epochs: float, distillation: Distillation | None) -> Lesson:
        if distillation is None:
            return task.loss_of, lambda epoch: mix(self.seed, epoch)
        if distillation.hints > 0:
            distillation = replace(distillation, places=tuple(b.path for b in self._build.original_blocks()))
        return lesson(task, self.original, distillation, epochs * self.effort, self._build.memory, self._plan_seed)
