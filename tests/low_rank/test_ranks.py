"""Ranks by size, by energy and by variational Bayes, rounded."""

import itertools

import numpy as np
import pytest
import torch

from trimpoint.low_rank import PairCost, RankRule, rank_for_params, rounded
from trimpoint.low_rank.ranks import NOISE, TuckerCost, tucker_ranks

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])


def test_the_share_of_parameters_is_kept_from_above():
    for whole, cost in ((384 * 1536, 1920), (100, 20), (128, 36)):
        for ratio in (0.2, 0.35, 0.5, 0.7, 0.99):
            rank = rank_for_params(cost, whole, ratio)
            assert rank == 1 or rank * cost <= ratio * whole
            assert (rank + 1) * cost > ratio * whole


def tail(rank):
    """Return the share of the squares of `VALUES` that is behind a rank."""
    return float(VALUES[rank:].square().sum() / VALUES.square().sum())


@pytest.mark.parametrize(("energy", "rank"), [(0.99, 4), (0.98, 3), (0.93, 2), (0.7, 1), (1e-6, 1)])
def test_retained_energy(energy, rank):
    found = RankRule("energy", 0.5, energy, 1).choose(PairCost(100, 10, 5), tail, lambda: 0)
    assert found == rank
    assert 1 - tail(found) >= energy


def test_rounding():
    assert [rounded(rank, 8, 40) for rank in (1, 11, 12, 39, 44, 100)] == [8, 8, 16, 40, 40, 40]
    assert rounded(20, 16, 15) == 0
    assert rounded(3, 1, 10) == 3


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule("ratio", 0.5, 0.9, 1), 2),
        (RankRule("ratio", 1.0, 0.9, 1), "no fewer parameters"),
        (RankRule("ratio", 0.01, 0.9, 1), 1),
        (RankRule("ratio", 0.7, 0.9, 2), 2),
        (RankRule("ratio", 0.3, 0.9, 2), 2),
        (RankRule("energy", 0.5, 0.98, 1), 3),
        (RankRule("energy", 0.5, 1.0, 1), "no fewer parameters"),
        (RankRule("energy", 0.5, 0.98, 2), 4),
        (RankRule("bayes", 0.5, 0.9, 1), 4),
        (RankRule("ratio", 0.5, 0.9, 8), "only ranks up to 4 make it smaller, below round_to=8"),
    ],
)
def test_no_rank_makes_a_layer_larger(rule, expected):
    found = rule.choose(PairCost(50, 10, 5), tail, bayes=lambda: 4)
    if isinstance(expected, str):
        assert expected in found
    else:
        assert found == expected
        assert found * 10 < 50


def test_a_rank_of_zero_by_variational_bayes_leaves_the_layer_alone():
    rule = RankRule("bayes", 0.5, 0.9, 1)
    assert rule.choose(PairCost(50, 10, 5), tail, lambda: 0) == NOISE
    for ranks in ((0, 3), (3, 0)):
        found = tucker_ranks(rule, TuckerCost(6, 8, 9, 1), (VALUES, VALUES), nothing, lambda ranks=ranks: ranks)
        assert found == NOISE


def test_by_ratio_multiples_stay_within_it():
    cost = PairCost(64 * 64, 128, 64)
    for ratio in (0.3, 0.5, 0.7, 0.95):
        rank = RankRule("ratio", ratio, 0.9, 8).by_ratio(cost)
        assert rank % 8 == 0
        assert ratio * cost.whole - 8 * cost.params < rank * cost.params <= ratio * cost.whole


def test_multiplications_before_a_stride_count():
    cost = PairCost(50, 10, 5, products=26)
    assert (cost.size, cost.most) == (26, 1)
    assert RankRule("ratio", 0.2, 0.9, 1).choose(cost, tail, lambda: 0) == 1
    for rule in (RankRule("ratio", 0.5, 0.9, 1), RankRule("energy", 0.5, 0.98, 1), RankRule("bayes", 0.5, 0.98, 1)):
        assert "no fewer multiplications" in rule.choose(cost, tail, lambda: 3)
    tucker = TuckerCost(8, 8, 4, 1, stride=16)
    assert set(tucker.pairs()[0]) == {1, 8}
    rule = RankRule("bayes", 0.5, 0.98, 1)
    assert "no fewer multiplications" in tucker_ranks(rule, tucker, (VALUES, VALUES), nothing, lambda: (2, 2))


def nothing(*_ranks):
    return 0.0


