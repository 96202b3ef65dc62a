"""Remove whole residual blocks and transformer layers."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError, SurgeryError, UnknownNameError, suggest
from trimpoint.graph import Bypass, bypass_
from trimpoint.graph.bypass import tensors_in
from trimpoint.importance.scoring import finite
from trimpoint.losses import for_loss_
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.parts import Block, Group
from trimpoint.recover import train
from trimpoint.recover.batches import epoch_batches, mix
from trimpoint.recover.recipe import short_settings
from trimpoint.signature import flatten
from trimpoint.task import Task

MOST_VARIANTS = 256
"""Combinations that a search considers at most; beyond, every other count of the largest family is left out."""


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Method):
    """Bypass blocks whose output has the shape of their input: residual blocks, transformer layers.

    When it pays:
        First of all, on CPUs: time falls in proportion to the blocks removed, unlike with narrower layers, and it
        multiplies with quantisation.
    What it costs:
        Quality collapses until the rest is trained again; plan a recovery step behind it. What recovers best is not
        what collapses least, which is all that `influence` and `loss` see; `rank="greedy"` sees more, at the price of
        one short recovery for each block that is left, for each block that goes. On a ResNet-20 that did not pay:
        with four of seven blocks gone it ended 0.5 points below `even`, `influence` 0.3 below and `loss` 0.2 above.
        A layer with no path around it is dear: two of thirteen of a MobileNet cost more than a quarter of its channels.
    Needs:
        Example inputs to find the blocks; `calibrate` data for `rank="influence"`, a loss as well for `rank="loss"`,
        and `train` data as well for `rank="greedy"` with `rank_steps` above 0.
    Leaves alone:
        Blocks that change the shape (the first of a stage), and everything outside of blocks. Named in `blocks`, any
        module goes whose output has the shape of its input.

    References:
        Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout" (2020), and Sanh et al.,
        "DistilBERT" (2019), for every other layer; Sajjad et al., "On the effect of dropping layers of pre-trained
        transformer models" (2023), for the last ones; Men et al., "ShortGPT" (2024), for block influence; Zhong et
        al., "BlockPruner" (2024), for greedy removal by the loss with re-ranking.
    """

    ratio: float = param(0.5, doc="share of the removable blocks to remove", bounds=Bounds(ge=0, le=1), noop=0.0)
    blocks: tuple[str, ...] = param(
        (), doc="paths of the blocks to remove, in scope of the step; where given, `ratio` does not count"
    )
    rank: str = param(
        "even",
        doc="which go: evenly spread, the last ones, those that change their input least, those without which the loss "
        "rises least, or one after another those without which it has risen least after a short recovery",
        choices=("even", "last", "influence", "loss", "greedy"),
    )
    rank_steps: int = param(50, doc='optimizer steps of each short recovery of `rank="greedy"`', bounds=Bounds(ge=0))

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        acts_on="blocks",
        requires=Fact.PRESENT,
        removes=Fact.PRESENT,
        reduces=frozenset({"params", "macs", "file_bytes"}),
    )

    def apply(self, ctx: Context) -> None:
        """Bypass the chosen blocks."""
        blocks = ctx.blocks()
        if self.blocks:
            named = self._named(ctx, [block.path for block in blocks])
            return self._bypass(ctx, named, dict.fromkeys(named, "named in the plan"))
        count = math.floor(self.ratio * len(blocks) + 0.5)
        if not count:
            for block in blocks:
                ctx.skip(block.path, f"kept: {self.ratio:g} of {len(blocks)} blocks rounds to none")
            return None
        paths = [block.path for block in blocks]
        if self.rank == "influence":
            found = influence(ctx, paths)
            return self._bypass(ctx, least(found, count), {p: f"influence {value:.4f}" for p, value in found.items()})
        if self.rank in ("loss", "greedy"):
            rounds, steps = (count, self.rank_steps) if self.rank == "greedy" else (1, 0)
            chosen, losses = by_loss(ctx, paths, count, rounds, steps=steps)
            return self._bypass(ctx, chosen, {p: f"a loss of {losses[p]:.4g} without it" for p in chosen})
        return self._bypass(ctx, spread(blocks, count, last=self.rank == "last"), {})

    @classmethod
    def variants(cls, blocks: Sequence[Block], groups: Sequence[Group]) -> tuple[Method, ...]:  # noqa: ARG003
        """Return every combination of how many blocks of each family go, evenly spread, fewest first."""
        families: dict[str, list[Block]] = {}
        for block in blocks:
            families.setdefault(block.family, []).append(block)
        menus = [range(len(members) + 1) for members in families.values()]
        while math.prod(len(menu) for menu in menus) > MOST_VARIANTS:
            longest = max(range(len(menus)), key=lambda index: len(menus[index]))
            menus[longest] = menus[longest][::-2][::-1]
        counts = sorted(product(*menus), key=lambda choice: (sum(choice), choice))
        chosen = [
            [path for members, count in zip(families.values(), choice, strict=True) for path in spread(members, count)]
            for choice in counts
        ]
        return tuple(cls(blocks=tuple(paths)) for paths in chosen if paths)

    def forecast(self, model: nn.Module, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return that nothing is left of the blocks that go."""
        paths = self.blocks or spread(blocks, math.floor(self.ratio * len(blocks) + 0.5), last=self.rank == "last")
        return dict.fromkeys(paths, 0.0)

    def _named(self, ctx: Context, known: list[str]) -> list[str]:
        """Return the first path of each module in `blocks`, once; `known` are those of the blocks that are found."""
        first = {module: path for path, module in ctx.module.named_modules()}
        modules = dict(ctx.module.named_modules(remove_duplicate=False))
        found: dict[str, str] = {}
        for name in self.blocks:
            if name not in modules or ctx.task is None:
                raise UnknownNameError(f"{name!r} is no block in scope that can be removed.", suggest(name, known))
            path = first[modules[name]]
            if not path:
                raise SurgeryError("The whole model cannot be bypassed.", "name one of its blocks")
            if not (ctx.covers(path) or ctx.covers(name)):
                raise UnknownNameError(f"The block `{name}` is out of scope of its step.", "check the step's `where`")
            if isinstance(modules[name], Bypass):
                ctx.skip(path, "it was removed before")
                continue
            if path not in known:
                bypass_(copy.deepcopy(ctx.module), path, ctx.task.example_batch(2))  # Says why where it cannot go.
            found.setdefault(path, name)
        for path, outer in product(found, found):
            if path.startswith(f"{outer}."):
                raise SurgeryError(f"`{found[path]}` is part of `{found[outer]}`, which goes too.", "name one of them")
        return list(found)

    def _bypass(self, ctx: Context, paths: Sequence[str], reasons: dict[str, str]) -> None:
        for path in paths:
            ctx.bypass(path, reasons.get(path, f"rank {self.rank}"))


