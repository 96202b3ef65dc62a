"""Two thin matrices and a shift of the bias in the place of one matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.low_rank.decomposition import Decomposition, decompose, regression
from trimpoint.low_rank.moments import CrossMoments, Moments
from trimpoint.low_rank.observed import gather, input_fisher
from trimpoint.low_rank.ranks import RankRule
from trimpoint.low_rank.vbmf import vbmf_rank
from trimpoint.method import Context

FIT_RIDGE = 1e-3
WEIGHTINGS = ("auto", "none", "activation", "fisher")


@dataclass(frozen=True)
class Fit:
    """Factors of a matrix `[out, in]`.

    Args:
        first: `[rank, in]`, float64.
        second: `[out, rank]`, float64.
        shift: `[out]`, to be added to the bias.
        error: share of the weighted sum of squares that is lost.
    """

    first: Tensor
    second: Tensor
    shift: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.first)


@dataclass(frozen=True)
class Weights:
    """What the inputs of layers count.

    Args:
        moments: path → moments of the inputs, where they weight.
        fisher: path → information of each input, where that weights.
        note: what was done, in words.
    """

    moments: Mapping[str, Moments]
    fisher: Mapping[str, Tensor]
    note: str


def weights_of(
    ctx: Context,
    weighting: str,
    sizes: Mapping[str, int],
    grads: Mapping[str, Callable[[nn.Module], Tensor]] | None = None,
) -> Weights:
    """Gather what a weighting needs.

    Args:
        ctx: of the step.
        weighting: one of `WEIGHTINGS`; `"auto"` is `"activation"` where there is calibration data, else `"none"`.
        sizes: path → number of inputs.
        grads: see `input_fisher`.

    Raises:
        DataError: if the task lacks what the weighting needs.
    """
    task = ctx.task
    if weighting == "auto" and (task is None or not task.has("calibrate")):
        return Weights({}, {}, "plain: the task has no `calibrate` data")
    if weighting == "none":
        return Weights({}, {}, "plain")
    if task is None or not task.has("calibrate") or (weighting == "fisher" and not task.has("loss")):
        needs = "`calibrate` data and a loss" if weighting == "fisher" else "`calibrate` data"
        raise DataError(
            f'weighting="{weighting}" needs {needs}. The task lacks them.', 'give them, or take weighting="none"'
        )
    if weighting == "fisher":
        return Weights({}, input_fisher(ctx.module, task, grads or {}), "weighted by the Fisher information")
    return Weights(gather(ctx, sizes), {}, "weighted by the inputs")


def fitted(
    matrix: Tensor, path: str, weights: Weights, rule: RankRule, *, cost: int, whole: int, bias: bool
) -> Fit | str:
    """Return the factors of a layer's matrix, or why there are none.

    Args:
        matrix: `[out, in]`.
        path: of the layer.
        weights: what inputs count.
        rule: how the rank is chosen.
        cost: parameters of one component.
        whole: parameters of what is replaced.
        bias: whether the layer has a bias, so that the mean of the inputs costs no rank.
    """
    moments = weights.moments.get(path)
    metric = weights.fisher.get(path)
    if moments is not None:
        if not moments.count:
            return "the calibration data does not reach it"
        metric = moments.covariance if bias else moments.second_moment
    if not bool(torch.isfinite(metric if metric is not None else matrix).all()):
        return "what weights it is not finite"
    whitened = decompose(matrix, metric)
    rank = rule.choose(whitened.values, cost, whole, lambda: vbmf_rank(matrix))
    if not rank:
        return rule.refusal(min(len(whitened.values), (whole - 1) // cost))
    return truncated(whitened, rank, moments.mean if moments is not None and bias else None)


def truncated(whole: Decomposition, rank: int, mean: Tensor | None) -> Fit:
    """Return the factors of rank `rank`; with the mean of the inputs, outputs keep theirs."""
    first, second = whole.at(rank)
    shift = torch.zeros(len(second), dtype=torch.float64)
    if mean is not None:
        shift = (whole.weight - second @ first) @ mean
    total = float(whole.values.norm())
    return Fit(first, second, shift, (whole.error(rank) / total) ** 2 if total else 0.0)


def fitted_again(pairs: CrossMoments, matrix: Tensor, bias: Tensor | None, rank: int) -> Fit:
    """Return the factors that come nearest to a layer's former outputs, from what it reads now.

    Reduced-rank regression: the least-squares map, drawn a little towards the layer's own matrix, and of it the best of
    rank `rank` for the inputs.

    Args:
        pairs: moments of what the layer reads now and what it gave.
        matrix: of the layer, `[out, in]`.
        bias: of the layer, `[out]`.
        rank: of the factors.

    References:
        Izenman, "Reduced-rank regression for the multivariate linear model" (1975).
    """
    inputs, cross = pairs.inputs.covariance, pairs.covariance
    if bias is None:
        inputs, cross = pairs.inputs.second_moment, cross + torch.outer(pairs.mean, pairs.inputs.mean)
    fit = truncated(decompose(regression(matrix, inputs, cross, FIT_RIDGE), inputs), rank, None)
    if bias is None:
        return fit
    shift = pairs.mean - fit.second @ (fit.first @ pairs.inputs.mean) - bias.detach().double()
    return Fit(fit.first, fit.second, shift, fit.error)


def filled(kind: Any, *sizes: Any, values: tuple[Tensor, Tensor | None], like: nn.Parameter, **more: Any) -> Any:
    """Make a layer with given values; its parameters have the type, device and `requires_grad` of `like`.

    Args:
        kind: class of the layer.
        sizes: positional arguments of it.
        values: of its weight and bias.
        like: a parameter of the layer in whose place it will stand.
        more: keyword arguments of the class.
    """
    weight, bias = values
    layer = kind(*sizes, **more, device="meta").to_empty(device=like.device).to(like.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(like.requires_grad)
