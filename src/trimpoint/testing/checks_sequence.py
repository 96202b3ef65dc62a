"""Checks of how a method goes with all others: by declared stages and facts, never by name."""

from collections.abc import Sequence
from functools import cache

from trimpoint.errors import PlanError
from trimpoint.method import Method, Stage
from trimpoint.plan import Plan, Step
from trimpoint.registry import all_methods
from trimpoint.testing.applied import answers, apply_to
from trimpoint.testing.checks_safety import expect_alike
from trimpoint.testing.failure import expect
from trimpoint.testing.zoo import ZooEntry


def check_order_validated(method: Method, _: ZooEntry) -> None:
    """Every ordered pair with another method is accepted or refused statically, by the stages of both."""
    for other in _others(method):
        for pair in ((method, other), (other, method)):
            allowed = _allowed(*pair)
            text = f"`{pair[0].name}` before `{pair[1].name}`"
            try:
                Plan(tuple(map(Step, pair))).check_order()
            except PlanError as error:
                expect(not allowed, f"{text} is refused, but their stages allow it: {error}")
                named = all(each.name in str(error) for each in pair)
                expect(named and bool(error.hint), f"the refusal of {text} must name both and have a hint: {error}")
            else:
                expect(allowed, f"{text} is accepted, but their stages do not allow it.")


def check_sequences_run(method: Method, entry: ZooEntry) -> None:
    """Plans that between them hold every allowed ordered pair with another method run, and keep the interface."""
    twice = Plan((Step(method), Step(method)), seed=1)
    for plan in (*covering_plans([method, *_others(method)]), twice):
        _run(plan, entry)


@cache
def _run(plan: Plan, entry: ZooEntry) -> None:
    model, task = entry.make()
    compressed = apply_to(plan, model, task)
    told = {change.method for change in compressed.changes}
    silent = [step.method.name for step in plan.steps if step.method.name not in told]
    expect(not silent, f"in the plan {plan}, {silent} record nothing at all.")
    expect_alike(answers(model, task), answers(compressed.module, task))


def covering_plans(methods: Sequence[Method]) -> tuple[Plan, Plan]:
    """Return two plans of all methods that between them hold every allowed ordered pair of different ones.

    Transforms stand in the order of their stages. Those of one stage, and recovery steps, may stand in any order: the
    second plan has them the other way round, and what recovers at its end instead of its beginning. The plans are the
    same whichever method is asked for, so that one run of them serves all.
    """
    ordered = sorted(methods, key=lambda method: method.name)
    recovery = [method for method in ordered if method.traits.stage is Stage.RECOVER]
    transforms = [method for method in ordered if method.traits.stage is not Stage.RECOVER]
    there = [*recovery, *sorted(transforms, key=lambda method: method.traits.stage)]
    back = [*sorted(transforms, key=lambda method: -method.traits.stage)[::-1], *recovery[::-1]]
    return Plan(tuple(map(Step, there)), seed=1), Plan(tuple(map(Step, back)), seed=1)


def _allowed(one: Method, other: Method) -> bool:
    stages = (one.traits.stage, other.traits.stage)
    return Stage.RECOVER in stages or stages[0] <= stages[1]


def _others(method: Method) -> list[Method]:
    return [kind() for name, kind in all_methods().items() if name != method.name]
