"""Replace linear layers by two thinner ones."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from trimpoint.graph.layers import LowRank
from trimpoint.low_rank import PairCost
from trimpoint.low_rank.factorization import Factorization, irreplaceable
from trimpoint.low_rank.fit import Fit, Weights, filled, fitted, weights_of
from trimpoint.method import Context, Fact, Site, Stage, Traits


@dataclass(frozen=True, kw_only=True)
class FactorizeLinear(Factorization):
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
        Quality falls with the rank; plan a recovery step behind it. On MiniLM, the errors that plain truncation
        (`weighting="none"`) makes in a layer's outputs are 1.7 to 3.6 times as large as those of `"activation"`.
        `"fisher"` costs a backward pass for every calibration sample.
    Needs:
        `calibrate` data for `weighting="activation"` (which `"auto"` takes where there is such data); for `"fisher"`
        also a loss.
    Leaves alone:
        Layers that share their weight, compute it from others or have a forward pass of their own; layers whose
        factors would have no fewer parameters than they have, whose weight is read by another module (as in
        `nn.MultiheadAttention`), or which the calibration data never calls.

    References:
        Eckart and Young, "The approximation of one matrix by another of lower rank" (1936); Wang et al., "SVD-LLM:
        truncation-aware singular value decomposition for large language model compression" (2024); Hsu et al.,
        "Language model compression with weighted low-rank factorization" (2022); for `rank="bayes"` Nakajima et al.,
        "Global analytic solution of fully-observed variational Bayesian matrix factorization" (2013).
    """

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
        if not (sites := self.sites(ctx)):
            return
        sizes = {site.path: matrix_of(site.module).shape[1] for site in sites}
        weights = weights_of(self, ctx, sizes, dict.fromkeys(sizes, gradient_of))
        for site in sites:
            self._replace(ctx, site, weights)

    def unfit(self, model: nn.Module, site: Site) -> str:
        """Return why a layer cannot be replaced, or `""`."""
        if reason := irreplaceable(model, site, nn.Linear if isinstance(site.module, nn.Linear) else None):
            return reason
        return "" if _is_known(site.module) else "it is no linear layer that is known here"

    def saved(self, layer: nn.Module) -> int:
        """Return how many parameters fewer the factors of a layer have by `rank="ratio"`."""
        shape = matrix_of(layer).shape
        return self.saved_by_pair(PairCost(shape.numel(), sum(shape), min(shape)))

    def _replace(self, ctx: Context, site: Site, weights: Weights) -> None:
        """Replace a layer, or skip it."""
        matrix, bias = matrix_of(site.module).detach(), cast("nn.Parameter | None", site.module.bias)
        fit = fitted(matrix, site.path, weights, self.rule, bias=bias is not None)
        if isinstance(fit, str):
            ctx.skip(site.path, fit)
        else:
            ctx.replace(site.path, _layers(site.module, matrix, bias, fit), fit.note)


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
        filled(nn.Linear, size, fit.rank, values=(fit.first, None), like=module, bias=False),
        filled(nn.Linear, fit.rank, out, values=(fit.second, shifted), like=module, bias=bias is not None),
    )
