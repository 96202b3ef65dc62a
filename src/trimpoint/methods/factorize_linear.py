"""Replace linear layers by two thinner ones."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from trimpoint.graph.layers import LowRank
from trimpoint.low_rank import RankRule
from trimpoint.low_rank.fit import WEIGHTINGS, Fit, Weights, filled, fitted, fitted_again, weights_of
from trimpoint.low_rank.observed import gather_pairs, unfit
from trimpoint.low_rank.ranks import RULES
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param
from trimpoint.parts import Block, Group


@dataclass(frozen=True, kw_only=True)
class FactorizeLinear(Method):
    """Replace a linear layer by two thinner ones, whose product is the best of its rank for the inputs that occur.

    With `weighting="activation"` the error that is minimised is that of the layer's outputs over the calibration data,
    in closed form, from the covariance of its inputs: one pass over the data, in memory that does not grow with it.
    Where the layer has a bias, the bias takes over the mean, which then costs no rank. Positions that the batch's
    `attention_mask`, `key_padding_mask` or `src_key_padding_mask` marks as padding do not count; without such a mask
    all do.

    When it pays:
        On wide layers (feed-forward layers and projections of transformers) whose inputs fill few directions, most of
        all for the size of the file. Two thin products take more time than their multiplications say, since they are
        two calls with a tensor between them; on narrow layers the pair may be no faster than the layer was.
    What it costs:
        Quality falls with the rank; plan a recovery step behind it. The errors that plain truncation
        (`weighting="none"`) makes in a layer's outputs are two to three times as large as those of `"activation"`.
        `"fisher"` costs a backward pass for every calibration sample, each of `sweeps` a pass over the data with both
        models; on MiniLM one sweep lowered the errors of the layers by 1 % and raised that of the result by 6 %, which
        is why there is none by default.
    Needs:
        `calibrate` data for `weighting="activation"` (which `"auto"` takes where there is such data); for `"fisher"`
        also a loss.
    Leaves alone:
        Layers that share their weight, compute it from others or have a forward pass of their own; layers whose
        factors would have no fewer parameters than they have, whose weight is read by another module (as in
        `nn.MultiheadAttention`), or which the calibration data does not reach.

    References:
        Eckart and Young, "The approximation of one matrix by another of lower rank" (1936); Wang et al., "SVD-LLM:
        truncation-aware singular value decomposition for large language model compression" (2024); Hsu et al.,
        "Language model compression with weighted low-rank factorization" (2022); for `rank="bayes"` Nakajima et al.,
        "Global analytic solution of fully-observed variational Bayesian matrix factorization" (2013); for `sweeps`
        Izenman, "Reduced-rank regression for the multivariate linear model" (1975).
    """

    rank_ratio: float = param(
        0.5,
        doc='share of a layer\'s parameters that its factors have, for rank="ratio"; 1 changes nothing',
        bounds=Bounds(gt=0, le=1),
        noop=1.0,
        weak=0.75,
        search=(0.75, 0.5, 0.35),
    )
    rank: str = param(
        "ratio",
        doc="how the rank is chosen: by the share of parameters, by the share of the weighted squares that it keeps "
        "(an error budget for each layer), or by variational Bayes on the weight",
        choices=RULES,
    )
    energy: float = param(
        0.95, doc='share of the (weighted) sum of squares that is kept, for rank="energy"', bounds=Bounds(gt=0, le=1)
    )
    round_to: int = param(1, doc="ranks are multiples of this; 8 or 16 suit most kernels", bounds=Bounds(ge=1))
    weighting: str = param(
        "auto",
        doc="what an error counts: all weights the same, by the layer's inputs, by the Fisher information of the loss, "
        "or by the inputs where there is `calibrate` data and all the same where not",
        choices=WEIGHTINGS,
    )
    sweeps: int = param(
        0,
        doc="how often all factors are then fitted, with least squares, to the outputs of the layers that they stand "
        "for, given the inputs that the other factors leave them; where weighted by the inputs",
        bounds=Bounds(ge=0),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.FACTORIZE,
        targets=("Linear", "Conv1D"),
        requires=Fact.FLOAT_WEIGHT | Fact.DENSE,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Replace every linear layer in scope that becomes smaller."""
        sites = []
        for site in ctx.modules():
            reason = unfit(ctx, site, nn.Linear if isinstance(site.module, nn.Linear) else None)
            reason = reason or ("" if _is_known(site.module) else "it is no linear layer that is known here")
            if reason or (self.rank == "ratio" and self.rank_ratio == 1):
                ctx.skip(site.path, reason or "rank_ratio=1 keeps all of it")
            else:
                sites.append(site)
        if not sites:
            return
        rule = RankRule(self.rank, self.rank_ratio, self.energy, self.round_to)
        sizes = {site.path: matrix_of(site.module).shape[1] for site in sites}
        weights = weights_of(ctx, self.weighting, sizes, dict.fromkeys(sizes, gradient_of))
        reference = copy.deepcopy(ctx.module).eval() if self.sweeps else ctx.module
        ranks = {site.path: self._replace(ctx, site, weights, rule) for site in sites}
        ranks = {path: rank for path, rank in ranks.items() if isinstance(ctx.get(path), LowRank)}
        for _ in range(self.sweeps if weights.moments else 0):
            _fit_again(ctx, reference, ranks)

    def forecast(self, blocks: Sequence[Block], groups: Sequence[Group]) -> Mapping[str, float]:  # noqa: ARG002
        """Return `rank_ratio` for each module that makes or reads channels, as far as the groups tell."""
        if self.rank != "ratio" or self.rank_ratio == 1:
            return {}
        members = (member for group in groups for member in group.members if member.role != "through")
        return {member.path: self.rank_ratio for member in members if member.parameter == "weight"}

    def _replace(self, ctx: Context, site: Site, weights: Weights, rule: RankRule) -> int:
        """Replace a layer, or skip it; return its rank, 0 where it is skipped."""
        matrix, bias = matrix_of(site.module).detach(), cast("nn.Parameter | None", site.module.bias)
        out, size = matrix.shape
        fit = fitted(matrix, site.path, weights, rule, cost=out + size, whole=out * size, bias=bias is not None)
        if isinstance(fit, str):
            ctx.skip(site.path, fit)
            return 0
        note = f"rank {fit.rank} of {min(out, size)}, {weights.note}, {fit.error:.2%} of the squares lost"
        again = ", then fitted again" if self.sweeps and weights.moments else ""
        ctx.replace(site.path, _layers(site.module, matrix, bias, fit), note + again)
        return fit.rank


