"""The model in the making while a plan is applied, and what is known of it."""

import copy
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from trimpoint.errors import DataError, TraceError
from trimpoint.graph import Edit, find_blocks, find_groups, trace
from trimpoint.graph.scalings import find_scalings
from trimpoint.losses import call, explained
from trimpoint.method import Fact
from trimpoint.parts import Block, Group, Scalings
from trimpoint.signature import flatten
from trimpoint.task import Task
from trimpoint.values import Change, Format


@dataclass(kw_only=True)
class Build:
    """A model in the making: what the steps of a plan share and change."""

    module: nn.Module
    given: nn.Module
    task: Task | None
    memory: MutableMapping[str, Tensor] | None = None
    changes: list[Change] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    formats: dict[str, dict[str, Format]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    blocks_before: tuple[Block, ...] | None = None

    @cached_property
    def original(self) -> nn.Module:
        """The unmodified model in evaluation mode: the given one, or a copy where that is in training mode."""
        return copy.deepcopy(self.given).eval() if any(m.training for m in self.given.modules()) else self.given

    def inputs(self) -> Any:
        """Return example inputs of the whole model, two samples."""
        if self.task is None:
            raise DataError("Changing the structure of a model needs example inputs.", "give a task")
        return self.task.example_batch(2)

    def example(self) -> Any:
        """Return example inputs of the whole model, two samples; `None` where the task has none."""
        return self.inputs() if self.task is not None and self.task.has_example else None

    def core(self) -> tuple[nn.Module, Any, str]:
        """Return the exported module, example inputs for it, and the prefix of its paths."""
        if self.task is None or self.task.core is None:
            return self.module, self.inputs(), ""
        core = self.task.core_of(self.module)
        return core, inputs_of(core, self.module, self.inputs()), f"{self.task.core}."

    def groups(self) -> tuple[Group, ...]:
        """Return all coupled groups, with the paths of the whole model."""
        if "groups" not in self.structure:
            core, inputs, prefix = self.core()
            self.structure["groups"] = tuple(
                replace(
                    group,
                    members=tuple(replace(m, path=(prefix + m.path).rstrip(".")) for m in group.members),
                    places=tuple(replace(p, path=(prefix + p.path).rstrip(".")) for p in group.places),
                )
                for group in find_groups(core, inputs)
            )
        return self.structure["groups"]  # type: ignore[no-any-return]

    def blocks(self) -> tuple[Block, ...]:
        """Return all blocks that can be bypassed, with the paths of the whole model."""
        if "blocks" not in self.structure:
            core, inputs, prefix = self.core()
            self.structure["blocks"] = tuple(
                replace(b, path=(prefix + b.path).rstrip(".")) for b in find_blocks(core, inputs)
            )
        return self.structure["blocks"]  # type: ignore[no-any-return]

    def scalings(self) -> Scalings:
        """Return where the model can be scaled, with the paths of the whole model."""
        if "scalings" not in self.structure:
            core, inputs, prefix = self.core()
            self.structure["scalings"] = find_scalings(trace(core, inputs), prefix)
        return self.structure["scalings"]  # type: ignore[no-any-return]

    def original_blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the unmodified model, with the paths of the whole model; none where it has no trace."""
        if self.blocks_before is None:
            before = replace(self, module=self.original, structure={})
            try:
                self.blocks_before = before.blocks()
            except TraceError:
                self.blocks_before = ()
        return self.blocks_before

    def origin(self, path: str) -> str:
        """Return the path that a module had in the unmodified model."""
        return self.origins.get(path, path)

    def aliases(self, module: nn.Module) -> list[str]:
        """Return all paths at which the model holds a module."""
        return [path for path, other in self.module.named_modules(remove_duplicate=False) if other is module]

    def inherit(self, module: nn.Module) -> None:
        """Give the parts of a module the origin that it has."""
        for alias in self.aliases(module):
            inner = (f"{alias}.{name}".strip(".") for name, _ in module.named_modules())
            self.origins.update(dict.fromkeys(inner, self.origin(alias)))

    def edited(self, edits: Sequence[Edit]) -> None:
        """Record edits of the structure, and forget what was known of it."""
        self.edits += edits
        self.structure.clear()


def type_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's class and its base classes, as they are without parametrisations."""
    return tuple(kind.__name__ for kind in type_before_parametrizations(module).__mro__)


def own_shapes(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a module's own parameters and buffers."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return tuple(tuple(tensor.shape) for tensor in tensors)


def why_no_format(module: nn.Module) -> str:
    """Return why a module's own weights get no number format, or `""`: kernels of integers compute from float32."""
    kinds = {p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()} - {torch.float32}
    kind = next((str(kind).removeprefix("torch.") for kind in kinds), "")
    return f"its weight is {kind}, and number formats are for float32 (`model.float()`)" if kind else ""


def describe(module: nn.Module) -> str:
    """Return a module in a few words.

    Example:
        >>> describe(nn.Conv2d(16, 32, 3))
        'Conv2d 16→32'
    """
    name = type_names(module)[0]
    for first, last in (
        ("in_channels", "out_channels"),
        ("in_features", "out_features"),
        ("input_size", "hidden_size"),
    ):
        if hasattr(module, first) and hasattr(module, last):
            return f"{name} {getattr(module, first)}→{getattr(module, last)}"
    size = next((getattr(module, key) for key in ("num_features", "normalized_shape") if hasattr(module, key)), None)
    if size is not None:
        return f"{name} {'×'.join(map(str, size)) if isinstance(size, tuple) else size}"
    parameters = sum(p.numel() for p in module.parameters())
    return f"{name} ({parameters:,} parameters)" if parameters else name


def observed(
    model: nn.Module,
    task: Task,
    observe: Callable[[str, nn.Module, tuple[Any, ...], Any], None],
    paths: Sequence[str],
) -> int:
    """Run all calibration data through a model, see `Context.calibrate`."""
    samples = 0

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            observe(path, module, (*args, *kwargs.values()), output)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in paths]
    try:
        for inputs, _ in task.batches("calibrate"):
            with explained(inputs, "a batch of `calibrate`"):
                call(model, inputs)
            samples += len(flatten(inputs)[0])
    finally:
        for handle in handles:
            handle.remove()
    return samples


def inputs_of(core: nn.Module, model: nn.Module, inputs: Any) -> Any:
    """Return what `core` receives when `model` is called with `inputs`, as `call` takes it.

    Raises:
        DataError: if the model does not call its core.
    """
    seen: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs and args:
            kwargs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        seen.append(dict(kwargs) if kwargs else args)

    handle = core.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), explained(inputs):
            call(model, inputs)
    finally:
        handle.remove()
    if not seen:
        raise DataError("The model does not call its core on the example inputs.", "check `Task(core=...)`")
    return seen[0]


def tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of all parameters that more than one module of a model has."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in holders.items() if len(modules) > 1}
