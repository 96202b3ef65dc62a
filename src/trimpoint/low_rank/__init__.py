"""The numerical core of low-rank methods: decompositions, ranks, and what weights them. All in float64."""

from trimpoint.low_rank.convolution import SpatialFactors, TuckerFactors, spatial, tucker2
from trimpoint.low_rank.decomposition import Decomposition, decompose, regression
from trimpoint.low_rank.moments import Moments
from trimpoint.low_rank.ranks import RankRule, rank_for_params, retained_rank, rounded
from trimpoint.low_rank.vbmf import noise_variance, vbmf_rank, vbmf_threshold

__all__ = [
    "Decomposition",
    "Moments",
    "RankRule",
    "SpatialFactors",
    "TuckerFactors",
    "decompose",
    "noise_variance",
    "rank_for_params",
    "regression",
    "retained_rank",
    "rounded",
    "spatial",
    "tucker2",
    "vbmf_rank",
    "vbmf_threshold",
]
