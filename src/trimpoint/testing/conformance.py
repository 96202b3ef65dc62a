"""Run every check that a method's traits call for over the zoo of awkward models.

A package that brings its own method needs one line in its tests:

    test_method = parametrize_with_checks([MyMethod()])

The model is scikit-learn's `parametrize_with_checks`: declared traits choose the checks, and known failures are data
with reasons, strict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from trimpoint.errors import MissingDependencyError, TrimpointError, UnknownNameError, suggest
from trimpoint.method import Method
from trimpoint.testing import checks_contract, checks_effect, checks_record, checks_safety, checks_sequence
from trimpoint.testing.failure import ConformanceFailure
from trimpoint.testing.known_failures import KNOWN_FAILURES, KnownFailure
from trimpoint.testing.select import Select, every, first, has_noop, has_strength, suited
from trimpoint.testing.zoo import ZooEntry, zoo

CheckFunction = Callable[[Method, ZooEntry], None]


@dataclass(frozen=True)
class Check:
    """One property that a method must have, and the models on which it is looked at.

    Args:
        name: of the check, without `check_`.
        function: `(method, entry) -> None`; raises `ConformanceFailure` where the property does not hold.
        entries: the models of the zoo, chosen for the method.
    """

    name: str
    function: CheckFunction
    entries: tuple[ZooEntry, ...]

    @property
    def summary(self) -> str:
        """The first line of the check's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def __call__(self, method: Method, entry: ZooEntry) -> None:
        """Run the check.

        Raises:
            ConformanceFailure: if the method does not have the property on this model.
        """
        head = f"{method.name} on the model `{entry}` fails the check `{self.name}`:"
        rule = f"\n\nthe rule: {self.summary}"
        try:
            self.function(method, entry)
        except ConformanceFailure as failure:
            raise ConformanceFailure(f"{head} {failure}{rule}") from failure
        except TrimpointError as error:
            raise ConformanceFailure(f"{head} it is refused: {type(error).__name__}: {error}{rule}") from error
        except Exception as error:
            raise ConformanceFailure(f"{head} it breaks with {type(error).__name__}: {error}{rule}") from error


@dataclass(frozen=True)
class _Row:
    function: CheckFunction
    select: Select
    when: Callable[[Method], bool] = lambda _: True


def _transforms(method: Method) -> bool:
    return method.traits.acts_on != "model"


_TABLE: tuple[_Row, ...] = (
    # What a method declares
    _Row(checks_contract.check_parameters_documented, first),
    _Row(checks_contract.check_bounds_rejected, first),
    _Row(checks_contract.check_docstring_headings, first),
    _Row(checks_contract.check_round_trip, first),
    _Row(checks_contract.check_readable, first),
    _Row(checks_contract.check_traits_sound, first),
    # What a method must leave alone
    _Row(checks_safety.check_model_untouched, every),
    _Row(checks_safety.check_task_untouched, every),
    _Row(checks_safety.check_global_state_untouched, every),
    _Row(checks_safety.check_same_interface, every),
    _Row(checks_safety.check_nothing_left_behind, every),
    _Row(checks_safety.check_ties_kept, every),
    _Row(checks_safety.check_names_kept, every),
    _Row(checks_safety.check_same_seed_same_bytes, suited(2)),
    _Row(checks_safety.check_bfloat16, suited(1)),
    _Row(checks_safety.check_missing_data, suited(1)),
    # What a method must tell
    _Row(checks_record.check_every_module_accounted, every),
    _Row(checks_record.check_every_change_recorded, every),
    _Row(checks_record.check_facts, every),
    _Row(checks_record.check_where_respected, suited(2)),
    _Row(checks_record.check_where_matching_nothing, suited(1)),
    _Row(checks_record.check_noop_exact, suited(2), has_noop),
    _Row(checks_record.check_not_vacuous, first),
    # What a method achieves
    _Row(checks_effect.check_rebuild, every, _transforms),
    _Row(checks_effect.check_better_than_zeroing, suited(2), lambda m: m.traits.acts_on in ("modules", "groups")),
    _Row(checks_effect.check_error_falls, suited(1), has_strength),
    _Row(checks_effect.check_reductions_measured, suited(2), lambda m: bool(m.traits.reduces)),
    _Row(checks_effect.check_exportable, suited(2)),
    _Row(checks_effect.check_trains_on, suited(3)),
    # How it goes with others
    _Row(checks_sequence.check_order_validated, first),
    _Row(checks_sequence.check_sequences_run, suited(1)),
)


def all_checks(method: Method) -> list[Check]:
    """Return the checks that apply to `method`, each with the models it is to be run on.

    Example:
        >>> from trimpoint.testing import all_checks, zoo
        >>> from trimpoint.registry import all_methods
        >>> checks = all_checks(all_methods()["drop-blocks"]())
        >>> len(checks) > 18
        True
    """
    return [
        Check(row.function.__name__.removeprefix("check_"), row.function, row.select(method))
        for row in _TABLE
        if row.when(method)
    ]


def parametrize_with_checks(
    methods: Mapping[str, type[Method]] | Iterable[Method | type[Method]],
    known_failures: Sequence[KnownFailure] = KNOWN_FAILURES,
) -> Callable[..., None]:
    """Return a pytest test that runs every check on every method.

    Each method is a group of its own for pytest-xdist's `--dist loadgroup`: its checks share what it made of a model.
    So is the check whose plans are the same for all methods.

    Args:
        methods: instances, classes (run with their defaults), or what `all_methods()` returns.
        known_failures: what is known to fail, and why. Strict: one that passes fails the test.

    Raises:
        MissingDependencyError: if pytest is not installed.
        UnknownNameError: if a known failure names a check or model that does not exist.
    """
    try:
        import pytest
    except ImportError as error:
        raise MissingDependencyError("The conformance harness needs pytest.", "pip install pytest") from error

    cases = []
    for method in _instances(methods):
        checks = all_checks(method)
        known = [failure for failure in known_failures if failure.method == method.name]
        _validate(known, checks)
        for check in checks:
            group = check.name if check.function is checks_sequence.check_sequences_run else method.name
            for entry in check.entries:
                reasons = [f.reason for f in known if f.check == check.name and f.entry == entry.name]
                marks: list[Any] = [pytest.mark.xdist_group(group)] if find_spec("xdist") else []
                marks += [pytest.mark.xfail(raises=ConformanceFailure, reason=why, strict=True) for why in reasons]
                cases.append(pytest.param(method, check, entry, id=f"{method.name}-{check.name}-{entry}", marks=marks))

    @pytest.mark.parametrize(("method", "check", "entry"), cases)
    def test_method(method: Method, check: Check, entry: ZooEntry) -> None:
        check(method, entry)

    return test_method


def _instances(methods: Mapping[str, type[Method]] | Iterable[Method | type[Method]]) -> list[Method]:
    given = methods.values() if isinstance(methods, Mapping) else methods
    return [item() if isinstance(item, type) else item for item in given]


def _validate(known: Sequence[KnownFailure], checks: Sequence[Check]) -> None:
    names = {check.name: [entry.name for entry in check.entries] for check in checks}
    for failure in known:
        if failure.check not in names:
            raise UnknownNameError(
                f"A known failure of {failure.method!r} names the check {failure.check!r}, which is not run on it.",
                suggest(failure.check, list(names)),
            )
        if failure.entry not in names[failure.check]:
            raise UnknownNameError(
                f"The check {failure.check!r} is not run on the model {failure.entry!r}; the zoo has {len(zoo())}.",
                suggest(failure.entry, names[failure.check]),
            )
