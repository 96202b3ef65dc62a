"""Remove channels and neurons, over everything that they run through."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.parts import Block, Group, Member
from trimpoint.task import Task

_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Method):
    """Remove the least important channels of convolutions and neurons of linear layers.

    When it pays:
        Where layers are wide, with widths that stay multiples of 8 or 16; before quantisation. On narrow networks
        removing blocks is worth more: time does not fall with the multiplications.
    What it costs:
        Quality falls with the ratio; plan a recovery step behind it. `importance="taylor"` costs a backward pass over
        the calibration data.
    Needs:
        Example inputs to find the coupled channels; for `importance="taylor"` also `calibrate` data and a loss.
    Leaves alone:
        Channels of the model's inputs and outputs, groups that are no wider than `round_to`, and what could not be
        traced; each is listed with its reason.

    References:
        Li et al., "Pruning filters for efficient ConvNets" (2017), and Fang et al., "DepGraph: towards any structural
        pruning" (2023), for the magnitude of a coupled group; Molchanov et al., "Importance estimation for neural
        network pruning" (2019), for the first-order Taylor expansion.
    """

    ratio: float = param(
        0.5,
        doc="share of the units to remove",
        bounds=Bounds(ge=0, lt=1),
        noop=0.0,
        weak=0.25,
        search=(0.25, 0.5, 0.75),
    )
    importance: str = param(
        "magnitude",
        doc="what makes a unit important: the norm of its weights, or the change of the loss without it",
        choices=("magnitude", "taylor"),
    )
    round_to: int = param(8, doc="kept widths are multiples of this many channels", bounds=Bounds(ge=1), search=(8, 16))
    scope: str = param(
        "local", doc="the same share of each group, or the least important of all groups", choices=("local", "global")
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
            if width(group) <= self.round_to:
                _skip(ctx, group, f"its {width(group)} channels are no more than round_to={self.round_to}")
            elif self.ratio == 0:
                _skip(ctx, group, "the ratio is 0")
            else:
                groups.append(group)
        if not groups:
            return
        scores = self._scores(ctx, groups)
        wanted = self._wanted(groups, scores)
        removals = {}
        for group in groups:
            kept = aligned(group, wanted[group.name], self.round_to)
            if kept >= group.size:
                _skip(ctx, group, f"removing {group.size - wanted[group.name]} of {group.size} units rounds to none")
            else:
                order = torch.argsort(scores[group.name], stable=True)
                removals[group.name] = sorted(int(unit) for unit in order[: group.size - kept])
        ctx.resize(removals)

    def forecast(self, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return the share of each module's multiplications that is left after the same share of every group goes."""
        shares: dict[str, float] = {}
        for group in groups:
            kept = 1.0
            if not group.reason and width(group) > self.round_to:
                wanted = group.size - math.floor(group.size * self.ratio)
                kept = aligned(group, wanted, self.round_to) / group.size
            touched = {(member.path, member.role) for member in group.members if member.role != "through"}
            for path, _ in touched:
                shares[path] = shares.get(path, 1.0) * kept
        return {path: share for path, share in shares.items() if share < 1}

    def _scores(self, ctx: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
        if self.importance == "magnitude":
            return {group.name: magnitude(ctx.module, group) for group in groups}
        if ctx.task is None or not ctx.task.has("calibrate") or not ctx.task.has("loss"):
            raise DataError(
                'importance="taylor" needs `calibrate` data and a loss. The task lacks one of them.',
                'give them, or take importance="magnitude"',
            )
        return taylor(ctx.module, groups, ctx.task)

    def _wanted(self, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Return how many units of each group are to be kept, before rounding."""
        if self.scope == "local":
            return {group.name: group.size - math.floor(group.size * self.ratio) for group in groups}
        relative = torch.cat([scores[group.name] / scores[group.name].mean().clamp_min(1e-30) for group in groups])
        gone = set(torch.argsort(relative, stable=True)[: math.floor(len(relative) * self.ratio)].tolist())
        wanted, start = {}, 0
        for group in groups:
            wanted[group.name] = group.size - len(gone & set(range(start, start + group.size)))
            start += group.size
        return wanted


def width(group: Group) -> int:
    """Return how many channels the first producing module of a group has."""
    return group.size * _channels(group)


def aligned(group: Group, wanted: int, round_to: int) -> int:
    """Return the number of units nearest to `wanted` whose channels are a multiple of `round_to`.

    At least one such multiple is kept, and never more than there is.
    """
    step = round_to // math.gcd(round_to, _channels(group))
    return min(group.size, max(1, math.floor(wanted / step + 0.5)) * step)


def magnitude(module: nn.Module, group: Group) -> Tensor:
    """Return the importance of each unit by the size of its weights, `[units]`.

    For each member: the squared L2 norm of the unit's slice, divided by the mean over units, so that large layers do
    not drown small ones; then the mean over members (group L2 with mean reduction, Fang et al. 2023). Biases, running
    statistics and weights that are all zero do not count.
    """
    scores = []
    for member in group.members:
        if "bias" in member.parameter or member.parameter in _RUNNING:
            continue
        squared = _by_unit(_tensor(module, member).detach().double().square(), member)
        if bool(squared.any()):
            scores.append(squared / squared.mean())
    return torch.stack(scores).mean(0) if scores else torch.ones(group.size, dtype=torch.float64)


def taylor(module: nn.Module, groups: Sequence[Group], task: Task) -> dict[str, Tensor]:
    """Return the importance of each unit by the first-order Taylor expansion of the loss, `[units]` for each group.

    For each batch of the calibration data and each module that the unit runs through, the square of the sum of
    gradient times weight over the unit's slice (Molchanov et al. 2019, equation 8); summed over modules and batches.

    Raises:
        DataError: if the task has no calibration data or no loss.
    """
    probe = copy.deepcopy(module).requires_grad_(True).eval()
    if task.step is not None:  # a loss inside the model may exist in training mode only
        probe.train()
        for part in probe.modules():
            if isinstance(part, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)):
                part.eval()
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for batch in task.batches("calibrate"):
        probe.zero_grad(set_to_none=True)
        with torch.enable_grad():
            task.loss_of(probe, batch).backward()  # type: ignore[no-untyped-call]
        for group in groups:
            scores[group.name] += _taylor_of(probe, group)
    return scores


def _taylor_of(probe: nn.Module, group: Group) -> Tensor:
    change: dict[str, Tensor] = {}
    for member in group.members:
        tensor = _tensor(probe, member)
        if tensor.grad is not None:
            product = _by_unit((tensor.detach() * tensor.grad).double(), member)
            key = f"{member.path}/{member.role}"
            change[key] = change[key] + product if key in change else product
    return sum((value.square() for value in change.values()), torch.zeros(group.size, dtype=torch.float64))


def _tensor(module: nn.Module, member: Member) -> Tensor:
    owner = module.get_submodule(member.path)
    return getattr(owner, member.parameter)  # type: ignore[no-any-return]


def _by_unit(values: Tensor, member: Member) -> Tensor:
    """Return the sum of `values` over everything that belongs to each unit, `[units]`."""
    along = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
    return torch.stack([along[list(indices)].sum() for indices in member.indices])


def _channels(group: Group) -> int:
    first = next((member for member in group.members if member.role == "out"), group.members[0])
    return len(first.indices[0])


def _skip(ctx: Context, group: Group, reason: str) -> None:
    for member in group.members:
        if member.role == "out":
            ctx.skip(member.path, reason)
