"""Parse the command line, run a verb, and turn what goes wrong into one clear message and an exit code."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trimpoint.cli.artifact_verbs import add_verbs as add_artifact_verbs
from trimpoint.cli.exit_codes import ERROR, INTERRUPTED, USAGE, VerbError
from trimpoint.cli.method_verbs import add_verbs as add_method_verbs
from trimpoint.cli.model_verbs import add_verbs as add_model_verbs
from trimpoint.cli.study_verbs import add_verbs as add_study_verbs
from trimpoint.errors import StorageError, TrimpointError
from trimpoint.extras import missing_dependency

DESCRIPTION = """\
Find how small and fast a trained network can get before it is no longer good enough, by measurement."""
EPILOG = """\
exit codes: 0 done, 1 error, 2 usage, 3 nothing met the goal (the nearest is reported),
            4 verification or certification failed

Standard output is data, standard error is everything else. Try `trimpoint demo`."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others."""

    def error(self, message: str) -> NoReturn:
        """Write the message and where help is, and end with the code of wrong usage."""
        self.exit(USAGE, f"error: {message}\n\nhint: see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs. Imports nothing heavy."""
    parser = Parser(
        prog="trimpoint",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trimpoint {_version()}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", "-q", action="store_true", help="show no progress")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for add_verbs in (add_study_verbs, add_model_verbs, add_method_verbs, add_artifact_verbs):
        add_verbs(verbs, common)
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("trimpoint")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 error, 2 usage, 3 nothing met the goal, 4 verification or certification failed,
        130 interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return ERROR
    except KeyboardInterrupt:
        return _interrupted(args)
    except VerbError as failure:
        return _say(failure, args, failure.code)
    except TrimpointError as error:
        return _say(error, args, ERROR)
    except ModuleNotFoundError as error:
        missing = missing_dependency(error, f"`trimpoint {args.verb}`")
        if missing is None:
            raise
        return _say(missing, args, ERROR)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        problem = StorageError(
            f"{error.strerror or error}{where}.", "check the path, its permissions and the free space"
        )
        return _say(problem, args, ERROR)
    return code


def _say(error: TrimpointError, args: argparse.Namespace, code: int) -> int:
    if args.debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {error.message}\n" + (f"\nhint: {error.hint}\n" if error.hint else ""))
    return code


def _interrupted(args: argparse.Namespace) -> int:
    if args.debug:
        traceback.print_exc()
    keeps = getattr(args, "keeps", None)
    study = None if keeps is None else keeps(args)
    if study is None or not Path(study, "study.db").is_file():
        sys.stderr.write("\ninterrupted: nothing had been written\n")
    else:
        sys.stderr.write(
            f"\ninterrupted: every trial that had ended is kept in {study}\n\n"
            f"hint: go on with `trimpoint resume {study}`\n"
        )
    return INTERRUPTED


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about a closed pipe when it flushes at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
