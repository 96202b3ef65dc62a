"""The contract of a compression technique: a frozen dataclass whose hyper-parameters *are* the method.

A technique is one file: a `Method` with its parameters declared by `param`, its `traits`, and `apply`. Validation,
search ranges, the recipe schema and the reference page are all derived from these declarations.
"""

import dataclasses
import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trimpoint.errors import InvalidParameterError
from trimpoint.params import Bounds, param, wrong_param
from trimpoint.parts import Block, Group, MaskSchedule, Scalings
from trimpoint.values import Format

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from trimpoint.graph.grids import OnGrid, OnGroups
    from trimpoint.graph.signs import OnSigns
    from trimpoint.recover.distill import Distillation
    from trimpoint.recover.penalty import Penalty
    from trimpoint.recover.recipe import Recovery
    from trimpoint.task import Task


__all__ = ["ALL_FACTS", "Bounds", "Context", "Fact", "Method", "Need", "Site", "Stage", "Traits", "param"]


class Stage(enum.IntEnum):
    """When a transform may run: never before one of a lower stage. Recovery may stand anywhere."""

    STRUCTURE = 1
    FACTORIZE = 2
    SPARSIFY = 3
    QUANTIZE = 4
    RECOVER = 9


class Fact(enum.Flag):
    """What holds for a module and can be lost: the only thing methods know of each other.

    Members:
        FLOAT_WEIGHT: its weights are plain floating-point parameters.
        DENSE: no weight is held at zero.
        ORIGINAL_SHAPE: its parameters have the shapes of the unmodified model's.
        PRESENT: it has not been bypassed.
    """

    NONE = 0
    FLOAT_WEIGHT = enum.auto()
    DENSE = enum.auto()
    ORIGINAL_SHAPE = enum.auto()
    PRESENT = enum.auto()


