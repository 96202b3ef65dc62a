"""What the first rung teaches about structures that were not tried: a small model of the drop, refitted each time."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimpoint.search.space import Structure, share_of

RIDGE = 0.1
"""How strongly differences between kinds of layers are held back, relative to the spread of what was seen."""
FLOOR = 0.001
"""A smaller drop than this counts as this much: its logarithm would be noise."""


def expected_drops(
    seen: Sequence[tuple[Structure, float]], candidates: Sequence[Structure], leaves: Mapping[str, int]
) -> NDArray[np.float64]:
    """Return the drop to expect of `candidates` after the training that `seen` had.

    The logarithm of the drop is taken to be linear in the share of work removed from each kind of layer, layers with
    equally many parameters being of one kind: removing more costs more the less there is. First one slope for all
    kinds is fitted, then ridge regression on what that leaves (Hoerl and Kennard, "Ridge regression", 1970).

    Args:
        seen: structures and their drops.
        candidates: structures to predict.
        leaves: module path → number of parameters.

    Returns:
        `[candidates]`, in the unit of the drops.
    """
    kinds = sorted(set(leaves.values()))
    x = np.array([_features(structure, leaves, kinds) for structure, _ in seen])
    y = np.log([max(drop, FLOOR) for _, drop in seen])
    total = x.sum(1)
    centred, spread = total - total.mean(), float(total.var() * len(total))
    slope = max(float(centred @ y) / spread, 0.0) if spread > 0 else 0.0
    fitted = y.mean() + slope * centred
    deviation = x - x.mean(0)
    ridge = RIDGE * float(np.mean(np.sum(deviation**2, 1)))
    residual = np.linalg.solve(deviation.T @ deviation + ridge * np.eye(len(kinds)), deviation.T @ (y - fitted))
    rows = np.array([_features(structure, leaves, kinds) for structure in candidates]).reshape(-1, len(kinds))
    return np.exp(y.mean() + slope * (rows.sum(1) - total.mean()) + (rows - x.mean(0)) @ residual)  # type: ignore[no-any-return]


def _features(structure: Structure, leaves: Mapping[str, int], kinds: Sequence[int]) -> list[float]:
    """Return, for each kind of layer, the work removed, weighted as in `Structure.damage`."""
    removed = dict.fromkeys(kinds, 0.0)
    for path, count in leaves.items():
        removed[count] += count**0.25 * (1 - share_of(path, structure.shares))
    scale = sum(count**0.25 for count in leaves.values())
    return [removed[kind] / scale for kind in kinds]


def newcomers(
    seen: Sequence[tuple[Structure, float]],
    candidates: Sequence[Structure],
    leaves: Mapping[str, int],
    *,
    allowed: float,
    shrink: float,
    count: int,
) -> list[Structure]:
    """Return untried structures of the best merit among those whose drop is expected to end up allowed.

    Args:
        seen: structures of the first rung and their drops.
        candidates: all structures.
        leaves: module path → number of parameters.
        allowed: drop.
        shrink: share of the drop that is expected to remain after all training.
        count: how many.
    """
    tried = {structure.steps for structure, _ in seen}
    fresh = [structure for structure in candidates if structure.steps and structure.steps not in tried]
    if len(seen) < 2 or not fresh:
        return []
    drops = expected_drops(seen, fresh, leaves) * shrink
    fitting = [s for s, drop in zip(fresh, drops, strict=True) if drop <= allowed]
    return sorted(fitting, key=lambda structure: structure.merit)[:count]
