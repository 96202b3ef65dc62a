"""One choice for each layer, of the least cost within a limit: a multiple-choice knapsack, solved exactly."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

Choice = TypeVar("Choice", bound=Hashable)

_GAIN = 1e-6
"""Share of the cost by which solving again must gain."""
_ROUNDING = 1e-9
"""Share of the limit that sums of many numbers may be off by."""


def cheapest(
    costs: Mapping[tuple[str, Choice], float], weights: Mapping[tuple[str, Choice], float], limit: float
) -> dict[str, Choice] | None:
    """Return the choice of each layer of the least total cost whose total weight is within a limit.

    Of equal costs the lighter ones.

    Args:
        costs: (layer, choice) → what it costs, at least 0; what is not finite is taken only where nothing else is
            within the limit.
        weights: the same keys → what it takes: bits, or seconds.
        limit: of the sum of the weights.

    Returns:
        layer → choice; nothing where no choice is within the limit.

    References:
        https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.milp.html
    """
    if not costs:
        return {}
    keys = list(costs)
    weight, limit = _scaled(np.array([weights[key] for key in keys]), limit)
    cost = np.array([costs[key] for key in keys])
    finite = np.isfinite(cost)
    cost = np.where(finite, cost, 2.0 * np.abs(cost, where=finite, out=np.zeros_like(cost)).sum() + 1e-30)
    each = np.array([[layer == other for other, _ in keys] for layer in dict.fromkeys(layer for layer, _ in keys)])
    taken, total = None, np.inf
    # The solver stops within 10⁻⁶ of the largest cost. What costs more than a solution as a whole is in no better one;
    # without it the largest cost is smaller, and what was hidden behind it shows.
    while True:
        found = _solved(cost, cost <= total, weight, limit, each.astype(float))
        if found is None or not (now := float(cost[found].sum())) < total * (1 - _GAIN):
            break
        taken, total = found, now
    if taken is None:
        return None
    return {layer: choice for (layer, choice), chosen in zip(keys, taken, strict=True) if chosen}


def _scaled(weight: np.ndarray, limit: float) -> tuple[np.ndarray, float]:
    scale = max(float(np.abs(weight).max()), 1e-30)
    return weight / scale, limit / scale


def _solved(
    cost: np.ndarray, allowed: np.ndarray, weight: np.ndarray, limit: float, each: np.ndarray
) -> np.ndarray | None:
    """Return which choices are taken of those allowed, booleans, or nothing where none is within the limit."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost, weight, each = cost[allowed], weight[allowed], each[:, allowed]
    limit = room = limit + _ROUNDING * abs(limit)
    best = np.zeros(len(cost), dtype=bool)
    best[[min(np.flatnonzero(row), key=lambda i: (weight[i], cost[i])) for row in each]] = True
    if weight[best].sum() > limit:
        return None
    # The solver takes what is over the limit by 10⁻⁶ of a large layer, which may be more than a small layer has: so it
    # gets less room until what it finds fits. Where that is no room at all, only the lightest choices do.
    while True:
        result = milp(
            cost / max(float(np.abs(cost).max()), 1e-30) + 1e-9 * weight,
            integrality=np.ones(len(cost)),
            options={"mip_rel_gap": 0.0},
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(each, 1, 1), LinearConstraint(weight[None], -np.inf, room)],
        )
        if result.x is None:
            break
        over = weight[result.x > 0.5].sum() - limit
        if over <= 0:
            best = result.x > 0.5
            break
        room -= 2 * over
    taken = np.zeros(len(allowed), dtype=bool)
    taken[allowed] = best
    return taken
