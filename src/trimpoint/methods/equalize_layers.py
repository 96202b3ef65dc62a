"""Scale channels so that neighbouring layers have weights of equal ranges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimpoint.graph.surgery import tensor_of
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.parts import Group, Member
from trimpoint.quantization.equalize import folded_scale, sizes_along

_CLOSE = 1e-3


@dataclass(frozen=True, kw_only=True)
class EqualizeLayers(Method):
    """Scale channels so that the layers that make them and those that read them have weights of equal ranges.

    A channel between two layers can be multiplied by any positive factor if what reads it is divided by it, as long as
    all in between is positively homogeneous (ReLU, pooling, sums, concatenation). The factors here leave each channel
    with the same share of the ranges of all its layers, so that one scale per tensor fits all channels.

    When it pays:
        Before weights are quantised with one scale per tensor, above all in networks of depthwise convolutions, whose
        channels often differ by orders of magnitude: there it makes the difference between chance and float. With a
        scale per channel weights gain nothing, and activations may gain or lose: measure.
    What it costs:
        Nothing: neither data nor time, and the model computes the same. A channel whose weights were small may get
        larger activations, for which `observer` and a scale per channel of what reads it are the remedy.
    Needs:
        Example inputs, by which the channels are found and the result is checked.
    Leaves alone:
        Channels that run through anything that is not positively homogeneous (GELU, SiLU, Sigmoid, ReLU6), through a
        normalisation, or to the output of the model; those that several uses of a parameter make; those made by layer
        norms, of which the size is no matter of weights; and channels that are zero. Each is listed with its reason.

    References:
        Nagel, van Baalen, Blankevoort and Welling, "Data-free quantization through weight equalization and bias
        correction" (2019), section 4.1; Meller, Finkelstein, Almog and Grobman, "Same, same but different: recovering
        neural network quantization error through weight factorization" (2019).
    """

    sweeps: int = param(
        20, doc="over all pairs of layers, at most; it ends where nothing changes", bounds=Bounds(ge=0), noop=0
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE, acts_on="groups", requires=Fact.FLOAT_WEIGHT, status="experimental"
    )

    def apply(self, ctx: Context) -> None:
        """Find the factors of all groups together, then scale once."""
        scalings = ctx.scalings()
        groups = []
        for group in scalings.groups:
            reason = group.reason or self._why_not(ctx, group)
            if reason:
                for path in dict.fromkeys(member.path for member in group.members):
                    ctx.skip(path, reason)
            else:
                groups.append(group)
        weights = _Weights(ctx, scalings.norms)
        factors = {group.name: torch.ones(group.size, dtype=torch.float64) for group in groups}
        for _ in range(self.sweeps):
            largest = max((weights.balance(group, factors[group.name]) for group in groups), default=0.0)
            if largest < _CLOSE:
                break
        changed = {name: sizes for name, sizes in factors.items() if bool(((sizes - 1).abs() > _CLOSE).any())}
        if changed:
            ctx.rescale(changed, "weights of equal ranges on both sides")

    def _why_not(self, ctx: Context, group: Group) -> str:
        if not all(ctx.covers(member.path) for member in group.members):
            return "its channels are shared with a module that is out of scope"
        made = [m for m in group.members if m.role != "in" and tensor_of(ctx.module, m.path, m.parameter).ndim > 1]
        return "" if made else "its channels are made by a normalisation alone"


class _Weights:
    """The ranges of all weights, channel by channel, as the factors so far leave them."""

    def __init__(self, ctx: Context, norms: Mapping[str, str]) -> None:
        self.ctx, self.norms, self.tensors = ctx, norms, dict[tuple[str, str], Tensor]()

    def balance(self, group: Group, factors: Tensor) -> float:
        """Equalise a group, in place; return by how much its factors change, at most."""
        made, read = (
            torch.stack(found).amax(0)
            for found in (
                [self._share(m, group.size) for m in self._members(group, made=True)],
                [self._share(m, group.size) for m in self._members(group, made=False)],
            )
        )
        alive = (made > 0) & (read > 0)
        change = torch.where(alive, (read / made.clamp_min(1e-300)).sqrt(), 1.0)
        factors *= change
        for member in (*self._members(group, made=True), *self._members(group, made=False)):
            sizes = change if member.role != "in" else 1 / change
            weight = self._weight(member)
            along = torch.ones(weight.shape[member.dim], dtype=torch.float64)
            for unit, positions in enumerate(member.indices):
                along[list(positions)] = sizes[unit]
            weight *= along.view([-1 if dim == member.dim else 1 for dim in range(weight.ndim)])
        return float((change - 1).abs().max())

    def _members(self, group: Group, *, made: bool) -> list[Member]:
        return [m for m in group.members if (m.role != "in") == made and self._weight(m).ndim > 1]

    def _weight(self, member: Member) -> Tensor:
        """Return a weight as it is with the batch norm behind it folded in, a working copy, float64."""
        key = (member.path, member.parameter)
        if key not in self.tensors:
            weight = tensor_of(self.ctx.module, *key).detach().double().cpu().clone()
            if member.path in self.norms and member.parameter == "weight":
                norm = self.ctx.get(self.norms[member.path])
                weight *= folded_scale(norm).cpu().view([-1] + [1] * (weight.ndim - 1))
            self.tensors[key] = weight
        return self.tensors[key]

    def _share(self, member: Member, size: int) -> Tensor:
        """Return the range of each channel as a share of the tensor's."""
        sizes = sizes_along(self._weight(member), member, size)
        return sizes / sizes.max().clamp_min(1e-300)
