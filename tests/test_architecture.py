"""The rules that hold for every file of the package, read from its syntax trees.

What stands where is the table `LAYERS`. The rules are functions from a source directory to a list of violations, and
the second half of this file plants each violation in a scratch package to show that it is found.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "trimpoint"

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        *("errors", "values", "annotations", "parts", "filters", "signature"),
        *("progress", "budget", "reference", "extras", "storage", "quiet"),
    ),
    ("score", "data", "losses", "params", "method", "registry", "padding", "task", "target", "plan"),
    (
        *("graph", "measure", "runtimes", "recover", "importance"),
        *("low_rank", "methods", "quantization", "sparsity", "demo", "coding"),
    ),
    (
        *("build", "record", "context", "compress", "manifest", "parity", "model_card"),
        *("packed", "artifact", "trust", "advice"),
    ),
    ("search",),
    ("report",),
    ("cli",),
    ("testing",),
)
"""A module may import its own row and those above it; the package's own `__init__` may import anything, lazily."""

APART = {("methods", "search"), ("methods", "target"), ("methods", "runtimes"), ("runtimes", "methods")}
"""(who, whom): never, whatever the rows say, and not for annotations either."""

DISCOVERY = {("trimpoint.registry", "trimpoint.methods"): "lists the files of that package and knows none of them"}
"""(importer, target) → why the direction does not matter there."""

SWALLOWS = {
    "trimpoint.runtimes.onnx_quantize": "the runtime's shape inference raises bare Exceptions; tried without",
    "trimpoint.search.contain": "whatever a candidate raises is recorded with its trial, and the search goes on",
}
"""Module → why it may catch everything."""

LIGHT = ("", ".__main__", ".cli", ".artifact")
"""Modules that work where only the base dependencies are installed, and so what they import; runtimes' sessions too."""

