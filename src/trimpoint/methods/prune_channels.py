"""Remove channels and neurons, over everything that they run through."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimpoint.importance import NAMES, between_groups, scores
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.parts import Block, Group

_OTHER_UNITS = {
    "heads": "its units are attention heads, no channels",
    "hidden": "its units are hidden units of a recurrent layer, no channels",
}


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Method):
    """Remove the least important channels of convolutions and neurons of linear layers.

    When it pays:
        Where layers are wide, with widths that stay multiples of 8 or 16; before quantisation. On narrow networks
        removing blocks is worth more: time does not fall with the multiplications.
    What it costs:
        Quality falls with the ratio; plan a recovery step behind it. Pruning in several rounds is a plan of several
        steps, each followed by a recovery: `ratio` is a share of the units that are there when the step begins, so
        that two steps of 0.3 leave 0.49 of them, before rounding. `taylor` costs a backward pass over the calibration
        data, `fisher` and `group-fisher` one for each of up to 256 single samples, `activation` a forward pass.
    Needs:
        Example inputs to find the coupled channels; for `activation` also `calibrate` data, for `taylor`, `fisher` and
        `group-fisher` `calibrate` data and a loss.
    Leaves alone:
        Channels of the model's inputs and outputs, groups that are no wider than `round_to`, attention heads, hidden
        units of recurrent layers, and what could not be traced; each is listed with its reason.

    References:
        Li et al., "Pruning filters for efficient ConvNets" (2017), and Fang et al., "DepGraph: towards any structural
        pruning" (2023), for the magnitude of a coupled group; Molchanov et al., "Importance estimation for neural
        network pruning" (2019), for the first-order Taylor expansion; the other criteria are cited in
        `trimpoint.importance.criteria`. Fang et al., "Isomorphic pruning for vision models" (2024), for ranking groups
        of one structure together.
    """

    ratio: float = param(
        0.5,
        doc="share to remove of the units that there are now",
        bounds=Bounds(ge=0, lt=1),
        noop=0.0,
        weak=0.25,
        search=(0.25, 0.5, 0.75),
    )
    importance: str = param(
        "magnitude",
        doc="what makes a unit important, or `package.module:attribute` for a function of your own from a group and "
        "the evidence to one number for each unit",
        choices=NAMES,
        reference=True,
    )
    round_to: int = param(8, doc="kept widths are multiples of this many channels", bounds=Bounds(ge=1), search=(8, 16))
    scope: str = param(
        "local",
        doc="the same share of each group, or the least important of all groups (scores divided by their group's "
        "mean), or of all groups of one structure (scores as they are)",
        choices=("local", "global", "isomorphic"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        acts_on="groups",
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs", "file_bytes"}),
    )

    def apply(self, ctx: Context) -> None:
        """Remove the least important units of every group in scope."""
        groups = []
        for group in ctx.groups():
            if group.kind != "channels":
                _skip(ctx, group, _OTHER_UNITS[group.kind])
            elif width(group) <= self.round_to:
                _skip(ctx, group, f"its {width(group)} channels are no more than round_to={self.round_to}")
            elif self.ratio == 0:
                _skip(ctx, group, "the ratio is 0")
            else:
                groups.append(group)
        if not groups:
            return
        found = scores(ctx, groups, self.importance)
        wanted = self._wanted(ctx.module, groups, found)
        removals = {}
        for group in groups:
            kept = aligned(group, wanted[group.name], self.round_to)
            if kept >= group.size:
                _skip(ctx, group, f"removing {group.size - wanted[group.name]} of {group.size} units rounds to none")
            else:
                order = torch.argsort(found[group.name], stable=True)
                removals[group.name] = sorted(int(unit) for unit in order[: group.size - kept])
        ctx.resize(removals)

    def forecast(self, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return the share of each module's multiplications that is left after the same share of every group goes."""
        shares: dict[str, float] = {}
        for group in groups:
            kept = 1.0
            if not group.reason and group.kind == "channels" and width(group) > self.round_to:
                wanted = group.size - math.floor(group.size * self.ratio)
                kept = aligned(group, wanted, self.round_to) / group.size
            touched = {(member.path, member.role) for member in group.members if member.role != "through"}
            for path, _ in touched:
                shares[path] = shares.get(path, 1.0) * kept
        return {path: share for path, share in shares.items() if share < 1}

    def _wanted(self, module: nn.Module, groups: Sequence[Group], found: Mapping[str, Tensor]) -> dict[str, int]:
        """Return how many units of each group are to be kept, before rounding."""
        if self.scope == "local":
            return {group.name: group.size - math.floor(group.size * self.ratio) for group in groups}
        if self.scope == "global":
            return _ranked(groups, between_groups(found, self.importance), self.ratio)
        alike: dict[object, list[Group]] = {}
        for group in groups:
            alike.setdefault(structure(module, group), []).append(group)
        return {name: kept for some in alike.values() for name, kept in _ranked(some, found, self.ratio).items()}


def width(group: Group) -> int:
    """Return how many channels the first producing module of a group has."""
    return group.size * _channels(group)


def aligned(group: Group, wanted: int, round_to: int) -> int:
    """Return the number of units nearest to `wanted` whose channels are a multiple of `round_to`.

    At least one such multiple is kept, and never more than there is.
    """
    step = round_to // math.gcd(round_to, _channels(group))
    return min(group.size, max(1, math.floor(wanted / step + 0.5)) * step)


def structure(module: nn.Module, group: Group) -> tuple[tuple[str, str, int, str], ...]:
    """Return what isomorphic groups share: the classes of the modules that a unit runs through, in order, and how."""
    return tuple((type(module.get_submodule(m.path)).__name__, m.parameter, m.dim, m.role) for m in group.members)


def _ranked(groups: Sequence[Group], found: Mapping[str, Tensor], ratio: float) -> dict[str, int]:
    """Return how many units of each group are left when the least important ones of all of them go."""
    every = torch.cat([found[group.name] for group in groups])
    owner = torch.cat([torch.full((group.size,), index) for index, group in enumerate(groups)])
    gone = owner[torch.argsort(every, stable=True)[: math.floor(len(every) * ratio)]]
    lost = torch.bincount(gone, minlength=len(groups)).tolist()
    return {group.name: group.size - count for group, count in zip(groups, lost, strict=True)}


def _channels(group: Group) -> int:
    first = next((member for member in group.members if member.role == "out"), group.members[0])
    return len(first.indices[0])


def _skip(ctx: Context, group: Group, reason: str) -> None:
    for member in group.members:
        if member.role == "out":
            ctx.skip(member.path, reason)
