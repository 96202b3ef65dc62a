"""How many components are kept: by size, by retained energy, or by variational Bayes; in steps that suit kernels."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ranks = NDArray[Any]
RULES = ("ratio", "energy", "bayes")
NOISE = "no component stands out of the noise (rank by bayes)"
SHORTLIST = 8
"""Pairs of Tucker ranks whose loss is measured, where several have the size that is asked for."""

_LADDER = 4 * 0.85 ** np.arange(25)
"""Sums of tails that are tried, as shares of what may be lost: in another metric than theirs they bound no loss."""


@dataclass(frozen=True)
class PairCost:
    """What a pair of factors costs; sizes count weights, and multiplications for each position of the output.

    Args:
        whole: size of what is replaced, the same by both counts.
        params: weights of one component.
        count: the largest rank there is.
        products: multiplications of one component; 0 where each weight is used once, as everywhere but before a stride.
    """

    whole: int
    params: int
    count: int
    products: int = 0

    @property
    def strided(self) -> bool:
        """Whether the first factor runs at more positions than there are in the output."""
        return self.products > self.params

    @property
    def size(self) -> int:
        """Weights or multiplications of one component, whichever are more."""
        return max(self.params, self.products)

    @property
    def most(self) -> int:
        """The largest rank whose factors are smaller than what they replace, by both counts."""
        return min(self.count, (self.whole - 1) // self.size)


@dataclass(frozen=True)
class RankRule:
    """A way to choose a rank.

    Args:
        rule: one of `RULES`.
        ratio: share of the parameters to keep.
        energy: share of the sum of squares to keep.
        round_to: ranks are multiples of this: rounded down by ratio, up by energy, to the nearest by variational Bayes.
    """

    rule: str
    ratio: float
    energy: float
    round_to: int

    def choose(self, cost: PairCost, lost: Callable[[int], float], bayes: Callable[[], int]) -> int | str:
        """Return the rank of a pair of factors, or why the layer is left alone.

        Args:
            cost: of the factors.
            lost: returns the share of the sum of squares that factors of a rank lose; it falls with the rank.
            bayes: returns the rank by variational Bayes.
        """
        if self.rule == "ratio":
            return self.by_ratio(cost)
        if self.rule == "bayes":
            found = bayes()
            rank = rounded(found, self.round_to, cost.most) if found <= cost.most else 0
            return (rank or self.refusal(cost)) if found else NOISE
        ranks = range(self.round_to, cost.most + 1, self.round_to)
        at = bisect.bisect_left(ranks, True, key=lambda rank: lost(rank) <= 1 - self.energy)
        return ranks[at] if at < len(ranks) else self.refusal(cost)

    def by_ratio(self, cost: PairCost) -> int | str:
        """Return what `choose` returns by ratio: a rank that sizes alone decide."""
        steps = rank_for_params(cost.params, cost.whole, self.ratio) // self.round_to
        rank = max(1, steps) * self.round_to
        return rank if rank <= cost.most else self.refusal(cost)

    def refusal(self, cost: "PairCost | TuckerCost") -> str:
        """Return why a layer is left alone whose factors would not be smaller."""
        if isinstance(cost, PairCost) and 0 < cost.most < self.round_to:
            return f"only ranks up to {cost.most} make it smaller, below round_to={self.round_to}"
        if isinstance(cost, TuckerCost) and not len(cost.pairs()[0]) and len(replace(cost, round_to=1).pairs()[0]):
            return f"no ranks that are multiples of round_to={self.round_to} make it smaller"
        if cost.strided:
            return (
                "its factors would take no fewer multiplications than it takes, since the first runs before the stride "
                f"(rank by {self.rule})"
            )
        return f"its factors would have no fewer parameters than it has (rank by {self.rule})"


def rank_for_params(cost: int, whole: int, ratio: float) -> int:
    """Return the largest rank whose factors have at most the share `ratio` of `whole` parameters, at least 1.

    Example:
        >>> rank_for_params(384 + 1536, 384 * 1536, 0.7)
        215
    """
    return max(1, math.floor(ratio * whole / cost + 1e-9))


def rounded(rank: int, round_to: int, most: int) -> int:
    """Return the multiple of `round_to` nearest to `rank`, at least one of them and at most `most`; else 0.

    Example:
        >>> rounded(215, 8, 306), rounded(2, 8, 306), rounded(5, 8, 7)
        (216, 8, 0)
    """
    nearest = max(1, math.floor(rank / round_to + 0.5)) * round_to
    return nearest if nearest <= most else most // round_to * round_to


@dataclass(frozen=True)
class TuckerCost:
    """What a Tucker-2 decomposition of a kernel costs, and which of its ranks are to be chosen from.

    Args:
        inputs: channels that go in.
        outputs: channels that come out.
        positions: of the kernel.
        round_to: ranks are multiples of this, or all the channels.
        stride: positions that the inlet runs at for each position of the output.
    """

    inputs: int
    outputs: int
    positions: int
    round_to: int
    stride: int = 1

    @property
    def whole(self) -> int:
        """Parameters of the kernel, and its multiplications for each position of the output."""
        return self.inputs * self.outputs * self.positions

    @property
    def strided(self) -> bool:
        """Whether the inlet runs at more positions than there are in the output."""
        return self.stride > 1

    def params(self, rank_in: Ranks, rank_out: Ranks) -> Ranks:
        """Return the parameters of the factors; a change of channels that keeps all of them is left out."""
        return self._size(rank_in, rank_out, 1)

    def size(self, rank_in: Ranks, rank_out: Ranks) -> Ranks:
        """Return the multiplications of the factors for each position of the output: no fewer than the parameters."""
        return self._size(rank_in, rank_out, self.stride)

    def pairs(self) -> tuple[Ranks, Ranks]:
        """Return all pairs of ranks whose factors are smaller than the kernel, fewest parameters first."""
        rank_in, rank_out = (
            grid.ravel() for grid in np.meshgrid(self._steps(self.inputs), self._steps(self.outputs), indexing="ij")
        )
        fit = (rank_in <= rank_out * self.positions) & (rank_out <= rank_in * self.positions)
        fit &= self.size(rank_in, rank_out) < self.whole
        rank_in, rank_out = rank_in[fit], rank_out[fit]
        order = np.argsort(self.params(rank_in, rank_out), kind="stable")
        return rank_in[order], rank_out[order]

    def clamped(self, rank_in: int, rank_out: int) -> tuple[int, int]:
        """Return two ranks as multiples, or all channels, and no more on one side than the other has use for."""
        one, other = (
            rounded(rank, self.round_to, channels) or channels
            for rank, channels in ((rank_in, self.inputs), (rank_out, self.outputs))
        )
        return self._limited(one, other), self._limited(other, one)

    def _limited(self, rank: int, other: int) -> int:
        most = other * self.positions
        return rank if rank <= most else max(1, most // self.round_to) * self.round_to

    def _size(self, rank_in: Ranks, rank_out: Ranks, stride: int) -> Ranks:
        inlet = self.inputs * rank_in * (rank_in < self.inputs) * stride
        outlet = self.outputs * rank_out * (rank_out < self.outputs)
        size: Ranks = inlet + rank_in * rank_out * self.positions + outlet
        return size

    def _steps(self, channels: int) -> list[int]:
        return [*range(self.round_to, channels, self.round_to), channels]


def tucker_ranks(
    rule: RankRule,
    cost: TuckerCost,
    values: tuple[Tensor, Tensor],
    lost: Callable[[int, int], float],
    bayes: Callable[[], tuple[int, int]],
) -> tuple[int, int] | str:
    """Return the ranks of a Tucker-2 decomposition, or why the layer is left alone.

    The sum of the tails of both unfoldings says which pairs are worth to be measured; each tail counts as a share of
    its own unfolding's squares, which may be weighted in another way than the other's. By parameters: of the pairs of
    the size that is asked for, those of the least sums are measured, and the best is taken; the smallest pair where all
    exceed the size. By energy: the sum that a pair may have falls from above until the smallest one that has it keeps
    what is asked for; one rank or the other is then lowered as long as that holds.

    Args:
        rule: how they are chosen.
        cost: of the kernel.
        values: singular values of the unfoldings along inputs and outputs.
        lost: returns the share of the sum of squares that factors of two ranks lose.
        bayes: returns both ranks by variational Bayes.
    """
    rank_in, rank_out = cost.pairs()
    pairs = list(zip(rank_in.tolist(), rank_out.tolist(), strict=True))
    tails = _tails(values[0], cost.inputs)[rank_in] + _tails(values[1], cost.outputs)[rank_out]
    if rule.rule == "bayes":
        found = bayes()
        wanted = cost.clamped(*found)
        return NOISE if not min(found) else wanted if wanted in pairs else rule.refusal(cost)
    if rule.rule == "ratio":
        within = np.flatnonzero(cost.params(rank_in, rank_out) <= rule.ratio * cost.whole)
        widest = within[np.lexsort((-rank_out[within], rank_in[within]))]
        widest = widest[np.unique(rank_in[widest], return_index=True)[1]]
        short = widest[np.argsort(tails[widest], kind="stable")[:SHORTLIST]]
        found_at = min((pairs[at] for at in short), key=lambda pair: lost(*pair), default=None)
        return found_at or (pairs[0] if pairs else rule.refusal(cost))
    return _keeping(pairs, tails, 1 - rule.energy, lost) or rule.refusal(cost)


def _keeping(
    pairs: list[tuple[int, int]], tails: NDArray[np.float64], most: float, lost: Callable[[int, int], float]
) -> tuple[int, int] | None:
    """Return a small pair of ranks, of `pairs` by size, that loses no more than `most`; `None` where none is found."""
    best = None
    for share in _LADDER * most:
        good = np.flatnonzero(tails <= share)
        if len(good) and good[0] != best:
            best = int(good[0])
            if lost(*pairs[best]) <= most:
                break
    else:
        return None
    places = {pair: at for at, pair in enumerate(pairs)}
    steps = [sorted(set(ranks)) for ranks in zip(*pairs, strict=True)]
    while True:
        one, other = pairs[best]
        below = [(max(steps[0][: steps[0].index(one)], default=0), other)]
        below.append((one, max(steps[1][: steps[1].index(other)], default=0)))
        smaller = [places[pair] for pair in below if places.get(pair, best) < best and lost(*pair) <= most]
        if not smaller:
            return pairs[best]
        best = min(smaller)


def _tails(values: Tensor, channels: int) -> NDArray[np.float64]:
    """Return the sums of the squares of `values[r:]` for r from 0 to `channels`, as shares of all squares."""
    tails = np.zeros(channels + 1)
    tails[: len(values)] = values.double().square().flip(0).cumsum(0).flip(0).numpy()
    shares: NDArray[np.float64] = tails / max(tails[0], np.finfo(np.float64).tiny)
    return shares