def _fit_again(ctx: Context, reference: nn.Module, ranks: Mapping[str, int]) -> None:
    """Fit the factors that stand in the model to the outputs of the layers that they replaced, in `reference`."""
    sizes = {}
    for path in ranks:
        out, size = matrix_of(reference.get_submodule(path)).shape
        sizes[path] = (size, out)
    for path, pairs in gather_pairs(ctx, reference, sizes):
        old: Any = reference.get_submodule(path)
        fit = fitted_again(pairs, matrix_of(old), old.bias, ranks[path])
        made: Any = ctx.get(path)
        with torch.no_grad():
            made[0].weight.copy_(fit.first)
            made[1].weight.copy_(fit.second)
            if old.bias is not None:
                made[1].bias.copy_(old.bias.double() + fit.shift)


def _is_known(module: nn.Module) -> bool:
    """Return whether the layer computes `x Wᵀ + b`: PyTorch's, or the `Conv1D` of transformers, which stores `W`."""
    return isinstance(module, nn.Linear) or type(module).__module__ == "transformers.pytorch_utils"


def matrix_of(module: nn.Module) -> Tensor:
    """Return the matrix of a linear layer, `[out, in]`."""
    weight = cast(Tensor, module.weight)
    return weight if isinstance(module, nn.Linear) else weight.T


def gradient_of(module: nn.Module) -> Tensor:
    """Return the gradient of the matrix of a linear layer, `[out, in]`; zero where the loss does not depend on it."""
    weight = cast(Tensor, module.weight)
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return grad if isinstance(module, nn.Linear) else grad.T


def _layers(module: Any, matrix: Tensor, bias: Tensor | None, fit: Fit) -> LowRank:
    shifted = None if bias is None else bias.detach().double() + fit.shift
    out, size = matrix.shape
    return LowRank(
        filled(nn.Linear, size, fit.rank, values=(fit.first, None), like=module.weight, bias=False),
        filled(nn.Linear, fit.rank, out, values=(fit.second, shifted), like=module.weight, bias=bias is not None),
    )
