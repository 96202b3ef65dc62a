"""The verbs about studies: search, resume, show, pick, report, demo."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpoint.cli.arguments import (
    add_format,
    add_goal,
    add_model,
    add_target,
    budget,
    goal_of,
    limit,
    positive,
    target_of,
)
from trimpoint.cli.exit_codes import DONE, NOT_VERIFIED, NOTHING_MET_THE_GOAL
from trimpoint.cli.output import note, write_json, write_table

if TYPE_CHECKING:
    from trimpoint.search.record import StudyRecord


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs of this file."""
    demo = verbs.add_parser(
        "demo",
        parents=[common],
        help="search a trained ResNet-20 on Fashion-MNIST, with a report",
        description="Search a trained ResNet-20 on Fashion-MNIST in ONNX Runtime on one thread; write the report.",
    )
    _add_run(demo, out="runs/demo", limit_of_time="10m")
    demo.set_defaults(run=run_demo, keeps=lambda args: args.out)

    search = verbs.add_parser(
        "search",
        parents=[common],
        help="find the balance of size, speed and quality",
        description="Measure the model and its one-line int8 on the target, search for smaller and faster ones, and "
        "certify and hand over the best. Stopped at any moment, what was found so far is kept.",
    )
    add_model(search)
    add_goal(search)
    add_target(search)
    _add_run(search, out=None, limit_of_time=None)
    search.set_defaults(run=run_search, keeps=lambda args: args.out)

    resume = verbs.add_parser(
        "resume",
        parents=[common],
        help="go on with a search",
        description="Go on with a search that was stopped, or give one that ended more time or trials.",
    )
    resume.add_argument("study", metavar="RUN", help="directory of the study")
    resume.add_argument("--model", help="the model, where it was not given by reference: package.module:attribute")
    resume.add_argument("--task", help="the task, where it was not given by reference: package.module:attribute")
    _add_budget(resume, None)
    _add_result(resume)
    resume.set_defaults(run=run_resume, keeps=lambda args: args.study)

    show = verbs.add_parser(
        "show",
        parents=[common],
        help="show what a search has found",
        description="Show the original, the one-line int8, the frontier and the choice of a study, finished or not.",
    )
    show.add_argument("study", metavar="RUN", help="directory of the study")
    add_format(show)
    show.set_defaults(run=run_show)

    pick = verbs.add_parser(
        "pick",
        parents=[common],
        help="choose another trial of a study",
        description="Hand over another trial of a study: by its number, at the knee of the frontier, or the best score "
        "within limits.",
    )
    pick.add_argument("study", metavar="RUN", help="directory of the study")
    rule = pick.add_mutually_exclusive_group(required=True)
    rule.add_argument("--trial", type=int, metavar="N", help="the trial with this number")
    rule.add_argument("--knee", action="store_true", help="the knee of the frontier")
    rule.add_argument("--limit", type=limit, action="append", metavar="METRIC=VALUE", help="may be repeated")
    add_format(pick)
    pick.set_defaults(run=run_pick)

    report = verbs.add_parser(
        "report",
        parents=[common],
        help="write the report of a study as one HTML file",
        description="Write the report of a study, finished or not, as one HTML file that opens offline.",
    )
    report.add_argument("study", metavar="RUN", help="directory of the study")
    report.add_argument("--out", metavar="FILE", help="the file (default: report.html in the directory of the study)")
    add_format(report)
    report.set_defaults(run=run_report)


def _add_run(parser: argparse.ArgumentParser, *, out: str | None, limit_of_time: str | None) -> None:
    group = parser.add_argument_group("search")
    _add_budget(group, limit_of_time)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    group.add_argument(
        "--out",
        default=out,
        required=out is None,
        metavar="DIR",
        help="directory of the study" + ("" if out is None else f" (default: {out})"),
    )
    _add_result(parser)


