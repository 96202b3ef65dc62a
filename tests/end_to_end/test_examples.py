"""The examples run, in their fast modes, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimpoint.artifact import verify_artifact

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("banking77_minilm.py",)
PARTS = ("banking77_model.py",)


def test_every_example_is_known_here() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("banking77_*.py")) == sorted((*SCRIPTS, *PARTS))


@pytest.mark.slow
def test_banking77_minilm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "banking77_minilm.py"), "--fast", "--runtimes", "onnxruntime"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        env={**os.environ, "TRIMPOINT_STATE": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    original, one_line, floating, chosen = figures["rows"]
    assert [row["runtime"] for row in figures["rows"]] == ["onnxruntime"] * 4
    assert 0 < figures["floor"]["accuracy"] <= 1

    def value(row: dict, name: str) -> float:
        return row["profile"][name]["value"]

    assert value(floating, "params") < value(original, "params")
    assert value(chosen, "file_bytes") < value(floating, "file_bytes") < value(original, "file_bytes")
    assert value(one_line, "file_bytes") < value(original, "file_bytes")
    assert value(original, "latency_ratio") == 1.0
    assert value(chosen, "latency_ratio") > 0
    assert {change["kind"] for change in figures["changes"]} >= {"bypassed", "trained", "assigned"}
    certificate = chosen["certificate"]
    assert certificate["n"] == figures["samples"]["certify"] == 60
    assert certificate["status"] in ("passed", "unproven", "failed")
    assert certificate["looks"] == 2
    assert verify_artifact(out / "artifact-onnxruntime").cases == 3
    assert not (tmp_path / "state").exists()
