"""What the methods that remove units of coupled groups share: which units go, and what is left then."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trimpoint.importance.scoring import NAMES, scores
from trimpoint.method import Bounds, Context, Method, param
from trimpoint.parts import Block, Group
from trimpoint.sparsity.inputs import PLAIN, own_forward

_UNITS = {"channels": "channels", "heads": "attention heads", "hidden": "hidden units"}
_FOREIGN = _UNITS | {"hidden": "hidden units of a recurrent layer"}


@dataclass(frozen=True, kw_only=True)
class UnitPruning(Method):
    """A method that removes the least important units of coupled groups, of one kind of units.

    Attributes:
        units: the kind; groups of another one are left alone.
    """

    units: ClassVar[Literal["channels", "heads", "hidden"]]

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

    @abstractmethod
    def unfit(self, model: nn.Module, alike: Sequence[Group]) -> str:
        """Return why groups of this kind, which must keep equally many units, are left alone, or `""`."""

    def multiple(self, alike: Sequence[Group]) -> int:  # noqa: ARG002
        """Return of how many units such groups keep a multiple."""
        return 1

    def wanted(self, model: nn.Module, groups: Sequence[Group], found: Mapping[str, Tensor]) -> dict[str, int]:  # noqa: ARG002
        """Return how many units each group is to keep, before rounding: by default the same share of all."""
        return {group.name: self.kept(group) for group in groups}

    def scored(self, ctx: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Return the importance of the units of each group, `[units]`; without those of which nothing is known."""
        return scores(ctx, groups, self.importance)

    def prepared(self, ctx: Context, groups: Sequence[Group]) -> Sequence[Group]:  # noqa: ARG002
        """Make the model ready for the groups to be scored, and return them as they are then."""
        return groups

    def opened(self, ctx: Context, groups: Sequence[Group]) -> Sequence[Group]:  # noqa: ARG002
        """Make the model ready for units of groups to go, and return them as they are then, in the same order."""
        return groups

    def kept(self, group: Group) -> int:
        """Return how many units of a group are left without the share `ratio`, before rounding."""
        return group.size - share_of(self.ratio, group.size)

    def rounded(self, alike: Sequence[Group], wanted: int) -> int:
        """Return how many units are kept: all where `wanted` is no fewer, else the nearest multiple, at least one."""
        if wanted >= alike[0].size:
            return alike[0].size
        multiple = self.multiple(alike)
        return min(alike[0].size, max(1, math.floor(wanted / multiple + 0.5)) * multiple)

    def apply(self, ctx: Context) -> None:
        """Remove the least important units of every group in scope."""
        ours: list[Group] = []
        for alike in together(ctx.groups()):
            if reason := self._refusal(ctx.module, alike):
                _skip(ctx, alike, reason)
            else:
                ours += alike
        _skip_own_forwards(ctx)
        if not ours:
            return
        groups = self.prepared(ctx, ours)
        found = self.scored(ctx, groups)
        if not (groups := self._ranked(ctx, groups, found)):
            return
        wanted = self.wanted(ctx.module, groups, found)
        gone: dict[str, list[int]] = {}
        for alike in together(groups):
            for group in alike:
                kept = self.rounded(alike, wanted[group.name])
                if kept < group.size:
                    order = torch.argsort(found[group.name], stable=True)
                    gone[group.name] = sorted(int(unit) for unit in order[: group.size - kept])
                else:
                    _skip(ctx, [group], self.none_goes(group, wanted[group.name]))
        losing = [group for group in groups if group.name in gone]
        ctx.resize({new.name: gone[old.name] for old, new in zip(losing, self.opened(ctx, losing), strict=True)})

    def forecast(self, model: nn.Module, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return the share of parameters that is left of each module when the same share of every group goes."""
        kept: dict[str, int] = {}
        for alike in together(groups):
            if not self._refusal(model, alike):
                kept |= {group.name: self.rounded(alike, self.kept(group)) for group in alike}
        return left(model, groups, kept)

    def none_goes(self, group: Group, wanted: int) -> str:
        """Return the reason why no unit of a group goes, of which `wanted` were to be kept."""
        if wanted >= group.size:
            return f"none of its {group.size} {_UNITS[self.units]} is among the least important {100 * self.ratio:.4g}%"
        return f"removing {group.size - wanted} of {group.size} {_UNITS[self.units]} rounds to none"

    def _ranked(self, ctx: Context, groups: Sequence[Group], found: Mapping[str, Tensor]) -> list[Group]:
        """Return the groups whose units can be ranked, those that must keep equally many with all of theirs."""
        ranked: list[Group] = []
        for alike in together(groups):
            if all(group.name in found for group in alike):
                ranked += alike
            else:
                _skip(ctx, alike, f"the loss has no gradient there, and {self.importance!r} cannot rank units without")
        return ranked

    def _refusal(self, model: nn.Module, alike: Sequence[Group]) -> str:
        group = alike[0]
        if group.reason or group.kind != self.units:
            return group.reason or f"its units are {_FOREIGN[group.kind]}, no {_FOREIGN[self.units]}"
        return self.unfit(model, alike) or ("" if self.ratio else "the ratio is 0")


def share_of(ratio: float, count: int) -> int:
    """Return how many whole units of `count` a ratio removes, at most its share.

    Example:
        >>> share_of(0.29, 100), share_of(0.3, 12)
        (29, 3)
    """
    return math.floor(ratio * count + 1e-9)  # 0.29 * 100 is a little less than 29.


def together(groups: Iterable[Group]) -> list[list[Group]]:
    """Return groups that must keep equally many units together, each of the others by itself."""
    sets: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        sets.setdefault((group.alike, "" if group.alike else group.name), []).append(group)
    return list(sets.values())


def ranked_together(
    groups: Sequence[Group], found: Mapping[str, Tensor], ratio: float, *, spared: int = 0
) -> dict[str, int]:
    """Return how many units of each group are left when the least important ones of all of them go.

    Args:
        groups: that are ranked together.
        found: the importance of the units of each group, `[units]`.
        ratio: share of all units that goes.
        spared: most important units of each group that are not ranked; the next of all go in their place.
    """
    ranked = [torch.sort(found[group.name])[0][: group.size - spared] for group in groups]
    owner = torch.cat([torch.full((len(values),), index) for index, values in enumerate(ranked)])
    count = share_of(ratio, sum(group.size for group in groups))
    lost = torch.bincount(owner[torch.argsort(torch.cat(ranked), stable=True)[:count]], minlength=len(groups))
    return {group.name: group.size - count for group, count in zip(groups, lost.tolist(), strict=True)}


def left(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]) -> dict[str, float]:
    """Return the share of parameters that is left of each module that loses some: path → share.

    What stands for a module also stands for everything below it: shares of modules inside of others are over theirs,
    and may be above 1 there.

    Args:
        model: as it is now.
        groups: of the model.
        kept: group name → how many of its units are kept; the others keep all.
    """
    lost: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for group in groups:
        gone = 1 - kept.get(group.name, group.size) / group.size
        positions: dict[tuple[nn.Parameter, int], set[int]] = defaultdict(set)
        for member in group.members if gone else ():
            tensor = getattr(model.get_submodule(member.path), member.parameter)
            if isinstance(tensor, nn.Parameter):
                positions[tensor, member.dim].update(*member.indices)
        for (tensor, dim), found in positions.items():
            lost[id(tensor)][dim] += len(found) * gone / tensor.shape[dim]
    shares: dict[str, float] = {}
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        rest = sum(p.numel() * math.prod(max(0.0, 1 - share) for share in lost[id(p)].values()) for p in own)
        above = math.prod(share for other, share in shares.items() if not other or path.startswith(f"{other}."))
        share = rest / sum(p.numel() for p in own) / above if own and above else 1.0
        if share != 1:
            shares[path] = share
    return shares


def _skip_own_forwards(ctx: Context) -> None:
    """Tell of the layers that belong to no group because their own forward pass hides what they multiply with."""
    grouped = {member.path for group in ctx.groups() for member in group.members}
    for path, module in ctx.module.named_modules():
        if isinstance(module, PLAIN) and path not in grouped and ctx.covers(path) and (reason := own_forward(module)):
            ctx.skip(path, f"no removable group begins here: {reason}")


def _skip(ctx: Context, groups: Sequence[Group], reason: str) -> None:
    for member in (member for group in groups for member in group.members if member.role == "out"):
        ctx.skip(member.path, reason)
