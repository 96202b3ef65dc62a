import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimpoint.budget import parse_duration
from trimpoint.cli import main
from trimpoint.cli.run import build_parser
from trimpoint.errors import InvalidParameterError, ModelError, UnknownNameError
from trimpoint.reference import load_reference
from trimpoint.registry import all_methods

GOLDEN = Path(__file__).parent / "golden" / "help"
VERBS = (
    *("demo", "search", "resume", "show", "pick", "report", "measure", "compress", "methods", "plan", "verify"),
    *("pack", "unpack", "env"),
)


def run(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trimpoint", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **more,
    )


# Help


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_the_golden_page(verb: str, monkeypatch, capsys) -> None:
    """Set UPDATE_GOLDEN=1 to write the pages anew, and read the difference."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"] if verb else ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    path = GOLDEN / f"{verb or 'trimpoint'}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_verb_has_a_line_of_help_and_a_golden_page() -> None:
    actions = [a for a in build_parser()._actions if a.dest == "verb"]
    helps = {choice.dest: choice.help for choice in actions[0]._choices_actions}
    assert set(helps) == set(actions[0].choices) == set(VERBS)
    assert all(helps.values())
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {"trimpoint", *VERBS}
    page = (GOLDEN / "trimpoint.txt").read_text(encoding="utf-8")
    assert all(f"    {verb} " in page for verb in VERBS)


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom trimpoint.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'rich', 'jinja2', 'onnx', 'onnxruntime', 'scipy', 'optuna'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_importing_the_package_imports_nothing_and_its_names_are_few() -> None:
    code = (
        "import sys, trimpoint\n"
        "print(len(trimpoint.__all__), sorted(n for n in sys.modules if n.startswith('trimpoint')), "
        "'numpy' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    count, rest = done.stdout.split(" ", 1)
    assert int(count) <= 25
    assert rest.strip() == "['trimpoint'] False False"


def test_every_public_name_is_there() -> None:
    import trimpoint

    for name in trimpoint.__all__:
        assert getattr(trimpoint, name) is not None
    assert sorted(trimpoint.__all__) == dir(trimpoint)
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        trimpoint.serach  # noqa: B018


def test_a_public_verb_is_not_hidden_by_the_package_of_its_name() -> None:
    import trimpoint
    from trimpoint.report.table import Table
    from trimpoint.search import record

    assert Table.__module__ == "trimpoint.report.table"
    assert record.StudyRecord.__module__ == "trimpoint.search.record"
    for name in ("search", "report", "measure", "compress"):
        assert type(getattr(trimpoint, name)).__name__ == "function", name


# Usage, errors, streams


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: VERB"),
        (["serach"], "invalid choice: 'serach'"),
        (["search", "m:m", "m:t"], "required: --out"),
        (["search", "m:m", "m:t", "--out", "o", "--budget", "soon"], "A duration must be a time above zero"),
        (["search", "m:m", "m:t", "--out", "o", "--limit", "latency_ms"], "must be METRIC=VALUE"),
        (["search", "m:m", "m:t", "--out", "o", "--limit", "latency=1"], "did you mean `latency_ms`?"),
        (["search", "m:m", "m:t", "--out", "o", "--limit", "latency_ms=0.5y"], 'write a ratio like "0.5x"'),
        (["search", "m:m", "m:t", "--out", "o", "--minimize", "speed"], "There is no metric 'speed'"),
        (["search", "m:m", "m:t", "--out", "o", "--max-drop", "-1"], "must be a number ≥ 0"),
        (["search", "m:m", "m:t", "--out", "o", "--trials", "0"], "must be a whole number ≥ 1"),
        (["search", "m:m", "m:t", "--out", "o", "--format", "xml"], "invalid choice: 'xml'"),
        (
            ["compress", "m:m", "m:t", "--out", "o", "--plan", "p.toml", "--set", "ratio=1"],
            "must be METHOD.PARAMETER=VALUE",
        ),
        (["pick", "runs/x"], "one of the arguments"),
        (["show", "runs/x", "--sead", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_ends_with_code_2_and_says_where_help_is(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "\n\nhint: see `trimpoint" in err


def test_an_error_is_a_message_and_a_hint_without_a_traceback(capsys) -> None:
    assert main(["methods", "drop-block"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: There is no method 'drop-block'.\n\nhint: did you mean `drop-blocks`?\n"


def test_debug_shows_the_traceback(capsys) -> None:
    assert main(["methods", "drop-block", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "error: There is no method" in err


def test_a_closed_pipe_is_no_error_message() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trimpoint", "env", "--format", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert err == b""


def test_interrupting_a_search_says_what_is_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    importlib.import_module("trimpoint.search")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["trimpoint.search"], "search", interrupted)
    assert main(["search", "a:b", "a:c", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing had been written\n"
    (tmp_path / "study.db").touch()
    assert main(["search", "a:b", "a:c", "--out", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert f"kept in {tmp_path}" in err
    assert f"hint: go on with `trimpoint resume {tmp_path}`" in err


def test_a_study_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert main(["show", str(tmp_path / "none")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")


# Data on standard output


def test_env_is_data_on_stdout(capsys) -> None:
    assert main(["env", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert {"cpu", "cores", "instruction_set", "python"} <= set(json.loads(out))
    assert main(["env"]) == 0
    assert "instruction_set" in capsys.readouterr().out


def test_methods_lists_all_and_shows_each_from_its_class(capsys) -> None:
    assert main(["methods", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(all_methods())
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    for name, kind in all_methods().items():
        assert name in table
        assert main(["methods", name]) == 0
        page = capsys.readouterr().out
        assert "When it pays" in page
        for parameter, field in ((f.name, f) for f in dataclasses.fields(kind)):
            assert parameter in page
            assert field.metadata["doc"] in page


def test_plan_completes_a_recipe_that_reads_back(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[steps]]\nmethod = "drop-blocks"\nratio = 0.25\nwhere = "stages.*"\n', encoding="utf-8")
    assert main(["plan", str(recipe), "--set", "drop-blocks.ratio=0.5"]) == 0
    text = capsys.readouterr().out
    assert "ratio = 0.5" in text
    recipe.write_text(text, encoding="utf-8")
    assert main(["plan", str(recipe), "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["steps"][0]["method"] == "drop-blocks"
    assert data["steps"][0]["where"] == "stages.*"
    assert len(data["hash"]) == 64


def test_plan_warns_of_steps_that_make_nothing_faster_on_the_target(capsys) -> None:
    assert main(["plan", "quantize-weights", "--set", "quantize-weights.bits=3"]) == 0
    out, err = capsys.readouterr()
    assert "bits = 3" in out
    assert err.startswith("warning: `quantize-weights` with weights of 3 bits is no faster than with 4 bits")
    assert main(["plan", "quantize-static"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["plan", "quantize-static", "--runtime", "onnxruntim"]) == 1
    assert "did you mean `onnxruntime`?" in capsys.readouterr().err


def test_plan_from_names_and_what_can_be_wrong_with_one(tmp_path: Path, capsys) -> None:
    assert main(["plan", "drop-blocks", "quantize-static"]) == 0
    assert capsys.readouterr().out.count("[[steps]]") == 2
    for arguments, message in (
        (["quantize-static", "drop-blocks"], "must stand before"),
        (["drop-blocks", "--set", "drop-blocks.ratoi=1"], "did you mean `ratio`?"),
        (["drop-blocks", "--set", "quantize.x=1"], "The plan has no step 'quantize'"),
        (["drop-blocks", "--set", "drop-blocks.ratio=2.5"], "must be in the range"),
        ([str(tmp_path / "none.toml")], "cannot be read: No such file"),
    ):
        assert main(["plan", *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err


# References


def write_module(directory: Path, name: str, text: str) -> None:
    (directory / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_references_are_objects_or_calls_without_arguments(here: Path) -> None:
    write_module(here, "tp_given", "x = 3\ndef y():\n    return 4\nclass inner:\n    z = 5\nclass Own(dict): pass\n")
    assert load_reference("tp_given:x", int, "model") == 3
    assert load_reference("tp_given:y", int, "model") == 4
    assert load_reference("tp_given:inner.z", int, "model") == 5
    assert load_reference("tp_given:Own", dict, "model") == {}


@pytest.mark.parametrize(
    ("reference", "kind", "message", "hint"),
    [
        ("tp_bad", UnknownNameError, "must be given as `package.module:attribute`", "`tp_bad:model`|mymodule:model"),
        ("tp_bad.py:x", UnknownNameError, "must be given as", "write `tp_bad:model`"),
        ("tp_nowhere:x", UnknownNameError, "There is no module 'tp_nowhere'", "run this where"),
        ("tp_bad.sub:x", UnknownNameError, "There is no module 'tp_bad.sub'|failed with", "run"),
        ("tp_bad:modle", UnknownNameError, "has no attribute 'modle'", "did you mean `model`?"),
        ("tp_bad:model", ModelError, "must be a int, or a callable .* Got str", "point it at"),
        ("tp_bad:broken", ModelError, r"failed with ZeroDivisionError: .*tp_bad.py:4", "--debug"),
        ("tp_bad:two", ModelError, "failed with TypeError", "--debug"),
        ("tp_raises:x", ModelError, "Importing 'tp_raises' failed with RuntimeError: no", "--debug"),
        ("tp_imports:x", ModelError, "failed with ModuleNotFoundError: No module named 'tp_missing'", "--debug"),
    ],
)
def test_what_can_be_wrong_with_a_reference(here: Path, reference: str, kind: type, message: str, hint: str) -> None:
    import re

    write_module(here, "tp_bad", "model = 'text'\n\ndef broken():\n    return 1 / 0\n\ndef two(a, b):\n    return 1\n")
    write_module(here, "tp_raises", "raise RuntimeError('no')\n")
    write_module(here, "tp_imports", "import tp_missing\n")
    with pytest.raises(kind, match=message) as caught:
        load_reference(reference, int, "model")
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), (12, 12), ("0.5s", 0.5)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3", "m", "10x", "5m1h", "1m1m", "nan", "inf", "1h 30"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="A duration must be"):
        parse_duration(text)


# A model of the user's own, end to end


MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint import Task


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    y = x[:, :3].argmax(1)
    return Task.classification(TensorDataset(x[:200], y[:200]), TensorDataset(x[200:], y[200:]))
"""


