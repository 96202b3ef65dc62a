"""Replace embeddings by a narrower table and a projection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimpoint.graph.layers import LowRank
from trimpoint.low_rank import PairCost, decompose, vbmf_rank
from trimpoint.low_rank.factorization import Factorization, irreplaceable
from trimpoint.low_rank.fit import filled
from trimpoint.method import Context, Fact, Site, Stage, Traits, param
from trimpoint.padding import calibrate_kept, rows_of

UNREAD = 0.01
"""What a row counts besides how often it is read, as a share of the mean: rows that never are must not be lost."""


@dataclass(frozen=True, kw_only=True)
class FactorizeEmbedding(Factorization):
    """Replace an embedding by a table of shorter rows and a projection to their former length.

    With `weighting="frequency"` the error of a row counts as often as it occurs in the calibration data, padding left
    out, so that the rows that are read are kept best; rows that never occur still count a little. The row of
    `padding_idx` stays zero where it was.

    When it pays:
        For the size of the file, where a large vocabulary makes up much of it. It makes nothing faster: reading a row
        costs next to nothing, and the projection is one more product.
    What it costs:
        Quality falls with the rank; plan a recovery step behind it.
    Needs:
        `calibrate` data for `weighting="frequency"` (which `"auto"` takes where there is such data).
    Leaves alone:
        Embeddings that are tied to an output layer, limit the norm of their rows, have sparse gradients or a forward
        pass of their own, and those whose factors would have no fewer parameters.

    References:
        Lan et al., "ALBERT: a lite BERT for self-supervised learning of language representations" (2020), for the
        factorised table; Chen et al., "GroupReduce: block-wise low-rank approximation for neural language model
        shrinking" (2018), for the weighting by frequency.
    """

    observed: ClassVar[str] = "frequency"

    weighting: str = param(
        "auto",
        doc="what a row counts: the same as any, as often as it occurs in the `calibrate` data, or that where there is "
        "such data and the same where not",
        choices=("auto", "none", "frequency"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.FACTORIZE,
        targets=("Embedding",),
        requires=Fact.FLOAT_WEIGHT | Fact.DENSE,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Replace every embedding in scope that becomes smaller."""
        sites = self.sites(ctx)
        counts = self._counts(ctx, sites) if sites else {}
        for site in sites:
            self._replace(ctx, site, counts.get(site.path))

    def unfit(self, model: nn.Module, site: Site) -> str:
        """Return why a layer cannot be replaced, or `""`."""
        layer: Any = site.module
        if reason := irreplaceable(model, site, nn.Embedding):
            return reason
        if layer.max_norm is not None:
            return "it limits the norm of its rows while it runs"
        if layer.sparse or layer.scale_grad_by_freq:
            return "its gradients are sparse or scaled by frequency, which factors cannot have"
        return ""

    def saved(self, layer: nn.Module) -> int:
        """Return how many parameters fewer the factors of a table have by `rank="ratio"`."""
        table: Any = layer
        return self.saved_by_pair(_cost(table.num_embeddings, table.embedding_dim))

    def _counts(self, ctx: Context, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return how often each row is read over the calibration data, `[rows]`, where that weights."""
        if self.weighting_for(ctx.task) == "none":
            return {}
        layers: dict[str, Any] = {site.path: site.module for site in sites}
        found = {path: torch.zeros(layer.num_embeddings, dtype=torch.float64) for path, layer in layers.items()}

        def see(path: str, _module: nn.Module, value: Any, kept: Tensor | None) -> None:
            ids = rows_of(value[..., None], kept).flatten().cpu().long()
            found[path] += torch.bincount(ids, minlength=len(found[path])).double()

        calibrate_kept(ctx, see, list(found))
        return found

    def _replace(self, ctx: Context, site: Site, counts: Tensor | None) -> None:
        layer: Any = site.module
        table = layer.weight.detach().double()
        rows, size = table.shape
        read = counts is not None and bool(counts.any())
        found = decompose(table.T, counts + UNREAD * counts.mean() if counts is not None and read else None)
        cost = _cost(rows, size)
        rank = self.rule.choose(cost, found.share, lambda: vbmf_rank(table))
        if isinstance(rank, str):
            return ctx.skip(site.path, rank)
        narrow, projection = found.at(rank)
        narrow[:, ~table.any(1)] = 0
        more = {"padding_idx": layer.padding_idx}
        parts = LowRank(
            filled(nn.Embedding, rows, rank, values=(narrow.T, None), like=layer, **more),
            filled(nn.Linear, rank, size, values=(projection, None), like=layer, bias=False),
        )
        text = "plain"
        if counts is not None:
            share = f"{int((counts > 0).sum())} of {rows} rows are read"
            text = f"weighted by frequency, {share}" if read else f"plain: {share}"
        elif self.weighting != "none":
            text = "plain: the task has no `calibrate` data"
        return ctx.replace(
            site.path, parts, f"rank {rank} of {cost.count}, {text}, {found.share(rank):.2%} of the squares lost"
        )


def _cost(rows: int, size: int) -> PairCost:
    return PairCost(rows * size, rows + size, min(rows, size))
