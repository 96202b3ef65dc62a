"""Checks of what a method declares: parameters, traits, documentation, recipe form."""

import dataclasses
import json
import math
import tomllib
from typing import Any

from trimpoint.errors import InvalidParameterError
from trimpoint.filters import parse
from trimpoint.method import ALL_FACTS, Bounds, Fact, Method, Stage
from trimpoint.plan import Plan, Step
from trimpoint.registry import all_methods
from trimpoint.target import METRICS
from trimpoint.testing.failure import expect
from trimpoint.testing.zoo import ZooEntry

HEADINGS = ("When it pays", "What it costs", "Needs", "Leaves alone", "References")
NO_WORD = "no-such-choice"


def check_parameters_documented(method: Method, _: ZooEntry) -> None:
    """Every hyper-parameter is declared by `param`, with a documentation and with the values it may take."""
    kind = type(method)
    expect(
        dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen,  # type: ignore[attr-defined]
        f"{kind.__name__} must be a frozen dataclass: `@dataclass(frozen=True, kw_only=True)`.",
    )
    for field in dataclasses.fields(method):
        where = f"the parameter {field.name!r}"
        expect(bool(field.metadata.get("doc", "").strip()), f"{where} has no `doc`; declare it by `param(doc=...)`.")
        expect(field.default is not dataclasses.MISSING, f"{where} has no default.")
        number = isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
        expect(not number or field.metadata.get("bounds") is not None, f"{where} is a number without `bounds`.")
        word = isinstance(field.default, str)
        expect(not word or bool(field.metadata.get("choices")), f"{where} is a word without a closed set of `choices`.")
        for role in ("noop", "weak"):
            if role in field.metadata:
                _accepted(method, field.name, field.metadata[role], f"the `{role}` value of {where}")
        for value in field.metadata.get("search") or ():
            _accepted(method, field.name, value, f"a `search` value of {where}")


def check_bounds_rejected(method: Method, _: ZooEntry) -> None:
    """Values outside of what a parameter declares are rejected by `InvalidParameterError`, which names it."""
    for field in dataclasses.fields(method):
        for value in _bad_values(field.metadata.get("bounds"), field.metadata.get("choices")):
            message = _rejection(method, field.name, value)
            expect(message is not None, f"`{field.name}={value!r}` is accepted; its declaration does not allow it.")
            expect(
                field.name in (message or "") and type(method).__name__ in (message or ""),
                f"the error for `{field.name}={value!r}` does not name the parameter and the class: {message!r}.",
            )


def check_docstring_headings(method: Method, _: ZooEntry) -> None:
    """The docstring has the five headings, each with something under it, and says what the method does first."""
    lines = (type(method).__doc__ or "").strip().splitlines()
    expect(bool(lines) and not lines[0].startswith(f"{type(method).__name__}("), "the class has no docstring.")
    places = {}
    for heading in HEADINGS:
        at = [index for index, line in enumerate(lines) if line.strip().lower().startswith(f"{heading.lower()}:")]
        expect(len(at) == 1, f"the docstring must have the heading `{heading}:` once, at the start of a line.")
        places[heading] = at[0]
    for heading, at_line in places.items():
        following = lines[at_line + 1] if at_line + 1 < len(lines) else ""
        own = lines[at_line].split(":", 1)[1].strip()
        expect(bool(own or following.strip()), f"nothing stands under the heading `{heading}` of the docstring.")


def check_round_trip(method: Method, _: ZooEntry) -> None:
    """A plan with the method survives TOML and JSON with the same content hash."""
    plan = Plan((Step(method, parse("a.* & !type:Linear")), Step(method)), seed=3)
    try:
        texts = {"JSON": json.loads(json.dumps(plan.to_data(), allow_nan=False)), "TOML": tomllib.loads(plan.to_toml())}
    except (TypeError, ValueError) as error:
        expect(False, f"a parameter cannot be written to a recipe: {error}. Use numbers, words, booleans, tuples.")
        return
    for form, data in texts.items():
        back = Plan.from_data(data) if all_methods().get(method.name) is type(method) else _read(method, data)
        expect(back == plan, f"the plan read back from {form} differs: {back} instead of {plan}.")
        expect(back.hash == plan.hash, f"the plan read back from {form} has another hash.")


def check_readable(method: Method, _: ZooEntry) -> None:
    """`repr` rebuilds the method, and a step prints as its name with what differs from the defaults."""
    text = repr(method)
    expect(text.startswith(f"{type(method).__name__}("), f"`repr` must look like the constructor. Got {text!r}.")
    for name, value in method.params.items():
        expect(f"{name}={value!r}" in text, f"`repr` does not show {name}={value!r}. Got {text!r}.")
    step = str(Step(method, parse("a.b")))
    expect(step.startswith(method.name), f"`str(Step(...))` must begin with {method.name!r}. Got {step!r}.")
    expect(step.endswith(" at a.b") and "\n" not in step, f"`str(Step(...))` must be one line. Got {step!r}.")
    expect(hash(method) == hash(dataclasses.replace(method)), "equal methods must have equal hashes.")


def check_traits_sound(method: Method, _: ZooEntry) -> None:
    """The traits do not contradict themselves, and claim only metrics that exist."""
    traits = method.traits
    unknown = sorted(traits.reduces - set(METRICS))
    expect(not unknown, f"`reduces` names {unknown}, which is no metric; metrics are {sorted(METRICS)}.")
    expect(traits.removes in ALL_FACTS and traits.requires in ALL_FACTS, "`requires` or `removes` is no known fact.")
    recovers = traits.stage is Stage.RECOVER
    expect(not (recovers and traits.removes is not Fact.NONE), "a recovery step must not remove facts.")
    expect(not (recovers and traits.reduces), "a recovery step reduces nothing in the exported file.")
    typed = traits.acts_on in ("modules", "groups")
    expect(typed or not traits.targets, "`targets` are for methods that act on modules or groups.")
    expect(traits.acts_on != "modules" or bool(traits.targets), "a method that acts on modules must name `targets`.")


def _bad_values(bounds: Bounds | None, choices: tuple[str, ...] | None) -> list[Any]:
    if choices:
        return [NO_WORD, ""]
    if bounds is None:
        return []
    outside = [
        edge
        for edge in (
            bounds.gt,
            bounds.lt,
            None if bounds.ge is None else bounds.ge - 1,
            None if bounds.ge is None else math.nextafter(bounds.ge, -math.inf),
            None if bounds.le is None else bounds.le + 1,
            None if bounds.le is None else math.nextafter(bounds.le, math.inf),
        )
        if edge is not None
    ]
    return [*outside, math.nan, "many", True]


def _rejection(method: Method, name: str, value: Any) -> str | None:
    try:
        dataclasses.replace(method, **{name: value})
    except InvalidParameterError as error:
        return str(error)
    return None


def _accepted(method: Method, name: str, value: Any, what: str) -> None:
    message = _rejection(method, name, value)
    expect(message is None, f"{what}, {value!r}, is outside of what it declares: {message}")


def _read(method: Method, data: dict[str, Any]) -> Plan:
    """Read a plan whose method is not registered, as a recipe would be read."""
    steps = []
    for step in data["steps"]:
        params = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in step.items()
            if key not in ("method", "where")
        }
        made = type(method)(**params)
        steps.append(Step(made, parse(step["where"])) if "where" in step else Step(made))
    return Plan(tuple(steps), data["seed"])
