"""Remove whole residual blocks and transformer layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimpoint.errors import UnknownNameError, suggest
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.parts import Block, Group
from trimpoint.signature import flatten

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
        what collapses least.
    Needs:
        Example inputs to find the blocks; `calibrate` data for `rank="influence"`.
    Leaves alone:
        Blocks that change the shape (the first of a stage), and everything outside of blocks.

    References:
        Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout" (2020), and Sanh et al.,
        "DistilBERT" (2019), for every other layer; Sajjad et al., "On the effect of dropping layers of pre-trained
        transformer models" (2023), for the last ones; Men et al., "ShortGPT" (2024), for block influence.
    """

    ratio: float = param(
        0.5,
        doc="share of the removable blocks to remove",
        bounds=Bounds(ge=0, le=1),
        noop=0.0,
        search=(0.25, 0.5, 0.75),
    )
    blocks: tuple[str, ...] = param((), doc="paths of the blocks to remove; where given, `ratio` does not count")
    rank: str = param(
        "even",
        doc="which go: evenly spread, the last ones, or those that change their input least",
        choices=("even", "last", "influence"),
    )

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
            known = [block.path for block in blocks]
            for path in self.blocks:
                if path not in known:
                    raise UnknownNameError(f"{path!r} is no block in scope that can be removed.", suggest(path, known))
            return self._bypass(ctx, self.blocks, dict.fromkeys(self.blocks, "named in the plan"))
        count = math.floor(self.ratio * len(blocks) + 0.5)
        if not count:
            for block in blocks:
                ctx.skip(block.path, f"kept: {self.ratio:g} of {len(blocks)} blocks rounds to none")
            return None
        influences = influence(ctx, [block.path for block in blocks]) if self.rank == "influence" else {}
        chosen = least(influences, count) if influences else spread(blocks, count, last=self.rank == "last")
        reasons = {path: f"influence {value:.4f}" for path, value in influences.items()}
        return self._bypass(ctx, chosen, reasons)

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

    def forecast(self, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return that nothing is left of the blocks that go."""
        paths = self.blocks or spread(blocks, math.floor(self.ratio * len(blocks) + 0.5))
        return dict.fromkeys(paths, 0.0)

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
    """Return the `count` paths of least influence, in the order given."""
    chosen = sorted(influences, key=lambda path: influences[path])[:count]
    return [path for path in influences if path in chosen]


def influence(ctx: Context, paths: Sequence[str]) -> dict[str, float]:
    """Return for each block `1 - cos(input, output)`, mean over the positions of the calibration data (ShortGPT).

    The cosine is over the feature dimension: the channels of images (dimension 1), the last one otherwise.

    Raises:
        DataError: if the task has no calibration data.
    """
    total, count = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)

    def observe(path: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        before, after = flatten(inputs)[0], flatten(output)[0]
        cosine: Tensor = torch.cosine_similarity(before.float(), after.float(), 1 if before.ndim == 4 else -1)
        total[path] += float((1 - cosine).sum())
        count[path] += cosine.numel()

    ctx.calibrate(observe, paths)
    return {path: total[path] / max(1, count[path]) for path in paths}
