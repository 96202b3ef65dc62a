"""Methods that are right, and methods with one bug each that a check must catch."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.values import Format

LAYERS = ("Linear", "Conv2d")
INT8 = Format(dtype="int8", granularity="channel")
UINT8 = Format(dtype="uint8", symmetric=False)


def tied(ctx: Context, module: nn.Module) -> bool:
    """Return whether a parameter of the module is used by another module as well."""
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    return any(
        other is not module and own & {id(parameter) for parameter in other.parameters(recurse=False)}
        for other in ctx.module.modules()
    )


@dataclass(frozen=True, kw_only=True)
class RoundWeights(Method):
    """Round weights to fewer bits of mantissa.

    When it pays: the file compresses better.
    What it costs: nothing but precision.
    Needs: nothing.
    Leaves alone: tied weights.
    References: IEEE 754.
    """

    bits: int = param(3, doc="kept bits of the mantissa", bounds=Bounds(ge=1, le=23), noop=23, weak=8)
    exact_bias: bool = param(True, doc="whether the bias is left as it is")

    traits: ClassVar[Traits] = Traits(stage=Stage.SPARSIFY, targets=LAYERS, requires=Fact.FLOAT_WEIGHT)

    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            if self.bits == 23:
                ctx.skip(site.path, "all bits are kept")
            elif site.tied:
                ctx.skip(site.path, "its weight is tied")
            else:
                ctx.replace(site.path, self.rounded(ctx, site.module), f"{self.bits} bits")

    def rounded(self, ctx: Context, module: nn.Module) -> nn.Module:
        result = copy.deepcopy(module)
        with torch.no_grad():
            result.weight.copy_(self.round(result.weight))
        return result

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(weight.float())
        steps = 2.0 ** (self.bits + 1)
        return torch.ldexp((mantissa * steps).round() / steps, exponent).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class AssignInt8(Method):
    """Assign 8-bit formats to linear layers and convolutions.

    When it pays: on CPUs with 8-bit dot products.
    What it costs: some quality.
    Needs: calibration data.
    Leaves alone: everything else.
    References: Jacob et al. (2018).
    """

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=LAYERS,
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"file_bytes"}),
        needs=frozenset({"calibrate"}),
    )

    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            ctx.assign(site.path, "weight", INT8)
            ctx.assign(site.path, "input", UINT8)


# One bug each


class MutatesTheModel(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        with torch.no_grad():
            for parameter in ctx.original.parameters():
                parameter.mul_(2)


class MutatesTheData(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        for inputs, _ in ctx.task.data("train"):
            for leaf in (
                inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else [inputs]
            ):
                leaf.add_(1)


class SeedsGlobally(RoundWeights):
    def apply(self, ctx: Context) -> None:
        torch.manual_seed(ctx.seed)
        random.seed(ctx.seed)
        super().apply(ctx)


class IgnoresWhere(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        for path, module in list(ctx.module.named_modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not tied(ctx, module) and path:
                ctx.replace(path, self.rounded(ctx, module))


class ForgetsToRecord(RoundWeights):
    def apply(self, ctx: Context) -> None:
        with torch.no_grad():
            for site in ctx.modules():
                site.module.weight.copy_(self.round(site.module.weight))
                ctx.skip(site.path, "nothing to see here")


class SkipsWithoutReason(RoundWeights):
    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            ctx.skip(site.path, "")


class IsRandom(RoundWeights):
    def round(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.SystemRandom().randrange(2**31))
            return super().round(weight * (1 + 0.01 * torch.rand_like(weight)))


class NoopIsNotExact(RoundWeights):
    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            if not site.tied:
                ctx.replace(site.path, self.rounded(ctx, site.module))

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        return super().round(weight) * (1 + 1e-6)


class DoesNothing(RoundWeights):
    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            ctx.skip(site.path, "another day")


@dataclass(frozen=True, kw_only=True)
class ClaimsMasks(RoundWeights):
    """See `RoundWeights`: this one sets weights to zero and calls that smaller."""

    traits: ClassVar[Traits] = Traits(
        stage=Stage.SPARSIFY,
        targets=LAYERS,
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.DENSE,
        reduces=frozenset({"file_bytes", "params"}),
    )

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (weight.abs() > weight.abs().median())


class BreaksTies(RoundWeights):
    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            ctx.replace(site.path, self.rounded(ctx, site.module))


class Renames(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        for path, module in list(ctx.module.named_modules()):
            if isinstance(module, nn.Linear) and path:
                parent, _, name = path.rpartition(".")
                holder = ctx.get(parent)
                setattr(holder, f"{name}_small", getattr(holder, name))


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


class ChangesTheType(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        for module in ctx.module.modules():
            if type(module) is nn.Linear:
                module.__class__ = Doubling


class LeavesHooks(RoundWeights):
    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            site.module.register_forward_hook(lambda module, inputs, output: None)
        super().apply(ctx)


class Freezes(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        ctx.module.requires_grad_(False)


class HidesItsNeed(RoundWeights):
    def apply(self, ctx: Context) -> None:
        paths = [site.path for site in ctx.modules()]
        ctx.calibrate(lambda path, module, inputs, output: None, paths)
        super().apply(ctx)


class ForcesFloat32(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        for module in ctx.module.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.float()


class HidesZeros(RoundWeights):
    def round(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (weight.abs() > weight.abs().median())


@dataclass(frozen=True, kw_only=True)
class DeclaresTooMuch(RoundWeights):
    """See `RoundWeights`: this one says that shapes change."""

    traits: ClassVar[Traits] = Traits(
        stage=Stage.SPARSIFY, targets=LAYERS, requires=Fact.FLOAT_WEIGHT, removes=Fact.ORIGINAL_SHAPE
    )


class FlipsSigns(RoundWeights):
    def round(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


class GrowsWithWeakness(RoundWeights):
    def round(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (1 + self.bits)


class Branching(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.inner = inner.weight, inner.bias, [inner]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](x) if float(x.sum()) > 1e9 else self.inner[0](x) * 1


def behind_its_back(ctx: Context, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace every untied layer without the context."""
    for path, module in list(ctx.module.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not tied(ctx, module) and path:
            parent, _, name = path.rpartition(".")
            setattr(ctx.get(parent), name, make(module))


class CannotBeExported(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        behind_its_back(ctx, Branching)


class CannotBeRebuilt(RoundWeights):
    def apply(self, ctx: Context) -> None:
        super().apply(ctx)
        behind_its_back(ctx, lambda module: nn.Sequential(module, nn.Identity()))


class BreaksAfterOthers(RoundWeights):
    def apply(self, ctx: Context) -> None:
        for site in ctx.modules():
            if site.module.weight.shape != ctx.original.get_submodule(site.origin).weight.shape:
                raise RuntimeError("who pruned this?")
        super().apply(ctx)


class AcceptsAnything(RoundWeights):
    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class HasAnOpenParameter(RoundWeights):
    """See `RoundWeights`."""

    extra: float = 1.0


class HasNoHeadings(RoundWeights):
    """Round weights to fewer bits."""


@dataclass(frozen=True, kw_only=True)
class CannotBeWritten(RoundWeights):
    """See `RoundWeights`."""

    ignored: frozenset[str] = param(frozenset({"a"}), doc="names that are left alone")


class HasAnOpaqueRepr(RoundWeights):
    def __repr__(self) -> str:
        return "<method>"


@dataclass(frozen=True, kw_only=True)
class ContradictsItself(RoundWeights):
    """See `RoundWeights`."""

    traits: ClassVar[Traits] = Traits(stage=Stage.RECOVER, targets=LAYERS, reduces=frozenset({"file_size"}))


PLANTED: dict[type[Method], str] = {
    MutatesTheModel: "model_untouched",
    MutatesTheData: "task_untouched",
    SeedsGlobally: "global_state_untouched",
    IgnoresWhere: "where_respected",
    ForgetsToRecord: "every_change_recorded",
    SkipsWithoutReason: "every_module_accounted",
    IsRandom: "same_seed_same_bytes",
    NoopIsNotExact: "noop_exact",
    DoesNothing: "not_vacuous",
    ClaimsMasks: "reductions_measured",
    BreaksTies: "ties_kept",
    Renames: "names_kept",
    ChangesTheType: "same_interface",
    LeavesHooks: "nothing_left_behind",
    Freezes: "trains_on",
    HidesItsNeed: "missing_data",
    ForcesFloat32: "bfloat16",
    HidesZeros: "facts",
    DeclaresTooMuch: "facts",
    FlipsSigns: "better_than_zeroing",
    GrowsWithWeakness: "error_falls",
    CannotBeExported: "exportable",
    CannotBeRebuilt: "rebuild",
    BreaksAfterOthers: "sequences_run",
    AcceptsAnything: "bounds_rejected",
    HasAnOpenParameter: "parameters_documented",
    HasNoHeadings: "docstring_headings",
    CannotBeWritten: "round_trip",
    HasAnOpaqueRepr: "readable",
    ContradictsItself: "traits_sound",
}
