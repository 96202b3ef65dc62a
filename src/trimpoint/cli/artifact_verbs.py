"""The verbs that work where only NumPy and a runtime are installed: verify, pack, unpack, env."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpoint.cli.arguments import add_format, fraction, positive
from trimpoint.cli.exit_codes import DONE, NOT_VERIFIED, USAGE, VerbError
from trimpoint.cli.output import note, write_json, write_table
from trimpoint.errors import ArtifactError

if TYPE_CHECKING:
    from trimpoint.packed import PackReport
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
    verify.add_argument("artifact", metavar="PATH", help="directory of the artifact, or a file that `pack` wrote")
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

    pack = verbs.add_parser(
        "pack",
        parents=[common],
        help="write an artifact as one small file, for the wire or for flash",
        description="Write an artifact into one file, its weights entropy-coded, from which it comes back bit for bit. "
        "`trimpoint.open`, `verify` and `unpack` take that file. Weights that are zero, that take few values or that "
        "are integers are what makes it small.",
    )
    pack.add_argument("artifact", metavar="DIR", help="directory of the artifact")
    pack.add_argument("--out", "-o", metavar="FILE", required=True, help="the file to write, such as model.tpz")
    pack.add_argument(
        "--model-only",
        action="store_true",
        help="leave out all records and recorded answers: the smallest file that runs",
    )
    add_format(pack)
    pack.set_defaults(run=run_pack)

    unpack = verbs.add_parser(
        "unpack",
        parents=[common],
        help="restore the files of an artifact that was packed",
        description="Restore what `pack` wrote, bit for bit, and check it against its SHA-256 before it is put in "
        "place.",
    )
    unpack.add_argument("file", metavar="FILE", help="that `pack` wrote")
    unpack.add_argument(
        "--out", "-o", metavar="DIR", required=True, help="where the files go: new, empty or an artifact"
    )
    unpack.add_argument(
        "--max-bytes",
        type=positive,
        default=1 << 32,
        metavar="N",
        help="refuse a file that would restore more than this (default: 4294967296)",
    )
    add_format(unpack)
    unpack.set_defaults(run=run_unpack)

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
    if args.baseline is not None and Path(args.artifact).is_file():
        raise VerbError("--baseline measures the directory of an artifact. Got a file.", "unpack it first", code=USAGE)
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


def run_pack(args: argparse.Namespace) -> int:
    """Pack an artifact."""
    from trimpoint.packed import pack_artifact

    with _progress(args, f"packing {args.artifact}") as on_step:
        report = pack_artifact(args.artifact, args.out, model_only=args.model_only, on_step=on_step)
    return _write_report(report, args.format)


def run_unpack(args: argparse.Namespace) -> int:
    """Unpack an artifact."""
    from trimpoint.packed import unpack_artifact

    with _progress(args, f"unpacking {args.file}") as on_step:
        report = unpack_artifact(args.file, args.out, max_bytes=args.max_bytes, on_step=on_step)
    return _write_report(report, args.format)


@contextmanager
def _progress(args: argparse.Namespace, phase: str) -> Iterator[Callable[[int, int], None]]:
    from trimpoint.report.progress import show_progress

    with show_progress(quiet=args.quiet) as progress:
        progress.phase(phase)
        yield lambda done, total: progress.update(
            text=f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", fraction=done / max(1, total)
        )


def _write_report(report: "PackReport", form: str) -> int:
    from trimpoint.report.table import pairs
    from trimpoint.values import to_data

    data = to_data(report)
    if form == "json":
        write_json(data)
    else:
        smaller = f"{report.bytes / report.coded_bytes:.2f}"
        write_table(pairs([*((key, str(value)) for key, value in data.items()), ("times smaller", smaller)]))
    return DONE


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
