"""The two plans that every method is tried in, beside all others."""

from itertools import combinations, permutations

from trimpoint.errors import PlanError
from trimpoint.plan import Plan
from trimpoint.registry import all_methods
from trimpoint.testing.checks_sequence import covering_plans

METHODS = [kind() for kind in all_methods().values()]


def test_every_allowed_pair_of_methods_stands_in_one_of_the_plans() -> None:
    plans = [[step.method.name for step in plan.steps] for plan in covering_plans(METHODS)]
    for plan in covering_plans(METHODS):
        plan.check_order()
    covered = {pair for plan in plans for pair in combinations(plan, 2)}
    for one, other in permutations(METHODS, 2):
        try:
            Plan().then(one, other).check_order()
        except PlanError:
            continue
        assert (one.name, other.name) in covered


def test_the_plans_are_the_same_whichever_method_is_asked_for() -> None:
    assert covering_plans(METHODS) == covering_plans(METHODS[::-1])
    assert len({hash(covering_plans([*METHODS[n:], *METHODS[:n]])) for n in range(len(METHODS))}) == 1
