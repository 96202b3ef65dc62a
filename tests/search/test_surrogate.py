import numpy as np
import pytest

from tests.search.trials import trial
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.plan import Step
from trimpoint.search.space import Structure
from trimpoint.search.surrogate import expected_drops, newcomer

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


def trials(seen, effort=0.1, room=0.002):
    return [(s, trial(i, drop=drop, upper=drop + room), effort) for i, (s, drop) in enumerate(seen, 2)]


CANDIDATES = [
    Structure(steps=(), shares={}),
    SEEN[0][0],
    without("small.2", merit=0.9),
    without("small.1", "small.2", merit=0.6),
    without("large.0", "large.1", merit=0.2),
]


def test_a_newcomer_is_untried_within_the_limit_and_the_best():
    found = newcomer(trials(SEEN), CANDIDATES, LEAVES, allowed=0.02, final=0.1)
    assert found is CANDIDATES[3]
    found = newcomer(
        [*trials(SEEN), (found, trial(9, drop=0.016, upper=0.018), 0.1)], CANDIDATES, LEAVES, allowed=0.02, final=0.1
    )
    assert found is CANDIDATES[2]


def test_training_to_come_and_the_room_of_a_bound_count():
    assert newcomer(trials(SEEN), CANDIDATES, LEAVES, allowed=0.02, final=10_000.0) is CANDIDATES[4]
    assert newcomer(trials(SEEN, room=0.02), CANDIDATES, LEAVES, allowed=0.02, final=0.1) is CANDIDATES[2]


def test_of_a_structure_tried_twice_the_last_trial_counts():
    again = [(s, trial(20 + i, drop=10 * drop, upper=10 * drop), 0.1) for i, (s, drop) in enumerate(SEEN)]
    assert newcomer(trials(SEEN), CANDIDATES, LEAVES, allowed=0.03, final=0.1) is CANDIDATES[3]
    assert newcomer(trials(SEEN) + again, CANDIDATES, LEAVES, allowed=0.03, final=0.1) is CANDIDATES[2]


def test_one_observation_teaches_nothing():
    assert newcomer(trials(SEEN[:1]), [without("small.2")], LEAVES, allowed=1.0, final=0.1) is None


def test_the_unit_of_the_score_does_not_matter():
    small = [(s, drop * 1e-4) for s, drop in SEEN]
    structures = [s for s, _ in SEEN] + CANDIDATES[2:]
    ratio = expected_drops(small, structures, LEAVES) / expected_drops(SEEN, structures, LEAVES)
    np.testing.assert_allclose(ratio, 1e-4)


def test_structures_of_one_kind_and_no_drop_at_all_can_be_fitted():
    same = [(without("small.0"), 0.01), (without("small.1"), 0.02)]
    assert np.isfinite(expected_drops(same, CANDIDATES, LEAVES)).all()
    assert (expected_drops([(s, 0.0) for s, _ in same], CANDIDATES, LEAVES) == 0).all()
