"""Replace convolutions by thinner ones in a row."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from trimpoint.graph.layers import LowRank
from trimpoint.low_rank import PairCost, RankRule, Spatial, Tucker, decompose, lost_share, shrunk, vbmf_rank
from trimpoint.low_rank.convolution import side_by_side, unfolded
from trimpoint.low_rank.factorization import Factorization, irreplaceable
from trimpoint.low_rank.fit import Metric, Weights, filled, weights_of
from trimpoint.low_rank.observed import patches_of
from trimpoint.low_rank.ranks import TuckerCost, tucker_ranks
from trimpoint.method import Context, Fact, Site, Stage, Traits, param

MOST_FEATURES = 4_608
POSITIONS = 1_024
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class FactorizeConv(Factorization):
    """Replace a convolution by thinner ones: over its channels (Tucker-2) or over the sides of its kernel (spatial).

    `form="tucker2"` makes a 1×1 convolution to fewer channels, the kernel on these, and a 1×1 convolution back; one
    that would keep all channels is left out. `form="spatial"` makes a k×1 and a 1×k convolution. A 1×1 convolution
    becomes two of them in either form. Stride, padding and dilation stay what they were: without a cut the answers are
    the same, at the border too.

    When it pays:
        For the size of the file of networks with wide k×k convolutions. For their speed less than the
        multiplications say: three convolutions read and write their inputs three times, the thin ones use little of
        the processor, and a narrow chain may be slower than the one convolution was.
    What it costs:
        Quality falls with the rank; plan a recovery step behind it. `weighting="activation"`, which fits the factors
        to the layer's outputs at random positions of the calibration data, costs one pass over it; from little data
        its result lies between that and the plain one.
    Needs:
        `calibrate` data for `weighting="activation"` (which `"auto"` takes where there is such data); kernels that
        read more than 4,608 numbers at a time are fitted without it.
    Leaves alone:
        Grouped and depthwise convolutions, those that share their weight, compute it from others or have a forward
        pass of their own, and those whose factors would have no fewer parameters or, as the first of them runs before
        the stride, take no fewer multiplications; with `form="spatial"` also kernels that have not two sides.

    References:
        Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications"
        (2016), for Tucker-2 and for `rank="bayes"`; Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural
        networks with low rank expansions" (2014), for the spatial form, and Tai et al., "Convolutional neural networks
        with low-rank regularization" (2016), for its closed solution; Zhang et al., "Accelerating very deep
        convolutional networks for classification and detection" (2016), for outputs in the place of weights; Chen et
        al., "Shrinkage algorithms for MMSE covariance estimation" (2010), for what little data is worth.
    """

    form: str = param(
        "tucker2", doc="over the channels, or over the sides of the kernel", choices=("tucker2", "spatial")
    )
    weighting: str = param(
        "auto",
        doc="what an error counts: all weights the same, by what the kernel reads, or by that where there is "
        "`calibrate` data and all the same where not",
        choices=("auto", "none", "activation"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.FACTORIZE,
        targets=("Conv1d", "Conv2d", "Conv3d"),
        requires=Fact.FLOAT_WEIGHT | Fact.DENSE,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "macs"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Replace every convolution in scope that becomes smaller."""
        if not (sites := self.sites(ctx)):
            return
        weights, rows = self._weights(ctx, sites)
        for site in sites:
            metric = weights.metric(site.path, site.module.bias is not None)
            made = metric if isinstance(metric, str) else self._factors(site.module, metric, rows.get(site.path, 0))
            if isinstance(made, str):
                ctx.skip(site.path, made)
            else:
                ctx.replace(site.path, *made)

    def _weights(self, ctx: Context, sites: Sequence[Site]) -> tuple[Weights, dict[str, float]]:
        """Return what kernels are multiplied with, where it is asked for and not too large, and what it is worth.

        The latter in independent rows. Patches of an image are more alike than those of different images, so that it is
        more than the images and less than the patches: the geometric mean of both numbers.
        """
        layers: dict[str, Any] = {site.path: site.module for site in sites}
        sizes = {path: layer.weight[0].numel() for path, layer in layers.items()}
        images: Counter[str] = Counter()

        def rows(path: str, value: Tensor, _kept: Tensor | None) -> Tensor:
            layer = layers[path]
            images[path] += len(value) if value.ndim == len(layer.kernel_size) + 2 else 1
            return patches_of(layer, value, POSITIONS, ctx.rng)

        fitting = {path: size for path, size in sizes.items() if size <= MOST_FEATURES}
        weights = weights_of(self, ctx, fitting, {}, rows)
        if self.weighting_for(ctx.task) != "none":
            weights = replace(weights, note=f": its kernel reads more than {MOST_FEATURES:,} numbers at a time")
        return weights, {path: math.sqrt(found.count * images[path]) for path, found in weights.moments.items()}

    def unfit(self, model: nn.Module, site: Site) -> str:
        """Return why a layer cannot be replaced, or `""`."""
        layer: Any = site.module
        plain = next((kind for kind in _PLAIN if isinstance(layer, kind)), nn.Module)
        if reason := irreplaceable(model, site, plain):
            return reason
        if layer.groups == layer.in_channels and layer.groups > 1:
            return "it is depthwise: each channel has a kernel of its own, of which nothing is shared"
        if layer.groups > 1:
            return f"it has {layer.groups} groups, and only convolutions without groups are factorised"
        if (
            self.form == "spatial"
            and max(layer.kernel_size) > 1
            and min(*layer.kernel_size, len(layer.kernel_size)) < 2
        ):
            return f"its kernel {'×'.join(map(str, layer.kernel_size))} has not two sides to separate"
        if self.form == "spatial" and len(layer.kernel_size) > 2 and max(layer.kernel_size) > 1:
            return "only kernels of two dimensions are separated"
        return ""

    def saved(self, layer: nn.Module) -> int:
        """Return how many weights fewer the factors have by `rank="ratio"`, or multiplications; about, by Tucker-2."""
        kernel: Any = layer
        if max(kernel.kernel_size) == 1 or self.form == "spatial":
            return self.saved_by_pair(_pair_cost(kernel, self.form))
        cost = _tucker_cost(kernel, self.round_to)
        rank_in, rank_out = cost.pairs()
        if not len(rank_in):
            return 0
        params = cost.params(rank_in, rank_out)
        most = max(self.rank_ratio * cost.whole, params[0])
        near = params >= 0.95 * params[params <= most][-1]
        return int(cost.whole - np.median(cost.size(rank_in, rank_out)[near & (params <= most)]))

    def _factors(self, layer: Any, metric: Metric, rows: float) -> tuple[LowRank, str] | str:
        """Return what stands for a convolution and its description, or why there is nothing.

        Args:
            layer: the convolution.
            metric: of what its kernel is multiplied with.
            rows: number of independent rows that the metric is the mean of.
        """
        weight = layer.weight.detach().double()
        trusted = None if metric.matrix is None else shrunk(metric.matrix, rows)
        counted = metric.matrix if self.rank == "energy" else trusted

        def lost(kernel: Tensor) -> float:
            return lost_share(weight - kernel, weight, counted)

        make = _pointwise if max(layer.kernel_size) == 1 else _spatial if self.form == "spatial" else _tucker
        made = make(layer, self.rule, trusted, lost)
        if isinstance(made, str):
            return made
        parts, kernel, text = made
        if layer.bias is not None:
            with torch.no_grad():
                parts[-1].bias.copy_(layer.bias.double() + metric.shift((weight - kernel).flatten(1)))
        share = lost_share(weight - kernel, weight)
        return LowRank(*parts), f"{text}, {metric.note}, {share:.2%} of the squared weights lost"


