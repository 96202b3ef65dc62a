import numpy as np
import pytest

from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.plan import Step
from trimpoint.search.space import Structure
from trimpoint.search.surrogate import expected_drops, newcomers

LEAVES = {"small.0": 100, "small.1": 100, "small.2": 100, "large.0": 10_000, "large.1": 10_000}


def without(*paths, merit=0.5):
    return Structure(
        steps=(Step(DropBlocks(blocks=paths)),), shares=dict.fromkeys(paths, 0.0), gains={"latency_ms": merit}
    )


SEEN = [
    (without("small.0"), 0.010),
    (without("small.0", "small.1"), 0.015),
    (without("large.0"), 0.040),
    (without("large.0", "small.0"), 0.060),
]


def test_what_was_seen_is_expected_again():
    drops = expected_drops(SEEN, [structure for structure, _ in SEEN], LEAVES)
    np.testing.assert_allclose(drops, [drop for _, drop in SEEN], rtol=0.25)


def test_layers_of_one_kind_share_what_was_learnt():
    third, large = without("small.2"), without("large.1")
    drops = expected_drops(SEEN, [third, large], LEAVES)
    assert drops[0] == pytest.approx(0.010, rel=0.3)
    assert drops[1] == pytest.approx(0.040, rel=0.3)


def test_removing_more_is_expected_to_cost_more():
    rng = np.random.default_rng(0)
    names = list(LEAVES)
    for _ in range(50):
        some = rng.permutation(names)[: rng.integers(1, 4)].tolist()
        more = [*some, next(name for name in names if name not in some)]
        fewer, further = expected_drops(SEEN, [without(*some), without(*more)], LEAVES)
        assert further > fewer


def test_newcomers_are_untried_within_the_limit_and_best_first():
    candidates = [
        Structure(steps=(), shares={}),
        SEEN[0][0],
        without("small.2", merit=0.9),
        without("small.1", "small.2", merit=0.6),
        without("large.0", "large.1", merit=0.2),
    ]
    found = newcomers(SEEN, candidates, LEAVES, allowed=0.01, shrink=0.5, count=5)
    assert [s.steps for s in found] == [candidates[3].steps, candidates[2].steps]


def test_one_observation_teaches_nothing():
    assert newcomers(SEEN[:1], [without("small.2")], LEAVES, allowed=1.0, shrink=1.0, count=3) == []
