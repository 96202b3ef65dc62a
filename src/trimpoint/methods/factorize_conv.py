"""Replace convolutions by thinner ones in a row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimpoint.graph.layers import LowRank
from trimpoint.low_rank import Moments, RankRule, decompose, spatial, tucker2, vbmf_rank
from trimpoint.low_rank.convolution import channel_moment, side_by_side, unfolded
from trimpoint.low_rank.decomposition import root_of
from trimpoint.low_rank.factorization import Factorization, irreplaceable
from trimpoint.low_rank.fit import filled
from trimpoint.low_rank.observed import gather, patches_of
from trimpoint.low_rank.ranks import TuckerCost, tucker_ranks
from trimpoint.method import Context, Fact, Site, Stage, Traits, param

MOST_FEATURES = 4_608
POSITIONS = 1_024
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TINY = 1e-300


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
        to the layer's outputs at random positions of the calibration data, costs one pass over it.
    Needs:
        `calibrate` data for `weighting="activation"` (which `"auto"` takes where there is such data); kernels that
        read more than 4,608 numbers at a time are fitted without it.
    Leaves alone:
        Grouped and depthwise convolutions, those that share their weight, compute it from others or have a forward
        pass of their own, and those whose factors would have no fewer parameters; with `form="spatial"` also kernels
        that have not two sides.

    References:
        Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications"
        (2016), for Tucker-2 and for `rank="bayes"`; Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural
        networks with low rank expansions" (2014), for the spatial form, and Tai et al., "Convolutional neural networks
        with low-rank regularization" (2016), for its closed solution; Zhang et al., "Accelerating very deep
        convolutional networks for classification and detection" (2016), for outputs in the place of weights.
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
        sites = self.sites(ctx)
        moments = self._moments(ctx, sites) if sites else {}
        for site in sites:
            made = self._factors(site.module, moments.get(site.path))
            if isinstance(made, str):
                ctx.skip(site.path, made)
            else:
                ctx.replace(site.path, *made)

    def _moments(self, ctx: Context, sites: Sequence[Site]) -> dict[str, Moments]:
        """Return the moments of what kernels are multiplied with, where they are asked for and not too large."""
        if self.weighting_for(ctx.task) == "none":
            return {}
        layers: dict[str, Any] = {site.path: site.module for site in sites}
        sizes = {path: layer.weight[0].numel() for path, layer in layers.items()}
        sizes = {path: size for path, size in sizes.items() if size <= MOST_FEATURES}

        def rows(path: str, value: Tensor, _kept: Tensor | None) -> Tensor:
            return patches_of(layers[path], value, POSITIONS, ctx.rng)

        found = gather(ctx, sizes, rows) if sizes else {}
        return {path: moments for path, moments in found.items() if bool(moments.second_moment.any())}

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
        """Return how many parameters fewer the factors have by `rank="ratio"`; at least so many by Tucker-2."""
        kernel: Any = layer
        out, channels, *size = kernel.weight.shape
        if max(size) == 1:
            return self.saved_by_pair(out, channels)
        if self.form == "spatial":
            return self.saved_by_pair(out * size[1], channels * size[0])
        cost = TuckerCost(channels, out, math.prod(size), self.round_to)
        params = cost.params(*cost.pairs())
        within = params[params <= self.rank_ratio * cost.whole]
        left = within[-1:] if len(within) else params[:1]
        return int(cost.whole - left[0]) if len(left) else 0

    def _factors(self, layer: Any, moments: Moments | None) -> tuple[LowRank, str] | str:
        """Return what stands for a convolution and its description, or why there is nothing."""
        metric = None if moments is None else moments.second_moment if layer.bias is None else moments.covariance
        if metric is not None and not bool(torch.isfinite(metric).all()):
            return "what it reads from the calibration data is not finite"
        if max(layer.kernel_size) == 1:
            made = _pointwise(layer, self.rule, metric)
        elif self.form == "spatial":
            made = _spatial(layer, self.rule, metric)
        else:
            made = _tucker(layer, self.rule, metric)
        if isinstance(made, str):
            return made
        parts, kernel, text = made
        lost = layer.weight.detach().double() - kernel
        if moments is not None and layer.bias is not None:
            with torch.no_grad():
                parts[-1].bias.copy_(layer.bias.double() + lost.flatten(1) @ moments.mean)
        share = float((lost.norm() / layer.weight.detach().double().norm().clamp_min(_TINY)) ** 2)
        weighted = "plain" if moments is None else "weighted by the inputs"
        return LowRank(*parts), f"{text}, {weighted}, {share:.2%} of the squared weights lost"


_Made = tuple[list[Any], Tensor, str]
"""Convolutions in a row, the kernel that they make, and their ranks in words."""


def _pointwise(layer: Any, rule: RankRule, metric: Tensor | None) -> _Made | str:
    matrix = layer.weight.detach().flatten(1)
    found = decompose(matrix, metric)
    rank = _rank(found.values, matrix, layer.in_channels + layer.out_channels, rule)
    if isinstance(rank, str):
        return rank
    first, second = found.at(rank)
    ones = layer.kernel_size
    parts = [
        _like(layer, first.reshape(*first.shape, *ones), None, whole=True),
        _like(layer, second.reshape(*second.shape, *ones), layer.bias),
    ]
    return parts, (second @ first).reshape(layer.weight.shape), f"rank {rank} of {min(matrix.shape)}"


def _spatial(layer: Any, rule: RankRule, metric: Tensor | None) -> _Made | str:
    kernel = layer.weight.detach()
    height, width = layer.kernel_size
    matrix = side_by_side(kernel)
    values = torch.linalg.svdvals(matrix)
    rank = _rank(values, matrix, layer.in_channels * height + layer.out_channels * width, rule)
    if isinstance(rank, str):
        return rank
    factors = spatial(kernel, rank, metric)
    parts = [_side(layer, factors.column, None, 0), _side(layer, factors.row, layer.bias, 1)]
    return parts, factors.kernel(), f"rank {rank} of {min(matrix.shape)}"


def _tucker(layer: Any, rule: RankRule, metric: Tensor | None) -> _Made | str:
    kernel = layer.weight.detach()
    sides = unfolded(kernel, 1), unfolded(kernel, 0)
    cost = TuckerCost(layer.in_channels, layer.out_channels, kernel[0, 0].numel(), rule.round_to)
    weighted = sides
    if metric is not None:
        weighted = root_of(channel_moment(metric, layer.in_channels)).T @ sides[0], sides[1] @ root_of(metric)
    values = torch.linalg.svdvals(weighted[0]), torch.linalg.svdvals(weighted[1])
    ranks = tucker_ranks(rule, cost, values, lambda: (vbmf_rank(sides[0]), vbmf_rank(sides[1])))
    if ranks is None:
        return rule.refusal(0)
    factors = tucker2(kernel, *ranks, metric)
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


def _rank(values: Tensor, matrix: Tensor, cost: int, rule: RankRule) -> int | str:
    """Return the rank of a pair of factors, or why there is none."""
    whole = matrix.numel()
    rank = rule.choose(values, cost, whole, lambda: vbmf_rank(matrix))
    return rank or rule.refusal(min(len(values), (whole - 1) // cost))


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
        like=layer.weight,
        bias=bias is not None,
        **more,
    )
