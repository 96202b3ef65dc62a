"""Try every method and runtime on networks that nobody here wrote: `python -m benchmarks.coverage [NAME…]`.

A cell is one network of `benchmarks.architectures`, one method, one runtime: the network is compressed by a plan of
that one step, exported, lowered, opened and compared with the module that the plan made. Each network is tried in a
process of its own with a time limit. What is done is kept, so that a run that was cut off goes on where it was; once
all is done, the next run starts over. The result is `benchmarks/results/coverage.json` and, to be read,
`docs/coverage.md`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.run import HERE, machine
from torch import nn

from trimpoint.compress import Compressed, compress
from trimpoint.data import as_numpy
from trimpoint.errors import ParityError, TrimpointError, UnknownNameError, suggest
from trimpoint.measure.inputs import CoreInputs, core_inputs
from trimpoint.plan import Plan, Step
from trimpoint.registry import make_method
from trimpoint.runtimes import get_runtime, runtime_names
from trimpoint.runtimes.base import Exported
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import Parity, check_parity, parity_batches, require_parity
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.values import Change

METHODS = {
    "none": None,
    "drop-blocks": {"ratio": 0.5},
    "prune-channels": {"ratio": 0.5},
    "prune-heads": {"ratio": 0.5},
    "prune-recurrent": {"ratio": 0.5},
    "prune-vocabulary": {},
    "factorize-linear": {},
    "factorize-conv": {},
    "factorize-embedding": {},
    "factorize-recurrent": {},
    "prune-weights": {"ratio": 0.5},
    "equalize-layers": {},
    "smooth-activations": {},
    "cast-weights": {},
    "quantize-static": {},
    "quantize-dynamic": {},
    "quantize-weights": {},
    "quantize-mixed": {"mean_bits": 4.5, "fewest_bits": 4, "most_bits": 5, "samples": 8},
    "share-weights": {},
    "ternarize-weights": {},
    "sparse-train": {"epochs": 1.0},
    "finetune": {"epochs": 1.0},
    "distill": {"epochs": 1.0},
}
"""Method → its parameters; `none` is the network as it is."""
RUNTIMES = ("onnxruntime", "openvino")
"""In the committed table. ExecuTorch takes ten times as long to lower; `--runtime executorch` tries it."""
MOST_FAILING = 0.1
"""Share of the cells that may fail."""
LEAST_SQNR_DB = 10.0
"""A quantised network must keep the noise in its main output this far below the signal."""
RESULT, PAGE = HERE / "results" / "coverage.json", HERE.parent / "docs" / "coverage.md"
MARKS = {"works": "✓", "skipped": "–", "fails": "✗", "crashes": "‼"}
FAILED = ("fails", "crashes")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What came of one network, method and runtime.

    Args:
        architecture: the network.
        method: applied to it.
        runtime: lowered to.
        status: `works`; `skipped`, where the method found nothing to change; `fails`, with a message for the user;
            `crashes`, with anything else: a bug.
        detail: what was changed, why nothing was, or the message.
        notes: what the exporter or the runtime did otherwise than asked.
        max_rel: largest difference from the module, as a share of the output's largest magnitude.
        sqnr_db: signal to noise of the main output, decibels; `None` where there is no noise.
        seconds: for applying (once for all runtimes), exporting and lowering.
    """

    architecture: str
    method: str
    runtime: str
    status: str
    detail: str = ""
    notes: tuple[str, ...] = ()
    max_rel: float | None = None
    sqnr_db: float | None = None
    seconds: float = 0.0


# One network


def try_architecture(
    architecture: Architecture, methods: Sequence[str] = tuple(METHODS), runtimes: Sequence[str] = RUNTIMES
) -> Iterator[Cell]:
    """Yield the cells of one network."""
    model, task = architecture.make()
    inputs = core_inputs(model, task, Target())
    for method in methods:
        started = time.perf_counter()
        blank = Cell(architecture=architecture.name, method=method, runtime="", status="")
        found = _attempt(blank, _applied, model, task, inputs, runtimes)
        for runtime in runtimes:
            cell = replace(blank, runtime=runtime)
            if isinstance(found, Cell):
                cell = replace(found, runtime=runtime)
            else:
                cell = _attempt(cell, _lowered, *found, task, inputs)
            yield replace(cell, seconds=round(time.perf_counter() - started, 1))