_Made = tuple[list[Any], Tensor, str]
"""Convolutions in a row, the kernel that they make, and their ranks in words."""


def _pair_cost(layer: Any, form: str) -> PairCost:
    """Return what two convolutions cost in the place of one."""
    out, channels, *size = layer.weight.shape
    whole = layer.weight.numel()
    if max(size) == 1 or form != "spatial":
        return PairCost(whole, out + channels, min(out, channels))
    height, width = size
    column, row = channels * height, out * width
    return PairCost(whole, column + row, min(column, row), column * layer.stride[1] + row)


def _tucker_cost(layer: Any, round_to: int) -> TuckerCost:
    out, channels, *size = layer.weight.shape
    return TuckerCost(channels, out, math.prod(size), round_to, math.prod(layer.stride))


def _pointwise(layer: Any, rule: RankRule, metric: Tensor | None, lost: Callable[[Tensor], float]) -> _Made | str:
    matrix = layer.weight.detach().flatten(1)
    found = decompose(matrix, metric)

    def product(rank: int) -> Tensor:
        first, second = found.at(rank)
        return (second @ first).reshape(layer.weight.shape)

    cost = _pair_cost(layer, "tucker2")
    rank = rule.choose(cost, lambda rank: lost(product(rank)), lambda: vbmf_rank(matrix))
    if isinstance(rank, str):
        return rank
    first, second = found.at(rank)
    ones = layer.kernel_size
    parts = [
        _like(layer, first.reshape(*first.shape, *ones), None, whole=True),
        _like(layer, second.reshape(*second.shape, *ones), layer.bias),
    ]
    return parts, product(rank), f"rank {rank} of {cost.count}"