def _add_budget(parser: Any, default: str | None) -> None:
    text = "how long it may take, such as 90s, 10m or 1h30m"
    ending = "" if default is None else f" (default: {default})"
    parser.add_argument("--budget", type=budget, default=default, metavar="TIME", help=text + ending)
    parser.add_argument("--trials", type=positive, metavar="N", help="how many candidates to try at most")


def _add_result(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require-certificate", action="store_true", help="end with code 4 unless the certificate is passed"
    )
    add_format(parser)


def run_search(args: argparse.Namespace) -> int:
    """Search, write the report, print the result."""
    from trimpoint.report.progress import show_progress
    from trimpoint.search import search

    with show_progress(quiet=args.quiet) as progress:
        study = search(
            args.model,
            args.task,
            target=target_of(args),
            goal=goal_of(args),
            budget=args.budget,
            trials=args.trials,
            out=args.out,
            seed=args.seed,
            progress=progress,
        )
    return conclude(study.record, args)


def run_demo(args: argparse.Namespace) -> int:
    """Search the demo's network."""
    from trimpoint.demo import GOAL
    from trimpoint.target import Target

    args.model, args.task = "trimpoint.demo:model", "trimpoint.demo:task"
    target = Target()
    args.runtime, args.threads, args.batch = target.runtime, target.threads, target.batch
    args.minimize, args.limit, args.max_drop = GOAL.minimize, list(GOAL.limits.items()), GOAL.max_drop
    return run_search(args)


def run_resume(args: argparse.Namespace) -> int:
    """Go on with a search."""
    from trimpoint.report.progress import show_progress
    from trimpoint.search import resume

    with show_progress(quiet=args.quiet) as progress:
        study = resume(
            args.study, model=args.model, task=args.task, budget=args.budget, trials=args.trials, progress=progress
        )
    return conclude(study.record, args)


def run_show(args: argparse.Namespace) -> int:
    """Print a study."""
    from trimpoint.search import open_study

    _write_study(open_study(args.study).record, args.format)
    return DONE


def run_pick(args: argparse.Namespace) -> int:
    """Hand over another trial."""
    from trimpoint.report.data import metric
    from trimpoint.search import open_study, pick
    from trimpoint.target import Goal

    rule: int | str | dict[str, float] = args.trial
    if args.knee:
        rule = "knee"
    elif args.limit:
        goal, baseline = Goal(limits=dict(args.limit)), open_study(args.study).record.baseline
        rule = {name: goal.limit(name, metric(baseline, name) or math.nan) for name in goal.limits}
    _write_study(pick(args.study, rule).record, args.format)
    return DONE


def run_report(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from trimpoint.report import report

    path = report(args.study, args.out)
    if args.format == "json":
        write_json({"report": path.as_posix()})
    else:
        print(path)
    return DONE


def conclude(record: "StudyRecord", args: argparse.Namespace) -> int:
    """Write the report of a search that came to its end, print its result and return its exit code."""
    from trimpoint.report.html import write_report

    note(f"report: {write_report(record, Path(record.directory) / 'report.html')}")
    if record.chosen is not None and record.chosen.artifact is not None:
        note(f"artifact: {Path(record.directory) / 'best'}")
    _write_study(record, args.format)
    if record.best is None:
        larger = "--trials N" if args.budget is None and args.trials is not None else "--budget TIME"
        note(f"hint: `trimpoint resume {record.directory} {larger}` goes on from here; the total counts all so far")
        return NOTHING_MET_THE_GOAL
    certificate = None if record.chosen is None else record.chosen.certificate
    if certificate is not None and certificate.status == "failed":
        note("the certificate failed: the drop is larger than allowed")
        return NOT_VERIFIED
    if args.require_certificate and (certificate is None or certificate.status != "passed"):
        note(f"no passed certificate: {'none was made' if certificate is None else certificate.status}")
        return NOT_VERIFIED
    return DONE


def _write_study(record: "StudyRecord", form: str) -> None:
    from trimpoint.report.data import study_data
    from trimpoint.report.text import study_table

    if form == "json":
        write_json(study_data(record))
    else:
        write_table(study_table(record))