LIGHT_THIRD_PARTY = {"numpy", "onnxruntime", "safetensors"}
BANNED_NAMES = ("utils", "util", "helpers", "helper", "handler", "handlers", "manager", "managers", "smash", "misc")
MOST_LINES = 400


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, at which line, whether on importing the importer, whether to run at all."""

    importer: str
    target: str
    line: int
    at_import: bool
    typing_only: bool


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join((source.name, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def trees(source: Path) -> dict[str, tuple[Path, ast.Module]]:
    return {
        module_name(path, source): (path, _parsed(path.read_text(encoding="utf-8")))
        for path in sorted(source.rglob("*.py"))
    }


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def imports(source: Path) -> list[Import]:
    files = sorted(source.rglob("*.py"))
    return _imports(source, tuple(path.read_text(encoding="utf-8") for path in files))


@cache
def _imports(source: Path, _: tuple[str, ...]) -> list[Import]:
    known = trees(source)
    found: list[Import] = []

    def visit(node: ast.AST, importer: str, package: str, at_import: bool, typing_only: bool) -> None:
        for target in _targets(node, package, known):
            found.append(Import(importer, target, getattr(node, "lineno", 0), at_import, typing_only))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, importer, package, at_import, True)
            for child in node.orelse:
                visit(child, importer, package, at_import, typing_only)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, importer, package, at_import and not inside, typing_only)

    for name, (path, tree) in known.items():
        visit(tree, name, name if path.stem == "__init__" else name.rpartition(".")[0], True, False)
    return found


def _targets(node: ast.AST, package: str, known: dict[str, tuple[Path, ast.Module]]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join((*parents, base)) if base else ".".join(parents)
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
    elif isinstance(node, ast.Call) and _dotted(node.func) in ("importlib.import_module", "__import__"):
        yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _dotted(node: ast.expr) -> str:
    """Return `a.b.c` for a name with attributes, and nothing for other expressions."""
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def area(module: str, root: str) -> str:
    """Return the first name below the package: `graph` of `trimpoint.graph.trace`, `""` of `trimpoint`."""
    return module.removeprefix(root).removeprefix(".").split(".")[0]


# The rules


def unplaced(source: Path) -> list[str]:
    """Find modules that the table does not place."""
    placed = {name for row in LAYERS for name in row} | {"", "__main__"}
    return sorted(
        {
            f"{area(m, source.name)} stands in no row of LAYERS"
            for m in trees(source)
            if area(m, source.name) not in placed
        }
    )


def wrong_way(source: Path) -> list[str]:
    """Find imports, inside functions too, of a module that stands in a later row or is kept apart.

    Imports for annotations only do not run, so they may name a later row.
    """
    row = {name: position for position, names in enumerate(LAYERS) for name in names}
    root, problems = source.name, []
    for found in imports(source):
        if found.target.split(".")[0] != root:
            continue
        importer, target = area(found.importer, root), area(found.target, root)
        if importer in ("", "__main__") or importer not in row or target not in row:
            continue
        later = row[target] > row[importer] and not found.typing_only
        discovers = (found.importer, found.target) in DISCOVERY
        if (later and not discovers) or (importer, target) in APART:
            problems.append(f"{found.importer}:{found.line} imports {found.target}")
    return problems


def sibling_methods(source: Path) -> list[str]:
    """Find methods that import another method; files whose name begins with `_` are shared."""
    prefix = f"{source.name}.methods."
    return [
        f"{found.importer}:{found.line} imports {found.target}"
        for found in imports(source)
        if found.importer.startswith(prefix)
        and found.target.startswith(prefix)
        and found.importer != found.target
        and not found.target.removeprefix(prefix).startswith("_")
    ]


def cycles(source: Path) -> list[str]:
    """Find modules that import each other in a ring while they are imported."""
    graph: dict[str, set[str]] = {name: set() for name in trees(source)}
    for found in imports(source):
        if found.at_import and not found.typing_only and found.target in graph and found.target != source.name:
            graph.setdefault(found.importer, set()).add(found.target)
    state: dict[str, int] = {}
    problems: list[str] = []

    def walk(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            problems.append(" → ".join((*trail[trail.index(name) :], name)))
        if name in state:
            return
        state[name] = 1
        for target in sorted(graph[name] - {name}):
            walk(target, (*trail, name))
        state[name] = 2

    for name in graph:
        walk(name, ())
    return problems


def heavy_in_light(source: Path) -> list[str]:
    """Find third-party imports that importing the light half would run, other than the base dependencies."""
    root, known = source.name, set(trees(source))
    by_importer: dict[str, list[Import]] = {}
    for found in imports(source):
        if found.at_import and not found.typing_only:
            by_importer.setdefault(found.importer, []).append(found)
    todo = [name for name, (_, tree) in trees(source).items() if name.removeprefix(root) in LIGHT or _has_session(tree)]
    reason = dict.fromkeys(todo, "")
    problems = []
    while todo:
        name = todo.pop()
        for found in by_importer.get(name, []):
            if found.target.split(".")[0] == root:
                parts = found.target.split(".")
                for target in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                    if target in known and target not in reason:
                        reason[target] = f" (imported by {name})"
                        todo.append(target)
            elif found.target.split(".")[0] not in sys.stdlib_module_names | LIGHT_THIRD_PARTY:
                problems.append(f"{name}:{found.line} imports {found.target}{reason[name]}")
    return sorted(set(problems))


def _has_session(tree: ast.Module) -> bool:
    bases = {ast.unparse(base) for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases}
    return bool(bases & {"Runtime", "Session", "base.Runtime", "base.Session"})


def too_long(source: Path) -> list[str]:
    """Find modules of more lines than a person reads from top to bottom."""
    counts = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, (path, _) in trees(source).items()}
    return [f"{name} has {count} lines" for name, count in counts.items() if count > MOST_LINES]


def swallowed(source: Path) -> list[str]:
    """Find `except:`, `except Exception` and `except BaseException` that do not end by raising."""
    problems = []
    for name, (_, tree) in trees(source).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and name not in SWALLOWS:
                problems += [] if isinstance(node.body[-1], ast.Raise) else [f"{name}:{node.lineno} catches everything"]
    return problems


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(item) for item in kind.elts)
    return kind is None or ast.unparse(kind) in ("Exception", "BaseException", "builtins.Exception")


def asserted(source: Path) -> list[str]:
    """Find assertions: they vanish under `python -O`."""
    return [
        f"{name}:{node.lineno} asserts"
        for name, (_, tree) in trees(source).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]


def unsafe(source: Path) -> list[str]:
    """Find what could run code from a file: pickle, `torch.load`, `eval`, `exec`."""
    problems = [
        f"{found.importer}:{found.line} imports {found.target}"
        for found in imports(source)
        if found.target.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle")
    ]
    for name, (_, tree) in trees(source).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _dotted(node.func) in ("eval", "exec", "torch.load"):
                problems.append(f"{name}:{node.lineno} calls {_dotted(node.func)}")
    return problems


def vague_names(source: Path) -> list[str]:
    """Find files, classes and functions named after nothing in particular."""
    problems = []
    for name, (_, tree) in trees(source).items():
        if set(name.split(".")) & set(BANNED_NAMES):
            problems.append(f"{name} is no name for a module")
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and _is_vague(node.name):
                problems.append(f"{name}:{node.lineno} {node.name} is no name")
    return problems


def _is_vague(name: str) -> bool:
    words = name.lower().split("_")
    return bool(set(words) & set(BANNED_NAMES)) or name.lower().endswith(("manager", "handler", "utils", "helper"))


def unfinished(source: Path) -> list[str]:
    """Find what was left for later."""
    problems = []
    for name, (path, tree) in trees(source).items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(mark in line for mark in ("TODO", "FIXME", "XXX")):
                problems.append(f"{name}:{number} {line.strip()}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
                problems.append(f"{name}:{node.lineno} is not implemented")
    return problems


RULES: tuple[Callable[[Path], list[str]], ...] = (
    unplaced,
    wrong_way,
    sibling_methods,
    cycles,
    heavy_in_light,
    too_long,
    swallowed,
    asserted,
    unsafe,
    vague_names,
    unfinished,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(SOURCE) == []


# Planted violations

CLEAN = {
    "__init__.py": "def __getattr__(name):\n    from trimpoint.search import study\n    return study\n",
    "errors.py": "class TrimpointError(Exception):\n    pass\n",
    "task.py": "import torch\nfrom trimpoint.errors import TrimpointError\n",
    "runtimes/__init__.py": "",
    "runtimes/base.py": "import numpy as np\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
    "runtimes/onnxruntime.py": "from trimpoint.runtimes import base\n"
    "class Here(base.Runtime):\n    def lower(self):\n        from trimpoint.runtimes import export\n",
    "runtimes/export.py": "import torch\n",
    "methods/__init__.py": "",
    "methods/_scores.py": "import torch\n",
    "methods/prune.py": "from trimpoint.methods._scores import x\nfrom trimpoint.task import Task\n",
    "search/__init__.py": "",
    "search/study.py": "from trimpoint.methods import prune\ntry:\n    pass\nexcept Exception:\n    x = 1\n    raise\n",
    "cli.py": "import argparse\ndef main():\n    from trimpoint.search import study\n    return study\n",
}

PLANTED: tuple[tuple[Callable[[Path], list[str]], str, str, str], ...] = (
    (unplaced, "oddments.py", "", "oddments stands in no row"),
    (wrong_way, "task.py", "from trimpoint.search import study\n", "trimpoint.task:1 imports trimpoint.search.study"),
    (wrong_way, "errors.py", "def f():\n    import trimpoint.task\n", "trimpoint.errors:2 imports trimpoint.task"),
    (wrong_way, "task.py", "from .search.study import x\n", "trimpoint.task:1 imports trimpoint.search.study"),
    (wrong_way, "methods/prune.py", "from ..search import study\n", "trimpoint.methods.prune:1 imports"),
    (wrong_way, "methods/__init__.py", "from .. import search\n", "trimpoint.methods:1 imports trimpoint.search"),
    (wrong_way, "methods/prune.py", "if TYPE_CHECKING:\n    from trimpoint.search import study\n", ":2 imports"),
    (wrong_way, "search/study.py", "from trimpoint.cli import main\n", "imports trimpoint.cli"),
    (
        wrong_way,
        "search/study.py",
        "import importlib\nimportlib.import_module('trimpoint.cli')\n",
        "imports trimpoint.cli",
    ),
    (
        wrong_way,
        "runtimes/base.py",
        "import trimpoint.graph\nclass A:\n    import trimpoint.methods.prune\n",
        ":3 imports",
    ),
    (
        sibling_methods,
        "methods/drop.py",
        "def f():\n    from trimpoint.methods import prune\n",
        "imports trimpoint.methods.prune",
    ),
    (cycles, "errors.py", "from trimpoint import task\n", "trimpoint.errors → trimpoint.task → trimpoint.errors"),
    (heavy_in_light, "runtimes/base.py", "import torch.nn\n", "trimpoint.runtimes.base:1 imports torch.nn"),
    (heavy_in_light, "runtimes/base.py", "from trimpoint.task import Task\n", "task:1 imports torch (imported by"),
    (heavy_in_light, "cli.py", "from rich import print\n", "trimpoint.cli:1 imports rich"),
    (heavy_in_light, "artifact.py", "try:\n    import scipy\nexcept ImportError:\n    scipy = None\n", "imports scipy"),
    (heavy_in_light, "__init__.py", "from trimpoint import task\n", "imports torch (imported by trimpoint)"),
    (too_long, "plan.py", "x = 1\n" * 401, "trimpoint.plan has 401 lines"),
    (swallowed, "plan.py", "try:\n    pass\nexcept Exception as e:\n    print(e)\n", "trimpoint.plan:3"),
    (swallowed, "plan.py", "try:\n    pass\nexcept:\n    pass\n", "trimpoint.plan:3"),
    (swallowed, "plan.py", "try:\n    pass\nexcept (OSError, BaseException):\n    pass\n", "trimpoint.plan:3"),
    (asserted, "plan.py", "def f(x):\n    assert x\n", "trimpoint.plan:2"),
    (unsafe, "plan.py", "def f():\n    import pickle\n", "imports pickle"),
    (unsafe, "plan.py", "import torch\ntorch.load('x')\n", "calls torch.load"),
    (vague_names, "graph/utils.py", "", "trimpoint.graph.utils is no name"),
    (vague_names, "plan.py", "class StepManager:\n    pass\n", "StepManager is no name"),
    (vague_names, "plan.py", "def load_helper():\n    pass\n", "load_helper is no name"),
    (unfinished, "plan.py", "x = 1  # TODO more\n", "trimpoint.plan:1"),
    (unfinished, "plan.py", "def f():\n    raise NotImplementedError('later')\n", "trimpoint.plan:2"),
)


def plant(directory: Path, files: dict[str, str]) -> Path:
    source = directory / "trimpoint"
    for name, text in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return source


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_package_is_passed(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(plant(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "expected"), PLANTED, ids=[f"{p[0].__name__}-{i}" for i, p in enumerate(PLANTED)]
)
def test_a_planted_violation_is_found(
    rule: Callable[[Path], list[str]], file: str, text: str, expected: str, tmp_path: Path
) -> None:
    problems = rule(plant(tmp_path, CLEAN | {file: text}))
    assert len(problems) >= 1
    assert any(expected in problem for problem in problems), problems


def test_every_rule_has_been_seen_to_find_something() -> None:
    assert {planted[0] for planted in PLANTED} == set(RULES)
