"""What trials teach about structures that were not tried: a small model of the drop, refitted after each of them."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimpoint.search.rungs import LEARNING, outlook
from trimpoint.search.space import Structure, work_by_kind
from trimpoint.values import Trial

RIDGE = 0.1
"""How strongly differences between kinds of layers are held back, relative to the spread of what was seen."""
MILDEST = 1.25
"""Structures count as the mildest whose drop is expected to be within this factor of the smallest."""
FLOOR = 0.01
"""A smaller drop than this share of the largest counts as so much: its logarithm would be noise."""


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
    x = np.array([work_by_kind(structure, leaves) for structure, _ in seen])
    largest = max(drop for _, drop in seen)
    if largest <= 0:
        return np.zeros(len(candidates))
    y = np.log([max(drop, FLOOR * largest) for _, drop in seen])
    total = x.sum(1)
    centred, spread = total - total.mean(), float(total.var() * len(total))
    slope = max(float(centred @ y) / spread, 0.0) if spread > 0 else 0.0
    fitted = y.mean() + slope * centred
    deviation = x - x.mean(0)
    ridge = max(RIDGE * float(np.mean(np.sum(deviation**2, 1))), 1e-9)
    residual = np.linalg.solve(deviation.T @ deviation + ridge * np.eye(x.shape[1]), deviation.T @ (y - fitted))
    rows = np.array([work_by_kind(structure, leaves) for structure in candidates])
    return np.exp(y.mean() + slope * (rows.sum(1) - total.mean()) + (rows - x.mean(0)) @ residual)  # type: ignore[no-any-return]


def newcomer(
    tried: Sequence[tuple[Structure, Trial, float]],
    candidates: Sequence[Structure],
    leaves: Mapping[str, int],
    *,
    allowed: float,
    final: float,
) -> Structure | None:
    """Return the untried structure of the best merit among those whose drop is expected to end up allowed.

    Where none is, it is the best of the mildest: then either what was seen misleads, or the goal is out of reach.

    Args:
        tried: structures, their trials and the effort of each; of a structure tried twice, the last one counts.
        candidates: all structures.
        leaves: module path → number of parameters.
        allowed: largest bound of the drop.
        final: effort of the last rung.
    """
    drops, rooms = {}, []
    for structure, trial, effort in tried:
        if trial.quality is not None and trial.quality.drop is not None:
            growth = max(final / effort, 1.0)
            expected = max(trial.quality.drop, 0.0) * growth**-LEARNING
            drops[structure.steps] = (structure, expected)
            rooms.append(outlook(trial, growth) - expected)
    known = {structure.steps for structure, _, _ in tried}
    fresh = [structure for structure in candidates if structure.steps and structure.steps not in known]
    if len(drops) < 2 or not fresh:
        return None
    expected = expected_drops(list(drops.values()), fresh, leaves)
    most = max(allowed - float(np.mean(rooms)), MILDEST * float(expected.min()))
    return min((s for s, drop in zip(fresh, expected, strict=True) if drop <= most), key=lambda s: s.merit)
