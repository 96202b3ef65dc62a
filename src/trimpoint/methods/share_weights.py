"""Let the weights of a layer share a few values."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from trimpoint.graph import kept_by, why_not_held
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param
from trimpoint.quantization.codebook import cluster, initial_values
from trimpoint.sparsity.inputs import as_matrix, from_matrix, gather, groups_of, own_forward

_LEAST = 1e-9
"""Importance of a weight that reads nothing but zeros, in shares of the mean."""


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Method):
    """Let the weights of a layer share a few values, found by k-means; training moves the values (codebooks).

    When it pays:
        Where what counts is the size of the file after compression, in a download or an archive. Nothing gets faster,
        and the file that the runtimes on CPUs load is as large as before: they have no kernel for codebooks, and store
        and multiply the values as plain weights.
    What it costs:
        Seconds for a million weights, and a pass over the calibration data with `importance="inputs"`. Which value a
        weight has does not change any more; a recovery step behind it trains the values.
    Needs:
        `calibrate` data with `importance="inputs"`.
    Leaves alone:
        Biases, norms, embeddings, recurrent layers; weights that are tied to others, computed from others, or not
        finite. Zeros of a mask stay zero, as they are when the step begins.

    References:
        Han, Mao and Dally, "Deep Compression: compressing deep neural networks with pruning, trained quantization and
        Huffman coding" (2016); Choi, El-Khamy and Lee, "Towards the limit of network quantization" (2017), for the
        importance of a weight and the price of a bit.
    """

    clusters: int = param(
        16, doc="values of a layer, besides zero", bounds=Bounds(ge=1, le=255), weak=255, search=(4, 8, 16, 32)
    )
    init: str = param(
        "linear",
        doc="values to begin with: evenly over the range, or over the distribution",
        choices=("linear", "density"),
    )
    importance: str = param(
        "none",
        doc="what the error of a weight counts: the same, or the mean square of what it is multiplied with",
        choices=("none", "inputs"),
    )
    entropy: float = param(
        0.0,
        doc="price of a bit of the coded weights, in shares of the mean square of a weight that is kept; above 0 small "
        "weights may become zero",
        bounds=Bounds(ge=0, le=10),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Linear", "Conv1d", "Conv2d"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"coded_bytes"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Put the weight of every module in scope on a codebook."""
        sites = {}
        for site in ctx.modules():
            if reason := self._why_not(site):
                ctx.skip(site.path, reason)
            else:
                sites[site.path] = site
        if self.importance == "none":
            for path, site in sites.items():
                self._share(ctx, path, site, None)
            return
        for path, seen in gather(ctx, {path: site.module for path, site in sites.items()}, products=False):
            if seen.total is None:
                ctx.skip(path, "the calibration data does not run through it")
                continue
            self._share(ctx, path, sites[path], seen.total / seen.positions)

    def _why_not(self, site: Site) -> str:
        if site.tied:
            return "its weight is tied to another module's"
        if reason := why_not_held(site.module, "weight"):
            return reason
        if self.importance == "inputs" and (reason := own_forward(site.module)):
            return reason
        weight = cast(Tensor, site.module.weight).detach()
        if not bool(torch.isfinite(weight).all()):
            return "its weight is not finite"
        return "" if bool((weight != 0).any()) else "all its weights are zero"

    def _share(self, ctx: Context, path: str, site: Site, squares: Tensor | None) -> None:
        weight, kept = cast(Tensor, site.module.weight).detach(), kept_by(site.module)
        chosen = weight[kept].double()
        heavy = None
        if squares is not None:
            rows = weight.shape[0] // groups_of(site.module)
            spread = squares.repeat_interleave(rows, 0).expand_as(as_matrix(weight))
            heavy = from_matrix(spread, weight.shape)[kept]
            mean = heavy.mean()
            # What reads zeros alone still takes the nearest value, not any.
            heavy = (heavy / mean).clamp_min(_LEAST) if mean > 0 else None
        # In units of the root mean square no square of a tiny or huge weight is lost.
        largest = chosen.abs().max()
        size = largest * (chosen / largest).square().mean().sqrt()
        start = initial_values(chosen / size, min(self.clusters, len(chosen)), self.init)
        found, values = cluster(chosen / size, start, heavy, self.entropy, self.entropy > 0)
        if not len(values):
            return ctx.skip(path, "at this price of a bit no weight is worth its bits")
        codes = torch.zeros(weight.shape, dtype=torch.uint8)
        codes[kept] = found
        ctx.share(path, codes, values * size, reason=f"{self.init}, importance {self.importance}")
