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
