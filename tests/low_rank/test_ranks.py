"""Ranks by size, by energy and by variational Bayes, rounded."""

import itertools

import numpy as np
import pytest
import torch

from trimpoint.low_rank import RankRule, rank_for_params, retained_rank, rounded
from trimpoint.low_rank.ranks import TuckerCost, tucker_ranks

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])


def test_the_share_of_parameters_is_kept_from_above():
    for whole, cost in ((384 * 1536, 1920), (100, 20), (128, 36)):
        for ratio in (0.2, 0.35, 0.5, 0.7, 0.99):
            rank = rank_for_params(cost, whole, ratio)
            assert rank == 1 or rank * cost <= ratio * whole
            assert (rank + 1) * cost > ratio * whole


@pytest.mark.parametrize(("energy", "rank"), [(1.0, 5), (0.99, 4), (0.98, 3), (0.93, 2), (0.7, 1), (1e-6, 1)])
def test_retained_energy(energy, rank):
    squares = VALUES.square().numpy()
    assert retained_rank(VALUES, energy) == rank
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-6)


def test_rounding():
    assert [rounded(rank, 8, 40) for rank in (1, 11, 12, 39, 44, 100)] == [8, 8, 16, 40, 40, 40]
    assert rounded(20, 16, 15) == 0
    assert rounded(3, 1, 10) == 3


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule("ratio", 0.5, 0.9, 1), 2),
        (RankRule("ratio", 1.0, 0.9, 1), 0),
        (RankRule("ratio", 0.01, 0.9, 1), 1),
        (RankRule("energy", 0.5, 0.98, 1), 3),
        (RankRule("energy", 0.5, 1.0, 1), 0),
        (RankRule("energy", 0.5, 0.98, 2), 4),
        (RankRule("bayes", 0.5, 0.9, 1), 4),
        (RankRule("ratio", 0.5, 0.9, 8), 0),
    ],
)
def test_no_rank_makes_a_layer_larger(rule, expected):
    found = rule.choose(VALUES, cost=10, whole=50, bayes=lambda: 4)
    assert found == expected
    assert found * 10 < 50
    assert rule.refusal(4)


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
    found = tucker_ranks(RankRule("ratio", 0.5, 0.9, round_to), cost, tuple(values), lambda: (0, 0))
    assert found in within
    assert lost(found) == pytest.approx(min(map(lost, within)))


def test_tucker_ranks_by_energy_and_by_variational_bayes():
    values = torch.tensor([4.0, 3.0, 0.1, 0.1, 0.1, 0.1]), torch.tensor([4.0, 3.0] + [0.1] * 6)
    cost = TuckerCost(6, 8, 9, 1)
    assert tucker_ranks(RankRule("energy", 0.5, 0.99, 1), cost, values, lambda: (0, 0)) == (2, 2)
    assert tucker_ranks(RankRule("energy", 0.5, 1.0, 1), cost, values, lambda: (0, 0)) is None
    assert tucker_ranks(RankRule("bayes", 0.5, 0.9, 1), cost, values, lambda: (3, 2)) == (3, 2)
    assert tucker_ranks(RankRule("bayes", 0.5, 0.9, 1), cost, values, lambda: (6, 8)) is None


def test_tucker_ranks_do_not_depend_on_the_scale_of_one_unfolding():
    cost = TuckerCost(16, 16, 9, 1)
    values = torch.linspace(4, 0.1, 16), torch.linspace(3, 0.5, 16)
    for rule in (RankRule("ratio", 0.5, 0.9, 1), RankRule("energy", 0.5, 0.9, 1)):
        ranks = tucker_ranks(rule, cost, values, lambda: (1, 1))
        assert ranks == tucker_ranks(rule, cost, (values[0] * 100, values[1]), lambda: (1, 1))
        assert ranks is not None
        assert min(ranks) > 1