def _spatial(layer: Any, rule: RankRule, metric: Tensor | None, lost: Callable[[Tensor], float]) -> _Made | str:
    kernel = layer.weight.detach()
    found, cost = Spatial(kernel, metric), _pair_cost(layer, "spatial")
    rank = rule.choose(cost, lambda rank: lost(found.at(rank).kernel()), lambda: vbmf_rank(side_by_side(kernel)))
    if isinstance(rank, str):
        return rank
    factors = found.at(rank)
    parts = [_side(layer, factors.column, None, 0), _side(layer, factors.row, layer.bias, 1)]
    return parts, factors.kernel(), f"rank {rank} of {cost.count}"


def _tucker(layer: Any, rule: RankRule, metric: Tensor | None, lost: Callable[[Tensor], float]) -> _Made | str:
    kernel = layer.weight.detach()
    found, cost = Tucker(kernel, metric), _tucker_cost(layer, rule.round_to)
    ranks = tucker_ranks(
        rule,
        cost,
        found.values,
        lambda *ranks: lost(found.at(*ranks).kernel()),
        lambda: (vbmf_rank(unfolded(kernel, 1)), vbmf_rank(unfolded(kernel, 0))),
    )
    if isinstance(ranks, str):
        return ranks
    factors = found.at(*ranks)
    ones = [1] * len(layer.kernel_size)
    inlet, core, outlet = factors.inlet, factors.core, factors.outlet
    parts = []
    if len(inlet) < layer.in_channels:
        parts.append(_like(layer, inlet.reshape(*inlet.shape, *ones), None))
    else:
        core = torch.einsum("rs...,si->ri...", core, inlet)
    last = outlet.shape[1] == layer.out_channels
    core = torch.einsum("or,ri...->oi...", outlet, core) if last else core
    parts.append(_like(layer, core, layer.bias if last else None, whole=True))
    if not last:
        parts.append(_like(layer, outlet.reshape(*outlet.shape, *ones), layer.bias))
    text = f"ranks {ranks[0]} of {layer.in_channels} in, {ranks[1]} of {layer.out_channels} out"
    return parts, factors.kernel(), text


def _like(layer: Any, kernel: Tensor, bias: Tensor | None, *, whole: bool = False) -> Any:
    """Return a convolution with a kernel; with the stride, padding and dilation of `layer` where `whole`."""
    more = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation} if whole else {}
    return _convolution(layer, kernel, bias, more | ({"padding_mode": layer.padding_mode} if whole else {}))


def _side(layer: Any, kernel: Tensor, bias: Tensor | None, dim: int) -> Any:
    """Return a convolution along one dimension, with the stride, padding and dilation that `layer` has there."""

    def only(values: tuple[int, int], rest: int) -> tuple[int, int]:
        return (values[0], rest) if dim == 0 else (rest, values[1])

    padding = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    more = {"stride": only(layer.stride, 1), "padding": padding, "dilation": only(layer.dilation, 1)}
    return _convolution(layer, kernel, bias, more | {"padding_mode": layer.padding_mode})


def _convolution(layer: Any, kernel: Tensor, bias: Tensor | None, more: Mapping[str, Any]) -> Any:
    kind = next(kind for kind in _PLAIN if isinstance(layer, kind))
    out, channels, *size = kernel.shape
    return filled(
        kind,
        channels,
        out,
        tuple(size),
        values=(kernel, None if bias is None else bias.detach()),
        like=layer,
        bias=bias is not None,
        **more,
    )
