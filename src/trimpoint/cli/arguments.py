"""Values of options, checked while they are parsed, and the options that several verbs share."""

import argparse
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trimpoint.budget import parse_duration
from trimpoint.errors import TrimpointError, UnknownNameError, suggest
from trimpoint.target import METRICS, Goal

if TYPE_CHECKING:
    from trimpoint.plan import Plan
    from trimpoint.target import Target

T = TypeVar("T")


def checked(text: str, read: Callable[[str], T]) -> T:
    """Return what `read` makes of an option's text; its error becomes an error of usage."""
    try:
        return read(text)
    except TrimpointError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise argparse.ArgumentTypeError(error.message + hint) from error


def budget(text: str) -> str:
    """Check a duration such as `10m`; it is kept as it was written."""
    checked(text, parse_duration)
    return text


def number_or_text(text: str) -> float | str:
    """Return a number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def limit(text: str) -> tuple[str, float | str]:
    """Read a limit such as `latency_ms=0.5x`."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be METRIC=VALUE, such as latency_ms=0.5x. Got {text!r}.")
    checked(text, lambda _: Goal(limits={name: number_or_text(value)}))
    return name, number_or_text(value)


def metrics(text: str) -> tuple[str, ...]:
    """Read names of metrics separated by commas."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    checked(text, lambda _: Goal(minimize=names))
    return names


def drop(text: str) -> float | str:
    """Read a drop such as `0.01` or `1%`."""
    value = number_or_text(text)
    checked(text, lambda _: Goal(max_drop=value))
    return value


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number ≥ 1. Got {text!r}.")
    return int(text)


def fraction(text: str) -> float:
    """Read a number from 0."""
    value = number_or_text(text)
    if isinstance(value, str) or not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number ≥ 0. Got {text!r}.")
    return value


def setting(text: str) -> tuple[str, str, Any]:
    """Read `method.parameter=value`; the value as JSON, anything else is text."""
    target, separator, value = text.partition("=")
    method, dot, parameter = target.partition(".")
    if not separator or not dot or not method or not parameter:
        raise argparse.ArgumentTypeError(
            f"must be METHOD.PARAMETER=VALUE, such as drop-blocks.ratio=0.3. Got {text!r}."
        )
    try:
        return method, parameter, json.loads(value)
    except json.JSONDecodeError:
        return method, parameter, value


def with_settings(plan: "Plan", settings: list[tuple[str, str, Any]]) -> "Plan":
    """Return a plan with parameters changed; `where` sets what a step applies to.

    Raises:
        UnknownNameError: if the plan has no such step.
    """
    from trimpoint.plan import Plan

    data = plan.to_data()
    for method, parameter, value in settings:
        steps = [step for step in data["steps"] if step["method"] == method]
        if not steps:
            known = [str(step["method"]) for step in data["steps"]]
            raise UnknownNameError(
                f"The plan has no step {method!r} to set {parameter!r} of.",
                suggest(method, known) if known else "the plan is empty",
            )
        for step in steps:
            step[parameter] = value
    return Plan.from_data(data)


def add_format(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add `--format`: `table`, `json` and what the verb knows beside these."""
    parser.add_argument(
        "--format",
        choices=("table", "json", *more),
        default="table",
        help="how the result is written (default: table)",
    )


def add_model(parser: argparse.ArgumentParser, *, task: bool = True) -> None:
    """Add the references to a model and its task."""
    parser.add_argument("model", metavar="MODEL", help="the trained model, as package.module:attribute")
    if task:
        parser.add_argument("task", metavar="TASK", help="its trimpoint.Task, as package.module:attribute")


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a `Target`."""
    group = parser.add_argument_group("target")
    group.add_argument("--runtime", default="onnxruntime", help="where the model will run (default: onnxruntime)")
    group.add_argument("--threads", type=positive, default=1, metavar="N", help="threads for one call (default: 1)")
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="samples in one call (default: 1)")


def add_goal(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a `Goal`."""
    group = parser.add_argument_group("goal")
    group.add_argument(
        "--minimize",
        type=metrics,
        default=("latency_ms", "file_bytes"),
        metavar="METRICS",
        help=f"what to improve, separated by commas: {', '.join(METRICS)} (default: latency_ms,file_bytes)",
    )
    group.add_argument(
        "--limit",
        type=limit,
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="the most a metric may be: a number, or a ratio to the original such as 0.5x; may be repeated",
    )
    group.add_argument(
        "--max-drop",
        type=drop,
        default=0.01,
        metavar="DROP",
        help='how much the score may drop: a number in its unit, or a share such as "1%%" (default: 0.01)',
    )


def target_of(args: argparse.Namespace) -> "Target":
    """Return the target that the options describe."""
    from trimpoint.target import Target

    return Target(runtime=args.runtime, threads=args.threads, batch=args.batch)


def goal_of(args: argparse.Namespace) -> Goal:
    """Return the goal that the options describe."""
    return Goal(minimize=args.minimize, limits=dict(args.limit), max_drop=args.max_drop)