def test_measure_compress_and_verify_a_model_by_reference(here: Path, capsys) -> None:
    write_module(here, "tp_mine", MODULE)
    assert main(["measure", "tp_mine:model", "tp_mine:task", "--format", "json", "--operators", "1"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["profile"]["metrics"]["params"]["value"] == 8 * 32 + 32 + 32 * 3 + 3
    assert data["profile"]["metrics"]["macs"]["value"] == 8 * 32 + 32 * 3
    assert len(data["operators"]) == 1
    # Another test may hold the machine's lock.
    said = [line for line in err.splitlines() if not line.startswith("waiting:")]
    assert said == ["measuring tp_mine:model …"]

    built = ["compress", "tp_mine:model", "tp_mine:task", "--out", "small", "--plan", "finetune", "quantize-static"]
    assert main([*built, "--set", "finetune.epochs=1"]) == 0
    out, err = capsys.readouterr()
    assert "original: accuracy on select" in out
    assert "compressed: accuracy on select" in out
    digest = out.rsplit("digest ", 1)[1].strip().removesuffix(")")
    assert err.splitlines()[0] == "measuring the unmodified model …"

    metrics = json.loads(Path("small/profile.json").read_text())["profile"]["metrics"]
    ratio = metrics["latency_ratio"]
    pays = ratio["value"] >= 1.1 and ratio["low"] > 1
    assert ("advice: int8 does not pay here" in out) is not pays
    assert 10 < metrics["sqnr_db"]["value"] < 100
    assert metrics["agreement[openvino]"]["value"] > 0.8
    assert "| sqnr_db[openvino] |" in Path("small/README.md").read_text()

    assert main(["verify", "small", "--digest", digest, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == digest
    assert main([*built]) == 1
    assert "holds an artifact already" in capsys.readouterr().err

    assert main(["verify", "small", "--digest", "0" * 64]) == 4
    weights = next(Path("small").glob("*.onnx"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", "small"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {weights.name}")
    assert "hint: " in err


def test_verify_without_an_artifact(here: Path, capsys) -> None:
    assert main(["verify", str(here)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
