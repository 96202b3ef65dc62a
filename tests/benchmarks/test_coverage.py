"""The coverage table: a small part of it, what becomes of a failure, and the page."""

import importlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimpoint.errors import UnknownNameError
from trimpoint.task import Task

ROOT = Path(__file__).parents[2]
WARNINGS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.coverage")


def cells_of(coverage: ModuleType, name: str, methods: list[str]) -> dict[str, Any]:
    (architecture,) = coverage.chosen([name])
    return {cell.method: cell for cell in coverage.try_architecture(architecture, methods, ["onnxruntime"])}


@WARNINGS
def test_a_convolutional_network(coverage: ModuleType) -> None:
    cells = cells_of(coverage, "ResNet", ["none", "quantize-static"])
    assert [cell.status for cell in cells.values()] == ["works", "works"], cells
    assert cells["none"].max_rel < 1e-3
    assert coverage.LEAST_SQNR_DB < cells["quantize-static"].sqnr_db < 80


@WARNINGS
def test_a_text_network_of_varying_lengths(
    coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = cells_of(coverage, "BERT", ["drop-blocks", "quantize-static"])
    assert [cell.status for cell in cells.values()] == ["works", "works"], cells
    assert cells["drop-blocks"].detail == "2 bypassed, 2 skipped"
    assert cells["drop-blocks"].max_rel < 1e-3
    assert not cells["drop-blocks"].notes
    assert not list(tmp_path.iterdir()), "something was left in the working directory"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Broken(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            raise RuntimeError
        return self.layer(x)


def planted(coverage: ModuleType, network: nn.Module) -> Any:
    data = [(torch.randn(4), 0) for _ in range(4)]
    return coverage.Architecture("Planted", "test", lambda: (network, Task(train=data, calibrate=data)))


def test_what_finds_nothing_is_skipped_with_the_reasons(coverage: ModuleType) -> None:
    (cell,) = coverage.try_architecture(planted(coverage, Plain()), ["drop-blocks"], ["onnxruntime"])
    assert (cell.status, cell.detail) == ("skipped", "1 × nothing in scope that drop-blocks acts on")


def test_a_message_for_the_user_is_a_failure_and_the_rest_a_crash(coverage: ModuleType) -> None:
    first, second = coverage.try_architecture(planted(coverage, Broken()), ["none", "finetune"], ["onnxruntime"])
    assert first.status == "fails"
    assert first.detail.startswith("ExportError: ")
    assert str(ROOT) not in first.detail
    assert (second.status, second.detail) == (
        "fails",
        "DataError: Step 1 (finetune) needs a loss. The task has none.",
    )
    blank = coverage.Cell(architecture="x", method="none", runtime="onnxruntime", status="")
    crash = coverage._attempt(blank, lambda _: {}["missing"])
    assert (crash.status, crash.detail) == ("crashes", "KeyError: 'missing'")


def made_cells(coverage: ModuleType) -> list[Any]:
    cell = coverage.Cell(architecture="ResNet", method="", runtime="", status="works", detail="1 trained")
    cells = [
        replace(cell, method=method, runtime=runtime) for method in coverage.METHODS for runtime in coverage.RUNTIMES
    ]
    cells[2] = replace(cells[2], status="fails", detail="ExportError: no")
    cells[3] = replace(cells[3], status="fails", detail="ExportError: no")
    cells[4] = replace(cells[4], status="skipped", detail="3 × too narrow")
    return cells


def test_the_page_holds_the_table_and_every_message(coverage: ModuleType, tmp_path: Path) -> None:
    cells = made_cells(coverage)
    result = coverage.write(cells, 1.0, tmp_path / "coverage.json", tmp_path / "coverage.md")
    page = (tmp_path / "coverage.md").read_text(encoding="utf-8")
    rest = len(coverage.METHODS) - 3
    assert "| ResNet | image | ✓ ✓ | ✗ ✗ | – ✓ |" + " ✓ ✓ |" * rest in page
    assert "- ResNet, drop-blocks, onnxruntime and openvino: ExportError: no" in page
    assert "- ResNet, prune-channels, onnxruntime: 3 × too narrow" in page
    assert f"2 of {2 * rest + 6} cells fail ({2 / (2 * rest + 6):.1%})" in page
    assert json.loads((tmp_path / "coverage.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert result["counts"] == {"works": 2 * rest + 3, "skipped": 1, "fails": 2, "crashes": 0}
    assert result["environment"]["versions"]["torch"]


def test_done_cells_are_kept_and_missing_ones_fail_with_the_reason(
    coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = made_cells(coverage)
    lines = [json.dumps(coverage.asdict(cell)) for cell in cells[:3]]
    (tmp_path / "resnet.jsonl").write_text("\n".join(lines) + '\n{"architect', encoding="utf-8")
    commands = []

    def cut_off(command: list[str], **_: Any) -> None:
        commands.append(command)
        raise subprocess.TimeoutExpired(command, 7)

    monkeypatch.setattr(coverage.subprocess, "run", cut_off)
    (architecture,) = coverage.chosen(["ResNet"])
    found = coverage.run_in_process(architecture, tmp_path, 7)
    assert found[:3] == cells[:3]
    assert len(found) == len(cells)
    assert {cell.detail for cell in found[3:]} == {"the network took longer than 7 s"}
    assert commands[0][1:5] == ["-m", "benchmarks.coverage", "ResNet", "--child"]

    tried = []
    monkeypatch.setattr(coverage, "try_architecture", lambda _, methods, __: tried.extend(methods) or iter(cells[2:]))
    coverage.run_child(architecture, tmp_path)
    assert tried == list(coverage.METHODS)[1:]
    assert coverage.run_in_process(architecture, tmp_path, 7) == cells
    assert len(commands) == 1


def test_an_unknown_network_is_named(coverage: ModuleType) -> None:
    with pytest.raises(UnknownNameError, match="no network 'Resnet'") as caught:
        coverage.main(["Resnet"])
    assert caught.value.hint == "did you mean `ResNet`?"


def test_the_committed_table_is_of_these_networks(coverage: ModuleType) -> None:
    result = json.loads(coverage.RESULT.read_text(encoding="utf-8"))
    cells = [coverage.Cell(**{k: v for k, v in row.items() if k != "system"}) for row in result["rows"]]
    names = [architecture.name for architecture in coverage.ARCHITECTURES]
    assert list(dict.fromkeys(cell.architecture for cell in cells)) == names
    assert len(cells) == len(names) * len(coverage.METHODS) * len(coverage.RUNTIMES)
    assert result["counts"]["crashes"] == 0
    assert result["failing_share"] <= coverage.MOST_FAILING
    assert coverage.page(result, [replace(cell, notes=tuple(cell.notes)) for cell in cells]) == coverage.PAGE.read_text(
        encoding="utf-8"
    )
