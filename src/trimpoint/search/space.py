"""What a search may try on a model: the structures that its methods propose, with a forecast of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trimpoint.build import type_names
from trimpoint.filters import EVERYTHING, Filter
from trimpoint.method import Method, Stage
from trimpoint.parts import Block, Group
from trimpoint.plan import Step
from trimpoint.registry import all_methods
from trimpoint.runtimes.base import OperatorTime
from trimpoint.task import Task

MOST_STRUCTURES = 4_000
LIMIT_SLACK = 1.03
"""By what factor a forecast may exceed a limit: it is not exact, and what is measured decides."""
BAND = 1.15
"""How much worse than the best at its damage a structure's merit may be, to be among the first candidates."""
DAMAGE = (0.3, 0.55)
"""Range of damage that the first candidates are spread over."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """One way of changing the structure of a model.

    Args:
        steps: structural steps only; empty for the unmodified model.
        shares: module path → share of its work that is left (a path stands for everything below it).
        damage: share of the layers' work that is removed, in [0, 1]; a layer counts by the fourth root of its number of
            parameters, between counting all alike and counting parameters.
        gains: metric → forecast ratio to the unmodified model (below 1 is smaller).
        aims: metrics that count towards the merit; where none of them is forecast, all that are.
    """

    steps: tuple[Step, ...]
    shares: Mapping[str, float]
    damage: float = 0.0
    gains: Mapping[str, float] = field(default_factory=dict)
    aims: tuple[str, ...] = ()

    @property
    def merit(self) -> float:
        """Geometric mean of the forecast ratios: lower is better."""
        return merit(self.gains, self.aims)


def merit(ratios: Mapping[str, float], aims: Sequence[str] = ()) -> float:
    """Return the geometric mean of the ratios that `aims` names; of all where it names none of them."""
    counted = [ratio for name, ratio in ratios.items() if name in aims] or list(ratios.values())
    return float(np.exp(np.mean(np.log(np.maximum(counted, 1e-9))))) if counted else 1.0


def usable_methods(
    task: Task, stages: Sequence[Stage], allowed: Callable[[Method], str] = lambda _: ""
) -> tuple[list[type[Method]], dict[str, str]]:
    """Return the stable methods of `stages` that the task has what it takes for, and the others with the reason.

    Args:
        task: what the model is for.
        stages: which methods are asked for.
        allowed: returns a reason against a method, or nothing.
    """
    usable, left_out = [], {}
    for name, kind in all_methods().items():
        if kind.traits.stage not in stages:
            continue
        missing = sorted(need for need in kind.traits.needs if not task.has(need))
        if kind.traits.status == "experimental":
            left_out[name] = "experimental: no committed benchmark shows its gain yet"
        elif missing:
            left_out[name] = f"the task has no {' and no '.join(missing)}"
        elif reason := allowed(kind()):
            left_out[name] = reason
        else:
            usable.append(kind)
    return usable, left_out


def within(
    model: nn.Module, blocks: Sequence[Block], groups: Sequence[Group], where: Filter
) -> tuple[tuple[Block, ...], tuple[Group, ...]]:
    """Return the blocks that `where` matches, and the groups all of whose producing modules it matches."""

    def inside(path: str) -> bool:
        return where == EVERYTHING or where.matches(path, type_names(model.get_submodule(path)))

    producers = {group.name: [m.path for m in group.members if m.role == "out"] for group in groups}
    return (
        tuple(block for block in blocks if inside(block.path)),
        tuple(group for group in groups if all(map(inside, producers[group.name]))),
    )


def forecast_shares(
    method: Method, model: nn.Module, blocks: Sequence[Block], groups: Sequence[Group], where: Filter = EVERYTHING
) -> Mapping[str, float]:
    """Return what a method's forecast says of what is in scope, given the blocks and groups in scope."""
    shares = method.forecast(model, blocks, groups)
    if where == EVERYTHING or method.traits.acts_on != "modules":
        return shares
    return {path: s for path, s in shares.items() if where.matches(path, type_names(model.get_submodule(path)))}


def proposals(
    kind: type[Method],
    model: nn.Module,
    blocks: Sequence[Block],
    groups: Sequence[Group],
    where: Filter = EVERYTHING,
) -> list[Method]:
    """Return the variants of a method that would change something on a model, weakest first.

    Args:
        kind: the method.
        model: unmodified.
        blocks: in scope, as the groups.
        groups: from `within`.
        where: what may be changed.
    """
    variants = kind.variants(blocks, groups)
    return [method for method in variants if forecast_shares(method, model, blocks, groups, where)]


def structures(
    kinds: Sequence[type[Method]],
    model: nn.Module,
    blocks: Sequence[Block],
    groups: Sequence[Group],
    leaves: Mapping[str, int],
    where: Filter = EVERYTHING,
) -> list[Structure]:
    """Return every combination of the methods' own variants, the unmodified structure first.

    Args:
        kinds: structural methods, in the order of their stages.
        model: unmodified.
        blocks: in scope, as the groups.
        groups: from `within`.
        leaves: paths of the modules that have weights, with their numbers of parameters.
        where: what may be changed.
    """
    menus: list[list[Method | None]] = [[None, *proposals(kind, model, blocks, groups, where)] for kind in kinds]
    while np.prod([len(menu) for menu in menus]) > MOST_STRUCTURES:
        longest = max(menus, key=len)
        longest[1:] = longest[1::2]
    weights = np.array(list(leaves.values()), dtype=np.float64) ** 0.25
    chosen = [method for menu in menus for method in menu if method]
    expected = {method: forecast_shares(method, model, blocks, groups, where) for method in chosen}
    result = []
    for choice in product(*menus):
        methods = [method for method in choice if method is not None]
        shares: dict[str, float] = {}
        for method in methods:
            for path, share in expected[method].items():
                shares[path] = shares.get(path, 1.0) * share
        lost = [1 - share_of(leaf, shares) for leaf in leaves]
        damage = float(np.average(lost, weights=weights)) if leaves else 0.0
        result.append(Structure(steps=tuple(Step(m, where) for m in methods), shares=shares, damage=damage))
    return result


