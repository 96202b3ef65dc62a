"""The verbs that work where only NumPy and a runtime are installed: verify, env."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpoint.cli.arguments import add_format, fraction, positive
from trimpoint.cli.exit_codes import DONE, NOT_VERIFIED, USAGE, VerbError
from trimpoint.cli.output import note, write_json, write_table
from trimpoint.errors import ArtifactError

if TYPE_CHECKING:
    from trimpoint.values import Certificate, Profile


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs of this file."""
    verify = verbs.add_parser(
        "verify",
        parents=[common],
        help="check an artifact: every hash, and its answers",
        description="Check every hash of an artifact, open it in a clean process and compare its answers with those "
        "that it was made with; on request measure it again beside a baseline, and certify it again on data. Ends with "
        "code 4 if anything is not as it should be.",
    )
    verify.add_argument("artifact", metavar="DIR", help="directory of the artifact")
    verify.add_argument("--digest", metavar="SHA256", help="of the manifest, noted when the artifact was made")
    verify.add_argument(
        "--baseline",
        metavar="PATH",
        help="measure latency and size beside this artifact or ONNX file, such as RUN/baseline",
    )
    verify.add_argument(
        "--data",
        metavar="TASK",
        help="certify again on the `certify` data of this task, package.module:attribute; needs --baseline",
    )
    verify.add_argument(
        "--margin",
        type=fraction,
        metavar="DROP",
        help="the drop that --data allows, in the score's own unit (default: that of the artifact's certificate)",
    )
    verify.add_argument("--threads", type=positive, default=1, metavar="N", help="threads for one call (default: 1)")
    add_format(verify)
    verify.set_defaults(run=run_verify)

    env = verbs.add_parser(
        "env",
        parents=[common],
        help="show the machine and the installed versions",
        description="Show what figures depend on: processor, instruction set, versions, runtimes.",
    )
    add_format(env)
    env.set_defaults(run=run_env)


def run_verify(args: argparse.Namespace) -> int:
    """Check an artifact."""
    from trimpoint.artifact import verify_artifact
    from trimpoint.values import to_data

    if args.data is not None and args.baseline is None:
        raise VerbError("--data needs --baseline: quality is compared.", "give `--baseline RUN/baseline`", code=USAGE)
    try:
        found = verify_artifact(Path(args.artifact), args.digest)
    except ArtifactError as error:
        raise VerbError(error.message, error.hint, code=NOT_VERIFIED) from error
    for text in found.notes:
        note(f"warning: {text}")
    data = to_data(found)
    data |= {} if args.baseline is None else {"measured": to_data(_measured(args))}
    data |= {} if args.data is None else {"certificate": to_data(_certified(args))}
    _write_verified(data, args.format)
    return NOT_VERIFIED if data.get("certificate", {}).get("status") == "failed" else DONE


def _measured(args: argparse.Namespace) -> "Profile":
    from trimpoint.trust.recheck import remeasure

    profile = remeasure(args.artifact, args.baseline, threads=args.threads)
    for text in profile.notes:
        note(f"warning: {text}")
    return profile


def _certified(args: argparse.Namespace) -> "Certificate":
    from trimpoint.reference import load_reference
    from trimpoint.task import Task
    from trimpoint.trust.recheck import recertify

    task = load_reference(args.data, Task, "task")
    return recertify(args.artifact, args.baseline, task, margin=args.margin, threads=args.threads)


def _write_verified(data: dict[str, Any], form: str) -> None:
    from trimpoint.report.table import pairs
    from trimpoint.report.words import certificate_text
    from trimpoint.values import Certificate, Measurement, from_data

    if form == "json":
        write_json(data)
        return
    rows = [(key, str(value)) for key, value in data.items() if key not in ("notes", "measured", "certificate")]
    for name, value in data.get("measured", {}).get("metrics", {}).items():
        rows.append((name, str(from_data(Measurement, value))))
    if "certificate" in data:
        rows.append(("certificate", data["certificate"]["status"]))
    write_table(pairs(rows))
    if "certificate" in data:
        print(certificate_text(from_data(Certificate, data["certificate"])))


def run_env(args: argparse.Namespace) -> int:
    """Show the environment."""
    from trimpoint.measure.environment import environment
    from trimpoint.report.table import pairs

    data = environment()
    if args.format == "json":
        write_json(data)
    else:
        write_table(pairs(list(data.items())))
    return DONE
