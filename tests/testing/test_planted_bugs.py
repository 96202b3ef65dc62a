"""The harness catches what it is for: one bug each, by the check that is meant to catch it."""

import importlib

import pytest

from tests.testing.planted import PLANTED, AssignInt8, RoundWeights
from trimpoint.errors import UnknownNameError
from trimpoint.method import Method
from trimpoint.plan import Plan
from trimpoint.testing import (
    Check,
    ConformanceFailure,
    KnownFailure,
    all_checks,
    parametrize_with_checks,
    zoo,
)

test_right_method = parametrize_with_checks([RoundWeights(), AssignInt8])


def check_named(method: Method, name: str) -> Check:
    return next(check for check in all_checks(method) if check.name == name)


def failures(method: Method, check: Check) -> list[str]:
    """Run a check on its models until it fails."""
    for entry in check.entries:
        try:
            check(method, entry)
        except ConformanceFailure as failure:
            return [str(failure)]
    return []


@pytest.mark.parametrize(("kind", "name"), PLANTED.items(), ids=[kind.__name__ for kind in PLANTED])
def test_bug_is_caught_by_the_check_for_it(kind: type[Method], name: str) -> None:
    method = kind()
    found = failures(method, check_named(method, name))
    assert found, f"the check `{name}` does not catch {kind.__name__}"
    assert found[0].startswith(f"{method.name} on the model ")
    assert "the rule: " in found[0]
    assert "breaks with" not in found[0] or kind.__name__ in BREAKING, found[0]


BREAKING = ("ForcesFloat32", "BreaksAfterOthers")
"""Whose bug is an exception; all others are caught by what they do."""


def test_every_check_of_a_method_has_a_planted_bug() -> None:
    names = {check.name for kind in (RoundWeights, AssignInt8) for check in all_checks(kind())}
    assert names - set(PLANTED.values()) == {"order_validated", "where_matching_nothing"}


def test_order_that_is_not_validated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    method = AssignInt8()
    check = check_named(method, "order_validated")
    monkeypatch.setattr(Plan, "check_order", lambda self: None)
    with pytest.raises(ConformanceFailure, match="is accepted, but their stages do not allow it"):
        check(method, check.entries[0])


def test_where_that_is_not_looked_at_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    method = RoundWeights()
    check = check_named(method, "where_matching_nothing")
    monkeypatch.setattr(importlib.import_module("trimpoint.compress"), "_check_where", lambda model, plan: None)
    with pytest.raises(ConformanceFailure, match="accepted in silence"):
        check(method, check.entries[0])


def cases(known: list[KnownFailure]) -> list:
    return parametrize_with_checks([RoundWeights()], known).pytestmark[0].args[1]


def test_a_known_failure_is_a_strict_expected_failure() -> None:
    known = KnownFailure("round-weights", "ties_kept", "tied", "a reason")
    marks = {case.id: mark for case in cases([known]) for mark in case.marks if mark.name == "xfail"}
    assert list(marks) == ["round-weights-ties_kept-tied"]
    (mark,) = marks.values()
    assert mark.kwargs == {"raises": ConformanceFailure, "reason": "a reason", "strict": True}


@pytest.mark.parametrize(("check", "entry"), [("ties_keptt", "tied"), ("ties_kept", "tide")])
def test_a_known_failure_of_something_unknown_is_an_error(check: str, entry: str) -> None:
    with pytest.raises(UnknownNameError, match="hint: did you mean `tie"):
        cases([KnownFailure("round-weights", check, entry, "a reason")])


def test_checks_are_chosen_by_traits() -> None:
    right, assigned = ({check.name for check in all_checks(kind())} for kind in (RoundWeights, AssignInt8))
    assert right - assigned == {"noop_exact", "error_falls"}
    assert assigned - right == {"reductions_measured"}
    assert len(right) >= 20


def test_the_harness_takes_what_all_methods_returns() -> None:
    mapping = parametrize_with_checks({"round-weights": RoundWeights}, []).pytestmark[0].args[1]
    assert [case.id for case in mapping] == [case.id for case in cases([])]


def test_every_check_looks_at_models_of_the_zoo() -> None:
    for check in all_checks(RoundWeights()):
        assert check.entries
        assert set(check.entries) <= set(zoo().values())
        assert check.summary.endswith(".")
