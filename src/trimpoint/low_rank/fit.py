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
from trimpoint.low_rank.ranks import PairCost, RankRule
from trimpoint.low_rank.vbmf import vbmf_rank
from trimpoint.method import Context


@dataclass(frozen=True)
class Fit:
    """Factors of a matrix `[out, in]`.

    Args:
        first: `[rank, in]`, float64.
        second: `[out, rank]`, float64.
        shift: `[out]`, to be added to the bias.
        note: its rank, what the inputs count and the share of the weighted sum of squares that is lost, in words.
    """

    first: Tensor
    second: Tensor
    shift: Tensor
    note: str

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.first)


@dataclass(frozen=True)
class Metric:
    """What the inputs of one layer count.

    Args:
        matrix: second moment or covariance of the inputs `[in, in]`, or a weight for each `[in]`; `None` where all
            count the same.
        mean: of the inputs, `[in]`, where a bias takes it over.
        note: what the matrix is, in words.
    """

    matrix: Tensor | None
    mean: Tensor | None
    note: str

    def shift(self, lost: Tensor) -> Tensor:
        """Return what is added to the bias where a matrix loses `lost [out, in]`: `[out]`, float64."""
        if self.mean is None:
            return torch.zeros(len(lost), dtype=torch.float64)
        return lost.double() @ self.mean


@dataclass(frozen=True)
class Weights:
    """What the inputs of layers count.

    Args:
        moments: path → moments of the inputs, where they weight.
        fisher: path → information of each input, where that weights.
        note: why the layers have neither, in words.
    """

    moments: Mapping[str, Moments]
    fisher: Mapping[str, Tensor]
    note: str

    def metric(self, path: str, bias: bool) -> Metric | str:
        """Return what the inputs of a layer count, or why that cannot be told; what is all zero says nothing.

        Args:
            path: of the layer.
            bias: whether the layer has a bias, so that the mean of the inputs costs no rank.
        """
        moments, fisher = self.moments.get(path), self.fisher.get(path)
        if moments is not None and not moments.count:
            return "the calibration data never calls it"
        found = Metric(None, None, f"plain{self.note}")
        if moments is not None:
            matrix, mean = moments.metric(centred=bias), moments.mean if bias else None
            silent = "do not vary" if bias else "are all zero"
            note = "weighted by the inputs" if matrix is not None else f"plain: its inputs {silent}"
            found = Metric(matrix, mean, note)
        elif fisher is not None and bool(fisher.any()):
            found = Metric(fisher, None, "weighted by the Fisher information")
        elif fisher is not None:
            found = Metric(None, None, "plain: the loss does not depend on it")
        sound = all(bool(torch.isfinite(part).all()) for part in (found.matrix, found.mean) if part is not None)
        return found if sound else "what weights it is not finite"


def weights_of(
    method: Factorization,
    ctx: Context,
    sizes: Mapping[str, int],
    grads: Mapping[str, Callable[[nn.Module], Tensor]],
    rows: Callable[[str, Any, Tensor | None], Tensor] | None = None,
) -> Weights:
    """Gather what the weighting of a method needs.

    Args:
        method: asks for it.
        ctx: of the step.
        sizes: path → number of inputs.
        grads: see `input_fisher`.
        rows: see `gather`.

    Raises:
        DataError: if the task lacks what the weighting needs.
    """
    weighting = method.weighting_for(ctx.task)
    if weighting == "none" or ctx.task is None:
        return Weights({}, {}, "" if method.weighting == "none" else ": the task has no `calibrate` data")
    if weighting == "fisher":
        return Weights({}, input_fisher(ctx.module, ctx.task, grads), "")
    return Weights(gather(ctx, sizes, rows), {}, "")


def fitted(matrix: Tensor, path: str, weights: Weights, rule: RankRule, *, bias: bool) -> Fit | str:
    """Return the factors of a layer's matrix, or why there are none.

    Args:
        matrix: `[out, in]`.
        path: of the layer.
        weights: what inputs count.
        rule: how the rank is chosen.
        bias: whether the layer has a bias, so that the mean of the inputs costs no rank.
    """
    metric = weights.metric(path, bias)
    if isinstance(metric, str):
        return metric
    found = decompose(matrix, metric.matrix)
    cost = PairCost(matrix.numel(), sum(matrix.shape), min(matrix.shape))
    rank = rule.choose(cost, found.share, lambda: vbmf_rank(matrix))
    if isinstance(rank, str):
        return rank
    first, second = found.at(rank)
    note = f"rank {rank} of {cost.count}, {metric.note}, {found.share(rank):.2%} of the squares lost"
    return Fit(first, second, metric.shift(found.weight - second @ first), note)


def filled(kind: Any, *sizes: Any, values: tuple[Tensor, Tensor | None], like: Any, **more: Any) -> Any:
    """Make a layer with given values; each parameter has the type, device and `requires_grad` of that of `like`.

    Args:
        kind: class of the layer.
        sizes: positional arguments of it.
        values: of its weight and bias.
        like: the layer in whose place it will stand; it has a bias where one is given.
        more: keyword arguments of the class.
    """
    weight, bias = values
    layer = kind(*sizes, **more, device="meta").to_empty(device=like.weight.device).to(like.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight).requires_grad_(like.weight.requires_grad)
        if bias is not None:
            layer.bias.copy_(bias).requires_grad_(like.bias.requires_grad)
    return layer
