"""The verbs about one model: measure, compress."""

import argparse
from typing import TYPE_CHECKING, Any

from trimpoint.cli.arguments import add_format, add_model, add_target, positive, setting, target_of, with_settings
from trimpoint.cli.exit_codes import DONE
from trimpoint.cli.output import note, write_json, write_table

if TYPE_CHECKING:
    from torch import nn

    from trimpoint.task import Task


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs of this file."""
    measure = verbs.add_parser(
        "measure",
        parents=[common],
        help="measure a model on the target",
        description="Export a model, run it in the target's runtime and measure parameters, bytes, "
        "multiply-accumulates, latency, throughput, peak memory and quality, with the slowest operators.",
    )
    add_model(measure)
    add_target(measure)
    measure.add_argument("--operators", type=positive, default=10, metavar="N", help="how many to list (default: 10)")
    add_format(measure)
    measure.set_defaults(run=run_measure)

    compress = verbs.add_parser(
        "compress",
        parents=[common],
        help="apply one recipe and write the artifact",
        description="Apply a recipe to a model, lower it to the target's runtime, verify and measure it, and write the "
        "artifact.",
    )
    add_model(compress)
    compress.add_argument(
        "--plan", required=True, nargs="+", metavar="RECIPE", help="a .toml file, or names of methods in their order"
    )
    compress.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="METHOD.PARAMETER=VALUE",
        help="change a parameter, such as drop-blocks.ratio=0.3; may be repeated",
    )
    add_target(compress)
    compress.add_argument("--seed", type=int, metavar="N", help="of everything random (default: the recipe's)")
    compress.add_argument("--out", required=True, metavar="DIR", help="directory of the artifact; must not exist")
    add_format(compress)
    compress.set_defaults(run=run_compress)


def run_measure(args: argparse.Namespace) -> int:
    """Measure a model."""
    from trimpoint.measure.profile import measure_model
    from trimpoint.report.progress import show_progress
    from trimpoint.report.text import operator_table, profile_table
    from trimpoint.values import to_data

    model, task = load_model_and_task(args)
    with show_progress(quiet=args.quiet) as progress:
        progress.phase(f"measuring {args.model}")
        found = measure_model(model, task, target_of(args), on_step=lambda text: progress.update(text=text))
    if args.format == "json":
        data = {"model": args.model, "task": args.task, "target": target_of(args), "profile": found.profile}
        more = {"qualities": found.qualities, "operators": found.operators[: args.operators], "macs": found.macs}
        write_json(to_data(data | more))
    else:
        title = f"{args.model} in {args.runtime}, {args.threads} thread{'s' if args.threads > 1 else ''}"
        write_table(profile_table(found.profile, title=title), operator_table(found.operators, shown=args.operators))
    return DONE


def load_model_and_task(args: argparse.Namespace) -> "tuple[nn.Module, Task]":
    """Return the model and the task that the arguments refer to."""
    from torch import nn

    from trimpoint.reference import load_reference
    from trimpoint.task import Task

    return load_reference(args.model, nn.Module, "model"), load_reference(args.task, Task, "task")


def run_compress(args: argparse.Namespace) -> int:
    """Apply a recipe and write the artifact."""
    from trimpoint.advice import trial_advice, warnings_of
    from trimpoint.cli.build import build_artifact
    from trimpoint.cli.method_verbs import read_plan
    from trimpoint.plan import Plan
    from trimpoint.report.html import group_changes
    from trimpoint.report.progress import show_progress
    from trimpoint.report.text import profile_table, quality_line
    from trimpoint.values import to_data

    plan = with_settings(read_plan(args.plan), args.set)
    plan = plan if args.seed is None else Plan(plan.steps, args.seed)
    model, task = load_model_and_task(args)
    for text in warnings_of(plan, target_of(args), model):
        note(f"warning: {text}")
    with show_progress(quiet=args.quiet) as progress:
        built = build_artifact(model, task, plan, target_of(args), args.out, progress)
    advice = trial_advice(plan.to_data(), built.trial.profile)
    if args.format == "json":
        data = {
            "artifact": args.out,
            "digest": built.verified.digest,
            "plan": plan.to_data(),
            "target": target_of(args),
        }
        found = {"profile": built.trial.profile, "quality": built.trial.quality, "changes": built.trial.changes}
        baseline = {"profile": built.baseline.profile, "quality": built.baseline.quality}
        write_json(to_data(data | found | {"baseline": baseline, "advice": advice or None}))
        return DONE
    write_table(profile_table(built.trial.profile, title=str(plan), ratios_to=built.baseline.profile))
    for trial in (built.baseline, built.trial):
        if trial.quality is not None:
            print(f"{'original' if trial is built.baseline else 'compressed'}: {quality_line(trial.quality)}")
    if advice:
        print(f"advice: {advice}")
    for group in group_changes(built.trial.changes):
        print(f"{group.count} × {group.kind} by {group.method}" + (f": {group.reason}" if group.reason else ""))
    print(f"artifact: {args.out} (digest {built.verified.digest})")
    return DONE
