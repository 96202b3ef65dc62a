"""The numerical core of low-rank methods: decompositions, ranks, and what weights them. All in float64."""

from trimpoint.low_rank.convolution import Spatial, SpatialFactors, Tucker, TuckerFactors, spatial, tucker2
from trimpoint.low_rank.decomposition import Decomposition, decompose, lost_share, regression
from trimpoint.low_rank.moments import Moments, shrunk
from trimpoint.low_rank.ranks import PairCost, RankRule, rank_for_params, rounded
from trimpoint.low_rank.vbmf import noise_variance, vbmf_rank, vbmf_threshold

__all__ = [
    "Decomposition",
    "Moments",
    "PairCost",
    "RankRule",
    "Spatial",
    "SpatialFactors",
    "Tucker",
    "TuckerFactors",
    "decompose",
    "lost_share",
    "noise_variance",
    "rank_for_params",
    "regression",
    "rounded",
    "shrunk",
    "spatial",
    "tucker2",
    "vbmf_rank",
    "vbmf_threshold",
]
