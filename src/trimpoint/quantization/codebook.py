"""Few values for many weights: k-means in one dimension, and with a price on the entropy of the codes."""

import torch
from torch import Tensor

ITERATIONS = 50
_PIECE = 1 << 20
"""Numbers whose distances to all values are held at once."""


@torch.no_grad()
def initial_values(weights: Tensor, clusters: int, init: str) -> Tensor:
    """Return the values that the iteration begins with, sorted.

    Args:
        weights: `[n]`, float64, n ≥ 1.
        clusters: how many values.
        init: `"linear"`: evenly from the smallest to the largest weight, which keeps a value for the few large ones;
            `"density"`: at even steps of their distribution.

    References:
        Han, Mao and Dally, "Deep Compression" (2016), section 3.2.
    """
    if init == "linear":
        low, high = weights.aminmax()
        return torch.linspace(float(low), float(high), clusters, dtype=weights.dtype)
    places = (torch.arange(clusters) + 0.5) / clusters * len(weights)
    return weights.sort().values[places.long().clamp_max(len(weights) - 1)]


@torch.no_grad()
def cluster(
    weights: Tensor, values: Tensor, importance: Tensor | None = None, price: float = 0.0, zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return codes and values that make Σ h·(w − value)² + price · Σ bits small, by Lloyd's iteration.

    Args:
        weights: `[n]`, float64.
        values: `[clusters]` to begin with.
        importance: h of each weight, `[n]`; 1 by default.
        price: of a bit of the codes' entropy; 0 is k-means.
        zero: whether 0 is one more value, which never moves.

    Returns:
        Codes `[n]`, uint8: 0 for the value 0, and i + 1 for `values[i]`; and the values, without those never used.

    References:
        Lloyd, "Least squares quantization in PCM" (1982); Chou, Lookabaugh and Gray, "Entropy-constrained vector
        quantization" (1989), and for weights of networks, weighted by the diagonal of the Hessian, Choi, El-Khamy and
        Lee, "Towards the limit of network quantization" (2017).
    """
    heavy = torch.ones_like(weights) if importance is None else importance.double()
    table = torch.cat([values.new_zeros(1), values.double()])
    cost = table.new_zeros(len(table))
    if not zero:
        cost[0] = torch.inf
    before = None
    for _ in range(ITERATIONS):
        codes = _nearest(weights, heavy, table, cost)
        if before is not None and torch.equal(codes, before):
            break
        before, mass = codes, torch.zeros_like(table).index_add_(0, codes, heavy)
        sums = torch.zeros_like(table).index_add_(0, codes, heavy * weights)
        table = torch.where(mass > 0, sums / mass.clamp_min(torch.finfo(torch.float64).tiny), table)
        table[0] = 0.0
        if price:
            counts = torch.bincount(codes, minlength=len(table)).double()
            cost = price * -torch.log2(counts / len(codes))  # what is used no more costs infinitely much
    used = torch.bincount(codes, minlength=len(table)) > 0
    used[0] = True
    return (used.cumsum(0) - 1)[codes].to(torch.uint8), table[used][1:]


def _nearest(weights: Tensor, heavy: Tensor, table: Tensor, cost: Tensor) -> Tensor:
    step = max(1, _PIECE // len(table))
    pieces = zip(torch.split(weights, step), torch.split(heavy, step), strict=True)
    return torch.cat([(h[:, None] * (w[:, None] - table).square() + cost).argmin(1) for w, h in pieces])