def share_of(path: str, shares: Mapping[str, float]) -> float:
    """Return the share of its work that the module at `path` keeps: the product over its parents and itself."""
    parts = path.split(".") if path else []
    return float(np.prod([shares.get(".".join(parts[:end]), 1.0) for end in range(len(parts) + 1)]))


def parameter_leaves(model: nn.Module) -> dict[str, int]:
    """Return the modules that own weights of two or more dimensions: path → number of parameters."""
    return {
        path: sum(p.numel() for p in module.parameters(recurse=False))
        for path, module in model.named_modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
    }


def forecast(
    structure: Structure, operators: Sequence[OperatorTime], leaves: Mapping[str, int], overhead_ms: float = 0.0
) -> dict[str, float]:
    """Return the forecast ratios of a structure: `latency_ms` from a measured profile, `file_bytes` from parameters.

    Args:
        structure: what is left of which module.
        operators: measured times of the unmodified model's operators, with their modules.
        leaves: module path → number of parameters.
        overhead_ms: time of a call that belongs to no operator.
    """
    before = sum(op.ms for op in operators) + overhead_ms
    after = sum(op.ms * share_of(op.module, structure.shares) for op in operators) + overhead_ms
    params = sum(leaves.values())
    left = sum(count * share_of(path, structure.shares) for path, count in leaves.items())
    return {
        "latency_ms": after / before if before else 1.0,
        "file_bytes": left / params if params else 1.0,
    }


def keeping(
    candidates: Sequence[Structure], start: Mapping[str, float], limits: Mapping[str, float]
) -> list[Structure]:
    """Return the structures that are forecast to keep the limits; all of them where none is.

    Args:
        candidates: structures with forecasts.
        start: metric → ratio to the baseline of what the forecasts multiply: the unmodified model, quantised.
        limits: metric → the largest ratio to the baseline.
    """
    kept = [
        structure
        for structure in candidates
        if all(
            structure.gains.get(metric, 1.0) * start.get(metric, 1.0) <= most * LIMIT_SLACK
            for metric, most in limits.items()
            if metric in structure.gains
        )
    ]
    return kept if any(structure.steps for structure in kept) else list(candidates)


def work_by_kind(structure: Structure, leaves: Mapping[str, int]) -> NDArray[np.float64]:
    """Return the share of the work that a structure removes from each kind of layer, weighted as in its damage.

    Layers with equally many parameters are of one kind; the sum over kinds is `Structure.damage`.

    Args:
        structure: what is left of which module.
        leaves: module path → number of parameters.

    Returns:
        `[kinds]`, fewest parameters first.
    """
    removed = dict.fromkeys(sorted(set(leaves.values())), 0.0)
    for path, count in leaves.items():
        removed[count] += count**0.25 * (1 - share_of(path, structure.shares))
    total = sum(count**0.25 for count in leaves.values())
    return np.array([work / total for work in removed.values()])


def ladder(candidates: Sequence[Structure], leaves: Mapping[str, int], count: int) -> list[Structure]:
    """Return `count` structures of rising damage, with a good forecast and as different from each other as can be.

    They are evenly spaced in damage between the two ends of `DAMAGE`: milder ones gain little over quantisation alone,
    and of harsher ones little recovers. At each damage the one is taken, among those whose merit is within `BAND` of
    the best there, that differs most from those before it in the kinds of layers that it removes: which kind costs most
    quality is not known yet, and structures that all remove the same kind would not show it.

    Args:
        candidates: structures with forecasts; the unmodified one is left out.
        leaves: module path → number of parameters.
        count: how many at most.
    """
    changed = sorted((s for s in candidates if s.steps and s.damage > 0), key=lambda s: (s.damage, s.merit))
    if len(changed) <= count:
        return changed
    kinds = [work_by_kind(structure, leaves) for structure in changed]
    damages, merits = np.array([s.damage for s in changed]), np.array([s.merit for s in changed])
    wanted = np.linspace(*DAMAGE, count) if count > 1 else [sum(DAMAGE) / 2]
    reach = (DAMAGE[1] - DAMAGE[0]) / (2 * max(count - 1, 1))
    picked: list[int] = []
    for goal in wanted:
        free = np.array([i for i in range(len(changed)) if i not in picked])
        away = np.abs(damages[free] - goal)
        near = free[away <= max(reach, away.min())]
        band = [int(i) for i in near if merits[i] <= BAND * merits[near].min()]
        apart = {i: min((float(np.abs(kinds[i] - kinds[j]).sum()) for j in picked), default=0.0) for i in band}
        picked.append(max(band, key=lambda i: (round(apart[i], 6), -merits[i])))
    return [changed[i] for i in sorted(picked)]
