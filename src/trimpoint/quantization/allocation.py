"""One choice for each layer, of the least cost within a limit: a multiple-choice knapsack, solved exactly."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

Choice = TypeVar("Choice", bound=Hashable)


def cheapest(
    costs: Mapping[tuple[str, Choice], float], weights: Mapping[tuple[str, Choice], float], limit: float
) -> dict[str, Choice] | None:
    """Return the choice of each layer of the least total cost whose total weight is within a limit.

    Of equal costs the lighter ones.

    Args:
        costs: (layer, choice) → what it costs.
        weights: the same keys → what it takes: bits, or seconds.
        limit: of the sum of the weights.

    Returns:
        layer → choice; nothing where no choice is within the limit.

    References:
        https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.milp.html
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    keys = list(costs)
    layers = list(dict.fromkeys(layer for layer, _ in keys))
    weight = np.array([weights[key] for key in keys])
    scale = max(float(np.abs(weight).max()), 1e-30)
    one_each = np.array([[layer == other for other, _ in keys] for layer in layers], dtype=float)
    cost = np.array([costs[key] for key in keys])
    cost = cost / max(float(np.abs(cost).max()), 1e-30) + 1e-9 * weight / scale
    result = milp(
        cost,
        integrality=np.ones(len(keys)),
        options={"mip_rel_gap": 0.0},
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weight[None] / scale, -np.inf, limit / scale * (1 + 1e-9)),
        ],
    )
    if result.x is None:
        return None
    return {layer: choice for (layer, choice), taken in zip(keys, result.x, strict=True) if taken > 0.5}
