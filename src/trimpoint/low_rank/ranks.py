"""How many components are kept: by size, by retained energy, or by variational Bayes; in steps that suit kernels."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ranks = NDArray[Any]
RULES = ("ratio", "energy", "bayes")


@dataclass(frozen=True)
class RankRule:
    """A way to choose a rank.

    Args:
        rule: one of `RULES`.
        ratio: share of the parameters to keep.
        energy: share of the sum of squares to keep.
        round_to: ranks are multiples of this.
    """

    rule: str
    ratio: float
    energy: float
    round_to: int

    def choose(self, values: Tensor, cost: int, whole: int, bayes: Callable[[], int]) -> int:
        """Return the rank of a pair of factors; 0 where none of them is smaller than what it replaces.

        Args:
            values: weighted singular values, descending.
            cost: parameters of one component.
            whole: parameters of the layer.
            bayes: returns the rank by variational Bayes.
        """
        if self.rule == "ratio":
            return self.by_ratio(len(values), cost, whole)
        wanted = retained_rank(values, self.energy) if self.rule == "energy" else max(1, bayes())
        return self._fitting(wanted, len(values), cost, whole)

    def by_ratio(self, count: int, cost: int, whole: int) -> int:
        """Return what `choose` returns by ratio: a rank that sizes alone decide, `count` being the largest there is."""
        return self._fitting(rank_for_params(cost, whole, self.ratio), count, cost, whole)

    def _fitting(self, wanted: int, count: int, cost: int, whole: int) -> int:
        most = min(count, (whole - 1) // cost)
        return 0 if wanted > most else rounded(wanted, self.round_to, most)

    def refusal(self, most: int) -> str:
        """Return why a layer is left alone, given the largest rank at which its factors are smaller."""
        if 0 < most < self.round_to:
            return f"only ranks up to {most} make it smaller, below round_to={self.round_to}"
        return f"its factors would have no fewer parameters than it has (rank by {self.rule})"


def rank_for_params(cost: int, whole: int, ratio: float) -> int:
    """Return the largest rank whose factors have at most the share `ratio` of `whole` parameters, at least 1.

    Example:
        >>> rank_for_params(384 + 1536, 384 * 1536, 0.7)
        215
    """
    return max(1, math.floor(ratio * whole / cost + 1e-9))


def retained_rank(values: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps the share `energy` of the sum of squares of `values`, at least 1."""
    squares = values.double().square()
    lost = squares.flip(0).cumsum(0).flip(0)
    return max(1, int((lost > (1 - energy) * lost[0] * (1 + 1e-12)).sum()))


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
    """

    inputs: int
    outputs: int
    positions: int
    round_to: int

    @property
    def whole(self) -> int:
        """Parameters of the kernel."""
        return self.inputs * self.outputs * self.positions

    def params(self, rank_in: Ranks, rank_out: Ranks) -> Ranks:
        """Return the parameters of the factors; a change of channels that keeps all of them is left out."""
        inlet = self.inputs * rank_in * (rank_in < self.inputs)
        outlet = self.outputs * rank_out * (rank_out < self.outputs)
        params: Ranks = inlet + rank_in * rank_out * self.positions + outlet
        return params

    def pairs(self) -> tuple[Ranks, Ranks]:
        """Return all pairs of ranks whose factors are smaller than the kernel, fewest parameters first."""
        rank_in, rank_out = (
            grid.ravel() for grid in np.meshgrid(self._steps(self.inputs), self._steps(self.outputs), indexing="ij")
        )
        fit = (rank_in <= rank_out * self.positions) & (rank_out <= rank_in * self.positions)
        fit &= self.params(rank_in, rank_out) < self.whole
        rank_in, rank_out = rank_in[fit], rank_out[fit]
        order = np.argsort(self.params(rank_in, rank_out), kind="stable")
        return rank_in[order], rank_out[order]

    def _steps(self, channels: int) -> list[int]:
        return [*range(self.round_to, channels, self.round_to), channels]


def tucker_ranks(
    rule: RankRule, cost: TuckerCost, values: tuple[Tensor, Tensor], bayes: Callable[[], tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the ranks of a Tucker-2 decomposition; `None` where none is smaller than the kernel and as good as asked.

    By parameters: the ranks of least error within the share, or the smallest ones where all exceed it; by energy: the
    smallest that keep it. The squared error is bounded by the sum of the tails of both unfoldings; each tail counts as
    a share of its own unfolding's squares, which may be weighted in another way than the other's.

    Args:
        rule: how they are chosen.
        cost: of the kernel.
        values: singular values of the unfoldings along inputs and outputs.
        bayes: returns both ranks by variational Bayes.
    """
    rank_in, rank_out = cost.pairs()
    if not len(rank_in):
        return None
    lost = _tails(values[0], cost.inputs)[rank_in] + _tails(values[1], cost.outputs)[rank_out]
    if rule.rule == "ratio":
        within = cost.params(rank_in, rank_out) <= rule.ratio * cost.whole
        best = int(np.argmin(np.where(within, lost, np.inf))) if within.any() else 0
    elif rule.rule == "energy":
        good = lost <= (1 - rule.energy) * (1 + 1e-12)
        if not good.any():
            return None
        best = int(np.argmax(good))
    else:
        wanted = [
            rounded(max(1, rank), cost.round_to, channels) or channels
            for rank, channels in zip(bayes(), (cost.inputs, cost.outputs), strict=True)
        ]
        same = (rank_in == wanted[0]) & (rank_out == wanted[1])
        if not same.any():
            return None
        best = int(np.argmax(same))
    return int(rank_in[best]), int(rank_out[best])


def _tails(values: Tensor, channels: int) -> NDArray[np.float64]:
    """Return the sums of the squares of `values[r:]` for r from 0 to `channels`, as shares of all squares."""
    tails = np.zeros(channels + 1)
    tails[: len(values)] = values.double().square().flip(0).cumsum(0).flip(0).numpy()
    shares: NDArray[np.float64] = tails / max(tails[0], np.finfo(np.float64).tiny)
    return shares