ALL_FACTS = Fact.FLOAT_WEIGHT | Fact.DENSE | Fact.ORIGINAL_SHAPE | Fact.PRESENT
Need = Literal["train", "calibrate", "loss"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method is, declared: everything that validation, search and the conformance harness go by.

    Args:
        stage: when it may run.
        targets: module classes that it acts on, as names (with those derived from them); `()` for methods that act on
            blocks, on the whole model, or on groups of any classes.
        acts_on: the unit it changes.
        requires: facts that must hold for a module to be changed.
        removes: facts that no longer hold for what was changed.
        reduces: metrics that it claims to reduce in the exported file.
        needs: what the task must provide.
        status: `experimental` methods stay out of the default search.
    """

    stage: Stage
    targets: tuple[str, ...] = ()
    acts_on: Literal["modules", "groups", "blocks", "model"] = "modules"
    requires: Fact = Fact.NONE
    removes: Fact = Fact.NONE
    reduces: frozenset[str] = frozenset()
    needs: frozenset[Need] = frozenset()
    status: Literal["stable", "experimental"] = "stable"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A module that a method may act on: where it is, where it was, what it is.

    Args:
        path: of the module as the model is now.
        origin: its path in the unmodified model.
        module: itself.
        tied: whether another module holds one of its parameters, so that replacing it would tear them apart.
    """

    path: str
    origin: str
    module: "nn.Module"
    tied: bool = False


class Context(ABC):
    """What a method sees and may do: the only way in which it touches the model.

    Every edit is recorded as a `Change`; tied and shared modules stay tied and shared.

    Attributes:
        module: the model as it is now, to be read; edits go through the methods below.
        original: the unmodified model, in evaluation mode, never to be changed.
        task: data and loss; `None` where a plan is applied without one.
        rng: NumPy generator, seeded by the plan.
        seed: for what seeds itself, derived from the plan's seed and the step's position.
        effort: share of its full length that a recovery step is to run, in (0, 1].
    """

    module: "nn.Module"
    original: "nn.Module"
    task: "Task | None"
    rng: "np.random.Generator"
    seed: int
    effort: float

    @abstractmethod
    def modules(self) -> Iterator[Site]:
        """Yield the modules in scope (`where`, targets, required facts, weights); others are recorded as skipped."""

    @abstractmethod
    def groups(self) -> tuple[Group, ...]:
        """Return the removable coupled groups in scope; the others are recorded as skipped with their reason."""

    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks in scope that can be bypassed."""

    @abstractmethod
    def covers(self, path: str) -> bool:
        """Return whether the module at `path` is in scope of the step's `where`."""

    @abstractmethod
    def get(self, path: str) -> "nn.Module":
        """Return the module at `path` as it is now."""

    @abstractmethod
    def scalings(self) -> Scalings:
        """Return where channels can be scaled without a change of what the model computes.

        Raises:
            TraceError: if the model cannot be traced.
        """

    @abstractmethod
    def rescale(self, factors: "Mapping[str, Tensor]", reason: str = "") -> None:
        """Scale channels: multiply all that makes them by a factor, and divide all that reads them by it.

        Args:
            factors: name of a group of `scalings` → positive factors `[size]`. All at once; where the model does not
                answer as before they stay, skipped.
            reason: how the factors were chosen.
        """

    @abstractmethod
    def resize(self, removals: Mapping[str, Sequence[int]]) -> None:
        """Remove units from groups: group name → units. All at once; where that does not run they stay, skipped."""

    @abstractmethod
    def bypass(self, path: str, reason: str = "") -> None:
        """Replace the block at `path` by one that hands its first input on."""

    @abstractmethod
    def replace(self, path: str, module: "nn.Module", reason: str = "") -> None:
        """Put `module` where the module at `path` was, everywhere it is used."""

    @abstractmethod
    def mask(
        self,
        path: str,
        keep: "Tensor | None" = None,
        *,
        parameter: str = "weight",
        values: "Tensor | None" = None,
        schedule: MaskSchedule | None = None,
        reason: str = "",
    ) -> None:
        """Hold weights of the module at `path` at zero, through training and in the exported file.

        Args:
            path: of the module.
            keep: booleans of the parameter's shape, false where a weight is to be zero.
            parameter: its name.
            values: that the weights take before.
            schedule: the mask comes about in training; `keep` is then what is kept before the first step.
            reason: how the weights were chosen.
        """

    @abstractmethod
    def put_on_grid(
        self,
        path: str,
        grid: "OnGrid | OnGroups | OnSigns",
        *,
        parameter: str = "weight",
        values: "Tensor | None" = None,
        reason: str = "",
    ) -> None:
        """Hold a weight of the module at `path` on a grid, through training and in the exported file.

        Args:
            path: of the module.
            grid: with the scales, see `trimpoint.graph.grids` and `trimpoint.graph.signs`; in float32.
            parameter: name of the weight.
            values: that the weight takes before, such as the result of a rounding that looks at more than one number.
            reason: how scales and integers were chosen.
        """

    @abstractmethod
    def round_input(self, paths: Sequence[str], low: float, high: float) -> None:
        """Round what modules read, one and the same tensor, to 8 bits, between numbers that training learns.

        Args:
            paths: of the modules.
            low: least level at first, at most 0; where it is 0 it stays.
            high: greatest level at first.
        """

    @abstractmethod
    def share(self, path: str, codes: "Tensor", values: "Tensor", *, reason: str = "") -> None:
        """Let the weights of the module at `path` share values, which are trained, also in the exported file.

        Args:
            path: of the module.
            codes: of the weight's shape, uint8: 0 for zero, i + 1 for `values[i]`.
            values: one-dimensional, at most 255.
            reason: how they were chosen.
        """

    @abstractmethod
    def assign(self, path: str, tensor: Literal["weight", "input", "output"], format: Format) -> None:
        """Decide the number format of a tensor of the module at `path`; the runtime realises it."""

    @abstractmethod
    def shift(self, path: str, parameter: str, by: "Tensor", reason: str = "") -> None:
        """Add `by` to a parameter or buffer of one dimension (a bias, a mean) of the module at `path`."""

    @abstractmethod
    def report(self, text: str, share: float) -> None:
        """Tell what is being done, and which share of the step is done."""

    @abstractmethod
    def skip(self, path: str, reason: str) -> None:
        """Record why the module at `path` stays as it is."""

    @abstractmethod
    def calibrate(self, observe: "Callable[[str, nn.Module, tuple[Any, ...], Any], None]", paths: Sequence[str]) -> int:
        """Run the calibration data through the model and call `observe(path, module, inputs, output)` at `paths`.

        Returns:
            The number of samples that were run.

        Raises:
            DataError: if the task has no calibration data.
        """

    @abstractmethod
    def train(
        self, recipe: "Recovery", distillation: "Distillation | None" = None, penalty: "Penalty | None" = None
    ) -> None:
        """Train what is in scope on the task's training data, in place; what cannot be trained is skipped.

        Args:
            recipe: how long and how; its length is scaled by `effort`.
            distillation: what to learn from the unmodified model; `None` is the task's loss alone.
            penalty: on the weights, added to the loss.
        """


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A compression or recovery technique.

    A subclass is a frozen dataclass with keyword-only fields declared by `param`. Its docstring has the headings
    *When it pays*, *What it costs*, *Needs*, *Leaves alone* and *References*.
    """

    traits: ClassVar[Traits]

    def __post_init__(self) -> None:
        problems = [problem for field in dataclasses.fields(self) if (problem := wrong_param(self, field))]
        if problems:
            text = problems[0] if len(problems) == 1 else "\n".join(f"{i}. {p}" for i, p in enumerate(problems, 1))
            raise InvalidParameterError(text, f"see `trimpoint methods {self.name}`")

    @classmethod
    def method_name(cls) -> str:
        """Return the name used in recipes and on the command line, such as `drop-blocks`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def name(self) -> str:
        """The name used in recipes and on the command line."""
        return type(self).method_name()

    @property
    def params(self) -> dict[str, Any]:
        """The hyper-parameters, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def formats(self) -> Mapping[str, Format]:
        """The number formats that it gives the tensors of a module, known beforehand: tensor → format.

        Tensors are named as in `Context.assign`. A method that gives layers different ones names that of the middle.
        """
        return {}

    @abstractmethod
    def apply(self, ctx: Context) -> None:
        """Change the model through `ctx`."""

    @classmethod
    def variants(cls, blocks: Sequence[Block], groups: Sequence[Group]) -> "tuple[Method, ...]":  # noqa: ARG003
        """Return the configurations that a search tries on a model, weakest first.

        By default the values of the first parameter that declares `search`, or the defaults alone.

        Args:
            blocks: of the unmodified model that can be bypassed.
            groups: of the unmodified model that can be cut.
        """
        for field in dataclasses.fields(cls):
            if field.metadata.get("search"):
                return tuple(cls(**{field.name: value}) for value in field.metadata["search"])
        return (cls(),)

    def forecast(self, model: "nn.Module", blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return what is left of the parameters of modules, before anything is done: path → share in [0, 1].

        A path also stands for everything below it; modules that are not named keep all of theirs, and so do those of
        which it cannot be told without the data. The search takes what is left of a module's time to be the same; it
        serves only to rank what is tried first.

        Args:
            model: unmodified.
            blocks: of the unmodified model that can be bypassed.
            groups: of the unmodified model that can be cut.
        """
        return {}
