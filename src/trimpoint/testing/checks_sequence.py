"""Checks of how a method goes with all others: by declared stages and facts, never by name."""

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
    for plan in covering_plans(method, _others(method)):
        model, task = entry.make()
        compressed = apply_to(plan, model, task)
        told = {change.method for change in compressed.changes}
        silent = [step.method.name for step in plan.steps if step.method.name not in told]
        expect(not silent, f"in the plan {plan}, {silent} record nothing at all.")
        expect_alike(answers(model, task), answers(compressed.module, task))


def covering_plans(method: Method, others: list[Method]) -> list[Plan]:
    """Return few plans in which `method` stands at least once before and after each method that it may.

    Transforms stand in the order of their stages, so that one plan covers all pairs of different stages; those of the
    same stage and recovery steps may stand on both sides, which takes a second plan and `method` twice.
    """
    before = [other for other in others if _allowed(other, method)]
    after = [other for other in others if _allowed(method, other)]
    plans = [_by_stage([*before, method], method, last=True), _by_stage([method, *after], method, last=False)]
    return [Plan(tuple(map(Step, steps)), seed=1) for steps in (*plans, [method, method])]


def _by_stage(methods: list[Method], method: Method, *, last: bool) -> list[Method]:
    """Sort transforms by stage, keeping equals; put recovery steps on the side where `method` stands last or first."""
    transforms = [each for each in methods if each.traits.stage is not Stage.RECOVER]
    transforms.sort(key=lambda each: each.traits.stage)
    recovery = [each for each in methods if each.traits.stage is Stage.RECOVER and each is not method]
    if method.traits.stage is Stage.RECOVER:
        return [*transforms, *recovery, method] if last else [method, *recovery, *transforms]
    return [*recovery, *transforms] if last else [*transforms, *recovery]


def _allowed(one: Method, other: Method) -> bool:
    stages = (one.traits.stage, other.traits.stage)
    return Stage.RECOVER in stages or stages[0] <= stages[1]


def _others(method: Method) -> list[Method]:
    return [kind() for name, kind in all_methods().items() if name != method.name]