def spread(blocks: Sequence[Block], count: int, *, last: bool = False) -> list[str]:
    """Choose `count` blocks, from each family in proportion to its size (largest remainder).

    Args:
        blocks: in the order of execution.
        count: how many to choose, at most as many as there are.
        last: the last ones of a family instead of evenly spread ones.

    Returns:
        Their paths, in the order of execution.
    """
    families: dict[str, list[str]] = {}
    for block in blocks:
        families.setdefault(block.family, []).append(block.path)
    exact = {family: count * len(paths) / len(blocks) for family, paths in families.items()}
    quota = {family: math.floor(value) for family, value in exact.items()}
    order = list(families)
    for family in sorted(order, key=lambda f: (quota[f] - exact[f], -order.index(f)))[: count - sum(quota.values())]:
        quota[family] += 1
    chosen = set()
    for family, paths in families.items():
        keep = len(paths) - quota[family]
        kept = set(range(keep)) if last else {index * len(paths) // keep for index in range(keep)}
        chosen |= {path for index, path in enumerate(paths) if index not in kept}
    return [block.path for block in blocks if block.path in chosen]


def least(influences: dict[str, float], count: int) -> list[str]:
    """Return the `count` paths of least influence, in the order given; NaN counts as infinite."""
    ranks = {path: math.inf if math.isnan(value) else value for path, value in influences.items()}
    chosen = sorted(ranks, key=lambda path: ranks[path])[:count]
    return [path for path in influences if path in chosen]


def by_loss(
    ctx: Context, paths: Sequence[str], count: int, rounds: int, *, steps: int
) -> tuple[list[str], dict[str, float]]:
    """Choose `count` blocks by the loss on the calibration data without each of them.

    Args:
        ctx: its model is left as it is.
        paths: of the blocks.
        count: how many to choose.
        rounds: in how many rounds; in each, all blocks that are left are ranked anew, without those chosen before.
        steps: of training, after a block is left out and before the loss is taken; the best one's model is kept for the
            next round.

    Returns:
        Paths in the order of execution, and the loss without each, when it was chosen.

    Raises:
        DataError: if the task has no calibration data or no loss, or no training data for `steps` > 0.
        ModelError: if there are not enough blocks without which the loss is a finite number.
    """
    task = cast(Task, ctx.task)  # Finding the blocks needed one.
    for need in ("calibrate", "loss", *(["train"] if steps else [])):
        if not task.has(need):
            raise DataError(f"This rank of blocks needs {need}. The task has none.", 'take rank="even", or give it')
    base, chosen, losses = copy.deepcopy(ctx.module), list[str](), dict[str, float]()
    for turn in range(rounds):
        found: dict[str, float] = {}
        leader, lowest = base, math.inf
        for path in (p for p in paths if p not in chosen):
            model = copy.deepcopy(base)
            try:
                bypass_(model, path, task.example_batch(2))
            except SurgeryError as error:
                ctx.skip(path, error.message)
                continue
            if steps:
                train(
                    model,
                    task.loss_of,
                    lambda epoch: (batch for _, batch in epoch_batches(task, mix(ctx.seed, epoch))),
                    short_settings(model, steps, seed=ctx.seed),
                )
            loss = mean_loss(model, task)
            if loss < lowest:
                leader, lowest = model, loss
            found[path] = loss
        best = least(found, -(-(count - len(chosen)) // (rounds - turn)))
        chosen += best
        losses |= {path: finite(found[path], f"The loss without the block `{path}`") for path in best}
        base = leader
    return [path for path in paths if path in chosen], losses


@torch.no_grad()
def mean_loss(model: nn.Module, task: Task) -> float:
    """Return the loss of a model on the calibration data, mean over its batches weighted by their sizes."""
    total, samples = 0.0, 0
    for_loss_(model, inner=task.step is not None)
    for batch in task.batches("calibrate"):
        size = len(flatten(batch[0])[0])
        total += float(task.loss_of(model, batch)) * size
        samples += size
    return total / max(1, samples)


def influence(ctx: Context, paths: Sequence[str]) -> dict[str, float]:
    """Return for each block `1 - cos(input, output)`, mean over the positions of the calibration data (ShortGPT).

    The cosine is over the feature dimension: the channels of images (dimension 1), the last one otherwise.

    Raises:
        DataError: if the task has no calibration data.
        ModelError: if the influence of a block is not finite.
    """
    total, count = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)

    def observe(path: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        before, after = next(tensors_in(inputs)), next(tensors_in(output))
        cosine: Tensor = torch.cosine_similarity(before.float(), after.float(), 1 if before.ndim == 4 else -1)
        total[path] += float((1 - cosine).sum())
        count[path] += cosine.numel()

    ctx.calibrate(observe, paths)
    return {path: finite(total[path] / max(1, count[path]), f"The influence of the block `{path}`") for path in paths}
