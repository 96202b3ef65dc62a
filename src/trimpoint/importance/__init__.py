"""How important the units of coupled groups are, by criteria that are functions from a group to a vector."""

from trimpoint.importance.criteria import BUILT_IN, Criterion
from trimpoint.importance.evidence import Evidence
from trimpoint.importance.scoring import NAMES, between_groups, scores

__all__ = ["BUILT_IN", "NAMES", "Criterion", "Evidence", "between_groups", "scores"]
