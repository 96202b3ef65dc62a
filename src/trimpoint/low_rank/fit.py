"""Two thin matrices and a shift of the bias in the place of one matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.low_rank.decomposition import decompose
from trimpoint.low_rank.factorization import Factorization
from trimpoint.low_rank.moments import Moments
from trimpoint.low_rank.observed import gather, input_fisher
from trimpoint.low_rank.ranks import RankRule
from trimpoint.low_rank.vbmf import vbmf_rank
from trimpoint.method import Context


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
    method: Factorization,
    ctx: Context,
    sizes: Mapping[str, int],
    grads: Mapping[str, Callable[[nn.Module], Tensor]],
) -> Weights:
    """Gather what the weighting of a method needs.

    Args:
        method: asks for it.
        ctx: of the step.
        sizes: path → number of inputs.
        grads: see `input_fisher`.

    Raises:
        DataError: if the task lacks what the weighting needs.
    """
    weighting = method.weighting_for(ctx.task)
    if weighting == "none" or ctx.task is None:
        lacking = "" if method.weighting == "none" else ": the task has no `calibrate` data"
        return Weights({}, {}, f"plain{lacking}")
    if weighting == "fisher":
        return Weights({}, input_fisher(ctx.module, ctx.task, grads), "weighted by the Fisher information")
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
    first, second = whitened.at(rank)
    shift = torch.zeros(len(matrix), dtype=torch.float64)
    if moments is not None and bias:
        shift = (whitened.weight - second @ first) @ moments.mean
    return Fit(first, second, shift, whitened.share(rank))


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
