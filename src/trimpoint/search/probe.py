"""What each kind of change is worth on this target, before anything is trained.

Latency depends on the configuration, not on how its weights were obtained, so a few shapes are exported and timed
untrained. They correct the forecasts that the operator profile gives for all the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from trimpoint.filters import EVERYTHING, Filter
from trimpoint.method import Method
from trimpoint.parts import Block, Group
from trimpoint.plan import Plan, Step
from trimpoint.progress import Progress
from trimpoint.runtimes.base import OperatorTime
from trimpoint.search.contain import contained, words
from trimpoint.search.space import Structure, forecast, forecast_shares, merit, proposals, structures, within

WORTH = 0.98
"""A kind of change is worth trying when it brings speed and size together below this share of the baseline."""


class Shapes(Protocol):
    """What the probe needs: a model's parts, and a way of measuring a shape."""

    @property
    def model(self) -> nn.Module:
        """The unmodified model."""

    @property
    def leaves(self) -> Mapping[str, int]:
        """Modules with weights and their numbers of parameters."""

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the unmodified model."""

    def groups(self) -> tuple[Group, ...]:
        """Return the coupled groups of the unmodified model."""

    def shape(self, plan: Plan) -> dict[str, float]:
        """Apply a plan without recovery, lower it and return its `latency_ms` and `file_bytes` over the baseline's."""

    def operators(self, plan: Plan) -> list[OperatorTime]:
        """Return the operator times of a plan without recovery."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the probe found.

    Args:
        structures: everything that may be tried, with corrected forecasts.
        quantiser: the quantise step that pays on this target, if one does.
        left_out: method → why the search does without it.
        start: metric → ratio to the baseline of the unmodified model under `quantiser`; the forecasts multiply it.
        rows: what was measured: `what`, `latency_ms` and `file_bytes` over the baseline's, and the forecasts.
    """

    structures: list[Structure]
    quantiser: Method | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


def probe(
    bench: Shapes,
    kinds: Sequence[type[Method]],
    quantisers: Sequence[type[Method]],
    *,
    where: Filter = EVERYTHING,
    aims: Sequence[str] = (),
    decide: Callable[[str, Callable[[], Any]], Any],
    progress: Progress,
) -> Probe:
    """Measure a few shapes and forecast the rest.

    Args:
        bench: what measures.
        kinds: structural methods that may be used.
        quantisers: quantise methods that may be used.
        where: what may be changed.
        aims: metrics that the goal minimises: what pays is judged by those of them that can be forecast.
        decide: returns the recorded result of a measurement or makes and records it.
        progress: where to tell how far it is.
    """
    blocks, groups = within(bench.model, bench.blocks(), bench.groups(), where)
    left_out: dict[str, str] = {}
    rows: list[dict[str, Any]] = []

    def measured(plan: Plan) -> dict[str, float]:
        """Return the ratios of a shape; of one that cannot be made or measured, nothing, with the reason left out."""

        def attempt() -> dict[str, Any]:
            ratios, error = contained(lambda: bench.shape(plan))
            return {"error": words(error)} if error is not None else dict(ratios or {})

        progress.update(text=f"measuring the shape of {plan}")
        found = dict(decide(f"shape/{plan.hash[:16]}", attempt))
        if "error" in found:
            left_out[str(plan.steps[0])] = f"could not be measured: {found['error']}"
            return {}
        return found

    quantiser = None
    for kind in quantisers:
        ratios = measured(Plan((Step(kind(), where),)))
        if not ratios:
            continue
        rows.append({"what": kind.method_name(), **ratios})
        if merit(ratios, aims) < WORTH and quantiser is None:
            quantiser = kind()
        elif merit(ratios, aims) >= WORTH:
            left_out[kind.method_name()] = f"does not pay on this target: {_words(ratios)}"
    tail = (Step(quantiser, where),) if quantiser is not None else ()
    reference = measured(Plan(tail)) if tail else {"latency_ms": 1.0, "file_bytes": 1.0}
    operators = [
        OperatorTime(**row)
        for row in decide(
            "operators", lambda: [vars(op) for op in contained(lambda: bench.operators(Plan(tail)))[0] or ()]
        )
    ]

    corrections: dict[str, float] = {}
    useful = []
    for kind in kinds:
        variants = proposals(kind, bench.model, blocks, groups, where)
        samples = [variants[i] for i in sorted({len(variants) // 2, len(variants) - 1})] if variants else []
        found = []
        for method in samples:
            shares = forecast_shares(method, bench.model, blocks, groups, where)
            alone = Structure(steps=(Step(method, where),), shares=shares)
            expected = forecast(alone, operators, bench.leaves)
            ratios = measured(Plan((*alone.steps, *tail)))
            if not ratios:
                continue
            rows.append({"what": str(alone.steps[0]), **ratios, "forecast_latency_ms": expected["latency_ms"]})
            relative = {name: ratios[name] / reference[name] for name in ratios}
            found.append((expected["latency_ms"], relative))
        if not samples:
            left_out[kind.method_name()] = "nothing in this model that it could change"
        elif not found:
            left_out[kind.method_name()] = "none of its shapes could be measured"
        elif all(merit(relative, aims) >= WORTH for _, relative in found):
            left_out[kind.method_name()] = f"does not pay on this target: {_words(found[-1][1])}"
        else:
            corrections[kind.method_name()] = _correction([(e, r["latency_ms"]) for e, r in found])
            useful.append(kind)
    every = structures(useful, bench.model, blocks, groups, bench.leaves, where)
    latencies: dict[Step, float] = {}
    for step in {step for structure in every for step in structure.steps}:
        shares = forecast_shares(step.method, bench.model, blocks, groups, where)
        changed = Structure(steps=(step,), shares=shares)
        ratio = forecast(changed, operators, bench.leaves)["latency_ms"]
        latencies[step] = ratio ** corrections.get(step.method.name, 1.0)
    with_gains = [_with_gains(structure, operators, bench.leaves, latencies) for structure in every]
    with_gains = [replace(structure, aims=tuple(aims)) for structure in with_gains]
    return Probe(structures=with_gains, quantiser=quantiser, left_out=left_out, start=reference, rows=rows)


def _words(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} of what it was" for name, value in ratios.items())


def _correction(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the exponent that carries forecast ratios to measured ones, by least squares through (1, 1) in logs."""
    logs = [(math.log(max(f, 1e-6)), math.log(max(m, 1e-6))) for f, m in pairs if f < 1]
    square = sum(f * f for f, _ in logs)
    return max(0.0, sum(f * m for f, m in logs) / square) if square else 1.0


def _with_gains(
    structure: Structure, operators: Sequence[OperatorTime], leaves: Mapping[str, int], alone: Mapping[Step, float]
) -> Structure:
    """Return a structure with its forecast; its latency is the product of what its steps bring each by itself."""
    gains = forecast(structure, operators, leaves)
    return replace(structure, gains={**gains, "latency_ms": math.prod(alone[step] for step in structure.steps)})
