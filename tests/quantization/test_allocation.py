from itertools import product

import numpy as np
import pytest

from trimpoint.quantization.allocation import cheapest


@pytest.mark.parametrize("seed", range(10))
def test_no_other_choice_within_the_limit_costs_less(seed):
    rng = np.random.default_rng(seed)
    layers, kinds = "abcde", ("float32", "int8", "int4")
    costs = {(layer, kind): float(rng.random()) for layer in layers for kind in kinds}
    weights = {key: float(rng.random()) * 1e-3 for key in costs}
    limit = sum(min(weights[layer, kind] for kind in kinds) for layer in layers) * 1.5
    totals = {
        chosen: sum(costs[key] for key in zip(layers, chosen, strict=True))
        for chosen in product(kinds, repeat=len(layers))
        if sum(weights[key] for key in zip(layers, chosen, strict=True)) <= limit
    }
    found = cheapest(costs, weights, limit)
    assert found == dict(zip(layers, min(totals, key=totals.__getitem__), strict=True))


def test_of_equal_costs_the_lighter_choice_and_nothing_where_nothing_fits():
    costs = {("a", "fast"): 0.0, ("a", "slow"): 0.0}
    weights = {("a", "fast"): 1.0, ("a", "slow"): 2.0}
    assert cheapest(costs, weights, 5.0) == {"a": "fast"}
    assert cheapest(costs, weights, 0.5) is None


def test_a_choice_that_costs_very_much_does_not_hide_what_the_others_cost():
    sizes, kinds = {"a": 1.0, "b": 1.0, "c": 1.0}, range(2, 8)
    costs = {(layer, bits): {"a": 1e-3, "b": 1e-4, "c": 1e-5}[layer] * 4.0**-bits for layer in sizes for bits in kinds}
    weights = {(layer, bits): float(bits) for layer in sizes for bits in kinds}
    for large in (1.0, 1e8, float("inf"), float("nan")):
        costs["c", 2] = large
        assert cheapest(costs, weights, 12.0) == {"a": 5, "b": 4, "c": 3}, large
    assert cheapest(costs, weights, 6.0) == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("seed", range(12))
def test_a_layer_of_a_few_weights_beside_one_of_millions_keeps_to_the_limit_as_well(seed):
    rng = np.random.default_rng(seed)
    sizes = {"tiny": int(rng.integers(1, 40)), "large": int(rng.integers(1, 40)) * 10**6, "wide": 1_241_519}
    weights = {(layer, bits): float(bits * size) for layer, size in sizes.items() for bits in range(2, 8)}
    costs = {(layer, bits): float(rng.lognormal(0, 6)) * 4.0**-bits for layer, bits in weights}
    for mean in (2.0, 3.0, 4.0, 6.0):
        found = cheapest(costs, weights, mean * sum(sizes.values()))
        assert sum(weights[each] for each in found.items()) <= mean * sum(sizes.values())
        uniform = sum(costs[layer, int(mean)] for layer in sizes)
        assert sum(costs[each] for each in found.items()) <= uniform * (1 + 1e-5)
    assert cheapest(costs, weights, 1.999 * sum(sizes.values())) is None


def test_nothing_to_choose():
    assert cheapest({}, {}, 1.0) == {}