def test_tucker_costs_count_the_parameters_of_the_factors():
    cost = TuckerCost(6, 8, 9, 1)
    rank_in, rank_out = cost.pairs()
    assert (cost.params(rank_in, rank_out) < cost.whole).all()
    for one, other, params in zip(rank_in, rank_out, cost.params(rank_in, rank_out), strict=True):
        expected = (6 * one if one < 6 else 0) + one * other * 9 + (8 * other if other < 8 else 0)
        assert params == expected


@pytest.mark.parametrize("round_to", [1, 2])
def test_tucker_ranks_by_size_are_the_best_within_it(round_to):
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(size, generator=generator).sort(descending=True).values for size in (6, 8)]
    cost = TuckerCost(6, 8, 9, round_to)

    def lost(pair):
        return float(values[0][pair[0] :].square().sum() + values[1][pair[1] :].square().sum())

    steps = [[*range(round_to, size, round_to), size] for size in (6, 8)]
    within = [pair for pair in itertools.product(*steps) if cost.params(*np.array(pair)) <= 0.5 * cost.whole]
    found = tucker_ranks(RankRule("ratio", 0.5, 0.9, round_to), cost, values, lambda *pair: lost(pair), lambda: (0, 0))
    assert found in within
    assert lost(found) == pytest.approx(min(map(lost, within)))


def test_tucker_ranks_by_energy_and_by_variational_bayes():
    values = torch.tensor([4.0, 3.0, 0.1, 0.1, 0.1, 0.1]), torch.tensor([4.0, 3.0] + [0.1] * 6)
    cost = TuckerCost(6, 8, 9, 1)

    def lost(*ranks):
        return sum(float(v[rank:].square().sum() / v.square().sum()) for v, rank in zip(values, ranks, strict=True))

    def ranks(rule, energy, found=(0, 0)):
        return tucker_ranks(RankRule(rule, 0.5, energy, 1), cost, values, lost, lambda: found)

    assert ranks("energy", 0.99) == (2, 2)
    assert "no fewer parameters" in ranks("energy", 1.0)
    assert ranks("bayes", 0.9, (3, 2)) == (3, 2)
    assert "no fewer parameters" in ranks("bayes", 0.9, (6, 8))


@pytest.mark.parametrize(
    ("found", "positions", "round_to", "ranks"),
    [((12, 1), 9, 1, (9, 1)), ((2, 30), 9, 1, (2, 18)), ((60, 3), 3, 8, (24, 8)), ((60, 3), 9, 8, (64, 8))],
)
def test_what_the_core_has_no_use_for_is_no_reason_to_refuse(found, positions, round_to, ranks):
    cost = TuckerCost(64, 64, positions, round_to)
    values = (torch.ones(64), torch.ones(64))
    assert tucker_ranks(RankRule("bayes", 0.5, 0.9, round_to), cost, values, nothing, lambda: found) == ranks


def test_tucker_ranks_that_no_multiple_makes_smaller():
    values = (torch.ones(8), torch.ones(8))
    found = tucker_ranks(RankRule("ratio", 0.5, 0.9, 16), TuckerCost(8, 8, 9, 16), values, nothing, lambda: (0, 0))
    assert "multiples of round_to=16" in found


def test_the_energy_that_is_measured_decides():
    """Where the sum of the tails says too much or too little of what is lost, the ranks are smaller or larger."""
    values, cost = (torch.linspace(4, 0.1, 16), torch.linspace(3, 0.1, 16)), TuckerCost(16, 16, 9, 1)
    sizes = []
    for factor in (0.4, 1.0, 3.0):

        def lost(*ranks, factor=factor):
            tails = [v[rank:].square().sum() / v.square().sum() for v, rank in zip(values, ranks, strict=True)]
            return factor * float(sum(tails))

        ranks = tucker_ranks(RankRule("energy", 0.5, 0.9, 1), cost, values, lost, lambda: (0, 0))
        assert 0.06 < lost(*ranks) <= 0.1
        sizes.append(int(cost.params(*np.array(ranks))))
    assert sizes == sorted(set(sizes))


def test_tucker_ranks_do_not_depend_on_the_scale_of_one_unfolding():
    cost = TuckerCost(16, 16, 9, 1)
    values = torch.linspace(4, 0.1, 16), torch.linspace(3, 0.5, 16)
    for rule in (RankRule("ratio", 0.5, 0.9, 1), RankRule("energy", 0.5, 0.9, 1)):

        def lost(*ranks):
            return sum(float(v[rank:].norm() / v.norm()) ** 2 for v, rank in zip(values, ranks, strict=True))

        ranks = tucker_ranks(rule, cost, values, lost, lambda: (1, 1))
        assert ranks == tucker_ranks(rule, cost, (values[0] * 100, values[1]), lost, lambda: (1, 1))
        assert isinstance(ranks, tuple)
        assert min(ranks) > 1