def _attempt(blank: Cell, work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work(blank, *arguments)` gives, or the cell of its failure."""
    try:
        return work(blank, *arguments)
    except TrimpointError as error:
        return replace(blank, status="fails", detail=_plain(f"{type(error).__name__}: {error.message}"))
    except Exception as error:  # noqa: BLE001 – the table is there to find these
        return replace(blank, status="crashes", detail=_plain(f"{type(error).__name__}: {error}"))


def _applied(
    blank: Cell, model: nn.Module, task: Task, inputs: CoreInputs, runtimes: Sequence[str]
) -> tuple[Compressed, Exported] | Cell:
    parameters = METHODS[blank.method]
    steps = () if parameters is None else (Step(make_method(blank.method, parameters)),)
    made = compress(model, Plan(steps), task)
    if steps and all(change.kind == "skipped" for change in made.changes):
        return replace(blank, status="skipped", detail=_reasons(made.changes))
    sources = tuple({get_runtime(name).source for name in runtimes})
    return made, export(made.module, inputs.example, inputs.dims, sources=sources)


def _lowered(cell: Cell, made: Compressed, exported: Exported, task: Task, inputs: CoreInputs) -> Cell:
    calibration = [as_numpy(batch) for batch, _ in task.batches("calibrate")] if made.formats else ()
    runtime = get_runtime(cell.runtime)
    with tempfile.TemporaryDirectory(prefix="trimpoint-") as name:
        directory = Path(name)
        lowered = runtime.lower(exported, directory, formats=made.formats or None, calibration=calibration)
        session = runtime.open(directory, lowered)
        batches = parity_batches(inputs.example, session, lengths=task.lengths())
        if made.formats:
            parity = check_parity(made.module, session, batches)
            left = {text.partition(":")[0] for text in lowered.unmapped} & set(made.formats)
            _require_sound(parity, len(left), len(made.formats))
        else:
            parity = require_parity(made.module, session, batches)
    return replace(
        cell,
        status="works",
        detail=_done(made.changes),
        notes=tuple(_plain(note) for note in (*exported.notes, *lowered.notes, *lowered.unmapped)),
        max_rel=float(f"{parity.max_rel:.3g}"),
        sqnr_db=round(parity.sqnr_db, 1) if parity.sqnr_db != float("inf") else None,
    )


def _require_sound(parity: Parity, unmapped: int, formats: int) -> None:
    if unmapped >= formats:
        raise ParityError(f"Of {formats} modules to be quantised the runtime realised none.")
    if parity.sqnr_db < LEAST_SQNR_DB:
        raise ParityError(
            f"The quantised output must keep its noise at least {LEAST_SQNR_DB:g} dB below the signal. Got "
            f"{parity.sqnr_db:.1f} dB."
        )


def _done(changes: Sequence[Change]) -> str:
    counts = Counter(change.kind for change in changes)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _reasons(changes: Sequence[Change]) -> str:
    counts = Counter(re.sub(r"`[^`]+`", "`…`", change.reason) for change in changes)
    return _plain("; ".join(f"{count} × {reason}" for reason, count in counts.most_common(3)))


def _plain(text: str) -> str:
    """Return text on one line without the place where this machine keeps its packages."""
    text = re.sub(r"[^\s\"'(]*/(site-packages|src)/", "", text.replace(str(HERE.parent), "."))
    return " ".join(text.split())[:600]


# All of them


def run_in_process(
    architecture: Architecture, state: Path, limit: float, runtimes: Sequence[str] = RUNTIMES
) -> list[Cell]:
    """Try a network in a process of its own; cells that it did not come to fail with the reason.

    Args:
        architecture: the network.
        state: directory in which the process keeps its cells.
        limit: seconds that it may take.
        runtimes: to lower to.
    """
    file = state / f"{_slug(architecture.name)}.jsonl"
    done = read_cells(file)
    wanted = [(method, runtime) for method in METHODS for runtime in runtimes]
    if {(cell.method, cell.runtime) for cell in done} >= set(wanted):
        return done
    command = [sys.executable, "-m", "benchmarks.coverage", architecture.name, "--child", "--state", str(state)]
    command += [word for runtime in runtimes for word in ("--runtime", runtime)]
    try:
        code = subprocess.run(
            command, cwd=HERE.parent, timeout=limit, check=False, stderr=subprocess.DEVNULL
        ).returncode
        reason = f"the process ended with code {code}"
    except subprocess.TimeoutExpired:
        reason = f"the network took longer than {limit:.0f} s"
    done = read_cells(file)
    missing = [pair for pair in wanted if pair not in {(cell.method, cell.runtime) for cell in done}]
    return done + [
        Cell(architecture=architecture.name, method=method, runtime=runtime, status="crashes", detail=reason)
        for method, runtime in missing
    ]


def read_cells(file: Path) -> list[Cell]:
    """Read the cells that a process has kept; a torn last line does not count."""
    cells = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            data = json.loads(line)
        except ValueError:
            break
        cells.append(Cell(**data | {"notes": tuple(data["notes"])}))
    return cells


def run_child(architecture: Architecture, state: Path, runtimes: Sequence[str] = RUNTIMES) -> None:
    """Try what a network still lacks, and keep each cell as soon as it is known."""
    file = state / f"{_slug(architecture.name)}.jsonl"
    kept = read_cells(file)
    complete = [m for m in METHODS if sum(cell.method == m for cell in kept) == len(runtimes)]
    with file.open("w", encoding="utf-8") as stream:
        for cell in (c for c in kept if c.method in complete):
            stream.write(json.dumps(asdict(cell), ensure_ascii=False) + "\n")
        stream.flush()
        for cell in try_architecture(architecture, [m for m in METHODS if m not in complete], runtimes):
            stream.write(json.dumps(asdict(cell), ensure_ascii=False) + "\n")
            stream.flush()


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


# The result


def counts(cells: Sequence[Cell]) -> dict[str, int]:
    """Return how many cells have each status."""
    return {status: sum(cell.status == status for cell in cells) for status in MARKS}


def page(result: dict[str, Any], cells: Sequence[Cell]) -> str:
    """Return the result as a page to be read."""
    versions = ", ".join(f"{name} {version}" for name, version in result["environment"]["versions"].items())
    total, found = len(cells), counts(cells)
    lines = [
        "# Coverage",
        "",
        "Made by `make coverage`; do not edit. Networks of `transformers` with random weights and small sizes, each",
        "compressed by a plan of one step, exported, lowered, opened and compared with the module that the plan made:",
        "float32 answers within 0.1 % of the largest output at several lengths and batch sizes, int8 answers with at",
        f"least {LEAST_SQNR_DB:g} dB of signal over noise. Quality says nothing here, and neither does speed.",
        "",
        "| mark | means | cells |",
        "| --- | --- | --: |",
        f"| ✓ | works | {found['works']} |",
        f"| – | skipped: the method found nothing to change, for the reasons below | {found['skipped']} |",
        f"| ✗ | fails, with the message below | {found['fails']} |",
        f"| ‼ | ends with anything but a clear message: a bug | {found['crashes']} |",
        "",
        f"{found['fails'] + found['crashes']} of {total} cells fail "
        f"({(found['fails'] + found['crashes']) / max(1, total):.1%}). First mark of a cell: "
        + ", second: ".join(dict.fromkeys(cell.runtime for cell in cells))
        + ".",
        "",
        "| network | kind | " + " | ".join(METHODS) + " |",
        "| --- | --- |" + " :-: |" * len(METHODS),
    ]
    kinds = {architecture.name: architecture.kind for architecture in ARCHITECTURES}
    for name in dict.fromkeys(cell.architecture for cell in cells):
        marks = [
            " ".join(MARKS[c.status] for c in cells if (c.architecture, c.method) == (name, method))
            for method in METHODS
        ]
        lines.append(f"| {name} | {kinds.get(name, '')} | " + " | ".join(marks) + " |")
    for title, statuses in (("Failures", FAILED), ("Skipped", ("skipped",))):
        lines += ["", f"## {title}", "", *_messages([cell for cell in cells if cell.status in statuses])]
    lines += ["", "## Notes", "", *_notes(cells)]
    lines += ["", "## Environment", "", f"{result['environment']['cpu']}; {versions}."]
    return "\n".join(lines) + "\n"


def _messages(cells: Sequence[Cell]) -> list[str]:
    merged: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        merged.setdefault((cell.architecture, cell.method, cell.detail), []).append(cell.runtime)
    return [
        f"- {name}, {method}, {' and '.join(runtimes)}: {detail}" for (name, method, detail), runtimes in merged.items()
    ] or ["None."]


def _notes(cells: Sequence[Cell]) -> list[str]:
    merged: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        for note in cell.notes:
            merged.setdefault((cell.architecture, note), set()).add(cell.runtime)
    shown = [f"- {name}, {' and '.join(sorted(runtimes))}: {note}" for (name, note), runtimes in merged.items()]
    return shown or ["None."]


def write(cells: Sequence[Cell], seconds: float, result_file: Path, page_file: Path) -> dict[str, Any]:
    """Write the result and its page, each in one piece."""
    found = counts(cells)
    result = {
        "scenario": "coverage",
        "question": "Which methods and runtimes work on which architectures?",
        "seconds": round(seconds, 1),
        "environment": machine(),
        "counts": found,
        "failing_share": round(sum(found[status] for status in FAILED) / max(1, len(cells)), 4),
        "rows": [{"system": f"{c.architecture}, {c.method}, {c.runtime}", **asdict(c)} for c in cells],
        "goals": [
            {
                "name": "failing cells",
                "value": sum(found[status] for status in FAILED) / max(1, len(cells)),
                "must": MOST_FAILING,
                "aim": 0.0,
                "better": "lower",
                "unit": "share",
            }
        ],
    }
    for file, text in (
        (result_file, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        (page_file, page(result, cells)),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    return result


def chosen(names: Sequence[str]) -> list[Architecture]:
    """Return the networks of these names, all without any.

    Raises:
        UnknownNameError: if there is none of a name.
    """
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    for name in names:
        if name not in known:
            raise UnknownNameError(f"There is no network {name!r}.", suggest(name, list(known)))
    return [known[name] for name in names or known]


def main(arguments: list[str] | None = None) -> int:
    """Fill the table; return 0 where at most a tenth of the cells fails and none crashes, else 3."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description="Fill the coverage table.")
    parser.add_argument("name", nargs="*", help="networks to try again; the others keep their cells. All by default")
    parser.add_argument("--state", type=Path, default=Path("runs/coverage"), help="kept until all is done")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one network")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument(
        "--runtime", action="append", choices=runtime_names(), help="instead of those of the table; may be repeated"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    networks, runtimes = chosen(options.name), tuple(options.runtime or RUNTIMES)
    options.state.mkdir(parents=True, exist_ok=True)
    if options.child:
        run_child(networks[0], options.state, runtimes)
        return 0
    started, cells = time.perf_counter(), {}
    if options.name and options.result.exists():
        for row in json.loads(options.result.read_text(encoding="utf-8"))["rows"]:
            row.pop("system")
            cells.setdefault(row["architecture"], []).append(Cell(**row | {"notes": tuple(row["notes"])}))
    for network in networks:
        cells[network.name] = run_in_process(network, options.state, options.limit, runtimes)
        found = counts(cells[network.name])
        print(
            f"{network.name}: " + ", ".join(f"{count} {status}" for status, count in found.items() if count), flush=True
        )
    ordered = [cell for architecture in ARCHITECTURES for cell in cells.get(architecture.name, [])]
    result = write(ordered, time.perf_counter() - started, options.result, options.page)
    for network in networks:
        (options.state / f"{_slug(network.name)}.jsonl").unlink(missing_ok=True)
    print(f"{len(ordered)} cells: {result['counts']}, {result['failing_share']:.1%} fail")
    return 3 if result["failing_share"] > MOST_FAILING or result["counts"]["crashes"] else 0


if __name__ == "__main__":
    sys.exit(main())
