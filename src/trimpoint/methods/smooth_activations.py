"""Scale channels so that activations have no outliers, at the cost of weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimpoint.errors import not_finite_at
from trimpoint.graph.surgery import tensor_of
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.padding import calibrate_kept, rows_of
from trimpoint.parts import Group, Member
from trimpoint.quantization.equalize import sizes_along, sizes_of

_READERS = (nn.Linear,)


@dataclass(frozen=True, kw_only=True)
class SmoothActivations(Method):
    """Divide the channels of activations by their outliers, and multiply the weights that read them (SmoothQuant).

    A few channels of a transformer's activations are many times larger than the others, and one scale per tensor
    leaves the others few levels. Weights have no such outliers. Each channel j is divided by
    max|Xⱼ|^strength / max|Wⱼ|^(1 − strength), which moves a part of the difficulty from activations to weights.

    When it pays:
        Before linear layers of transformers are quantised with weights and activations of 8 bits, the more, the larger
        the network.
    What it costs:
        A pass over the calibration data. The model computes the same and is as fast as before.
    Needs:
        `calibrate` data, and example inputs by which the channels are found and the result is checked.
    Leaves alone:
        Channels that are not made by a layer, a normalisation's affine part or attention's values alone, and read by
        linear layers alone: what a residual sum reads as well, as behind the normalisations of BERT, and what runs
        through GELU or another function that is not positively homogeneous. Each is listed with its reason.

    References:
        Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: accurate and efficient post-training quantization for
        large language models" (2023).
    """

    strength: float = param(
        0.5,
        doc="share of the outliers that goes to the weights; 0 leaves activations, 1 makes all channels alike",
        bounds=Bounds(ge=0, le=1),
        search=(0.5, 0.75),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        acts_on="groups",
        requires=Fact.FLOAT_WEIGHT,
        needs=frozenset({"calibrate"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Observe what the linear layers read, find the factors, and scale once."""
        groups: list[Group] = []
        for group in ctx.scalings().groups:
            if reason := group.reason or _why_not(ctx, group):
                for path in dict.fromkeys(member.path for member in group.members):
                    ctx.skip(path, reason)
            else:
                groups.append(group)
        if not groups:
            return
        reads = {group.name: next(m for m in group.members if m.role == "in") for group in groups}
        largest = _largest(ctx, [member.path for member in reads.values()])
        factors = {}
        for group in groups:
            seen = largest.get(reads[group.name].path)
            if seen is None:
                ctx.skip(reads[group.name].path, "the calibration data does not run through it")
                continue
            if not bool(torch.isfinite(seen).all()):
                raise not_finite_at(reads[group.name].path)
            activations = sizes_of(seen, reads[group.name], group.size)
            weights = torch.stack([_columns(ctx, m, group.size) for m in group.members if m.role == "in"]).amax(0)
            alive = (activations > 0) & (weights > 0)
            sizes = activations.pow(self.strength) / weights.clamp_min(1e-30).pow(1 - self.strength)
            factors[group.name] = torch.where(alive, 1 / sizes.clamp_min(1e-30), 1.0)
        if factors:
            ctx.rescale(factors, f"outliers of its input, strength {self.strength:g}")


def _why_not(ctx: Context, group: Group) -> str:
    if not all(ctx.covers(member.path) for member in group.members):
        return "its channels are shared with a module that is out of scope"
    readers = [m for m in group.members if m.role == "in"]
    other = next((m for m in readers if not isinstance(ctx.get(m.path), _READERS)), None)
    return f"its channels are read by `{other.path}`, which is no linear layer" if other else ""


def _columns(ctx: Context, member: Member, size: int) -> Tensor:
    return sizes_along(tensor_of(ctx.module, member.path, member.parameter), member, size).cpu()


def _largest(ctx: Context, paths: list[str]) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel that layers read, `[features]`, without padding."""
    found: dict[str, Tensor] = {}

    def see(path: str, _module: nn.Module, value: Any, kept: Tensor | None) -> None:
        rows = rows_of(value, kept)
        if len(rows):
            most = rows.detach().abs().amax(0).double().cpu()
            found[path] = torch.maximum(found[path], most) if path in found else most

    calibrate_kept(ctx, see, paths)
    return found
