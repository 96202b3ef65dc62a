"""The verbs about methods and recipes: methods, plan."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpoint.cli.arguments import add_format, add_target, setting, target_of, with_settings
from trimpoint.cli.exit_codes import DONE
from trimpoint.cli.output import note, write_json, write_table
from trimpoint.errors import StorageError, UnknownNameError, suggest

if TYPE_CHECKING:
    from trimpoint.plan import Plan


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs of this file."""
    methods = verbs.add_parser(
        "methods",
        parents=[common],
        help="list the compression methods, or show one",
        description="List the compression methods, or show the reference page of one.",
    )
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method, such as drop-blocks")
    add_format(methods, "markdown")
    methods.set_defaults(run=run_methods)

    plan = verbs.add_parser(
        "plan",
        parents=[common],
        help="check a recipe, or write one from method names",
        description="Check a TOML recipe and print it with all its parameters, or write one from the names of methods, "
        "in their order: `trimpoint plan drop-blocks distill quantize-static > recipe.toml`. Warns of steps that will "
        "make nothing faster on the target.",
    )
    plan.add_argument("recipe", metavar="RECIPE", nargs="+", help="a .toml file, or names of methods")
    plan.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="METHOD.PARAMETER=VALUE",
        help="change a parameter; may be repeated",
    )
    add_target(plan)
    plan.add_argument("--format", choices=("toml", "json"), default="toml", help="how it is written (default: toml)")
    plan.set_defaults(run=run_plan)


def run_methods(args: argparse.Namespace) -> int:
    """List all methods, or show one."""
    from trimpoint.registry import all_methods
    from trimpoint.report import method_page as page

    known = all_methods()
    if args.name is None:
        if args.format == "json":
            write_json([page.method_data(kind) for kind in known.values()])
        elif args.format == "markdown":
            sys.stdout.write(page.reference_page(known))
        else:
            write_table(page.methods_table(known))
        return DONE
    if args.name not in known:
        raise UnknownNameError(f"There is no method {args.name!r}.", suggest(args.name, list(known)))
    data = page.method_data(known[args.name])
    if args.format == "json":
        write_json(data)
    elif args.format == "markdown":
        sys.stdout.write(page.method_markdown(data))
    else:
        sys.stdout.write(page.method_text(data) + "\n")
        if data["parameters"]:
            write_table(page.parameter_table(data))
    return DONE


def run_plan(args: argparse.Namespace) -> int:
    """Check a recipe and print it."""
    from trimpoint.advice import warnings_of

    plan = with_settings(read_plan(args.recipe), args.set)
    for text in warnings_of(plan, target_of(args)):
        note(f"warning: {text}")
    if args.format == "json":
        write_json(plan.to_data() | {"hash": plan.hash})
    else:
        sys.stdout.write(plan.to_toml())
    return DONE


def read_plan(recipe: list[str]) -> "Plan":
    """Return the plan of a recipe file, or of names of methods with their defaults.

    Raises:
        StorageError: if the file cannot be read.
        PlanError: if it is no recipe, or the methods stand in the wrong order.
        UnknownNameError: if there is no such method.
    """
    from trimpoint.plan import Plan
    from trimpoint.registry import make_method

    if len(recipe) == 1 and recipe[0].endswith(".toml"):
        try:
            return Plan.from_toml(Path(recipe[0]).read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(
                f"The recipe {recipe[0]!r} cannot be read: {error.strerror}.",
                "write one with `trimpoint plan METHOD ... > recipe.toml`",
            ) from error
    plan = Plan().then(*(make_method(name, {}) for name in recipe))
    plan.check_order()
    return plan
