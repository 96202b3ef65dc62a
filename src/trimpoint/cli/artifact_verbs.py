"""The verbs that work where only NumPy and a runtime are installed: verify, env."""

import argparse
from pathlib import Path
from typing import Any

from trimpoint.cli.arguments import add_format
from trimpoint.cli.exit_codes import DONE, NOT_VERIFIED, VerbError
from trimpoint.cli.output import note, write_json, write_table
from trimpoint.errors import ArtifactError


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs of this file."""
    verify = verbs.add_parser(
        "verify",
        parents=[common],
        help="check an artifact: every hash, and its answers",
        description="Check every hash of an artifact, open it in a clean process and compare its answers with those "
        "that it was made with. Ends with code 4 if anything is not as it should be.",
    )
    verify.add_argument("artifact", metavar="DIR", help="directory of the artifact")
    verify.add_argument("--digest", metavar="SHA256", help="of the manifest, noted when the artifact was made")
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
    from trimpoint.report.table import pairs
    from trimpoint.values import to_data

    try:
        found = verify_artifact(Path(args.artifact), args.digest)
    except ArtifactError as error:
        raise VerbError(error.message, error.hint, code=NOT_VERIFIED) from error
    for text in found.notes:
        note(f"warning: {text}")
    if args.format == "json":
        write_json(to_data(found))
    else:
        write_table(pairs([(key, str(value)) for key, value in to_data(found).items() if key != "notes"]))
    return DONE


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
