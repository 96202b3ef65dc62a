"""Run benchmark scenarios and write their results: `python -m benchmarks.run [NAME…]`.

A scenario is a file in `benchmarks/scenarios/` with `QUESTION` and `run(resume_dir) -> {"rows": […], "goals": […]}`.
It keeps in `resume_dir` what it must not lose, so that a run that was cut off goes on where it was. The result, with
the environment it holds for, is `benchmarks/results/<name>.json`. A scenario with `PAGE` and `page(result) -> text`
also makes that page of `docs/reference/`.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from trimpoint.errors import DataError, UnknownNameError, suggest
from trimpoint.measure.environment import PACKAGES, environment

HERE = Path(__file__).parent
GOAL_KEYS = {"name", "value", "must", "aim", "better", "unit"}


def scenario_names() -> list[str]:
    """Return the names of all scenarios, sorted."""
    return sorted(path.stem for path in (HERE / "scenarios").glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> ModuleType:
    """Import a scenario.

    Raises:
        UnknownNameError: if there is none of that name.
    """
    if name not in scenario_names():
        raise UnknownNameError(f"There is no scenario {name!r}.", suggest(name, scenario_names()))
    return importlib.import_module(f"benchmarks.scenarios.{name}")


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code under test: processor, versions, commit, load."""
    found = environment()
    versions = {package: found.pop(package) for package in PACKAGES if package in found}
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return {
        **found,
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": versions,
        "commit": commit(),
        "load": load,
    }


def commit() -> str:
    """Return the commit that is checked out, marked where files differ from it; empty outside of a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


def check_result(name: str, result: dict[str, Any]) -> None:
    """Check what a scenario returned.

    Raises:
        DataError: naming everything that is missing from it.
    """
    problems = [f"`{key}` must be a list that is not empty" for key in ("rows", "goals") if not result.get(key)]
    problems += [f"row {i} names no `system`" for i, row in enumerate(result.get("rows", [])) if "system" not in row]
    for goal in result.get("goals", []):
        if missing := sorted(GOAL_KEYS - set(goal)):
            problems.append(f"goal {goal.get('name')!r} lacks {', '.join(missing)}")
        elif goal["better"] not in ("higher", "lower"):
            problems.append(f"goal {goal['name']!r}: `better` must be 'higher' or 'lower'. Got {goal['better']!r}")
    if problems:
        raise DataError(f"The result of {name!r} is none: " + "; ".join(problems) + ".")


def verdict(goal: dict[str, Any]) -> str:
    """Return the most that a goal's value reaches.

    `aim` or `must`; `missed` where the value is not there or falls short of the `must`; `short` where there is no
    `must` and it falls short of the aim; `–` where nothing was asked of it.
    """
    sign = 1 if goal["better"] == "higher" else -1
    value = goal["value"]
    if value is None or math.isnan(value):
        return "missed"
    if goal["aim"] is not None and sign * value >= sign * goal["aim"]:
        return "aim"
    if goal["must"] is None:
        return "–" if goal["aim"] is None else "short"
    return "must" if sign * value >= sign * goal["must"] else "missed"


def run(name: str, state: Path, results: Path, pages: Path) -> dict[str, Any]:
    """Run one scenario and write its result file in one piece.

    Args:
        name: of the scenario.
        state: directory in which scenarios keep what they must not lose.
        results: directory of the result files.
        pages: directory of the pages that some scenarios make.
    """
    scenario, resume_dir = load(name), state / name
    resume_dir.mkdir(parents=True, exist_ok=True)
    clock = resume_dir / "seconds"
    spent, started, before = float(clock.read_text()) if clock.exists() else 0.0, time.perf_counter(), machine()
    try:
        outcome = scenario.run(resume_dir)
    finally:
        seconds = spent + time.perf_counter() - started
        clock.write_text(f"{seconds:.1f}")
    check_result(name, outcome)
    result = {
        "scenario": name,
        "question": scenario.QUESTION,
        "seconds": round(seconds, 1),
        "environment": before,
        "rows": outcome["rows"],
        "goals": outcome["goals"],
    }
    _write(results / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if hasattr(scenario, "PAGE"):
        _write(pages / scenario.PAGE, scenario.page(result))
    return result


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def show(result: dict[str, Any]) -> None:
    """Print the goals of a result and what they reach."""
    print(f"{result['scenario']}: {result['question']} ({result['seconds']:.0f} s)")
    for goal in result["goals"]:
        value = "–" if goal["value"] is None else f"{goal['value']:.4g}"
        must, aim = ("–" if goal[name] is None else goal[name] for name in ("must", "aim"))
        print(f"  {verdict(goal):6}  {goal['name']}: {value} {goal['unit']} (must {must}, aim {aim})")


def main(arguments: list[str] | None = None) -> int:
    """Run the named scenarios, or all; return 0 where every goal's `must` is reached, else 3."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run benchmark scenarios.")
    parser.add_argument("scenario", nargs="*", help="all of them by default")
    parser.add_argument(
        "--state", type=Path, default=Path("runs/bench"), help="kept between runs; remove it to start over"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--pages", type=Path, default=HERE.parent / "docs" / "reference")
    options = parser.parse_args(arguments)
    names = options.scenario or scenario_names()
    for name in names:
        load(name)
    missed = 0
    for name in names:
        result = run(name, options.state, options.results, options.pages)
        show(result)
        missed += sum(verdict(goal) == "missed" for goal in result["goals"])
    print(f"{len(names)} scenarios, {missed} goals missed", file=sys.stderr)
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
