"""Remove whole heads of attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.graph import pruned_attention, why_unprunable
from trimpoint.importance import NAMES, between_groups
from trimpoint.importance.pruning import UnitPruning, ranked_together
from trimpoint.importance.scoring import checked
from trimpoint.method import Context, Fact, Stage, Traits, param
from trimpoint.parts import Group, Member

CONTRIBUTION = "contribution"
_WATCHED = (CONTRIBUTION, "activation")


@dataclass(frozen=True, kw_only=True)
class PruneHeads(UnitPruning):
    """Remove the least important heads of attention, with their part of every projection.

    Heads are found in the traced graph, by how the products of attention are made, and not by the classes of modules;
    where several query heads share one head of keys and values they go together. An `nn.MultiheadAttention` cannot lose
    heads as it is: where some go, it is replaced by an attention that computes the same and can. Keys may come from
    elsewhere than queries, and may be padded.

    When it pays:
        In transformers with more heads than they use; the projections become narrower, which is seen in size and time
        alike. At short lengths most of the time is in the feed-forward layers, which this leaves alone: a third of the
        parameters of a usual encoder layer is all that it can reach, and removing whole blocks is worth more.
    What it costs:
        Quality falls with the ratio; plan a recovery step behind it. `taylor`, `fisher` and `group-fisher` cost
        backward passes over the calibration data, `activation` and `contribution` a forward pass.
    Needs:
        Example inputs to find the heads; for what is measured on data also `calibrate` data, and a loss for gradients.
    Leaves alone:
        The last head of each attention; attention whose weights are returned, whose code or a shared configuration
        fixes the number of heads, which learns keys and values of its own, or which has hooks; with `taylor`, `fisher`
        and `group-fisher` attention by which the loss has no gradient. On its fast path `nn.TransformerEncoder` gives
        zeros at padded positions; behind a replaced attention it no longer does.

    References:
        Michel et al., "Are sixteen heads really better than one?" (2019); Voita et al., "Analyzing multi-head
        self-attention: specialized heads do the heavy lifting, the rest can be pruned" (2019); Kobayashi et al.,
        "Attention is not only a weight: analyzing transformers with vector norms" (2020), for the norm of what a head
        adds to the output (`contribution`), which unlike the weights of attention needs no knowledge of the module.
    """

    units = "heads"

    importance: str = param(
        "magnitude",
        doc="what makes a head important: a criterion for coupled groups, `contribution` for the norm of what it adds "
        "to the output of its attention, or `package.module:attribute` for a function of your own",
        choices=(*NAMES, CONTRIBUTION),
        reference=True,
    )
    scope: str = param(
        "local",
        doc="the same share of each attention, or the least important heads of all (scores divided by their mean)",
        choices=("local", "global"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        acts_on="groups",
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs", "file_bytes"}),
    )

    def unfit(self, model: nn.Module, alike: Sequence[Group]) -> str:
        """Return why no heads of a group can go, or `""`."""
        return _fixed(model, alike[0])

    def prepared(self, ctx: Context, groups: Sequence[Group]) -> Sequence[Group]:
        """Replace attention that cannot be watched as it is, where heads will go from it."""
        if self.importance not in _WATCHED:
            return groups
        sure = [group for group in groups if self.scope == "global" or self.kept(group) < group.size]
        return _made_prunable(ctx, sure) + [group for group in groups if group not in sure]

    def scored(self, ctx: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Return the importance of the heads of each group, `[heads]`."""
        return contribution(ctx, groups) if self.importance == CONTRIBUTION else super().scored(ctx, groups)

    def wanted(self, model: nn.Module, groups: Sequence[Group], found: Mapping[str, Tensor]) -> dict[str, int]:
        """Return how many heads of each group stay; one of each does."""
        if self.scope == "local":
            return super().wanted(model, groups, found)
        return ranked_together(groups, between_groups(found, self.importance), self.ratio, spared=1)

    def opened(self, ctx: Context, groups: Sequence[Group]) -> Sequence[Group]:
        """Replace attention that cannot lose heads as it is."""
        return _made_prunable(ctx, groups)


def contribution(ctx: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the root mean square norm of what each head adds to the output of its attention, `[heads]`.

    Over all positions of the calibration data; the norm is that of the head's result after the output projection. Where
    several modules read the heads, their squares are added. Groups whose heads no called module reads get ones.

    Raises:
        DataError: if the task has no calibration data.
        ModelError: if the heads add something that is not finite.
    """
    if ctx.task is None or not ctx.task.has("calibrate"):
        raise DataError(
            f'importance="{CONTRIBUTION}" needs `calibrate` data. The task lacks it.',
            'give it, or take importance="magnitude"',
        )
    readers: dict[str, list[tuple[str, Member]]] = {}
    for group in groups:
        for member in group.members:
            if member.role == "in" and _weight(ctx.module, member).ndim == 2:
                readers.setdefault(member.path, []).append((group.name, member))
    squares = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    counts = dict.fromkeys(readers, 0)

    def observe(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        rows = inputs[0].detach().double().flatten(0, -2)
        counts[path] += len(rows)
        for name, member in readers[path]:
            weight = _weight(ctx.module, member).detach().double().movedim(member.dim, 0)
            for unit, positions in enumerate(member.indices):
                squares[name][unit] += (rows[:, list(positions)] @ weight[list(positions)]).square().sum().cpu()

    ctx.calibrate(observe, list(readers))
    found = {}
    for group in groups:
        count = max((counts[path] for path, read in readers.items() if group.name in dict(read)), default=0)
        mean = squares[group.name] / count if count else torch.ones_like(squares[group.name])
        found[group.name] = checked(mean.sqrt(), group, CONTRIBUTION)
    return found


def _weight(module: nn.Module, member: Member) -> Tensor:
    return getattr(module.get_submodule(member.path), member.parameter)  # type: ignore[no-any-return]


def _attentions(module: nn.Module, group: Group) -> list[str]:
    """Return the paths of the `nn.MultiheadAttention` modules that a group runs through."""
    paths = dict.fromkeys(member.path for member in group.members)
    return [path for path in paths if isinstance(module.get_submodule(path), nn.MultiheadAttention)]


def _fixed(module: nn.Module, group: Group) -> str:
    """Return why heads of a group cannot go because of an `nn.MultiheadAttention`, or `""`."""
    holders: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for path in _attentions(module, group):
        attention = module.get_submodule(path)
        if reason := why_unprunable(attention):
            return reason
        if any(holders[id(parameter)] > 1 for parameter in attention.parameters()):
            return "its parameters are tied with those of another module"
    return ""


def _made_prunable(ctx: Context, groups: Sequence[Group]) -> list[Group]:
    """Replace each `nn.MultiheadAttention` that groups run through, and return the groups as they are then."""
    homes = [_attentions(ctx.module, group) for group in groups]
    for path in dict.fromkeys(path for paths in homes for path in paths):
        attention = ctx.get(path)
        if isinstance(attention, nn.MultiheadAttention):
            ctx.replace(path, pruned_attention(attention), "projections of its own for queries, keys and values")
    if not any(homes):
        return list(groups)
    now = [group for group in ctx.groups() if group.kind == "heads"]
    return [_same(now, group, paths) for group, paths in zip(groups, homes, strict=True)]


def _same(now: Sequence[Group], group: Group, paths: Sequence[str]) -> Group:
    """Return the group that `group` has become after the modules at `paths` were replaced."""
    wanted = {f"{path}.q_proj" for path in paths} or {group.name}
    return next((new for new in now if wanted & {new.name, *(member.path for member in new.members)}), group)
